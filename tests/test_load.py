"""Files that are damaged, foreign or hostile: one line that says so, nothing run, nothing written, no network."""

import fnmatch
import hashlib
import io
import json
import pickle
import shutil
import socket
import struct
import sys
import tarfile
import types
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save, save_file

from sdlite.checkpoints import hub, load, single_file, weights
from sdlite.checkpoints.load import CheckpointError, ModelParts, load_model, random_model
from sdlite.checkpoints.places import is_hub_id
from sdlite.checkpoints.save import save_folder, save_single_file
from sdlite.checkpoints.weights import Weights, open_safetensors, read_json, read_safetensors
from sdlite.config import AutoencoderTinyConfig, sd15, sd21, tiny, tiny_dit
from sdlite.models.codec import LatentCodec

PART_FILES = {
    "unet": "unet/diffusion_pytorch_model.safetensors",
    "transformer": "transformer/diffusion_pytorch_model.safetensors",
    "vae": "vae/diffusion_pytorch_model.safetensors",
    "text_encoder": "text_encoder/model.safetensors",
}


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: object) -> None:
        raise AssertionError("loading must not use the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture(scope="module")
def parts() -> ModelParts:
    return random_model(tiny(), seed=0)


@pytest.fixture(scope="module")
def saved(parts: ModelParts, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "model"
    save_folder(parts, path)
    return path


@pytest.fixture(scope="module")
def original(parts: ModelParts, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("original") / "model.safetensors"
    save_single_file(parts, path)
    return path


@pytest.fixture
def one_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reads the vocabulary once, where a test loads the same model many times."""
    tokenizer = load.load_tokenizer()
    monkeypatch.setattr(load, "load_tokenizer", lambda folder=None: tokenizer)


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "model"))


@pytest.fixture
def holder(part: str, folder: Path, tmp_path: Path) -> Path:
    """A folder that has the part of the test."""
    if part != "transformer":
        return folder
    save_folder(random_model(tiny_dit(), seed=0), tmp_path / "dit")
    return tmp_path / "dit"


def refused(path: Path | str, message: str, **options: Any) -> str:
    with pytest.raises(CheckpointError, match=message) as error:
        load_model(path, **options)
    text = str(error.value)
    assert "\n" not in text and len(text) < 1000, text
    return text


def small(**tensors: torch.Tensor) -> bytes:
    buffer = io.BytesIO()
    buffer.write(save(tensors or {"a": torch.ones(2, 2), "b": torch.zeros(3)}))
    return buffer.getvalue()


def raw(header: str | bytes, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else header.encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(dtype: str = "F32", shape: Any = (1,), offsets: Any = (0, 4)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


BAD_FILES = {
    "empty": (b"", "is empty"),
    "seven bytes": (b"1234567", "not a safetensors file"),
    "cut in the header": (small()[:40], "truncated"),
    "cut in the data": (small()[:-5], "truncated: 5 of 28 bytes are missing"),
    "over-long": (small() + b"\0" * 7, "over-long: 7 bytes follow"),
    "header beyond the file": (struct.pack("<Q", 10**6) + b"{}", "truncated"),
    "header bomb": (struct.pack("<Q", 2**60) + b"{" + b"x" * 100, "not a safetensors file"),
    "deep header": (raw('{"a":' * 50_000), "damaged header"),
    "no json": (raw("{nonsense}"), "damaged header"),
    "not utf-8": (raw(b'{"\xff": 1}'), "damaged header"),
    "no tensors": (raw("{}"), "no tensors"),
    "key twice": (raw(f'{{"a":{json.dumps(entry())},"a":{json.dumps(entry())}}}', b"1234"), "'a' is there twice"),
    "too many": (raw(json.dumps({f"t{i}": entry() for i in range(20_001)}), b"1234"), "20001 tensors"),
    "name": (raw(json.dumps({"../a": entry()}), b"1234"), "named '../a'"),
    "name with a line": (raw(json.dumps({"a\nb": entry()}), b"1234"), "named"),
    "unknown dtype": (raw(json.dumps({"a": entry(["x"])}), b"1234"), "'x'.*which safetensors does not know"),
    "huge and empty": (raw(json.dumps({"a": entry(shape=[0, 2**62], offsets=[0, 0])})), "which is too large"),
    "not an object": (raw('{"a":1}').replace(b'{"a":1}', b'{ "a":1'), "damaged header"),
    "many duplicates": (raw("{" + ",".join(f'"{i}":0' for i in range(100_000)) + ',"7":0}'), "'7' is there twice"),
    "overlap": (raw(json.dumps({"a": entry(), "b": entry()}), b"1234"), "overlap"),
    "gap": (raw(json.dumps({"a": entry(), "b": entry(offsets=[8, 12])}), b"1" * 12), "gaps"),
    "negative": (raw(json.dumps({"a": entry(shape=[-1], offsets=[4, 0])}), b"1234"), "damaged header"),
    "shape and size": (raw(json.dumps({"a": entry(shape=[10**9])}), b"1234"), "of shape"),
    "many dimensions": (raw(json.dumps({"a": entry(shape=[1] * 1000)}), b"1234"), "damaged header"),
    "boolean size": (raw(json.dumps({"a": entry(shape=[True])}), b"1234"), "damaged header"),
    "no entry": (raw(json.dumps({"a": 3}), b"1234"), "damaged header"),
    "metadata": (raw(json.dumps({"__metadata__": {"a": 1}, "b": entry()}), b"1234"), "__metadata__"),
    "nan": (small(a=torch.tensor([1.0, float("nan")])), "a has NaN or Inf"),
    "inf": (small(deep=torch.tensor([float("-inf")]).half()), "deep has NaN or Inf"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "Git LFS pointer"),
    "html": (b"<!DOCTYPE html><html>", "web page"),
    "gguf": (b"GGUF" + b"\0" * 100, "GGUF"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files(name: str, tmp_path: Path):
    content, message = BAD_FILES[name]
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as error:
        read_safetensors(path)
    assert "\n" not in str(error.value) and str(path) in str(error.value)
    refused(path, message if "NaN" not in message else "no UNet")


def test_good_file(tmp_path: Path):
    path = tmp_path / "model.safetensors"
    tensors = {"a": torch.randn(3, 4), "h": torch.randn(5).half(), "b": torch.randn(2).bfloat16(), "s": torch.ones(())}
    path.write_bytes(small(**tensors, ids=torch.arange(3), empty=torch.zeros(0, 4)))
    found = read_safetensors(path)
    assert set(found) == {"a", "h", "b", "s", "empty"}
    assert all(torch.equal(found[name], tensor.float()) for name, tensor in tensors.items())
    assert open_safetensors(path).shapes["a"] == (3, 4)


def test_every_cut_and_flipped_header_byte_is_refused_or_harmless(tmp_path: Path):
    path, content = tmp_path / "model.safetensors", small()
    for end in range(len(content)):
        path.write_bytes(content[:end])
        with pytest.raises(CheckpointError):
            read_safetensors(path)
    for i in range(len(content)):
        for bit in (1, 4, 128):
            path.write_bytes(content[:i] + bytes([content[i] ^ bit]) + content[i + 1 :])
            try:
                read_safetensors(path)
            except CheckpointError as error:
                assert "\n" not in str(error)


class Gadget:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.path,)


def as_zip(content: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr("archive/data.pkl", content)
    return buffer.getvalue()


def as_tar(content: bytes) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as file:
        info = tarfile.TarInfo("pickle")
        info.size = len(content)
        file.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def as_torch(gadget: object, new: bool) -> bytes:
    buffer = io.BytesIO()
    torch.save({"state_dict": gadget}, buffer, _use_new_zipfile_serialization=new)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "name",
    ["m.ckpt", "m.pt", "m.pth", "m.bin", "m.pkl", "m.safetensors", "m.zip", "m"],
)
def test_pickles_never_run(name: str, tmp_path: Path):
    gadget = Gadget(tmp_path / "ran")
    forms = [pickle.dumps(gadget, protocol) for protocol in range(6)]
    forms += [as_zip(forms[-1]), as_tar(forms[-1]), as_torch(gadget, True), as_torch(gadget, False)]
    for content in forms:
        (tmp_path / name).write_bytes(content)
        text = refused(tmp_path / name, "pickle|not a safetensors file")
        protocol_0 = content in forms[:2] and not name.endswith((".ckpt", ".pt", ".pth", ".bin", ".pkl"))
        assert protocol_0 or "sdlite convert --trust-pickle" in text
    assert [file.name for file in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("part", PART_FILES)
def test_pickles_in_folders(part: str, holder: Path):
    file = holder / PART_FILES[part]
    file.write_bytes(pickle.dumps(Gadget(holder / "ran")))
    refused(holder, "is a pickle")
    file.rename(file.with_suffix(".bin"))
    refused(holder, f"{part} has its weights as a pickle")
    assert not (holder / "ran").exists()


def changed(path: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


@pytest.mark.usefixtures("one_tokenizer")
@pytest.mark.parametrize("part", PART_FILES)
def test_wrong_tensors(part: str, holder: Path):
    path = holder / PART_FILES[part]
    good = path.read_bytes()
    names = sorted(load_file(path))[:: max(1, len(load_file(path)) // 5)][:5]
    seen = [name.removeprefix("text_model.") for name in names]

    changed(path, lambda tensors: [tensors.pop(name) for name in names])
    text = refused(holder, f"{part}.*is missing.*incomplete")
    assert all(f"{name} is missing" in text for name in seen)

    path.write_bytes(good)
    changed(path, lambda tensors: tensors.update({f"{name}.more": torch.ones(1) for name in names}))
    note = next(note for note in load_model(holder).notes if "not used" in note)
    assert part in note and all(f"{name}.more" in note for name in seen)

    path.write_bytes(good)
    changed(path, lambda tensors: tensors.update({name: torch.ones(3, 7) for name in names}))
    text = refused(holder, f"{part}.*the config is another model's")
    assert all(f"{name} is (3, 7), not" in text for name in seen)

    path.write_bytes(good)
    changed(path, lambda tensors: tensors[names[2]].view(-1)[0].fill_(float("nan")))
    refused(holder, f"{names[2]} has NaN or Inf")


@pytest.mark.usefixtures("one_tokenizer")
def test_wrong_tensors_in_a_single_file(original: Path, tmp_path: Path):
    path = Path(shutil.copy(original, tmp_path))
    for name in (
        "model.diffusion_model.input_blocks.1.0.in_layers.0.weight",
        "first_stage_model.decoder.up.3.block.0.conv1.weight",
        "cond_stage_model.transformer.text_model.final_layer_norm.bias",
    ):
        for change, message in (
            (lambda t, name=name: t.pop(name), "is missing"),
            (lambda t, name=name: t.update({name: torch.ones(1, 2)}), r"is \(1, 2\), not"),
            (lambda t, name=name: t[name].fill_(float("inf")), "has NaN or Inf"),
        ):
            changed(path, change)
            refused(path, message, config=tiny())
            shutil.copy(original, path)


def test_weights_of_another_model(folder: Path):
    shutil.copy(folder / PART_FILES["vae"], folder / PART_FILES["unet"])
    refused(folder, "and [0-9]+ more. Likely these are another model's weights")


def edited(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


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


@pytest.mark.usefixtures("one_tokenizer")
def test_config_bombs_are_refused_before_memory_is_taken(folder: Path):
    unet = folder / "unet" / "config.json"
    good = unet.read_text()
    edited(unet, block_out_channels=[8192, 8192], attention_head_dim=8, layers_per_block=8)  # 100 GB
    refused(folder, "another model's")
    unet.write_text(good)
    edited(folder / "text_encoder" / "config.json", hidden_size=10**7)
    refused(folder, "hidden_size=10000000")
    edited(folder / "text_encoder" / "config.json", hidden_size=8192, num_hidden_layers=48)
    refused(folder, "another model's")
    (folder / "text_encoder" / "config.json").write_text('{"a":' * 100_000)
    refused(folder, "nested deeper than 64 levels")


@pytest.mark.usefixtures("one_tokenizer")
def test_transformer_bombs_are_refused_before_memory_is_taken(tmp_path: Path):
    save_folder(random_model(tiny_dit(), seed=0), tmp_path / "dit")
    transformer = tmp_path / "dit" / "transformer" / "config.json"
    heads = {"num_attention_heads": 64, "attention_head_dim": 128, "cross_attention_dim": 8192}
    edited(transformer, num_layers=128, **heads)  # 500 GB
    refused(tmp_path / "dit", "another model's")
    transformer.unlink()
    refused(tmp_path / "dit", r"transformer/config\.json is missing")


def test_parts_that_do_not_fit(parts: ModelParts, tmp_path: Path):
    text = parts.config.text.replace(hidden_size=16)
    with pytest.raises(CheckpointError, match="gives 16 features, but the UNet takes 32"):
        random_model(tiny().replace(text=text), seed=0)
    with pytest.raises(CheckpointError, match="from 7 to 4 channels"):
        random_model(tiny(7), seed=0)
    with pytest.raises(CheckpointError, match="but the DiT takes 32"):
        random_model(tiny_dit().replace(text=text), seed=0)


def test_not_a_model(tmp_path: Path, original: Path):
    refused(tmp_path, "no model folder: model_index.json is missing")
    refused(tmp_path / "nothing" / "here" / "at all", "does not exist")
    refused("", "model is empty")
    shutil.copy(original, tmp_path / "sd.safetensors")
    refused(tmp_path, "did you mean .*sd.safetensors")
    refused(tmp_path, "for single files", ema=True)
    with pytest.raises(CheckpointError, match="is missing"):
        read_json(tmp_path / "none.json")


@pytest.mark.parametrize("file", ["unet/config.json", "scheduler/scheduler_config.json", "tokenizer/vocab.json"])
def test_missing_files(file: str, folder: Path):
    (folder / file).unlink()
    refused(folder, "missing|no tokenizer")


def sharded(folder: Path, places: Any) -> None:
    file = folder / PART_FILES["unet"]
    tensors = load_file(file)
    file.unlink()
    save_file(tensors, folder / "unet" / "shard.safetensors", {"format": "pt"})
    listed = places(tensors) if callable(places) else places
    (folder / "unet" / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps({"weight_map": listed}))


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("../../../etc/passwd", "shard '../../../etc/passwd' must be"),
        ("/etc/passwd", "must be a .safetensors file next to it"),
        ("../vae/diffusion_pytorch_model.safetensors", "next to it"),
        ("a\0.safetensors", "next to it"),
        ("none.safetensors", "is missing"),
        (7, "weight_map"),
    ],
)
def test_shard_names(place: Any, message: str, folder: Path):
    sharded(folder, lambda tensors: dict.fromkeys(tensors, place))
    refused(folder, message)


@pytest.mark.usefixtures("one_tokenizer")
def test_shard_lists(folder: Path):
    sharded(folder, lambda tensors: dict.fromkeys([*list(tensors)[1:], "more"], "shard.safetensors"))
    refused(folder, "'more' is not in shard.safetensors, where it is listed")


@pytest.mark.parametrize("linked", ["unet", PART_FILES["unet"], "unet/config.json", "tokenizer/vocab.json"])
def test_links_out_of_the_folder(linked: str, folder: Path, tmp_path: Path, parts: ModelParts):
    outside = tmp_path / "outside"
    (folder / linked).rename(outside)
    (folder / linked).symlink_to(outside)
    text = refused(folder, "is a link to .*, outside of the model folder; --allow-links .* follows it")
    root = text.split("--allow-links ")[1].removesuffix(" follows it")
    refused(folder, "outside of the model folder", allow_links=[tmp_path / "elsewhere"])
    assert load_model(folder, allow_links=[root]).hash == parts.hash


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


def test_links_inside_and_to_the_folder(folder: Path, tmp_path: Path, parts: ModelParts):
    file = folder / PART_FILES["unet"]
    file.rename(folder / "weights")
    file.symlink_to("../weights")
    (tmp_path / "link").symlink_to(folder)
    assert load_model(tmp_path / "link").hash == parts.hash


def test_sums(folder: Path, parts: ModelParts):
    files = [file for file in folder.rglob("*") if file.is_file()]
    lines = [f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.relative_to(folder)}\n" for file in files]
    sums = folder / "sha256sums.txt"
    sums.write_text("".join(lines))
    assert load_model(folder).hash == parts.hash
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


def fake_hub(saved: Path, cache: Path) -> Path:
    """A snapshot as the hub's cache has it: every file a link to ../../blobs."""
    snapshot = cache / "models--org--name" / "snapshots" / "abc"
    for file in [file for file in saved.rglob("*") if file.is_file()]:
        blob = cache / "models--org--name" / "blobs" / hashlib.sha256(str(file).encode()).hexdigest()
        blob.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, blob)
        link = snapshot / file.relative_to(saved)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(blob)
    return snapshot


def test_hub(saved: Path, tmp_path: Path, parts: ModelParts, monkeypatch: pytest.MonkeyPatch):
    snapshot, calls = fake_hub(saved, tmp_path), []

    def snapshot_download(name: str, **options: Any) -> str:
        calls.append((name, options))
        return str(snapshot)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    loaded = load_model("org/name")
    assert (loaded.hash, loaded.name) == (parts.hash, "org/name")
    (call,) = calls
    assert call[0] == "org/name"
    assert {pattern.rsplit(".", 1)[1] for pattern in call[1]["allow_patterns"]} == {"json", "txt", "safetensors"}
    monkeypatch.setattr(hub, "UNWANTED", ([], []))
    assert is_hub_id("org/name.v1") and not is_hub_id("org/name.ckpt") and not is_hub_id("./name")
    assert not is_hub_id("../name") and not is_hub_id("a/b/c") and not is_hub_id("folder/x.safetensors")


def test_a_variant_from_the_hub(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Its weights and, of parts that have none such, the plain ones; never both, which would be gigabytes more."""
    hub_files = Path(shutil.copytree(saved, tmp_path / "hub"))
    plain = hub_files / PART_FILES["unet"]
    save_file(load_file(plain), plain.with_name("diffusion_pytorch_model.bf16.safetensors"), {"format": "pt"})
    cache = tmp_path / "cache"

    def snapshot_download(name: str, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
        for file in [file for file in hub_files.rglob("*") if file.is_file()]:
            path = file.relative_to(hub_files)
            chosen = [any(fnmatch.fnmatch(str(path), p) for p in ps) for ps in (allow_patterns, ignore_patterns)]
            if chosen == [True, False]:
                (cache / path).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, cache / path)
        return str(cache)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    load_model("org/name", variant="bf16")
    fetched = {str(path.relative_to(cache)) for path in cache.rglob("*.safetensors")}
    assert fetched == {
        "unet/diffusion_pytorch_model.bf16.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
        "text_encoder/model.safetensors",
    }
    shutil.rmtree(cache)
    refused("org/name", "has no weights of variant 'ema'", variant="ema")
    assert not list(cache.rglob("*.safetensors"))


def test_hub_offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    refused("some-org/some-model-that-is-nowhere", "the hub did not give it")


def meta_file(config: Any, metadata: dict[str, str] | None = None, **tensors: torch.Tensor) -> Weights:
    """A full-size original file without its data: names and shapes only, but for the given tensors."""
    from sdlite.checkpoints import compvis
    from sdlite.checkpoints.load import empty_modules
    from sdlite.checkpoints.tokenizer import load_tokenizer

    text, denoiser, codec = empty_modules(config, load_tokenizer(), Path("full"))
    modules = {"text": text.model, "denoiser": denoiser, "codec": codec.model}
    ours = {f"{part}.{n}": tuple(t.shape) for part, module in modules.items() for n, t in module.state_dict().items()}
    open_clip = config.text.hidden_act == "gelu"
    names = compvis.original_names({part: list(m.state_dict()) for part, m in modules.items()}, config, open_clip)
    shapes = {key: compvis.original_shape(key, [ours[n] for n in sources]) for key, sources in names.items()}
    shapes |= {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    return Weights(shapes, metadata or {}, lambda wanted: {name: tensors[name] for name in wanted})


@pytest.mark.parametrize("expected", [sd15(), sd15(9), sd21(), sd21(prediction="epsilon"), sd21(9, "epsilon")])
def test_full_size_files_are_recognised(expected: Any, tmp_path: Path):
    is_v = expected.denoiser.prediction == "v"
    bias = torch.tensor([-1.0, 1.0] * 160) * (0.2 if is_v else 0.05)
    file = meta_file(expected, **{single_file.SD2_V_KEY: bias})
    keys = {key: key for key in file.shapes}
    config, stated, notes = single_file.find_config(tmp_path / "m.safetensors", file, keys, None)
    prediction, reasons = single_file.find_prediction(tmp_path / "m.safetensors", file, keys, config, stated)
    assert config.replace(
        denoiser=config.denoiser.replace(prediction=prediction), sample_size=expected.sample_size
    ) == (expected)
    assert not stated and not notes
    assert "is a guess" in reasons[0] and "--prediction" in reasons[0]


def test_what_says_epsilon_or_v(tmp_path: Path):
    path, config = tmp_path / "m.safetensors", sd21(prediction="epsilon")

    def found(metadata: dict[str, str], *markers: str) -> tuple[str, str]:
        keys = {name: name for name in (*markers, single_file.SD2_V_KEY)}
        file = Weights({}, metadata, lambda names: {single_file.SD2_V_KEY: torch.tensor([-0.01, 0.01])})
        prediction, (reason,) = single_file.find_prediction(path, file, keys, config, False)
        return prediction, reason

    assert found({})[0] == "epsilon" and "0.010" in found({})[1]
    assert found({}, "v_pred") == ("v", "prediction v: the file has the marker tensor v_pred")
    assert found({single_file.PREDICTION_KEY: "epsilon"}, "v_pred")[1].endswith("the metadata says so")
    path.with_suffix(".json").write_text('{"prediction_type": "v_prediction"}')
    assert found({single_file.PREDICTION_KEY: "epsilon"}) == ("v", "prediction v: the file next to the model says so")
    path.with_suffix(".yaml").write_text("model:\n  params:\n    linear_start: 0.00085\n")
    assert found({})[0] == "epsilon"
    path.with_suffix(".yaml").write_text('model:\n  params:\n    parameterization: "v"\n')
    assert found({}) == ("v", "prediction v: the file next to the model says so")


def test_explicit_prediction_wins(saved: Path, original: Path):
    assert load_model(saved, prediction="v").denoiser.prediction == "v"
    assert load_model(original, prediction="sample").config.denoiser.prediction == "sample"


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("conditioner.embedders.1.model.ln_final.weight", "Stable Diffusion XL"),
        ("model.diffusion_model.label_emb.0.0.weight", "Stable Diffusion XL"),
        ("model.diffusion_model.double_blocks.0.img_attn.proj.weight", "is Flux"),
        ("double_blocks.0.img_attn.proj.weight", "is Flux"),
        ("model.diffusion_model.joint_blocks.0.x_block.attn.proj.weight", "Stable Diffusion 3"),
        ("lora_unet_down_blocks_0_attentions_0_proj_in.lora_up.weight", "is a LoRA"),
        ("lora_te_text_model_encoder.alpha", "is a LoRA"),
        ("unet.down_blocks.0.attentions.0.to_q.lora_A.weight", "is a LoRA"),
        ("emb_params", "textual inversion"),
        ("control_model.input_hint_block.0.weight", "ControlNet"),
        ("decoder.conv_in.weight", "VAE alone; give a whole model, and this as vae"),
        ("first_stage_model.decoder.conv_in.weight", "VAE alone"),
        ("down_blocks.0.resnets.0.conv1.weight", "UNet of a folder"),
        ("text_model.encoder.layers.0.mlp.fc1.bias", "text encoder alone"),
        ("something.else", "no UNet that sdlite knows"),
    ],
)
def test_other_models_are_named(key: str, message: str, tmp_path: Path):
    path = tmp_path / "m.safetensors"
    save_file({key: torch.ones(2, 2)}, path)
    refused(path, f"{message}.*sdlite loads Stable Diffusion 1.x and 2.x")


def test_other_sizes_need_a_config(original: Path, tmp_path: Path, parts: ModelParts):
    path = tmp_path / "m.safetensors"
    save_file(load_file(original), path)
    refused(path, "UNet of width 32 for 4 channels and text features of 32")
    assert load_model(path, config=tiny()).hash == parts.hash
    save_file(load_file(original), path, {single_file.CONFIG_KEY: '{"denoiser": 3}'})
    refused(path, "metadata sdlite.config")


@pytest.mark.usefixtures("one_tokenizer")
def test_schedule_in_the_file(original: Path, tmp_path: Path):
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    abar = (1 - betas).cumprod(0).float()
    for table, count in ((abar, 0), (abar.half().float(), 0), (abar**2, 1)):
        file = meta_file(sd15(), alphas_cumprod=table)
        notes = single_file.find_config(Path("m"), file, {key: key for key in file.shapes}, None)[2]
        assert len(notes) == count
    path = tmp_path / "m.safetensors"
    save_file(load_file(original) | {"ztsnr": torch.ones(1), "v_pred": torch.ones(1)}, path)
    assert load_model(path, config=tiny()).config.schedule.zero_terminal_snr


def test_loading_leaves_no_trace(saved: Path, original: Path):
    state = torch.get_rng_state()
    before = sorted(saved.rglob("*")), sorted(original.parent.iterdir())
    for path in (saved, original):
        load_model(path)
    assert (sorted(saved.rglob("*")), sorted(original.parent.iterdir())) == before
    assert torch.equal(torch.get_rng_state(), state)


def test_old_names_of_the_codec(folder: Path, parts: ModelParts):
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def rename(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if ".attentions.0." in name]:
            where, rest = name.split(".attentions.0.")
            module, leaf = rest.rsplit(".", 1)
            tensors[f"{where}.attentions.0.{old.get(module, module)}.{leaf}"] = tensors.pop(name)

    changed(folder / PART_FILES["vae"], rename)
    assert load_model(folder).hash == parts.hash


def test_hash_depends_on_every_weight(saved: Path, parts: ModelParts):
    loaded = load_model(saved)
    modules = {"text": loaded.text.model, "denoiser": loaded.denoiser, "codec": loaded.codec.model}
    assert weights.weights_hash(modules) == parts.hash
    with torch.no_grad():
        loaded.codec.model.quant_conv.bias[0] += 1e-3
    assert weights.weights_hash(modules) != parts.hash


def test_a_folder_of_the_name_of_a_preset_comes_first(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    other = random_model(tiny(), seed=5)
    save_folder(other, tmp_path / "tiny")
    monkeypatch.chdir(tmp_path)
    assert load_model("tiny").hash == other.hash


def test_what_to_give_instead(saved: Path, tmp_path: Path):
    refused(saved / "unet", f"it is a part of {saved}, give that")
    snapshot = fake_hub(saved, tmp_path)
    refused(tmp_path / "models--org--name", f"did you mean {snapshot}?")
    with pytest.raises(CheckpointError) as error:
        load_model(tmp_path / "models--org--name" / "snapshots")
    assert "did you mean" not in str(error.value)


def test_a_mistyped_path_does_not_ask_the_hub(saved: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(saved.parent)
    refused("model/unnet", "does not exist; give a model folder")
    refused("models.d/model.ckpt", "does not exist; give a model folder")


@pytest.mark.usefixtures("one_tokenizer")
def test_variants(folder: Path, parts: ModelParts):
    """A folder with other variants alone names them; one of them is taken where it is there, as in diffusers."""
    file = folder / PART_FILES["unet"]
    tensors = load_file(file)
    half = {name: tensor.half() for name, tensor in tensors.items()}
    save_file(half, file.with_name("diffusion_pytorch_model.bf16.safetensors"), {"format": "pt"})
    refused(folder, "no weights of variant 'ema'; it has: bf16", variant="ema")
    assert load_model(folder).hash == parts.hash
    chosen = load_model(folder, variant="bf16")
    assert torch.equal(chosen.denoiser.conv_in.weight, parts.denoiser.conv_in.weight.half().float())
    file.rename(file.with_name("diffusion_pytorch_model.non_ema.safetensors"))
    refused(folder, "has its weights only as bf16, non_ema; --variant picks one")
    assert load_model(folder, variant="non_ema").hash == parts.hash
    names = dict.fromkeys(tensors, "part.safetensors")
    save_file(tensors, folder / "unet" / "part.safetensors")
    for index in ("safetensors.index.fp16.json", "fp16.safetensors.index.json"):
        index_file = folder / "unet" / f"diffusion_pytorch_model.{index}"
        index_file.write_text(json.dumps({"weight_map": names}))
        assert load_model(folder).hash == parts.hash
        index_file.unlink()


@pytest.mark.usefixtures("one_tokenizer")
def test_what_is_not_used_may_be_anything(folder: Path, original: Path, tmp_path: Path, parts: ModelParts):
    """Strict is for what is drawn with: files of merges and old tools hold more, in types that no weight has."""
    odd = {"embeddings.position_ids": torch.arange(77.0, dtype=torch.float64)[None], "counter": torch.tensor(3)}
    odd |= {"text_projection.weight": torch.ones(4, 4), "rotary": torch.ones(2, dtype=torch.complex64)}
    changed(folder / PART_FILES["text_encoder"], lambda tensors: tensors.update(odd))
    loaded = load_model(folder)
    assert loaded.hash == parts.hash and any("not used: text_projection.weight" in note for note in loaded.notes)

    path = Path(shutil.copy(original, tmp_path / "merged.safetensors"))
    more = {
        "alphas_cumprod": torch.full((1000,), float("nan"), dtype=torch.float64),
        "cond_stage_model.transformer.text_model.embeddings.position_ids": torch.arange(77.0, dtype=torch.float64)[
            None
        ],
        "model.diffusion_model.merge_ratio": torch.ones(1),
        "lora_unet_mid.alpha": torch.ones(1),
        "v_pred": torch.ones((), dtype=torch.uint8),
        "scales": torch.ones(3).to(torch.float8_e4m3fn),
    }
    old = {"q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0", "norm": "group_norm"}

    def renamed(tensors: dict[str, torch.Tensor]) -> None:
        tensors.update(more)
        for name in [name for name in tensors if ".attn_1." in name]:
            where, module, leaf = name.rsplit(".", 2)
            tensors[f"{where}.{old[module]}.{leaf}"] = tensors.pop(name)

    changed(path, renamed)
    loaded = load_model(path, config=tiny())
    assert loaded.hash == parts.hash
    assert any("not used: " in note and "model.diffusion_model.merge_ratio" in note for note in loaded.notes)


@pytest.mark.usefixtures("one_tokenizer")
def test_weights_of_other_types(folder: Path, parts: ModelParts):
    """Doubles are rounded; what cannot be a weight is named with its type where one is needed."""
    file = folder / PART_FILES["unet"]
    changed(file, lambda tensors: tensors.update({n: t.double() for n, t in tensors.items()}))
    assert load_model(folder).hash == parts.hash
    for dtype, said in ((torch.float8_e5m2, "F8_E5M2"), (torch.complex64, "C64"), (torch.int64, "I64")):
        changed(file, lambda tensors, dtype=dtype: tensors.update({"conv_in.bias": torch.ones(32).to(dtype)}))
        refused(folder, f"conv_in.bias is in {said}, not one of F64, F32, F16, BF16")


@pytest.mark.parametrize(
    "key",
    [
        "model.diffusion_model.input_blocks.0.0.weight",
        "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight",
        "alphas_cumprod",
        single_file.SD2_V_KEY,
    ],
)
@pytest.mark.parametrize("shape", [(), (0,), (0, 320, 0, 1)])
def test_odd_shapes_of_the_keys_that_tell_models_apart(
    key: str, shape: tuple[int, ...], original: Path, tmp_path: Path
):
    path = tmp_path / "m.safetensors"
    save_file(load_file(original) | {key: torch.ones(shape)}, path)
    refused(path, "is not Stable Diffusion")


def vae_tensors(parts: ModelParts) -> dict[str, torch.Tensor]:
    return {name: tensor + 1 for name, tensor in parts.codec.model.state_dict().items()}


@pytest.mark.usefixtures("one_tokenizer")
def test_a_vae_from_elsewhere(saved: Path, original: Path, tmp_path: Path, parts: ModelParts):
    """From every form of file that people have, in place of the model's own or where it has none."""
    other = ModelParts(parts.text, parts.denoiser, LatentCodec(parts.config.codec), parts.config, "", "")
    other.codec.model.load_state_dict(vae_tensors(parts))
    whole, folder = tmp_path / "whole.safetensors", tmp_path / "folder"
    save_single_file(other, whole)
    save_folder(other, folder)
    config = {single_file.CONFIG_KEY: parts.config.model_dump_json()}
    alone = {k: v for k, v in load_file(whole).items() if k.startswith("first_stage_model.")}
    bare = {k.removeprefix("first_stage_model."): v for k, v in alone.items()} | {"loss.discriminator": torch.ones(1)}
    save_file(alone, tmp_path / "alone.safetensors", config)
    save_file(bare, tmp_path / "bare.safetensors", config)
    places = [whole, folder, folder / "vae", folder / PART_FILES["vae"], tmp_path / "alone.safetensors"]
    expected = None
    for place in [*places, tmp_path / "bare.safetensors"]:
        loaded = load_model(saved, vae=place)
        found = loaded.codec.model.state_dict()
        assert all(torch.equal(found[name], tensor) for name, tensor in vae_tensors(parts).items()), place
        assert expected in (None, loaded.hash) and loaded.hash != parts.hash
        expected = loaded.hash

    without = tmp_path / "without.safetensors"
    save_file({k: v for k, v in load_file(original).items() if not k.startswith("first_stage_model.")}, without, config)
    refused(without, "has no VAE; give one with --vae: a file, a folder, or tiny")
    assert load_model(without, vae=folder).hash == expected
    shutil.rmtree(Path(shutil.copytree(saved, tmp_path / "holed")) / "vae")
    refused(tmp_path / "holed", "vae/config.json is missing")
    assert load_model(tmp_path / "holed", vae=whole).hash == load_model("tiny", vae=whole).hash == expected
    with pytest.raises(CheckpointError, match="vae='nowhere' does not exist"):
        load_model(saved, vae="nowhere")
    refused(saved, "no VAE: config.json is missing", vae=tmp_path)


def test_the_tiny_vae_is_taesd_from_the_hub(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    codec = LatentCodec(AutoencoderTinyConfig())
    codec.model.save_pretrained(tmp_path / "taesd")
    asked: list[str] = []
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download", lambda name, **_: [str(tmp_path / "taesd"), asked.append(name)][0]
    )
    loaded = load_model(saved, vae="tiny")
    assert asked == ["madebyollin/taesd"] and loaded.config.codec == AutoencoderTinyConfig()
    assert torch.equal(loaded.codec.model.encoder.layers[0].weight, codec.model.encoder.layers[0].weight)
    file = tmp_path / "taesd" / "diffusion_pytorch_model.safetensors"
    assert load_model(saved, vae=file).hash == loaded.hash


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
