"""Checks a model folder in diffusers' layout and finds the weights of each part."""

import glob
import hashlib
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from sdlite.checkpoints.configs import check_model_index
from sdlite.checkpoints.hub import PARTS, cache_folder
from sdlite.checkpoints.weights import WAY_OUT, CheckpointError, Weights, open_safetensors, open_sharded, read_json

WEIGHT_STEMS = dict.fromkeys(("unet", "transformer", "vae"), "diffusion_pytorch_model") | {"text_encoder": "model"}
PART_STEMS = tuple(sorted(set(WEIGHT_STEMS.values())))  # how a part's own file begins
MAX_SUMS_BYTES = 2**20


def check_folder(folder: Path, allow_links: Sequence[Path] = ()) -> None:
    """Raises CheckpointError unless a folder holds one model, its links are allowed and its checksums are right.

    allow_links: links in the folder may lead into these folders.
    """
    if not (folder / "model_index.json").is_file():
        raise CheckpointError(f"{folder} is no model folder: model_index.json is missing{_advice(folder)}")
    parts = [folder / part for part in PARTS]
    inside = [file for part in PARTS for file in folder.glob(f"{part}/*")]
    check_links(folder, [folder / "model_index.json", folder / "sha256sums.txt", *parts, *inside], allow_links)
    if (folder / "sha256sums.txt").is_file():
        _check_sums(folder, folder / "sha256sums.txt")
    check_model_index(read_json(folder / "model_index.json"), str(folder / "model_index.json"))


def _advice(folder: Path) -> str:
    """What to give instead of a folder that is no model folder, where that can be seen."""
    if (folder.parent / "model_index.json").is_file() and folder.name in PARTS:
        return f"; it is a part of {folder.parent}, give that"
    snapshots = sorted(folder.glob("snapshots/*/model_index.json"), key=lambda path: path.stat().st_mtime)
    if snapshots:
        return f"; did you mean {snapshots[-1].parent}?"
    inside = [file for file in sorted(folder.glob("*.safetensors")) if not file.name.startswith(PART_STEMS)]
    return f"; did you mean {inside[0]}?" if inside else ""


def check_links(folder: Path, paths: Iterable[Path], allowed: Sequence[Path]) -> None:
    """Raises CheckpointError for a path that leads out of the folder, the hub's cache and the folders that are allowed.

    Snapshots in the hub's cache are links to ../../blobs.
    """
    try:
        roots = [folder.resolve(), *(root.resolve() for root in allowed)]
        if roots[0].parent.name == "snapshots" and roots[0].parent.parent.name.startswith("models--"):
            roots.append(roots[0].parent.parent)
        for path in paths:
            target = path.resolve()
            if not any(target.is_relative_to(root) for root in roots) and not target.is_relative_to(cache_folder()):
                raise CheckpointError(
                    f"{path} is a link to {target}, outside of the model folder; "
                    f"--allow-links {target if target.is_dir() else target.parent} follows it"
                )
    except (RuntimeError, OSError) as error:  # Python 3.13 calls it an OSError
        raise CheckpointError(f"{folder} has a link in it that leads in a circle or nowhere: {error}") from None


def _check_sums(folder: Path, sums: Path) -> None:
    """Raises CheckpointError unless every file listed as `sha256sum` does is there and as listed."""
    if sums.stat().st_size > MAX_SUMS_BYTES:
        raise CheckpointError(f"{sums} has more than {MAX_SUMS_BYTES} bytes")
    for line in sums.read_text(encoding="utf-8", errors="replace").splitlines():
        stated, _, name = line.partition(" ")
        file = folder / name[1:]  # a space for text or a star for binary
        if len(stated) != 64 or "\0" in name or not file.resolve().is_relative_to(folder.resolve()):
            raise CheckpointError(f"{sums}: {line!r:.120} is not a sum of a file in this folder")
        if not file.is_file():
            raise CheckpointError(f"{file} is missing; {sums.name} lists it")
        with file.open("rb") as content:
            if hashlib.file_digest(content, "sha256").hexdigest() != stated.lower():
                raise CheckpointError(f"{file} is not the file that {sums.name} lists; download it again")


def open_part(folder: Path, stem: str, variant: str | None = None) -> Weights:
    """Weights of one part, whole or in shards: the variant, or the plain ones, or those in half precision.

    A part that has no such variant gives its plain weights, as in diffusers: often the UNet alone has one. Raises
    CheckpointError.
    """
    found = variants(folder, stem)
    wanted = [variant, "", "fp16"] if variant is not None else ["", "fp16"]
    chosen = next((found[name] for name in wanted if name in found), None)
    if chosen is not None:
        return open_sharded(chosen) if chosen.suffix == ".json" else open_safetensors(chosen)
    if found:
        raise CheckpointError(f"{folder} has its weights only as {', '.join(sorted(found))}; --variant picks one")
    if pickles := sorted(file.name for file in folder.glob("*.bin")):
        raise CheckpointError(
            f"{folder} has its weights as a pickle ({pickles[0]}), which could run code when it is read; {WAY_OUT}"
        )
    raise CheckpointError(f"{folder}: {stem}.safetensors is missing")


class Reader(NamedTuple):
    """Functions that read weights: `file` from a single file, `part` from a part of a folder (see `open_part`)."""

    file: Callable[[Path], Weights]
    part: Callable[[Path, str, str | None], Weights]


SAFE = Reader(open_safetensors, open_part)


def variants(folder: Path, stem: str) -> dict[str, Path]:
    """Maps each variant of a part to its weight file or index of shards; "" is the plain variant."""
    name = re.compile(rf"{re.escape(stem)}(?:\.([\w-]+))?\.safetensors(\.index(?:\.([\w-]+))?\.json)?")
    found: dict[str, Path] = {}
    for file in sorted(folder.glob(f"{glob.escape(stem)}*")):  # an index comes after a file of the same variant
        if match := name.fullmatch(file.name):
            found[match[1] or match[3] or ""] = file
    return found


def check_variant(folder: Path, parts: Iterable[str], variant: str | None) -> None:
    """Raises CheckpointError unless at least one of the parts has that variant."""
    found = {name for part in parts for name in variants(folder / part, WEIGHT_STEMS[part])}
    if variant is not None and variant not in found:
        known = ", ".join(sorted(found - {""})) or "none"
        raise CheckpointError(f"{folder} has no weights of variant {variant!r:.80}; it has: {known}")
