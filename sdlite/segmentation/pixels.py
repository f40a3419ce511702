"""From images to what the network reads, and from classes to images that people read.

image --pixels_of--> (C, H, W) --standardized--> mean 0, deviation 1
classes (H, W) --mask_image--> mask;  image, mask --overlay--> tinted image;  image, mask --cutout--> transparent image
"""

import torch
from PIL import Image
from torch import Tensor

# Formats of images. Pillow opens more: EPS starts another program, and TGA takes many other files for an image.
FORMATS = ("PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF", "JPEG2000", "AVIF", "PPM", "PSD")
MAX_PIXELS = 128 * 1024 * 1024
COLOURS = (0, 0, 0, 255, 255, 255, 230, 25, 75, 60, 180, 75, 0, 130, 200, 245, 130, 48, 145, 30, 180, 70, 240, 240)
CYCLES = 42  # of the six colours after black and white, to fill a palette of 256
BLOCK = 2**22  # pixels that are added up at once
MIN_DEVIATION = 1e-3  # of an image's values; below it there is nothing to see, and noise is not blown up


def pixels_of(image: Image.Image, channels: int) -> Tensor:
    """The image's values, (C, H, W): uint8, or float32 for images of 16 or 32 bits. They are not scaled.

    channels: 1 turns colour into grey, 3 repeats grey three times. Palettes are looked up, transparent parts become
    white. Raises ValueError for an image without pixels or with values that are not finite.
    """
    if 0 in image.size:
        raise ValueError(f"the image has {image.width} x {image.height} pixels; it must have some")
    if image.mode.startswith(("I", "F")):
        values = torch.frombuffer(bytearray(image.convert("F").tobytes()), dtype=torch.float32)
        if not values.isfinite().all():
            raise ValueError("the image has values that are infinite or not a number")
        return values.view(1, image.height, image.width).expand(channels, -1, -1)
    image = _over_white(image).convert("L" if channels == 1 else "RGB")
    values = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return values.view(image.height, image.width, channels).movedim(-1, 0)


def _over_white(image: Image.Image) -> Image.Image:
    if not image.has_transparency_data:
        return image
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)


def statistics(pixels: Tensor) -> tuple[float, float]:
    """Mean and standard deviation of all values (C, H, W), in float64, some rows at a time to save memory."""
    blocks = torch.split(pixels, max(1, BLOCK // pixels.shape[-1]), dim=1)
    mean = sum(float(block.double().sum()) for block in blocks) / pixels.numel()
    square = sum(float((block.double() - mean).square().sum()) for block in blocks) / pixels.numel()
    return mean, max(square**0.5, MIN_DEVIATION)


def standardized(pixels: Tensor, over: tuple[float, float] | None = None) -> Tensor:
    """(C, H, W) float32 with mean 0 and deviation 1, so that exposure and bit depth do not matter.

    over: the `statistics` of the whole image if pixels are a part of it.
    """
    mean, deviation = statistics(pixels) if over is None else over
    return ((pixels.double() - mean) / deviation).float()


def mask_image(classes: Tensor) -> Image.Image:
    """Class numbers (H, W) as an image of mode "P" with a colour for each class; 0 is black, 1 is white."""
    data = classes.to("cpu", torch.uint8).contiguous()
    mask = Image.frombytes("P", (data.shape[1], data.shape[0]), data.numpy().tobytes())
    mask.putpalette([*COLOURS[:6], *COLOURS[6:] * CYCLES])
    return mask


def visible(image: Image.Image) -> Image.Image:
    """The image as RGBA. Values of 16 or 32 bits become grey, from 2.7 deviations below their mean to 2.7 above."""
    if not image.mode.startswith(("I", "F")):
        return image.convert("RGBA")
    values = standardized(pixels_of(image, 1)) * 48 + 128
    grey = values.clamp(0, 255).to(torch.uint8).contiguous()
    return Image.frombytes("L", image.size, grey.numpy().tobytes()).convert("RGBA")


def overlay(image: Image.Image, mask: Image.Image) -> Image.Image:
    """The image as RGB, over white. Every class but 0 is tinted half with its colour; class 1 is red."""
    _check_sizes(image, mask)
    tints = mask.copy()
    tints.putpalette([0, 0, 0, *COLOURS[6:] * CYCLES])
    strength = Image.frombytes("L", mask.size, mask.tobytes()).point([0] + [128] * 255)
    return Image.composite(tints.convert("RGB"), _over_white(visible(image)).convert("RGB"), strength)


def cutout(image: Image.Image, mask: Image.Image) -> Image.Image:
    """The image as RGBA, transparent where the mask has class 0 (mode "P") or is black (other modes, may be soft).

    Transparent parts of the image stay transparent. Raises ValueError if the sizes differ.
    """
    _check_sizes(image, mask)
    result = visible(image)
    if mask.mode == "P":
        mask = Image.frombytes("L", mask.size, mask.tobytes()).point([0] + [255] * 255)
    alpha = Image.new("L", image.size)
    alpha.paste(result.getchannel("A"), mask=mask.convert("L"))
    result.putalpha(alpha)
    return result


def _check_sizes(image: Image.Image, mask: Image.Image) -> None:
    if image.size != mask.size:
        raise ValueError(f"image of {image.size} and mask of {mask.size} must have one size")
