"""The images of a data folder in memory.

Images may have any size. Their transparency is kept, so that backgrounds can vary.
"""

import math
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from torch import Tensor

from sdlite.images.files import FORMATS, decoded, open_picture
from sdlite.training.datasets.folder import Records

MAX_HELD = 64 * 2**30  # bytes of all images of a data folder
Fit = Literal["crop", "pad", "bucket"]
WIDEST = 2.5  # longer side over the shorter one, of a bucket


def load_pixels(folder: Path, records: Records, size: int, fit: Fit = "crop") -> Tensor:
    """(N, 4, size, size) uint8 RGBA of all records; see `fitted`. Raises ValueError if no memory can hold them."""
    if fit == "bucket":
        raise ValueError("fit=bucket is for the denoiser; use crop or pad")
    return load_shaped(folder, records, size, fit, 1).pixels


class Shaped(NamedTuple):
    """pixels: (N, 4, M, M) uint8 RGBA, each image at the top left. shapes: (N, 2) int64, height and width of each."""

    pixels: Tensor
    shapes: Tensor


def load_shaped(folder: Path, records: Records, size: int, fit: Fit, step: int) -> Shaped:
    """All images in shapes of their own. Raises ValueError if no memory can hold them.

    fit: "bucket" cuts each image to the bucket that is nearest to its shape, and M is the longest side; others make
    squares of M = size. step: the sides of a bucket are multiples of it.
    """
    shapes = [(size, size)] * len(records)
    if fit == "bucket":
        shapes = [bucket_of(*_size(folder / record["file_name"]), size, step) for record in records]
    longest = max((max(shape) for shape in shapes), default=size)
    needed = len(records) * 4 * longest**2
    if needed > MAX_HELD:
        raise ValueError(
            f"{len(records)} images of {longest} pixels need {needed >> 30} GiB of memory, more than the limit of "
            f"{MAX_HELD >> 30} GiB; use fewer images, or a smaller size"
        )
    pixels = np.zeros((len(records), longest, longest, 4), np.uint8)
    for row, record, (height, width) in zip(pixels, records, shapes, strict=True):
        row[:height, :width] = np.asarray(fitted(_rgba(folder / record["file_name"]), width, height, fit))
    return Shaped(torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(), torch.tensor(shapes).view(-1, 2))


def bucket_of(width: int, height: int, size: int, step: int) -> tuple[int, int]:
    """Height and width of the bucket whose proportions are nearest to an image's.

    The sides are multiples of step; a bucket has at most size * size pixels.
    """
    heights = range(step, int(size * WIDEST) + 1, step)
    fullest = [(h, size**2 // h // step * step) for h in heights]  # the widest of each height
    buckets = [(h, w) for h, w in fullest if max(h, w) <= WIDEST * min(h, w)]
    return min(buckets, key=lambda bucket: abs(math.log(bucket[1] / bucket[0] * height / width)))


def _rgba(path: Path) -> Image.Image:
    """An image as `open_picture` reads it, but with its transparency."""
    image = decoded(path)
    return (image if image.has_transparency_data else open_picture(image)).convert("RGBA")


def fitted(image: Image.Image, width: int, height: int, fit: Fit = "crop") -> Image.Image:
    """An RGBA image at another size.

    fit: "crop" keeps the middle of the image, and so does "bucket". "pad" puts the whole image into the middle of a
    transparent one; so does "crop" if the image has transparent parts.
    """
    size = (width, height)
    if image.size == size:
        return image
    if fit == "bucket" or (fit == "crop" and np.asarray(image)[..., 3].min() == 255):
        return ImageOps.fit(image, size, Image.Resampling.LANCZOS)
    scale = width / max(image.size)
    small = image.resize([max(1, round(side * scale)) for side in image.size], Image.Resampling.LANCZOS)
    padded = Image.new("RGBA", size)
    padded.paste(small, ((width - small.width) // 2, (height - small.height) // 2))
    return padded


def fit_notes(folder: Path, records: Records, fit: Fit) -> list[str]:
    """Notes for the user on images that are not square."""
    count = sum(width != height for width, height in (_size(folder / record["file_name"]) for record in records))
    what = {
        "bucket": "each is cut to the nearest of a few shapes",
        "pad": "they get white bars",
        "crop": "they lose their ends, unless they are transparent; --fit pad keeps all",
    }[fit]
    return [f"{count} of {len(records)} images are not square: {what}"] if count else []


def _size(path: Path) -> tuple[int, int]:
    """Width and height of the upright image, read from its header."""
    try:
        with Image.open(path, formats=FORMATS) as image:
            turned = image.getexif().get(ExifTags.Base.Orientation, 1) > 4
            return (image.height, image.width) if turned else image.size
    except Exception:  # whatever is wrong, reading the whole image explains it in one line
        return _rgba(path).size


def composed(pixels: Tensor, colours: Tensor) -> Tensor:
    """RGBA (B, 4, H, W) uint8 on background colours (B, 3) in [0, 1]: images (B, 3, H, W) in [-1, 1]."""
    rgba = pixels.float() / 255
    alpha = rgba[:, 3:]  # (B, 1, H, W)
    return (rgba[:, :3] * alpha + colours[:, :, None, None] * (1 - alpha)) * 2 - 1


def on_white(pixels: Tensor) -> Tensor:
    return composed(pixels, torch.ones(len(pixels), 3))
