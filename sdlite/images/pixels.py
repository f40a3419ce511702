"""PIL images to tensors and back, masks, and comparing images."""

import hashlib
from dataclasses import dataclass

import torch
from PIL import Image, ImageChops, ImageFilter
from torch import Tensor

from sdlite.images.files import Drawn

SURE = 0.05  # of a mask's pixels may be neither black nor white: the soft rim of a brush


@dataclass(frozen=True, slots=True)
class Opened:
    """What is known of an image or mask to start from, once it was opened.

    checksum: see `digest`. size: (width, height) in pixels. grey: see `has_grey`. picture: from `open_picture`; None
    where it is not kept, as in the plan of a batch.
    """

    checksum: str
    size: tuple[int, int]
    grey: bool = False
    picture: Image.Image | None = None

    @classmethod
    def of(cls, picture: Image.Image, *, for_mask: bool = False) -> "Opened":
        """picture: from `open_picture`."""
        return cls(digest(picture), picture.size, for_mask and has_grey(picture), picture)


def to_pil(images: Tensor) -> list[Image.Image]:
    """(B, 3, H, W) in [-1, 1] to RGB images, rounded as diffusers does."""
    pixels = ((images.float() / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
    return [_as_drawn(Image.fromarray(image.permute(1, 2, 0).contiguous().cpu().numpy())) for image in pixels]


def _as_drawn(picture: Image.Image) -> Image.Image:
    """The same image as a `Drawn`. PIL makes only its own class, and `Drawn` adds a method and no state."""
    picture.__class__ = Drawn
    return picture


def from_pil(image: Image.Image, size: tuple[int, int]) -> Tensor:
    """(1, 3, H, W) in [-1, 1], resized to size = (width, height) with the Lanczos filter as diffusers does."""
    return 2.0 * _unit_interval(image.convert("RGB").resize(size, Image.Resampling.LANCZOS)) - 1.0


def mask_from_pil(mask: Image.Image, size: tuple[int, int]) -> Tensor:
    """(1, 1, H, W) of 0 (keep) and 1 (repaint, white in the image), resized and cut at half as diffusers does."""
    return (_unit_interval(mask.resize(size, Image.Resampling.LANCZOS).convert("L")) >= 0.5).float()


def pasted(drawn: Image.Image, picture: Image.Image, mask: Image.Image, blur: float) -> Image.Image:
    """The drawn image where the mask is white, and the image that it was drawn from elsewhere.

    blur: radius in pixels of the soft edge between them, as of Automatic1111's mask blur; 0 is a hard edge.
    """
    size = drawn.size
    white = (mask_from_pil(mask, size)[0, 0] * 255).to(torch.uint8)  # (H, W)
    soft = Image.fromarray(white.numpy()).filter(ImageFilter.GaussianBlur(blur))
    under = picture.convert("RGB").resize(size, Image.Resampling.LANCZOS)
    return _as_drawn(Image.composite(drawn, under, soft))


def _unit_interval(image: Image.Image) -> Tensor:
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)  # H * W * C
    return pixels.view(1, image.height, image.width, -1).permute(0, 3, 1, 2).float() / 255  # (1, C, H, W) in [0, 1]


def digest(image: Image.Image) -> str:
    """ "sha256:..." of the size and the RGB pixels, whatever file they came from."""
    size = f"{image.width}x{image.height}:".encode()
    return "sha256:" + hashlib.sha256(size + image.convert("RGB").tobytes()).hexdigest()


def largest_difference(first: Image.Image, second: Image.Image) -> int:
    """In grey levels, 0 to 255, over all pixels and channels; 255 where the sizes differ."""
    if first.size != second.size:
        return 255
    return max(ImageChops.difference(first.convert("RGB"), second.convert("RGB")).tobytes())


def has_grey(mask: Image.Image) -> bool:
    """Whether more of an opened mask than the soft rim of a brush is neither black nor white."""
    return sum(mask.convert("L").histogram()[16:240]) > SURE * mask.width * mask.height


def mask_notes(size: tuple[int, int], grey: bool, picture: tuple[int, int]) -> list[str]:
    """How a mask is read, for the user. size, picture: (width, height) of mask and image. grey: see `has_grey`."""
    notes = []
    if size != picture:
        sizes = ["{}x{}".format(*side) for side in (size, picture)]
        notes.append("the mask has {} pixels and the image {}; it is stretched over it".format(*sizes))
    if grey:
        notes.append("the mask has grey parts; it is cut at half: lighter parts are redrawn, the rest is kept")
    return notes
