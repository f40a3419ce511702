"""The places of a model: a file, a folder, the model that ships, an untrained preset, or the hub.

Imports nothing heavy, so that the command line can refuse a wrong name at once.
"""

import re
from collections.abc import Callable, Sequence
from pathlib import Path

from sdlite.config import ModelConfig, sd15, sd21, tiny, tiny_dit

SHIPPED = "emoji-128"
SHIPPED_STYLES = ("noto style", "twemoji style", "fluent flat style", "fluent 3d style")  # at the end of a prompt
PRESETS: dict[str, Callable[..., ModelConfig]] = {"tiny": tiny, "tiny-dit": tiny_dit, "sd15": sd15, "sd21": sd21}
HUB_ID = re.compile(r"\w[\w.\-]{0,95}/\w[\w.\-]{0,95}", re.ASCII)
FILES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin", ".gguf")  # a name that ends so is a file's


class CheckpointError(ValueError):
    """A model cannot be loaded. The message is one line that names the file and what is wrong with it."""


def shipped_folder() -> Path:
    """The folder of the model that ships: inside an installed package, beside the package in a clone."""
    package = Path(__file__).parents[1]
    places = [folder / "weights" / SHIPPED for folder in (package, package.parent)]
    return next((place for place in places if place.is_dir()), places[-1])


def is_hub_id(name: str) -> bool:
    """Whether a name can be one of the hub's: org/name, where org is not a folder here."""
    if HUB_ID.fullmatch(name) is None or name.lower().endswith(FILES):
        return False
    return Path(name).parts[0] not in (".", "..") and not Path(Path(name).parts[0]).exists()


def check_model(name: str) -> None:
    """Raises CheckpointError for a name that no model can have. It does not ask the hub."""
    if name == "" or not _can_be(name, (SHIPPED, *PRESETS)):
        fault = f"{name} does not exist" if name else "model is empty"
        raise CheckpointError(f"{fault}; give a model folder, a .safetensors file or a hub id (org/name)")


def check_vae(name: str) -> None:
    """Raises CheckpointError for a name that no VAE can have; see `check_model`."""
    if not _can_be(name, ("tiny",)):
        advice = "give a .safetensors file, the folder of a VAE or a model, or tiny"
        raise CheckpointError(f"vae={name!r} does not exist; {advice}")


def _can_be(name: str, known: Sequence[str]) -> bool:
    return Path(name).is_file() or Path(name).is_dir() or name in known or is_hub_id(name)
