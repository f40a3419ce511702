"""Folders in diffusers' layout: hostile ones are refused, written ones are read by diffusers and by sdlite."""

import hashlib
import json
import shutil
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, PixArtTransformer2DModel, StableDiffusionPipeline
from safetensors.torch import load_file, save_file

from sdlite.checkpoints.folder import save_folder
from sdlite.checkpoints.load import load_model
from sdlite.checkpoints.parts import ModelParts
from sdlite.checkpoints.places import CheckpointError
from sdlite.checkpoints.single_file import save_single_file
from sdlite.checkpoints.untrained import random_model
from sdlite.config import AutoencoderTinyConfig, tiny, tiny_dit
from sdlite.contracts import Conditioning
from tests.checkpoints.cases import PART_FILES, SD2_LIKE, assert_same, assert_same_weights, changed, edited, refused


@pytest.mark.usefixtures("one_tokenizer")
@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
@pytest.mark.parametrize(
    "hook",
    [
        {"auto_map": {"AutoModel": "evil/repo--code.Model"}},
        {"_attn_implementation": "evil/kernels"},
        {"_attn_implementation_internal": "evil/kernels"},
        {"trust_remote_code": True},
        {"_class_name": "Evil"},
        {"custom_pipelines": "evil"},
    ],
    ids=lambda hook: next(iter(hook)),
)
def test_code_hooks(part: str, hook: dict[str, Any], saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    class Stub(types.ModuleType):
        def __getattr__(self, name: str) -> object:
            raise AssertionError("a config made the kernels package load")

    monkeypatch.setitem(sys.modules, "kernels", Stub("kernels"))
    folder = tmp_path / "model"
    shutil.copytree(saved, folder, copy_function=lambda a, b: Path(b).hardlink_to(a))
    config = folder / part / "config.json"
    text = config.read_text()
    config.unlink()
    config.write_text(text)
    edited(config, **hook)
    refused(folder, r"asks for code|unknown key|_class_name='Evil' is not supported")


@pytest.mark.parametrize("file", ["unet/config.json", "scheduler/scheduler_config.json", "tokenizer/vocab.json"])
def test_missing_files(file: str, folder: Path):
    (folder / file).unlink()
    refused(folder, "missing|no tokenizer")


@pytest.mark.parametrize("linked", ["unet", PART_FILES["unet"], "unet/config.json", "tokenizer/vocab.json"])
def test_links_out_of_the_folder(linked: str, folder: Path, tmp_path: Path, sd1: ModelParts):
    outside = tmp_path / "outside"
    (folder / linked).rename(outside)
    (folder / linked).symlink_to(outside)
    text = refused(folder, "is a link to .*, outside of the model folder; --allow-links .* follows it")
    root = text.split("--allow-links ")[1].removesuffix(" follows it")
    refused(folder, "outside of the model folder", allow_links=[tmp_path / "elsewhere"])
    assert load_model(folder, allow_links=[root]).hash == sd1.hash


def test_links_into_the_cache_of_the_hub(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "cache").mkdir()
    (folder / PART_FILES["unet"]).rename(tmp_path / "cache" / "blob")
    (folder / PART_FILES["unet"]).symlink_to(tmp_path / "cache" / "blob")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    load_model(folder)


def test_links_in_a_circle(folder: Path):
    (folder / "unet" / "a").symlink_to("b")
    (folder / "unet" / "b").symlink_to("a")
    refused(folder, "leads in a circle")


def test_links_inside_and_to_the_folder(folder: Path, tmp_path: Path, sd1: ModelParts):
    file = folder / PART_FILES["unet"]
    file.rename(folder / "weights")
    file.symlink_to("../weights")
    (tmp_path / "link").symlink_to(folder)
    assert load_model(tmp_path / "link").hash == sd1.hash


def test_sums(folder: Path, sd1: ModelParts):
    files = [file for file in folder.rglob("*") if file.is_file()]
    lines = [f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.relative_to(folder)}\n" for file in files]
    sums = folder / "sha256sums.txt"
    sums.write_text("".join(lines))
    assert load_model(folder).hash == sd1.hash
    vae = folder / PART_FILES["vae"]
    content = bytearray(vae.read_bytes())
    content[-1] ^= 1
    vae.write_bytes(content)
    refused(folder, "vae.*is not the file that sha256sums.txt lists")
    vae.unlink()
    refused(folder, "is missing; sha256sums.txt lists it")
    for line in (f"{'0' * 64}  ../secret", "nonsense", f"{'0' * 64}  /etc/passwd"):
        sums.write_text(line)
        refused(folder, "not a sum of a file in this folder")


@pytest.mark.usefixtures("one_tokenizer")
def test_variants(folder: Path, sd1: ModelParts):
    """A folder with other variants alone names them; one of them is taken where it is there, as in diffusers."""
    file = folder / PART_FILES["unet"]
    tensors = load_file(file)
    half = {name: tensor.half() for name, tensor in tensors.items()}
    save_file(half, file.with_name("diffusion_pytorch_model.bf16.safetensors"), {"format": "pt"})
    refused(folder, "no weights of variant 'ema'; it has: bf16", variant="ema")
    assert load_model(folder).hash == sd1.hash
    chosen = load_model(folder, variant="bf16")
    assert torch.equal(chosen.denoiser.conv_in.weight, sd1.denoiser.conv_in.weight.half().float())
    file.rename(file.with_name("diffusion_pytorch_model.non_ema.safetensors"))
    refused(folder, "has its weights only as bf16, non_ema; --variant picks one")
    assert load_model(folder, variant="non_ema").hash == sd1.hash
    names = dict.fromkeys(tensors, "part.safetensors")
    save_file(tensors, folder / "unet" / "part.safetensors")
    for index in ("safetensors.index.fp16.json", "fp16.safetensors.index.json"):
        index_file = folder / "unet" / f"diffusion_pytorch_model.{index}"
        index_file.write_text(json.dumps({"weight_map": names}))
        assert load_model(folder).hash == sd1.hash
        index_file.unlink()


def test_old_names_of_the_codec(folder: Path, sd1: ModelParts):
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def rename(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if ".attentions.0." in name]:
            where, rest = name.split(".attentions.0.")
            module, leaf = rest.rsplit(".", 1)
            tensors[f"{where}.attentions.0.{old.get(module, module)}.{leaf}"] = tensors.pop(name)

    changed(folder / PART_FILES["vae"], rename)
    assert load_model(folder).hash == sd1.hash


@pytest.mark.usefixtures("one_tokenizer")
def test_a_model_of_two_sides(folder: Path, tmp_path: Path):
    """diffusers reads sample_size as [height, width]: of 8 pixels a cell, width 192 and height 128."""
    from sdlite.pipeline import Pipeline

    edited(folder / "unet" / "config.json", sample_size=[16, 24])
    pipe = Pipeline.load(folder)
    assert pipe.default_size == (192, 128)
    pipe.save(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "unet" / "config.json").read_text())["sample_size"] == [16, 24]
    save_single_file(load_model(folder), tmp_path / "one.safetensors")
    assert load_model(tmp_path / "one.safetensors").config.sample_size == (16, 24)
    edited(folder / "unet" / "config.json", sample_size=[24, 24])
    assert load_model(folder).config.sample_size == 24


DIT = SD2_LIKE.replace(denoiser=tiny_dit(9, "v").denoiser)


def test_diffusers_loads_the_folder(parts: ModelParts, parts_folder: Path):
    theirs = StableDiffusionPipeline.from_pretrained(parts_folder, local_files_only=True)
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


def test_steps_offset_cannot_be_lost(sd1: ModelParts, tmp_path: Path):
    config = sd1.config.replace(schedule=sd1.config.schedule.replace(steps_offset=0))
    other = ModelParts(sd1.text, sd1.denoiser, sd1.codec, config, "", "")
    with pytest.raises(CheckpointError, match="steps_offset=0"):
        save_folder(other, tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


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
