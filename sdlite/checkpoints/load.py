"""Loads a model of any form, and converts between forms: finds out what a name is and calls the reader of its format.

    name --> diffusers folder (folder.py) | original file (single_file.py) | hub id (hub.py) | untrained preset

Models are loaded in float32 on the CPU. No file can run code (see weights.py and pickles.py).
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from sdlite.checkpoints.folder import read_folder, save_folder
from sdlite.checkpoints.hub import download, download_variant
from sdlite.checkpoints.parts import ModelParts as ModelParts
from sdlite.checkpoints.places import PRESETS, SHIPPED, CheckpointError as CheckpointError, check_model, shipped_folder
from sdlite.checkpoints.single_file import read_single_file, save_single_file
from sdlite.checkpoints.untrained import random_model
from sdlite.checkpoints.vae import load_vae
from sdlite.config import LoadOptions, ModelConfig, Prediction
from sdlite.files import check_file, check_folder, exported


def load_model(
    path: str | Path,
    *,
    prediction: Prediction | None = None,
    config: ModelConfig | None = None,
    ema: bool = False,
    variant: str | None = None,
    vae: str | Path | None = None,
    allow_links: Sequence[str | Path] = (),
) -> ModelParts:
    """Loads a diffusers folder, an original .safetensors file or a hub id, in float32 on the CPU.

    "emoji-128" is the model that ships; "tiny", "tiny-dit", "sd15" and "sd21" are untrained models of those sizes. If a
    file or folder has such a name, it is loaded instead.
    prediction, variant, vae, allow_links: see `LoadOptions`. config: for a single file whose size is not Stable
    Diffusion's. ema: use the moving average of the UNet from a single file that has both.
    Raises CheckpointError with one line.
    """
    files: dict[str, Any] = {"vae": vae, "variant": variant, "allow_links": tuple(allow_links)}
    return read_model(LoadOptions(model=path, prediction=prediction, **files), config=config, ema=ema)


def read_model(
    options: LoadOptions, *, config: ModelConfig | None = None, ema: bool = False, trust_pickle: bool = False
) -> ModelParts:
    """As `load_model`. trust_pickle: read pickles if there are no safetensors; device and dtype are not looked at."""
    name = SHIPPED if options.model is None else options.model
    check_model(name)
    location = Path(name)
    is_preset = name in PRESETS and not location.exists()
    if (config is not None or ema) and not location.is_file():
        raise CheckpointError(f"{name}: config and ema are for single files, and this is none")
    if options.variant is not None and (location.is_file() or is_preset):
        raise CheckpointError(f"{name} has no variants: variant={options.variant!r:.80} is for folders and hub ids")
    codec, notes = load_vae(options.vae, options) if options.vae is not None else (None, [])
    if location.is_file():
        parts = read_single_file(location, options, config=config, ema=ema, codec=codec, trust_pickle=trust_pickle)
    elif is_preset:
        preset = PRESETS[name]
        chosen = preset() if options.prediction is None else preset(prediction=options.prediction)
        parts = random_model(chosen, seed=0, codec=codec)
    else:
        folder, title = _find_folder(name, options.variant)
        parts = read_folder(folder, title, options, codec=codec, trust_pickle=trust_pickle)
    return replace(parts, notes=(*parts.notes, *notes))


def _find_folder(name: str, variant: str | None) -> tuple[Path, str]:
    """The folder of a model on this machine, fetched from the hub if it is none, and what to call it."""
    location = Path(name)
    if name == SHIPPED and not location.exists():
        location = shipped_folder()
    elif not location.is_dir():
        return (download(name) if variant is None else download_variant(name, variant)), name
    return exported(location, "model_index.json"), location.resolve().name


def convert(
    source: str | Path,
    target: str | Path,
    *,
    trust_pickle: bool = False,
    dtype: torch.dtype | None = None,
    config: ModelConfig | None = None,
    ema: bool = False,
    **options: Any,
) -> ModelParts:
    """Loads a model and saves it: as one file if target ends in .safetensors, else as a folder.

    trust_pickle: read pickles if there are no safetensors: a .ckpt file, or a folder of .bin files. config, ema,
    options: as for `load_model`. dtype: as for `save_folder`. Returns the parts; their notes say what was guessed.
    Raises the errors of `load_model`, `save_folder` and `save_single_file`.
    """
    goal = Path(target)
    as_file = goal.suffix == ".safetensors"
    check_file(goal, force=False) if as_file else check_folder(goal, force=False)  # before minutes of reading
    parts = read_model(LoadOptions(model=source, **options), config=config, ema=ema, trust_pickle=trust_pickle)
    if as_file:
        save_single_file(parts, goal, dtype=dtype)
    else:
        save_folder(parts, goal, dtype=dtype)
    return parts
