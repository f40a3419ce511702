"""The contact sheet of a batch: a grid file's pictures under labelled axes, any other's with their prompts."""

import itertools
from collections.abc import Mapping, Sequence
from math import sqrt
from pathlib import Path
from typing import Any

from PIL.Image import Image

from sdlite.batch.plan import Item, Plan
from sdlite.batch.store import SHEET
from sdlite.files import write_file
from sdlite.images import MAX_PIXELS, contact_sheet, open_picture, png_bytes

LEAST_SIDE = 16  # pixels of a picture on a sheet of very many


def write_sheet(plan: Plan, folder: Path) -> Path:
    """Draws all pictures of a batch that are there into DIR/contact-sheet.png, smaller if they are many."""
    pixels = sum((item.request.width or 0) * (item.request.height or 0) for item in plan.items)
    scale = min(1.0, sqrt(MAX_PIXELS / pixels))
    pictures = [_small(folder / item.file_name, scale) for item in plan.items]
    if not any(pictures):
        raise ValueError(f"{folder} holds no picture of this batch to put on a contact sheet")
    axes = None if plan.axes is None else _labels(plan.axes, plan.items)
    sheet = contact_sheet(pictures, None if axes else [item.request.prompt for item in plan.items], axes=axes)
    write_file(folder / SHEET, png_bytes(sheet), force=True)
    return folder / SHEET


def _small(path: Path, scale: float) -> Image | None:
    if not path.is_file():
        return None
    picture = open_picture(path)
    picture.thumbnail((max(LEAST_SIDE, picture.width * scale), max(LEAST_SIDE, picture.height * scale)))
    return picture


def _labels(axes: Mapping[str, Sequence[Any]], items: Sequence[Item]) -> tuple[str, list[str], list[str]] | None:
    """Corner, row and column labels: the last axis lies across, all combinations of the others go down.

    Several pictures of a cell lie side by side. None if the cells do not hold equally many.
    """
    if not axes or "num_images" in axes:
        return None
    *others, (name, values) = axes.items()
    down = [[str(value) if other == "prompt" else f"{other} {value}" for value in column] for other, column in others]
    rows = [", ".join(row) for row in itertools.product(*down)]
    each = len(items) // (len(rows) * len(values))
    return f"{name}:", rows, [f"{value} #{k + 1}" if each > 1 else f"{value}" for value in values for k in range(each)]
