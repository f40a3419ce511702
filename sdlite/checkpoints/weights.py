"""Safetensors files, alone or in shards: weights are read as data, checked before and while they are read, and written.

    8 bytes: length N | N bytes: JSON {name: {dtype, shape, data_offsets}} | tensors, end to end

Nothing in a file is trusted: not its suffix, sizes, names or numbers. Any fault is a CheckpointError of one line.
Pickles, which can run code when they are read, are recognised by content and refused.
"""

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sdlite import files
from sdlite.checkpoints.places import CheckpointError

T = TypeVar("T")
MAX_HEADER_BYTES = 16 * 2**20  # 20,000 tensors need about 4 MB
MAX_CONFIG_BYTES = 2**20  # Stable Diffusion's have 2 kB
MAX_INDEX_BYTES = 8 * 2**20
MAX_TENSORS = 20_000  # an SDXL file with EMA has 7,000
MAX_DIMENSIONS = 8
MAX_ELEMENTS = 2**48  # of a tensor, empty dimensions apart: beyond it PyTorch's own sizes overflow
# Weights are FLOATS; all else may be there, unread: position_ids, counters, parts in 8 bits.
FLOATS = ("F64", "F32", "F16", "BF16")
BITS = {  # of an element
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("I8", "U8", "BOOL", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}
NAME = re.compile(r"[\w.\-]{1,512}", re.ASCII)
PICKLES = (b"PK\x03\x04", b"PK\x05\x06", *(bytes([0x80, protocol]) for protocol in range(6)))
TAR_MAGIC = slice(257, 262)
OTHERS = {
    b"version https://git-lfs": "is a Git LFS pointer, not the weights; fetch them with `git lfs pull`",
    b"<": "is a web page, not weights; download the file itself",
    b"GGUF": "is a GGUF file; sdlite reads safetensors",
    b"\x89HDF": "is an HDF5 file; sdlite reads safetensors",
}
WAY_OUT = "convert it once, if you trust who made it: sdlite convert --trust-pickle OLD NEW"


@dataclass(frozen=True, eq=False)
class Weights:
    """The tensors of a model by name, read on demand. read: returns the named ones as finite float32 on the CPU.

    unread: names and dtypes of tensors that are not weights, such as integers.
    """

    shapes: Mapping[str, tuple[int, ...]]
    metadata: Mapping[str, str]
    read: Callable[[Iterable[str]], dict[str, Tensor]]
    unread: Mapping[str, str] = field(default_factory=dict)


def from_files(where: Path | str, make: Callable[..., T], /, *arguments: Any, **fields: Any) -> T:
    """make(...); a ValueError or a missing file becomes a CheckpointError of one line that names the place."""
    try:
        return make(*arguments, **fields)
    except (ValueError, FileNotFoundError) as error:
        text = " ".join(str(error).split())
        raise CheckpointError(text if str(where) in text else f"{where}: {text}") from None


def read_json(path: Path, max_bytes: int = MAX_CONFIG_BYTES) -> dict[str, Any]:
    """The JSON object in a file. Raises CheckpointError if it is missing, too large or not an object."""
    return from_files(path, files.read_json, path, max_bytes)


def open_safetensors(path: Path) -> Weights:
    """Checks a file's header and size. The tensors come later, by name."""
    if not path.is_file():
        raise CheckpointError(f"{path} is missing")
    try:
        header, data_bytes = _read_header(path)
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError("has a damaged header: __metadata__ must map names to text")
        entries = {name: _checked_entry(name, entry) for name, entry in header.items()}
        _check_extent(sorted(extent for *_, extent in entries.values()), data_bytes)
    except ValueError as error:
        raise CheckpointError(f"{path} {error}") from None
    shapes = {name: shape for name, (dtype, shape, *_) in entries.items() if dtype in FLOATS}
    unread = {name: dtype for name, (dtype, *_) in entries.items() if dtype not in FLOATS}

    def read(names: Iterable[str]) -> dict[str, Tensor]:
        try:
            with safe_open(path, framework="pt") as file:
                return {name: finite(file.get_tensor(name), f"{path}: {name}") for name in names}
        except SafetensorError as error:
            raise CheckpointError(f"{path} is not a sound safetensors file: {error}") from None

    return Weights(shapes, metadata, read, unread)


def _read_header(path: Path) -> tuple[dict[str, Any], int]:
    """The header as it is, and how many bytes follow it."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(max(TAR_MAGIC.stop, 9))
        length = int.from_bytes(start[:8], "little")
        if start[8:9] != b"{" or length > MAX_HEADER_BYTES:
            raise ValueError(_foreign(path, start))
        if length > size - 8:
            raise ValueError("is truncated; download it again")
        file.seek(8)
        text = file.read(length)
    try:
        header = files.parse_json(text)
    except ValueError as error:
        raise ValueError(f"has a damaged header: {error}") from None
    if len(header) > MAX_TENSORS:
        raise ValueError(f"has {len(header)} tensors, more than the {MAX_TENSORS} that any model needs")
    return header, size - 8 - length


def _foreign(path: Path, start: bytes) -> str:
    """What else a file is: a pickle, a web page, ..."""
    pickled = start.startswith(PICKLES) or start[TAR_MAGIC] == b"ustar"
    if pickled or path.suffix.lower() in (".ckpt", ".pt", ".pth", ".bin", ".pkl"):
        return f"is a pickle, which could run code when it is read; {WAY_OUT}"
    if not start:
        return "is empty"
    known = next((what for magic, what in OTHERS.items() if start.startswith(magic)), None)
    return known or "is not a safetensors file, or its header is damaged"


def _checked_entry(name: str, entry: Any) -> tuple[str, tuple[int, ...], tuple[int, int]]:
    """(dtype, shape, (start, end)) of a header entry."""
    if not NAME.fullmatch(name):
        raise ValueError(f"has a tensor named {name!r:.80}; only letters, digits, '.', '-' and '_' are allowed")
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"has a damaged header at {name}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        raise ValueError(f"has {name} in {dtype!r:.20}, which safetensors does not know")
    numbers = [*shape, *offsets] if isinstance(shape, list) and isinstance(offsets, list) else [None]
    whole = all(type(number) is int and 0 <= number < 2**63 for number in numbers)
    if not whole or len(offsets) != 2 or len(shape) > MAX_DIMENSIONS:
        raise ValueError(f"has a damaged header at {name}")
    if math.prod(max(side, 1) for side in shape) > MAX_ELEMENTS:
        raise ValueError(f"has {name} of shape {tuple(shape)}, which is too large")
    start, end = offsets
    if math.prod(shape) * BITS[dtype] != 8 * (end - start):
        raise ValueError(f"has {name} of shape {tuple(shape)} in {end - start} bytes of {dtype}")
    return dtype, tuple(shape), (start, end)


def _check_extent(extents: list[tuple[int, int]], data_bytes: int) -> None:
    """Raises ValueError unless the tensors, in order, lie end to end and fill the file."""
    if not extents:
        raise ValueError("has no tensors")
    position = extents[-1][1]
    if [0, *(end for _, end in extents)] != [*(start for start, _ in extents), position]:
        raise ValueError("has tensors that overlap or leave gaps")
    if position > data_bytes:
        raise ValueError(f"is truncated: {position - data_bytes} of {position} bytes are missing; download it again")
    if position < data_bytes:
        raise ValueError(f"is over-long: {data_bytes - position} bytes follow its tensors; download it again")


def finite(tensor: Tensor, what: str) -> Tensor:
    """The tensor as float32. Raises CheckpointError if it holds NaN or Inf."""
    tensor = tensor.detach().to(device="cpu", dtype=torch.float32)
    if tensor.numel() and not all(math.isfinite(bound.item()) for bound in tensor.aminmax()):
        raise CheckpointError(f"{what} has NaN or Inf in it; the file is damaged or its training failed")
    return tensor


def open_weights(index: Path) -> Weights:
    """The tensors of all files that a *.safetensors.index.json names, or of one file. Raises CheckpointError."""
    if index.suffix != ".json":
        return open_safetensors(index)
    places = read_json(index, MAX_INDEX_BYTES).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(place, str) for place in places.values()):
        raise CheckpointError(f"{index}: weight_map must map the names of tensors to files")
    shards: dict[str, Weights] = {}
    for place in sorted(set(places.values())):
        if not NAME.fullmatch(place) or not place.endswith(".safetensors"):
            raise CheckpointError(f"{index}: shard {place!r:.80} must be a .safetensors file next to it")
        shards[place] = open_safetensors(index.parent / place)
    for name, place in sorted(places.items()):
        if name not in shards[place].shapes and name not in shards[place].unread:
            raise CheckpointError(f"{index}: {name!r:.80} is not in {place}, where it is listed")
    return joined({name: shards[place] for name, place in places.items()})


def joined(places: Mapping[str, Weights]) -> Weights:
    """The weights of several files as one. places: which file each tensor is read from; their others are left out."""

    def read(names: Iterable[str]) -> dict[str, Tensor]:
        wanted = list(names)
        tensors: dict[str, Tensor] = {}
        for file in dict.fromkeys(places.values()):
            tensors |= file.read([name for name in wanted if places[name] is file])
        return tensors

    shapes = {name: file.shapes[name] for name, file in places.items() if name in file.shapes}
    return Weights(shapes, {}, read, {name: file.unread[name] for name, file in places.items() if name in file.unread})


def write_safetensors(
    path: Path, tensors: Mapping[str, Tensor], dtype: torch.dtype | None = None, **metadata: str
) -> None:
    """Writes dense copies that share no memory, in `dtype`, or each in its own with None."""
    copies = {
        name: tensor.detach().to("cpu", dtype or tensor.dtype).clone(memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
    }
    save_file(copies, path, {"format": "pt", **metadata})


def write_shards(
    folder: Path, stem: str, tensors: Mapping[str, Tensor], dtype: torch.dtype | None, max_size: int | None
) -> None:
    """One file, or several of up to max_size bytes with an index, as diffusers and transformers name them."""
    sizes = {name: tensor.numel() * (dtype or tensor.dtype).itemsize for name, tensor in tensors.items()}
    shards: list[list[str]] = [[]]
    for name in sizes:
        if max_size is not None and shards[-1] and sum(sizes[other] for other in [*shards[-1], name]) > max_size:
            shards.append([])
        shards[-1].append(name)
    if len(shards) == 1:
        write_safetensors(folder / f"{stem}.safetensors", tensors, dtype)
        return
    places: dict[str, str] = {}
    for i, names in enumerate(shards, 1):
        file = f"{stem}-{i:05}-of-{len(shards):05}.safetensors"
        write_safetensors(folder / file, {name: tensors[name] for name in names}, dtype)
        places |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": places}
    write_json(folder / f"{stem}.safetensors.index.json", index)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
