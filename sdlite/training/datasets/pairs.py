"""Images and masks of a data folder; what the masks mean is decided from all of them.

    DIR/train/metadata.jsonl   one line per image: {"file_name": "a.png", "mask_file_name": "masks/a.png", ...}
    mask                       8 bits: the class number of each pixel, 255 where it does not count
                               or black and white: white is class 1

validation/ or test/ has the same layout and is used to measure. Hugging Face `datasets` loads the folder as an
"imagefolder".
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sdlite.images.files import decoded
from sdlite.segmentation.pixels import FORMATS, MAX_PIXELS, pixels_of, standardized, statistics
from sdlite.segmentation.segmenter import mirrored
from sdlite.training.datasets.folder import MASKED, Records, read_records

IGNORED = 255  # in masks, as in PASCAL VOC
SPLITS = ("train", "validation", "test")
SPARSE = 32  # a highest class from here on must have half of the numbers below it in use
MOST_CLASSES = 192  # no known set of labels has as many; grey levels go up to 254
NEAR = 16  # grey levels from black or white that are still black or white, as JPEG and smooth edges make them
BLACK_OR_WHITE = 0.95  # part of the pixels that must be near either for masks to be taken as black and white
GREY = ("1", "L", "LA", "I", "F", "I;16", "I;16B")


class Labels(NamedTuple):
    """What the masks mean. white: they are black and white; values above half are class 1."""

    classes: int
    white: bool
    notes: tuple[str, ...] = ()


class Pair:
    """An image, (C, H, W), and its mask, (H, W), both uint8 where they can be. white: of `Labels`."""

    def __init__(self, folder: Path, record: Mapping[str, str], channels: int, white: bool = False) -> None:
        self.pixels = pixels_of(decoded(folder / record["file_name"], FORMATS, MAX_PIXELS), channels)
        self.over = statistics(self.pixels)  # once: a sample is a small part of a large photo
        mask = read_mask(folder / record["mask_file_name"])
        values = torch.frombuffer(bytearray(mask.tobytes()), dtype=torch.uint8).view(mask.height, mask.width)
        self.mask = (values >= 128).byte() if white else values
        if self.mask.shape != self.pixels.shape[1:]:
            raise ValueError(f"{record['mask_file_name']} and its image must have one size")

    def sample(self, side: int, margin: int, generator: np.random.Generator) -> tuple[Tensor, Tensor]:
        """Image (C, side + 2 margin, the same), standardized over the whole image, and mask (side, side)."""
        lines, inner = [], []
        for size in self.mask.shape:
            start = int(generator.integers(min(0, size - side), max(0, size - side) + 1))
            line = mirrored(start - margin, start + side + margin, size)
            line = line.flip(0) if generator.random() < 0.5 else line
            lines.append(line)
            inner.append(line[margin : margin + side])
        values = standardized(self.pixels[:, lines[0]][:, :, lines[1]], self.over)
        mask = self.mask[inner[0]][:, inner[1]].long()
        return (values.mT, mask.mT) if generator.random() < 0.5 else (values, mask)


def read_mask(path: Path) -> Image.Image:
    """A mask as an image of mode "L" or "P" with the values of the file. Raises ValueError for other kinds."""
    mask = decoded(path, FORMATS, MAX_PIXELS)
    if mask.mode == "1":
        return mask.convert("L")
    if mask.mode in ("RGB", "RGBA", "LA") and _is_grey(mask):
        return mask.getchannel(0)
    if mask.mode not in ("L", "P"):
        raise ValueError(f"{path} is {mask.mode}; a mask has 8 bits: the number of a class, or black and white")
    return mask


def _is_grey(image: Image.Image) -> bool:
    """Whether all colours are equal and nothing is transparent."""
    pixels = np.asarray(image)
    colours = pixels[..., :-1] if image.mode.endswith("A") else pixels
    opaque = not image.mode.endswith("A") or bool((pixels[..., -1] == 255).all())
    return opaque and bool((colours == colours[..., :1]).all())


def labels_of(data: Path) -> Labels:
    """Decides what the masks mean from the values in all splits.

    Raises ValueError for masks that are neither class numbers nor black and white.
    """
    files = [data / record["mask_file_name"] for record in _all_records(data)]
    counts = np.sum([read_mask(file).histogram() for file in files], axis=0)
    used = np.flatnonzero(counts[:IGNORED])
    highest = int(used.max(initial=0))
    lossy = next((file for file in files if _format(file) == "JPEG"), None)
    only_white = highest == 0 and counts[IGNORED] > 0 and counts[0] > 0  # else nothing would count but class 0
    if lossy is None and highest < MOST_CLASSES and highest < max(SPARSE, 2 * len(used)) and not only_white:
        return Labels(max(highest + 1, 2), False)
    black, white = counts[:NEAR].sum(), counts[-NEAR:].sum()
    if black and white and black + white >= BLACK_OR_WHITE * counts.sum():
        grey = "" if only_white else f", grey is cut at half ({len(used)} levels below white)"
        return Labels(2, True, (f"the masks are black and white: white is class 1{grey}",))
    if lossy is not None:
        raise ValueError(f"{lossy} is a JPEG, which changes the values of a mask; save class numbers as PNG")
    shown = ", ".join(map(str, used[:8])) + (" ..." if len(used) > 8 else "")
    raise ValueError(
        f"the masks of {data} have the values {shown}: neither class numbers (0, 1, 2 ...; {IGNORED} does not count) "
        "nor black and white; number the classes from 0 on"
    )


def channels_of(data: Path) -> Literal[1, 3]:
    """1 if all images of all splits are grey, else 3."""
    modes = {decoded(data / record["file_name"], FORMATS, MAX_PIXELS).mode for record in _all_records(data)}
    return 1 if modes <= set(GREY) else 3


def _all_records(data: Path) -> Records:
    return [record for split in SPLITS for record in read_records(data, split, MASKED)]


def _format(path: Path) -> str | None:
    with Image.open(path, formats=FORMATS) as image:
        return image.format
