"""The stages of training by name.

    codec --OUT/export--+
    text  --OUT/export--+--> denoiser --> OUT/export is a model folder

segmentation stands alone; `sdlite.segmentation.Segmenter` loads its OUT/export.
"""

from importlib import import_module
from pathlib import Path
from typing import Any

from sdlite.training.loop import fit
from sdlite.training.options import Stage, options_of


def train(stage: Stage, data: Path, out: Path, **fields: Any) -> None:
    """Trains a stage into `out`; continues the run if `out` holds one.

    fields: those of the stage's record in options.py; None stands for the default. The module of the stage makes its
    task. Raises ValueError or FileNotFoundError that says what is missing.
    """
    options = options_of(stage, fields)
    fit(import_module(f"sdlite.training.{stage}").make_task(data, out, options), options, out)
