"""A model folder in diffusers' layout as files: is it one, is it whole, and where are the weights of each part."""

import hashlib
from pathlib import Path

from sdlite.checkpoints.configs import check_model_index
from sdlite.checkpoints.hub import PARTS
from sdlite.checkpoints.weights import CheckpointError, Weights, open_safetensors, open_sharded, read_json

WEIGHT_STEMS = dict.fromkeys(("unet", "transformer", "vae"), "diffusion_pytorch_model") | {"text_encoder": "model"}
MAX_SUMS_BYTES = 2**20


def check_folder(folder: Path) -> None:
    """Raises CheckpointError unless a folder is one model, holds what it links to, and has the sums that it states."""
    if not (folder / "model_index.json").is_file():
        inside = sorted(file.name for file in folder.glob("*.safetensors"))
        hint = f"; did you mean {folder / inside[0]}?" if inside else ""
        raise CheckpointError(f"{folder} is no model folder: model_index.json is missing{hint}")
    root = folder.resolve()
    if root.parent.name == "snapshots" and root.parent.parent.name.startswith("models--"):
        root = root.parent.parent  # the hub's cache: files are links to ../../blobs
    for path in [folder / part for part in PARTS] + [file for part in PARTS for file in folder.glob(f"{part}/*")]:
        if not path.resolve().is_relative_to(root):
            raise CheckpointError(f"{path} is a link to outside of the model folder; copy the file itself there")
    if (folder / "sha256sums.txt").is_file():
        _check_sums(folder, folder / "sha256sums.txt")
    check_model_index(read_json(folder / "model_index.json"), str(folder / "model_index.json"))


def _check_sums(folder: Path, sums: Path) -> None:
    """Raises CheckpointError unless every file listed as `sha256sum` does is there and as listed."""
    if sums.stat().st_size > MAX_SUMS_BYTES:
        raise CheckpointError(f"{sums} has more than {MAX_SUMS_BYTES} bytes")
    for line in sums.read_text(encoding="utf-8", errors="replace").splitlines():
        stated, _, name = line.partition(" ")
        file = folder / name[1:]  # a space for text or a star for binary
        if len(stated) != 64 or not file.resolve().is_relative_to(folder.resolve()):
            raise CheckpointError(f"{sums}: {line!r:.120} is not a sum of a file in this folder")
        if not file.is_file():
            raise CheckpointError(f"{file} is missing; {sums.name} lists it")
        with file.open("rb") as content:
            if hashlib.file_digest(content, "sha256").hexdigest() != stated.lower():
                raise CheckpointError(f"{file} is not the file that {sums.name} lists; download it again")


def open_part(folder: Path, stem: str) -> Weights:
    """Weights of one part: plain or in half precision, whole or in shards. Raises CheckpointError."""
    for variant in ("", ".fp16"):
        for name in (f"{stem}{variant}.safetensors.index.json", f"{stem}.safetensors.index{variant}.json"):
            if (folder / name).is_file():
                return open_sharded(folder / name)
        if (folder / f"{stem}{variant}.safetensors").is_file():
            return open_safetensors(folder / f"{stem}{variant}.safetensors")
    if pickles := sorted(file.name for file in folder.glob("*.bin")):
        raise CheckpointError(
            f"{folder} has its weights as a pickle ({pickles[0]}), which could run code when it is read; "
            "get the safetensors version of this model"
        )
    raise CheckpointError(f"{folder}: {stem}.safetensors is missing")
