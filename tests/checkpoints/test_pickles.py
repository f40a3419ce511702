"""Pickles: never read unless they are trusted, and then only as weights."""

import io
import pickle
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sdlite.checkpoints.folder import save_folder
from sdlite.checkpoints.load import convert, load_model
from sdlite.checkpoints.parts import ModelParts
from sdlite.checkpoints.places import CheckpointError
from sdlite.config import tiny
from tests.checkpoints.cases import PART_FILES, refused


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


@pytest.mark.usefixtures("one_tokenizer")
def test_trusted_pickle(sd1: ModelParts, original_tensors: dict[str, torch.Tensor], tmp_path: Path):
    content = {"epoch": 3, "state_dict": {"state_dict": {**original_tensors, "betas": torch.ones(1000)}}}
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
