"""Reads pickles (.ckpt, .bin) that the user trusts, and of them only tensors and plain containers (weights_only)."""

import re
import zipfile
from pathlib import Path

import torch
from torch import Tensor

from sdlite.checkpoints.places import CheckpointError
from sdlite.checkpoints.weights import MAX_TENSORS, NAME, Weights, finite, joined

MAX_NESTING = 4  # of "state_dict" in pickles; training frameworks make 1


def open_pickles(folder: Path, stem: str, variant: str | None) -> Weights | None:
    """A part's pickles, one or several, as diffusers and transformers name them; None if there are no such files."""
    name = "pytorch_model" if stem == "model" else stem
    files = sorted(folder.glob(f"{name}*.bin"))
    plain = [file for file in files if re.fullmatch(rf"{name}(-\d+-of-\d+)?\.bin", file.name)]
    chosen = [file for file in files if variant is not None and file.name.startswith(f"{name}.{variant}")] or plain
    parts = [open_pickle(path) for path in chosen]
    return joined({name: part for part in parts for name in part.shapes}) if parts else None


def open_pickle(path: Path) -> Weights:
    """The tensors of a file, taken out of the "state_dict"s around them. Raises CheckpointError.

    Tensors with more numbers than the file has bytes for are refused: views that repeat numbers, and packed archives.
    """
    if _is_packed(path):
        raise CheckpointError(f"{path} is a packed archive, which PyTorch does not write")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the unpickler raises whatever the file makes it raise
        cause = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"{path} cannot be read as weights alone: {cause:.200}") from None
    for _ in range(MAX_NESTING):
        if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
            content = content["state_dict"]
    if not isinstance(content, dict) or len(content) > MAX_TENSORS:
        raise CheckpointError(f"{path} holds no state dict of up to {MAX_TENSORS} tensors")
    tensors: dict[str, Tensor] = {
        name: value for name, value in content.items() if isinstance(value, Tensor) and value.is_floating_point()
    }
    for name, tensor in tensors.items():
        if not isinstance(name, str) or not NAME.fullmatch(name):
            raise CheckpointError(f"{path} has a tensor named {name!r:.80}")
        if not _is_plain(tensor):
            raise CheckpointError(f"{path}: {name} of shape {tuple(tensor.shape)} is more than the file holds")
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    return Weights(shapes, {}, lambda names: {name: finite(tensors[name], f"{path}: {name}") for name in names})


def _is_packed(path: Path) -> bool:
    """Whether a file is an archive whose contents are more than its own bytes."""
    try:
        with zipfile.ZipFile(path) as archive:
            return sum(entry.file_size for entry in archive.infolist()) > path.stat().st_size
    except (zipfile.BadZipFile, ValueError, OSError):
        return False  # an older pickle, or none: torch.load finds out


def _is_plain(tensor: Tensor) -> bool:
    """Whether a tensor is dense, in memory, and has a number of its own for every element."""
    is_dense = tensor.layout is torch.strided and tensor.device.type == "cpu"
    return is_dense and tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()
