"""The export of a stage, which a later one reads: a JSON config and weights, both checked as untrusted files."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from sdlite.checkpoints.parts import check_same, shapes_of, weights_hash
from sdlite.checkpoints.places import CheckpointError
from sdlite.checkpoints.weights import open_safetensors
from sdlite.config import Record
from sdlite.files import read_json

Config = TypeVar("Config", bound=Record)
Module = TypeVar("Module", bound=nn.Module)


def read_config(kind: type[Config], path: Path) -> Config:
    """Raises ValueError or FileNotFoundError of one line that begins with the path."""
    fields = read_json(path)
    try:
        return kind(**fields)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def built(make: Callable[[], Module], path: Path) -> Module:
    """The module of a config without memory for its weights. Raises CheckpointError if none can be built of it."""
    try:
        with torch.device("meta"):
            return make()
    except ValueError as error:
        raise CheckpointError(f"{path}: {' '.join(str(error).split())}") from None


def fill(module: nn.Module, path: Path) -> None:
    """Gives a module the weights of a file, if names and shapes are its own and all are finite; counters are 0."""
    weights = open_safetensors(path)
    integers = {name: tensor for name, tensor in module.state_dict().items() if not tensor.is_floating_point()}
    counters = {name: torch.zeros_like(tensor, device="cpu") for name, tensor in integers.items()}
    own = {name: shape for name, shape in shapes_of(module).items() if name not in counters}
    check_same(own, weights.shapes, str(path))
    module.load_state_dict(counters | weights.read(own), assign=True)


def identity(module: nn.Module | None, *facts: Any) -> str:
    """What a part is known by in the settings of a run: a hash of its weights and of what else decides its output."""
    if module is None:
        return ""
    text = json.dumps([weights_hash({"": module}), *facts], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]
