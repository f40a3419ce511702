"""Safetensors files that are damaged, foreign or hostile, and those that are split."""

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sdlite.checkpoints.load import load_model
from sdlite.checkpoints.parts import ModelParts
from sdlite.checkpoints.places import CheckpointError
from sdlite.checkpoints.weights import open_safetensors
from tests.checkpoints.cases import (
    PART_FILES,
    changed,
    entry,
    raw,
    read_safetensors,
    refused,
    small,
)

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


@pytest.mark.usefixtures("one_tokenizer")
def test_weights_of_other_types(folder: Path, sd1: ModelParts):
    """Doubles are rounded; what cannot be a weight is named with its type where one is needed."""
    file = folder / PART_FILES["unet"]
    changed(file, lambda tensors: tensors.update({n: t.double() for n, t in tensors.items()}))
    assert load_model(folder).hash == sd1.hash
    for dtype, said in ((torch.float8_e5m2, "F8_E5M2"), (torch.complex64, "C64"), (torch.int64, "I64")):
        changed(file, lambda tensors, dtype=dtype: tensors.update({"conv_in.bias": torch.ones(32).to(dtype)}))
        refused(folder, f"conv_in.bias is in {said}, not one of F64, F32, F16, BF16")
