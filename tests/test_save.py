"""What is written: read back by diffusers and transformers, by ourselves, and whole or not at all."""

import json
import multiprocessing
import os
import random
import signal
import stat
import time
import zipfile
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, PixArtTransformer2DModel, StableDiffusionPipeline
from safetensors.torch import load_file, save_file

from sdlite import cli
from sdlite.checkpoints import load, save
from sdlite.checkpoints.load import ModelParts, load_model, random_model
from sdlite.checkpoints.save import convert, save_folder, save_single_file
from sdlite.checkpoints.weights import CheckpointError
from sdlite.config import AutoencoderTinyConfig, ModelConfig, tiny, tiny_dit
from sdlite.contracts import Conditioning
from sdlite.files import sweep

SD2_LIKE = tiny(9, "v").replace(  # and inpainting
    denoiser=tiny(9, "v").denoiser.replace(use_linear_projection=True, layers_per_block=2),
    text=tiny().text.replace(hidden_act="gelu", pad_token_id=0),
    schedule=tiny().schedule.replace(spacing="trailing", zero_terminal_snr=True, final_abar_one=True),
)
CONFIGS = {"sd1": tiny(), "sd2": SD2_LIKE}
DIT = SD2_LIKE.replace(denoiser=tiny_dit(9, "v").denoiser)


@pytest.fixture(scope="module", params=CONFIGS)
def parts(request: pytest.FixtureRequest) -> ModelParts:
    return random_model(CONFIGS[request.param], seed=3)


@pytest.fixture(scope="module")
def sd1() -> ModelParts:
    return random_model(tiny(), seed=0)


@pytest.fixture(scope="module")
def folder(parts: ModelParts, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("folder") / "model"
    save_folder(parts, path)
    return path


@pytest.fixture(scope="module")
def single(parts: ModelParts, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("single") / "model.safetensors"
    save_single_file(parts, path)
    return path


def assert_same_weights(parts: ModelParts, theirs: StableDiffusionPipeline) -> None:
    pairs = {
        "unet": (parts.denoiser, theirs.unet),
        "vae": (parts.codec.model, theirs.vae),
        "text": (parts.text.model, theirs.text_encoder),
    }
    for part, (our, their) in pairs.items():
        a, b = our.state_dict(), their.state_dict()
        assert set(a) == set(b), part
        for name in a:
            assert torch.equal(a[name], b[name]), f"{part}.{name}"


def assert_same(a: ModelParts, b: ModelParts) -> None:
    assert a.config == b.config
    assert a.hash == b.hash


def test_diffusers_loads_the_folder(parts: ModelParts, folder: Path):
    theirs = StableDiffusionPipeline.from_pretrained(folder, local_files_only=True)
    assert_same_weights(parts, theirs)
    config, schedule = theirs.scheduler.config, parts.config.schedule
    assert (config.beta_start, config.beta_end, config.beta_schedule) == (0.00085, 0.012, "scaled_linear")
    assert (config.steps_offset, config.clip_sample) == (1, False)
    assert config.timestep_spacing == (schedule.spacing or "leading")
    assert config.prediction_type == ("v_prediction" if parts.denoiser.prediction == "v" else "epsilon")
    assert theirs.tokenizer.pad_token_id == parts.config.text.pad_token_id
    ids = theirs.tokenizer(["a red apple"], padding="max_length", return_tensors="pt").input_ids
    with torch.no_grad():
        expected = theirs.text_encoder(ids).last_hidden_state
    torch.testing.assert_close(parts.text.encode(["a red apple"]).context, expected, rtol=1e-5, atol=1e-5)
    x, t = torch.randn(2, parts.config.denoiser.in_channels, 9, 6), torch.tensor([3, 800])
    with torch.no_grad():
        ours = parts.denoiser(x, t, parts.denoiser.prepare(Conditioning(expected.repeat(2, 1, 1))))
        other = theirs.unet(x, t, expected.repeat(2, 1, 1)).sample
    torch.testing.assert_close(ours, other, rtol=1e-5, atol=1e-5)


def test_diffusers_loads_the_single_file(parts: ModelParts, folder: Path, single: Path):
    theirs = StableDiffusionPipeline.from_single_file(single, config=str(folder), local_files_only=True)
    assert_same_weights(parts, theirs)


def test_we_load_both(parts: ModelParts, folder: Path, single: Path):
    for path in (folder, single):
        loaded = load_model(path)
        assert_same(loaded, parts)
        assert loaded.notes == parts.notes and "untrained" in loaded.notes[0]
        assert not any(p.is_meta for m in (loaded.text, loaded.denoiser, loaded.codec) for p in m.parameters())


def test_both_ways(parts: ModelParts, folder: Path, tmp_path: Path):
    convert(folder, tmp_path / "one.safetensors")
    convert(tmp_path / "one.safetensors", tmp_path / "two")
    assert_same(load_model(tmp_path / "two"), parts)
    before = {file.relative_to(folder): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    after = {file.relative_to(tmp_path / "two"): file.read_bytes() for file in (tmp_path / "two").rglob("*.*")}
    assert after == before


def test_shards(sd1: ModelParts, tmp_path: Path):
    save_folder(sd1, tmp_path / "model", max_shard_size=300_000)
    sizes = [file.stat().st_size for file in (tmp_path / "model" / "unet").glob("*.safetensors")]
    assert len(sizes) > 2
    assert_same(load_model(tmp_path / "model"), sd1)
    assert_same_weights(sd1, StableDiffusionPipeline.from_pretrained(tmp_path / "model", local_files_only=True))


def test_half_precision(sd1: ModelParts, tmp_path: Path):
    save_folder(sd1, tmp_path / "model", dtype=torch.float16)
    file = tmp_path / "model" / "unet" / "diffusion_pytorch_model.safetensors"
    assert {tensor.dtype for tensor in load_file(file).values()} == {torch.float16}
    file.rename(file.with_name("diffusion_pytorch_model.fp16.safetensors"))
    loaded = load_model(tmp_path / "model")
    assert loaded.denoiser.conv_in.weight.dtype == torch.float32
    assert torch.equal(loaded.denoiser.conv_in.weight, sd1.denoiser.conv_in.weight.half().float())


def test_tiny_autoencoder(tmp_path: Path):
    codec = AutoencoderTinyConfig(
        encoder_block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4, num_encoder_blocks=(1, 1, 1, 1)
    )
    parts = random_model(tiny().replace(codec=codec), seed=1)
    save_folder(parts, tmp_path / "model")
    assert_same(load_model(tmp_path / "model"), parts)
    assert_same_weights(parts, StableDiffusionPipeline.from_pretrained(tmp_path / "model", local_files_only=True))
    with pytest.raises(CheckpointError, match="AutoencoderTiny; save a folder"):
        save_single_file(parts, tmp_path / "one.safetensors")


def test_never_overwrites(sd1: ModelParts, tmp_path: Path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "precious.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="model exists and is not empty; give a new folder"):
        save_folder(sd1, tmp_path / "model")
    (tmp_path / "one.safetensors").write_text("mine")
    with pytest.raises(FileExistsError, match="exists"):
        save_single_file(sd1, tmp_path / "one.safetensors")
    assert (tmp_path / "one.safetensors").read_text() == "mine"
    assert sorted(file.name for file in tmp_path.rglob("*")) == ["model", "one.safetensors", "precious.txt"]
    (tmp_path / "empty").mkdir()
    save_folder(sd1, tmp_path / "empty")
    save_single_file(sd1, tmp_path / "two.safetensors")
    umask = os.umask(0)
    os.umask(umask)
    written = [tmp_path / "two.safetensors", *(path for path in (tmp_path / "empty").rglob("*") if path.is_file())]
    assert {stat.S_IMODE(path.stat().st_mode) for path in written} == {0o666 & ~umask}


def test_convert_leaves_what_is_there_alone(sd1: ModelParts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Also what appears while the model is read, and what a link leads to; known before the model is read."""
    save_folder(sd1, tmp_path / "model")
    (tmp_path / "theirs").write_text("theirs")
    (tmp_path / "link.safetensors").symlink_to(tmp_path / "theirs")
    with pytest.raises(FileExistsError):
        convert(tmp_path / "missing", tmp_path / "link.safetensors")
    with pytest.raises(FileExistsError):
        convert(tmp_path / "missing", tmp_path / "theirs")
    target = tmp_path / "late.safetensors"
    monkeypatch.setattr(save, "load_model", lambda *_, **__: [sd1, target.write_text("theirs")][0])
    with pytest.raises(FileExistsError):
        convert(tmp_path / "model", target)
    assert target.read_text() == (tmp_path / "theirs").read_text() == "theirs"
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "late.safetensors",
        "link.safetensors",
        "model",
        "theirs",
    ]


def test_whole_or_not_at_all(sd1: ModelParts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    calls = []

    def fails_later(tensors: object, path: Path, metadata: object) -> None:
        calls.append(path)
        path.write_bytes(b"half")
        if len(calls) != 1:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(save, "save_file", fails_later)
    for write, name in ((save_folder, "model"), (save_single_file, "one.safetensors")):
        with pytest.raises(OSError, match="No space left"):
            write(sd1, tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def convert_in_child(parts: ModelParts, target: Path) -> None:
    """The command, with a model that is loaded already: all its time goes into writing."""
    save.load_model = lambda *_, **__: parts  # type: ignore[assignment]
    cli.main(["convert", "tiny", str(target), "-q"])


@pytest.mark.skipif(os.name != "posix", reason="forks")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
@pytest.mark.parametrize("times", [1, pytest.param(100, marks=pytest.mark.slow)])
def test_ended_at_any_time_convert_leaves_all_or_nothing(sd1: ModelParts, tmp_path: Path, number: int, times: int):
    """And nothing beside it, but for a process that was killed: one name, which the next command sweeps away."""
    chance = random.Random(number)
    save_folder(sd1, tmp_path / "whole" / "model")
    save_single_file(sd1, tmp_path / "whole" / "model.safetensors")
    whole = contents(tmp_path / "whole")
    for name in ("model", "model.safetensors"):
        expected = {path: content for path, content in whole.items() if path.parts[0] == name}
        seconds = 0.2
        for i in range(times):
            folder = tmp_path / name / str(i)
            folder.mkdir(parents=True)
            start = time.monotonic()
            child = multiprocessing.get_context("fork").Process(target=convert_in_child, args=(sd1, folder / name))
            child.start()
            if i:  # the first tells how long it takes
                time.sleep(chance.random() * seconds)
                os.kill(child.pid or 0, number)
            child.join()
            seconds = seconds if i else time.monotonic() - start
            assert child.exitcode in (0, 130, -number), child.exitcode
            if number == signal.SIGKILL:
                assert len(list(folder.iterdir())) <= 2
                sweep(folder)
            found = contents(folder)
            assert found in ({}, expected) and (i or found), sorted(found)


def contents(folder: Path) -> dict[Path, tuple[int, bytes]]:
    """Sizes and contents of all files; of safetensors without the header, whose metadata come in any order."""
    found = {}
    for path in [path for path in folder.rglob("*") if path.is_file()]:
        content = path.read_bytes()
        start = 8 + int.from_bytes(content[:8], "little") if path.suffix == ".safetensors" else 0
        found[path.relative_to(folder)] = len(content), content[start:]
    return found


def test_steps_offset_cannot_be_lost(sd1: ModelParts, tmp_path: Path):
    config = sd1.config.replace(schedule=sd1.config.schedule.replace(steps_offset=0))
    other = ModelParts(sd1.text, sd1.denoiser, sd1.codec, config, "", "")
    with pytest.raises(CheckpointError, match="steps_offset=0"):
        save_folder(other, tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("one_tokenizer")
def test_random_models_leave_the_global_generator_alone():
    state = torch.get_rng_state()
    a, b, c = (random_model(tiny(), seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert a.hash == b.hash != c.hash
    assert a.name == "untrained (random weights)" and "untrained" in a.notes[0]


@pytest.fixture
def one_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reads the vocabulary once, where a test loads the same model many times."""
    tokenizer = load.load_tokenizer()
    monkeypatch.setattr(load, "load_tokenizer", lambda folder=None: tokenizer)


@pytest.fixture
def original(sd1: ModelParts, tmp_path: Path) -> dict[str, torch.Tensor]:
    save_single_file(sd1, tmp_path / "original.safetensors")
    tensors = load_file(tmp_path / "original.safetensors")
    (tmp_path / "original.safetensors").unlink()
    return tensors


@pytest.mark.usefixtures("one_tokenizer")
def test_trusted_pickle(sd1: ModelParts, original: dict[str, torch.Tensor], tmp_path: Path):
    content = {"epoch": 3, "state_dict": {"state_dict": {**original, "betas": torch.ones(1000)}}}
    torch.save(content, tmp_path / "old.ckpt")
    with pytest.raises(CheckpointError, match="trust-pickle"):
        convert(tmp_path / "old.ckpt", tmp_path / "new", config=tiny())
    assert not (tmp_path / "new").exists()
    parts = convert(tmp_path / "old.ckpt", tmp_path / "new", trust_pickle=True, config=tiny())
    assert parts.hash == sd1.hash
    assert load_model(tmp_path / "new").hash == sd1.hash


def test_trusted_pickle_still_runs_no_code(tmp_path: Path):
    class Gadget:
        def __reduce__(self) -> tuple[object, ...]:
            return Path.touch, (tmp_path / "ran",)

    torch.save({"state_dict": {"a": Gadget()}}, tmp_path / "old.ckpt")
    with pytest.raises(CheckpointError, match="cannot be read as weights alone") as error:
        convert(tmp_path / "old.ckpt", tmp_path / "new", trust_pickle=True)
    assert "\n" not in str(error.value)
    assert [file.name for file in tmp_path.iterdir()] == ["old.ckpt"]


@pytest.mark.usefixtures("one_tokenizer")
def test_a_folder_of_trusted_pickles(sd1: ModelParts, tmp_path: Path):
    """As diffusers wrote folders before safetensors: one .bin in each part, or several."""
    save_folder(sd1, tmp_path / "old")
    for part, name in (
        ("unet", "diffusion_pytorch_model"),
        ("vae", "diffusion_pytorch_model"),
        ("text_encoder", "model"),
    ):
        file = tmp_path / "old" / part / f"{name}.safetensors"
        tensors = load_file(file)
        file.unlink()
        if part == "unet":
            halves = list(tensors.items())
            for i, half in enumerate((halves[::2], halves[1::2]), 1):
                torch.save(dict(half), file.with_name(f"{name}-{i:05}-of-00002.bin"))
        elif part == "text_encoder":
            torch.save(tensors, file.with_name("pytorch_model.bin"))
        else:
            torch.save(tensors, file.with_suffix(".bin"))
    with pytest.raises(CheckpointError, match=r"as a pickle.*--trust-pickle"):
        convert(tmp_path / "old", tmp_path / "new")
    assert convert(tmp_path / "old", tmp_path / "new", trust_pickle=True).hash == sd1.hash
    assert load_model(tmp_path / "new").hash == sd1.hash


@pytest.mark.parametrize(
    "tensor",
    [
        torch.ones(1).expand(2**40),
        torch.ones(4)[:, None].expand(4, 3),
        torch.sparse_coo_tensor(torch.zeros(1, 1, dtype=torch.long), torch.ones(1), (2**40,), check_invariants=True),
        torch.empty(2**40, device="meta"),
    ],
    ids=["expanded", "repeated", "sparse", "meta"],
)
def test_a_trusted_pickle_holds_no_more_than_its_bytes(tensor: torch.Tensor, tmp_path: Path):
    torch.save({"state_dict": {"model.diffusion_model.input_blocks.0.0.weight": tensor}}, tmp_path / "old.ckpt")
    with pytest.raises(CheckpointError, match=r"more than the file holds|cannot be read") as error:
        convert(tmp_path / "old.ckpt", tmp_path / "new", trust_pickle=True, config=tiny())
    assert "\n" not in str(error.value)


def test_a_packed_pickle_is_refused(tmp_path: Path):
    torch.save({"state_dict": {"a": torch.zeros(100_000)}}, tmp_path / "plain.ckpt")
    with (
        zipfile.ZipFile(tmp_path / "plain.ckpt") as plain,
        zipfile.ZipFile(tmp_path / "packed.ckpt", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for entry in plain.infolist():
            packed.writestr(entry.filename, plain.read(entry))
    with pytest.raises(CheckpointError, match="is a packed archive"):
        convert(tmp_path / "packed.ckpt", tmp_path / "new", trust_pickle=True, config=tiny())


def save_original(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> Path:
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, path, metadata)
    return path


@pytest.mark.usefixtures("one_tokenizer")
def test_original_spellings_and_unused_keys(sd1: ModelParts, original: dict[str, torch.Tensor], tmp_path: Path):
    variants = {
        "novelai": {
            k.replace("cond_stage_model.transformer.text_model.", "cond_stage_model.transformer."): v
            for k, v in original.items()
        },
        "sgm": {k.replace("cond_stage_model.", "conditioner.embedders.0."): v for k, v in original.items()},
        "unused": original
        | {
            "betas": torch.ones(1000),
            "loss.logvar": torch.ones(1),
            "cond_stage_model.transformer.text_model.embeddings.position_ids": torch.arange(77)[None],
            "model_ema.decay": torch.tensor(0.9999),
            "model_ema.num_updates": torch.tensor(3),
            "cond_stage_model.logit_scale": torch.ones(()),
        },
        "2-d attention": {k: v[:, :, 0, 0] if ".attn_1." in k and v.ndim == 4 else v for k, v in original.items()},
    }
    for name, tensors in variants.items():
        loaded = load_model(save_original(tmp_path / f"{name}.safetensors", tensors), config=tiny())
        assert loaded.hash == sd1.hash, name


@pytest.mark.usefixtures("one_tokenizer")
def test_ema(sd1: ModelParts, original: dict[str, torch.Tensor], tmp_path: Path):
    unet = {k: v for k, v in original.items() if k.startswith("model.diffusion_model.")}
    averages = {"model_ema." + k.removeprefix("model.").replace(".", ""): v + 1 for k, v in unet.items()}
    path = save_original(tmp_path / "both.safetensors", original | averages)
    assert load_model(path, config=tiny()).hash == sd1.hash
    averaged = load_model(path, config=tiny(), ema=True)
    assert torch.equal(averaged.denoiser.conv_out.bias, sd1.denoiser.conv_out.bias + 1)
    assert torch.equal(averaged.codec.model.quant_conv.bias, sd1.codec.model.quant_conv.bias)
    with pytest.raises(CheckpointError, match="moving average"):
        load_model(save_original(tmp_path / "one.safetensors", original), config=tiny(), ema=True)


def test_custom_tokenizer_stays_in_folders(sd1: ModelParts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(save, "load_tokenizer", lambda: type("T", (), {"get_vocab": lambda self: {}})())
    with pytest.raises(CheckpointError, match="tokenizer that is not CLIP's"):
        save_single_file(sd1, tmp_path / "one.safetensors")


@pytest.mark.usefixtures("one_tokenizer")
def test_configs_of_any_structure_survive(tmp_path: Path):
    base = tiny()
    denoiser = base.denoiser.replace(
        block_out_channels=(16, 32, 32), attention_stages=(False, True, True), num_heads=(2, 4, 8), layers_per_block=2
    )
    config: ModelConfig = base.replace(denoiser=denoiser, sample_size=12)
    parts = random_model(config, seed=5)
    save_single_file(parts, tmp_path / "one.safetensors")
    assert_same(load_model(tmp_path / "one.safetensors"), parts)


def test_a_dit_folder_says_so_and_its_parts_load_in_diffusers(tmp_path: Path):
    parts = random_model(DIT, seed=3)
    save_folder(parts, tmp_path / "model", max_shard_size=100_000)
    index = json.loads((tmp_path / "model" / "model_index.json").read_text())
    assert index["_class_name"] == "SdlitePipeline" and "unet" not in index
    assert index["transformer"] == ["diffusers", "PixArtTransformer2DModel"]
    assert len(list((tmp_path / "model" / "transformer").glob("*.safetensors"))) > 1
    assert_same(load_model(tmp_path / "model"), parts)
    theirs = PixArtTransformer2DModel.from_pretrained(tmp_path / "model" / "transformer", local_files_only=True)
    AutoencoderKL.from_pretrained(tmp_path / "model" / "vae", local_files_only=True)
    x, t = torch.randn(2, 9, 6, 10), torch.tensor([3, 800])
    context = parts.text.encode(["a red apple", ""]).context
    with torch.no_grad():
        ours, other = parts.denoiser(x, t, parts.denoiser.prepare(Conditioning(context))), theirs(x, context, t).sample
    torch.testing.assert_close(ours, other, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("one_tokenizer")
def test_the_original_layout_has_no_place_for_a_dit(single: Path, tmp_path: Path):
    parts = random_model(tiny_dit(), seed=3)
    with pytest.raises(CheckpointError, match="no place for a DiT; save a folder"):
        save_single_file(parts, tmp_path / "one.safetensors")
    with pytest.raises(CheckpointError, match="no place for a DiT; use a folder"):
        load_model(single, config=tiny_dit())
