"""Reads weights as data: safetensors files, alone or in shards, checked before and while they are read.

    8 bytes: length N | N bytes: JSON {name: {dtype, shape, data_offsets}} | tensors, end to end

Nothing in a file is trusted: not its suffix, sizes, names or numbers. Any fault is a CheckpointError of one line.
Pickles, which can run code when they are read, are recognised by content and refused.
"""

import hashlib
import math
import re
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from sdlite import files
from sdlite.checkpoints.places import CheckpointError as CheckpointError

T = TypeVar("T")
MAX_HEADER_BYTES = 16 * 2**20  # 20,000 tensors need about 4 MB
MAX_CONFIG_BYTES = 2**20  # Stable Diffusion's have 2 kB
MAX_INDEX_BYTES = 8 * 2**20
MAX_TENSORS = 20_000  # an SDXL file with EMA has 7,000
MAX_DIMENSIONS = 8
SHOWN_DIFFERENCES = 5
MAX_ELEMENTS = 2**48  # of a tensor, empty dimensions apart: beyond it PyTorch's own sizes overflow
# Bits of an element. Weights are FLOATS; all else may be there, unread: position_ids, counters, parts in 8 bits.
FLOATS = {"F64": 64, "F32": 32, "F16": 16, "BF16": 16}
OTHER_DTYPES = {"F6_E2M3": 6, "F6_E3M2": 6, "F4": 4, "C64": 64, "BOOL": 8} | {
    **dict.fromkeys(("I64", "U64"), 64),
    **dict.fromkeys(("I32", "U32"), 32),
    **dict.fromkeys(("I16", "U16"), 16),
    **dict.fromkeys(("I8", "U8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
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


@dataclass(frozen=True)
class Weights:
    """The tensors of a model by name, read on demand. read: returns the named ones as finite float32 on the CPU.

    unread: names and dtypes of tensors that are not weights, such as integers.
    """

    shapes: Mapping[str, tuple[int, ...]]
    metadata: Mapping[str, str]
    read: Callable[[Iterable[str]], dict[str, Tensor]]
    unread: Mapping[str, str] = field(default_factory=dict)


def read_json(path: Path, max_bytes: int = MAX_CONFIG_BYTES) -> dict[str, Any]:
    """The JSON object in a file. Raises CheckpointError if it is missing, too large or not an object."""
    try:
        return files.read_json(path, max_bytes)
    except (ValueError, FileNotFoundError) as error:
        raise CheckpointError(str(error)) from None


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """All floating-point tensors of a file, as finite float32 on the CPU. Raises CheckpointError."""
    weights = open_safetensors(path)
    return weights.read(weights.shapes)


def open_safetensors(path: Path) -> Weights:
    """Checks a file's header and size. The tensors come later, by name."""
    if not path.is_file():
        raise CheckpointError(f"{path} is missing")
    try:
        header = _read_header(path)
        entries = {name: _checked_entry(name, entry) for name, entry in header.items() if name != "__metadata__"}
        _check_extent(path, [(start, end) for _, _, start, end in entries.values()])
    except ValueError as error:
        raise CheckpointError(f"{path} {error}") from None
    metadata = header.get("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{path}: __metadata__ must map names to text")
    shapes = {name: shape for name, (dtype, shape, *_) in entries.items() if dtype in FLOATS}
    unread = {name: dtype for name, (dtype, *_) in entries.items() if dtype not in FLOATS}

    def read(names: Iterable[str]) -> dict[str, Tensor]:
        try:
            with safe_open(path, framework="pt") as file:
                return {name: finite(file.get_tensor(name), f"{path}: {name}") for name in names}
        except SafetensorError as error:
            raise CheckpointError(f"{path} is not a sound safetensors file: {error}") from None

    return Weights(shapes, metadata, read, unread)


def _read_header(path: Path) -> dict[str, Any]:
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
    if not isinstance(header, dict):
        raise ValueError("has a damaged header: not a JSON object")
    if len(header) > MAX_TENSORS:
        raise ValueError(f"has {len(header)} tensors, more than the {MAX_TENSORS} that any model needs")
    return header


def _foreign(path: Path, start: bytes) -> str:
    """What a file is that is no safetensors file."""
    pickled = start.startswith(PICKLES) or start[TAR_MAGIC] == b"ustar"
    if pickled or path.suffix.lower() in (".ckpt", ".pt", ".pth", ".bin", ".pkl"):
        return f"is a pickle, which could run code when it is read; {WAY_OUT}"
    if not start:
        return "is empty"
    known = next((what for magic, what in OTHERS.items() if start.startswith(magic)), None)
    return known or "is not a safetensors file, or its header is damaged"


def _checked_entry(name: str, entry: Any) -> tuple[str, tuple[int, ...], int, int]:
    """(dtype, shape, start, end) of a header entry."""
    if not NAME.fullmatch(name):
        raise ValueError(f"has a tensor named {name!r:.80}; only letters, digits, '.', '-' and '_' are allowed")
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"has a damaged header at {name}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    known = FLOATS | OTHER_DTYPES
    if not isinstance(dtype, str) or dtype not in known:
        raise ValueError(f"has {name} in {dtype!r:.20}, which safetensors does not know")
    numbers = [*shape, *offsets] if isinstance(shape, list) and isinstance(offsets, list) else []
    if len(numbers) < 2 or len(offsets) != 2 or len(shape) > MAX_DIMENSIONS:
        raise ValueError(f"has a damaged header at {name}")
    if not all(type(number) is int and 0 <= number < 2**63 for number in numbers):
        raise ValueError(f"has a damaged header at {name}")
    if math.prod(max(side, 1) for side in shape) > MAX_ELEMENTS:
        raise ValueError(f"has {name} of shape {tuple(shape)}, which is too large")
    if math.prod(shape) * known[dtype] != 8 * (offsets[1] - offsets[0]):
        raise ValueError(f"has {name} of shape {tuple(shape)} in {offsets[1] - offsets[0]} bytes of {dtype}")
    return dtype, tuple(shape), offsets[0], offsets[1]


def _check_extent(path: Path, extents: list[tuple[int, int]]) -> None:
    """Raises ValueError unless the tensors lie end to end and fill the file."""
    if not extents:
        raise ValueError("has no tensors")
    with path.open("rb") as file:
        data = path.stat().st_size - 8 - int.from_bytes(file.read(8), "little")
    position = 0
    for start, end in sorted(extents):
        if start != position:
            raise ValueError("has tensors that overlap or leave gaps")
        position = end
    if position > data:
        raise ValueError(f"is truncated: {position - data} of {position} bytes are missing; download it again")
    if position < data:
        raise ValueError(f"is over-long: {data - position} bytes follow its tensors; download it again")


def finite(tensor: Tensor, what: str) -> Tensor:
    """The tensor as float32. Raises CheckpointError if it holds NaN or Inf."""
    tensor = tensor.detach().to(device="cpu", dtype=torch.float32)
    if tensor.numel() and not all(math.isfinite(bound.item()) for bound in tensor.aminmax()):
        raise CheckpointError(f"{what} has NaN or Inf in it; the file is damaged or its training failed")
    return tensor


def open_sharded(index: Path) -> Weights:
    """The tensors of all files that a *.safetensors.index.json names. Raises CheckpointError."""
    places = read_json(index, MAX_INDEX_BYTES).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(place, str) for place in places.values()):
        raise CheckpointError(f"{index}: weight_map must map the names of tensors to files")
    for place in sorted(set(places.values())):
        if not NAME.fullmatch(place) or not place.endswith(".safetensors"):
            raise CheckpointError(f"{index}: shard {place!r:.80} must be a .safetensors file next to it")
    shards = {place: open_safetensors(index.parent / place) for place in sorted(set(places.values()))}
    for place, shard in shards.items():
        named = {name for name in places if places[name] == place}
        if lost := sorted(named - shard.shapes.keys() - shard.unread.keys()):
            raise CheckpointError(f"{index}: {lost[0]!r:.80} is not in {place}, where it is listed")

    def read(names: Iterable[str]) -> dict[str, Tensor]:
        wanted = list(names)
        parts = [shard.read([n for n in wanted if places[n] == place]) for place, shard in shards.items()]
        return {name: tensor for part in parts for name, tensor in part.items()}

    listed = [(name, shards[place]) for name, place in places.items()]  # a shard's other tensors belong to no model
    shapes = {name: shard.shapes[name] for name, shard in listed if name in shard.shapes}
    return Weights(shapes, {}, read, {name: shard.unread[name] for name, shard in listed if name in shard.unread})


def shapes_of(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def check_same(
    expected: Mapping[str, tuple[int, ...]],
    found: Mapping[str, tuple[int, ...]],
    what: str,
    unread: Mapping[str, str] | None = None,
) -> list[str]:
    """A note, in a list, on tensors that are found and not expected; they are not used.

    unread: names and dtypes of tensors that are no weights. Raises CheckpointError with the first differences and their
    likely cause if one that is expected is missing or has another shape.
    """
    unread = unread or {}
    missing = [
        f"{name} is in {unread[name]}, not one of {', '.join(FLOATS)}" if name in unread else f"{name} is missing"
        for name in expected
        if name not in found
    ]
    reshaped = [
        f"{name} is {found[name]}, not {shape}"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    extra = [name for name in found if name not in expected]
    if not missing and not reshaped:
        return [f"{what}: not used: {_first(extra)}"] if extra else []
    differences = [*missing, *(f"{name} is not expected" for name in extra), *reshaped]
    if 2 * len(differences) > len(expected):
        cause = "these are another model's weights, or another model's config"
    elif not missing and not extra:
        cause = "the config is another model's"
    else:
        cause = "the file is incomplete" if not extra else "the file was edited or is another model's"
    raise CheckpointError(f"{what}: {_first(differences)}. Likely {cause}.")


def _first(entries: list[str]) -> str:
    """The first few, and how many more there are."""
    more = len(entries) - SHOWN_DIFFERENCES
    return "; ".join(entries[:SHOWN_DIFFERENCES]) + (f"; and {more} more" if more > 0 else "")


def fill(
    module: nn.Module,
    weights: Weights,
    what: str,
    renamed: Callable[[Mapping[str, Any]], dict[str, Any]] = dict,
) -> list[str]:
    """Gives a module its weights; notes on what is not used. renamed: maps the file's names to the module's, or drops
    them. Raises CheckpointError if one is missing, has another shape or is not finite.
    """
    keys = from_files(what, renamed, {name: name for name in weights.shapes})
    expected = shapes_of(module)
    found = {name: weights.shapes[key] for name, key in keys.items()}
    notes = check_same(expected, found, what, from_files(what, renamed, weights.unread))
    tensors = weights.read(keys[name] for name in expected)
    module.load_state_dict({name: tensors[keys[name]] for name in expected}, assign=True)
    return notes


def from_files(where: Path | str, make: Callable[..., T], *arguments: Any) -> T:
    """make(*arguments), with the errors of files that do not fit as CheckpointErrors."""
    try:
        return make(*arguments)
    except (ValueError, FileNotFoundError) as error:
        text = " ".join(str(error).split())
        raise CheckpointError(text if str(where) in text else f"{where}: {text}") from None


def weights_hash(parts: Mapping[str, nn.Module]) -> str:
    """sha256 over names, shapes and float32 values of all weights: the same for every file layout of a model."""

    def digest(name: str, tensor: Tensor) -> bytes:
        values = tensor.detach().to("cpu", torch.float32).contiguous()
        start = f"{name} {tuple(values.shape)} ".encode()
        return hashlib.sha256(start + hashlib.sha256(values.view(-1).numpy().data).digest()).digest()

    named = {f"{part}.{name}": t for part, module in parts.items() for name, t in module.state_dict().items()}
    with ThreadPoolExecutor(max_workers=4) as pool:
        digests = pool.map(digest, sorted(named), [named[name] for name in sorted(named)])
    return hashlib.sha256(b"".join(digests)).hexdigest()
