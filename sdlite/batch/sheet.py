"""The contact sheet of a batch: images of a grid file under labelled axes, all others with their prompts."""

import itertools
from collections.abc import Mapping, Sequence
from contextlib import suppress
from io import BytesIO
from math import sqrt
from pathlib import Path
from typing import Any

from PIL.Image import Image
from PIL.PngImagePlugin import PngInfo

from sdlite.batch.plan import Item, Plan
from sdlite.batch.store import SHEET
from sdlite.files import write_file
from sdlite.images.files import MAX_PIXELS, decoded, open_picture
from sdlite.images.sheet import contact_sheet

LEAST_SIDE = 16  # pixels of an image on a sheet of very many
MARK = "sdlite contact sheet"  # in a sheet's text "Software": a later run replaces it, and nothing else


def check_place(place: Path, plan: Plan, folder: Path) -> None:
    """Raises ValueError or FileExistsError unless a sheet may be written to this file."""
    if place.suffix.lower() != ".png" or place.is_dir():
        raise ValueError(f"--contact-sheet={place} must be a .png file, e.g. {folder / SHEET}")
    if place.absolute() in {(folder / item.file_name).absolute() for item in plan.items}:
        raise ValueError(f"--contact-sheet={place} is the file of an image; give it another name")
    if place.exists() and place != folder / SHEET and not is_sheet(place):
        raise FileExistsError(f"--contact-sheet={place} exists and is no contact sheet; give it another name")


def is_sheet(path: Path) -> bool:
    """Whether a file is a contact sheet that `write_sheet` wrote."""
    with suppress(ValueError, OSError):
        return decoded(path).info.get("Software") == MARK
    return False


def write_sheet(plan: Plan, folder: Path, place: Path) -> None:
    """Draws all images of a batch that are done into one PNG; if they are many, smaller. Replaces an older sheet.

    Raises as `check_place` does.
    """
    check_place(place, plan, folder)
    scale = min(1.0, sqrt(MAX_PIXELS / sum(item.pixels for item in plan.items)))
    pictures = [_small(folder / item.file_name, scale) for item in plan.items]
    if not any(pictures):
        raise ValueError(f"{folder} holds no image of this batch to put on a contact sheet")
    axes = None if plan.axes is None else _labels(plan.axes, plan.items)
    sheet = contact_sheet(pictures, None if axes else [item.request.prompt for item in plan.items], axes=axes)
    text, data = PngInfo(), BytesIO()
    text.add_text("Software", MARK)
    sheet.save(data, "PNG", pnginfo=text)
    write_file(place, data.getvalue(), force=True)


def _small(path: Path, scale: float) -> Image | None:
    picture = open_picture(path) if path.is_file() else None
    if picture is not None:
        picture.thumbnail((max(LEAST_SIDE, picture.width * scale), max(LEAST_SIDE, picture.height * scale)))
    return picture


def _labels(axes: Mapping[str, Sequence[Any]], items: Sequence[Item]) -> tuple[str, list[str], list[str]] | None:
    """Corner, row and column labels: the last axis goes across, all combinations of the others go down.

    Row labels leave out axes of one value. If a cell has several images, they are side by side. None if the cells do
    not hold equally many.
    """
    if not axes or "num_images" in axes:
        return None
    *others, name = axes
    values = axes[name]
    rows = [dict(zip(others, row, strict=True)) for row in itertools.product(*(axes[other] for other in others))]
    others.sort(key=lambda other: other == "prompt")  # last: a long one would push out the rest
    differing = [other for other in others if len(axes[other]) > 1] or others
    down = [", ".join(f"{row[n]}" if n == "prompt" else f"{n} {row[n]}" for n in differing) for row in rows]
    each = len(items) // (len(rows) * len(values))
    return f"{name}:", down, [f"{value} #{k + 1}" if each > 1 else f"{value}" for value in values for k in range(each)]
