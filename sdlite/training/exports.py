"""Files of tensors between stages: exports, which later stages read as untrusted files, and caches.

OUT/export/<name>.json          how the module is made
OUT/export/<name>.safetensors   its weights
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sdlite.checkpoints.parts import check_same, shapes_of, weights_hash
from sdlite.checkpoints.weights import from_files, open_safetensors
from sdlite.config import Record
from sdlite.files import atomic_file, exported, read_json

Config = TypeVar("Config", bound=Record)
Module = TypeVar("Module", bound=nn.Module)


def save_export(name: str, module: nn.Module, config: Record, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {key: tensor.cpu().contiguous() for key, tensor in module.state_dict().items()}
    save_file(tensors, folder / f"{name}.safetensors")
    (folder / f"{name}.json").write_text(config.model_dump_json(indent=1) + "\n")


def read_config(kind: type[Config], path: Path) -> Config:
    """Raises ValueError or FileNotFoundError of one line that begins with the path."""
    return from_files(path, kind, **read_json(path))


def built(make: Callable[[], Module], path: Path) -> Module:
    """The module of a config without memory for its weights. Raises CheckpointError if none can be built of it."""
    with torch.device("meta"):
        return from_files(path, make)


def fill(module: nn.Module, path: Path) -> None:
    """Gives a module the weights of a file, if names and shapes are its own and all are finite; counters are 0."""
    weights = open_safetensors(path)
    integers = {name: tensor for name, tensor in module.state_dict().items() if not tensor.is_floating_point()}
    counters = {name: torch.zeros_like(tensor, device="cpu") for name, tensor in integers.items()}
    own = {name: shape for name, shape in shapes_of(module).items() if name not in counters}
    check_same(own, weights.shapes, str(path))
    module.load_state_dict(counters | weights.read(own), assign=True)


def find_export(name: str, folder: Path) -> Path:
    """The folder of a stage's export. folder: that, or the run that holds it. Raises FileNotFoundError."""
    folder = exported(folder, f"{name}.json")
    if not (folder / f"{name}.json").is_file():
        raise FileNotFoundError(f"{folder} holds no {name}; run `sdlite train {name}` first and give its export folder")
    return folder


def load_export(
    name: str, folder: Path, kind: type[Config], make: Callable[[Config], Module], part: str = ""
) -> Module:
    """The frozen module that `save_export` wrote. make: builds it from its config. part: what in it has the weights."""
    path = find_export(name, folder) / f"{name}.json"
    config = read_config(kind, path)
    module = built(lambda: make(config), path)
    fill(module.get_submodule(part), path.with_suffix(".safetensors"))
    return module.eval().requires_grad_(False)


def identity(module: nn.Module, *facts: Any) -> str:
    """Names a part in the settings of a run: a hash of its weights and of everything else that decides its output."""
    text = json.dumps([weights_hash({"": module}), *facts], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def key_of(**facts: Any) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def cached(path: Path | None, key: str, make: Callable[[], Mapping[str, Tensor]]) -> Mapping[str, Tensor]:
    """The result of make(), or the file at path if it was written with the same key.

    key: a hash of everything that the tensors depend on. A file with another key, or a damaged one, is replaced.
    """
    if path is None:
        return make()
    if path.is_file():
        with suppress(SafetensorError, OSError), safe_open(path, framework="pt") as file:
            if (file.metadata() or {}).get("key") == key:
                return load_file(path)
    tensors = {name: tensor.contiguous() for name, tensor in make().items()}
    with atomic_file(path, force=True) as temporary:
        save_file(tensors, temporary, {"key": key})
    return tensors
