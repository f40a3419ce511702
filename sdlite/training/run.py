"""The folder of a training run. Each file is written whole or not at all, and read as an untrusted file.

    OUT/config.json        its TrainConfig and the settings of its task, written with every checkpoint
    OUT/log.jsonl          a line per report; a resumed run first drops the lines after the last checkpoint
    OUT/state-<samples>/   a checkpoint: safetensors files under 16 MB, and state.json with their checksums

A resumed run must have the same data, parts and network. Rate, batch size and other settings may change.
"""

import json
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

import torch
from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from sdlite.config import Record
from sdlite.files import atomic_folder, checksum, read_json, write_file
from sdlite.training.options import Call, Pace

SHARD_BYTES = 15 * 2**20  # so that a file stays under 16 MB with its header
KEPT = 2  # checkpoints: the last, and the one before it should the last be damaged
FORGOTTEN, LOGGED = set(Call.model_fields), set(Pace.model_fields)
DATA = {"data": "other captions or file names", "pictures": "other images", "phrases": "another phrases.txt"}
OTHERS = {
    "codec": "another codec",
    "text": "another text encoder",
    "teacher": "another teacher",
    "start": "another model to start from",
}
OTHER = ("optimizer.", "scaler.")  # what begins the names of tensors whose shapes a checkpoint decides
Count = Annotated[int, Field(strict=True, ge=0)]
Settings = Mapping[str, Any]
Found = TypeVar("Found")
Changes = dict[str, list[Any]]  # name -> [before, now]


class Stated(Record):
    """The fields of state.json. sums: checksums of the files; runs of older versions have none."""

    samples: Count
    tensors: Count
    sums: dict[str, str] = Field(default_factory=dict)


def checkpoints(out: Path) -> list[Path]:
    """The checkpoints of a run, oldest first; they may be damaged."""
    found = [path for path in out.glob("state-*") if re.fullmatch(r"state-\d{10}", path.name)]
    return sorted(path for path in found if (path / "state.json").is_file())


def write_checkpoint(out: Path, samples: int, tensors: Mapping[str, Tensor]) -> None:
    """Writes OUT/state-<samples>. Removes later ones, which were damaged, and all but the last KEPT."""
    folder = out / f"state-{samples:010}"
    check_finite(tensors, f"after {samples} samples")
    with atomic_folder(folder, force=True) as temporary:
        shards: list[dict[str, Tensor]] = []
        room = -1
        for name, tensor in tensors.items():
            if tensor.nbytes > room:
                shards.append({})
                room = SHARD_BYTES
            shards[-1][name] = tensor.detach().to("cpu").clone(memory_format=torch.contiguous_format)
            room -= tensor.nbytes
        for i, shard in enumerate(shards):
            save_file(shard, temporary / f"state-{i:05}.safetensors")
        sums = {file.name: checksum(file) for file in sorted(temporary.iterdir())}
        stated = Stated(samples=samples, tensors=len(tensors), sums=sums)
        write_file(temporary / "state.json", stated.model_dump_json().encode())
    there = checkpoints(out)
    newest = there.index(folder)
    for old in there[: max(0, newest + 1 - KEPT)] + there[newest + 1 :]:
        shutil.rmtree(old)


def read_checkpoint(folder: Path, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, dict[str, Tensor]]:
    """The number of samples and the tensors of a checkpoint, all finite.

    shapes: tensors that it must have; the names of all others begin with one of OTHER. Raises ValueError of one line.
    """
    try:
        stated = Stated(**read_json(folder / "state.json"))
        files = sorted(folder.glob("*.safetensors"))
        if stated.sums and stated.sums != {file.name: checksum(file) for file in files}:
            raise ValueError("a file is missing or is not as it was written")
        tensors = {name: tensor for file in files for name, tensor in load_file(file).items()}
        if len(tensors) != stated.tensors or folder.name != f"state-{stated.samples:010}":
            raise ValueError("state.json does not belong to the other files")
        check_finite(tensors, "in the checkpoint")
    except (OSError, ValueError, TypeError, SafetensorError, FloatingPointError) as error:
        raise ValueError(f"{folder} is damaged: {' '.join(str(error).split()):.200}") from None
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items() if not name.startswith(OTHER)}
    if found != shapes:
        name = next(name for name in [*shapes, *found] if found.get(name) != shapes.get(name))
        raise ValueError(
            f"{folder} is damaged or of another model; delete it, or train into another folder: {name} is "
            f"{found.get(name, 'missing')} and must be {shapes.get(name, 'absent')}"
        )
    return stated.samples, tensors


def last_sound(out: Path, load: Callable[[Path], Found]) -> tuple[Found | None, list[str]]:
    """What `load` returns for the last checkpoint that it can load, and a note for each damaged one after it.

    None without a checkpoint. Raises ValueError if all are damaged.
    """
    faults: list[str] = []
    for folder in reversed(checkpoints(out)):
        try:
            return load(folder), [f"{fault}; going on from {folder.name}" for fault in faults]
        except ValueError as error:
            faults.append(str(error))
    if faults:
        raise ValueError(faults[0])
    return None, []


def check_finite(tensors: Mapping[str, Tensor], when: str) -> None:
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise FloatingPointError(f"{name} has values that are not finite {when}; try a lower --lr")


def changes(out: Path, ours: Settings, *, new_data: bool) -> Changes:
    """The allowed differences between the settings of the run in `out` and ours; empty without a run.

    Raises ValueError that names a difference which is not allowed; new_data allows other data.
    """
    if not checkpoints(out) or not (out / "config.json").exists():
        return {}
    try:
        theirs = {"optimizer": "adamw"} | _flat(read_json(out / "config.json"))  # older runs knew no other
    except ValueError as error:
        raise ValueError(f"{error}; delete that file to go on without a check of the settings") from None
    changed = {name: [theirs[name], value] for name, value in _flat(ours).items() if theirs.get(name, value) != value}
    for name, (before, now) in changed.items():
        if name in FORGOTTEN | LOGGED or (name in DATA and new_data):
            continue
        what = f"{out} is a run with {name}={' '.join(str(before).split()):.60}, not {now}"
        if name in DATA:
            raise ValueError(f"{what}: {DATA[name]}; --new-data goes on with them, or give another folder")
        kind = f": {OTHERS[name]}" if name in OTHERS else ""
        raise ValueError(f"{what}{kind}; resume it with that, or give another folder")
    return {name: change for name, change in changed.items() if name not in FORGOTTEN}


def write_settings(out: Path, settings: Settings) -> None:
    write_file(out / "config.json", (json.dumps(settings, indent=1) + "\n").encode(), force=True)


def begin_log(out: Path, samples: int) -> None:
    """Keeps the log's lines on the first `samples` samples; drops those that a killed process wrote later."""
    path = out / "log.jsonl"
    lines = path.read_bytes().splitlines() if path.is_file() else []
    kept = [line for line in lines if _samples_of(line) <= samples] if samples else []
    write_file(path, b"".join(line + b"\n" for line in kept), force=True)


def add_to_log(out: Path, line: Mapping[str, Any]) -> None:
    with (out / "log.jsonl").open("a") as log:
        log.write(json.dumps(line) + "\n")


def _samples_of(line: bytes) -> float:
    """Number of samples in a line of the log; infinite for an incomplete line."""
    try:
        samples = json.loads(line)["samples"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return float("inf")
    return samples if isinstance(samples, int) else float("inf")


def _flat(settings: Settings, prefix: str = "") -> dict[str, Any]:
    """Nested settings as names with dots, with the values that JSON returns."""
    flat: dict[str, Any] = {}
    for name, value in json.loads(json.dumps(settings)).items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat
