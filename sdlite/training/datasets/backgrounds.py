"""Backgrounds for the drawings of `masks.py`: crops of photos, patterns, and heaps of shapes made of both.

Each function returns (size, size, 3) uint8 and takes all its random choices from the given generator.
"""

import numpy as np
from PIL import Image, ImageDraw

from sdlite.training.datasets.draws import Generator

GAMMA = 0.7  # at most, up or down, in log2, of each channel
MOST_LEAVES = 200
SMALLEST_LEAF, LARGEST_LEAF = 0.06, 0.8  # radius over the image's side
LAYERS = 3


def crop(photos: list[Image.Image], size: int, generator: Generator, *, smallest: int | None = None) -> np.ndarray:
    """A square of a random photo of random scale, mirrored or not. smallest: its side in the photo, else `size`."""
    photo = photos[generator.integers(len(photos))]
    side = int(generator.integers(size if smallest is None else smallest, min(photo.size) + 1))
    left, top = (int(generator.integers(0, whole - side + 1)) for whole in photo.size)
    method = Image.Resampling.BOX if side >= size else Image.Resampling.BILINEAR
    pixels = np.asarray(photo.resize((size, size), method, (left, top, left + side, top + side)))
    return np.ascontiguousarray(pixels[:, ::-1]) if generator.random() < 0.5 else pixels


def pattern(size: int, generator: Generator) -> np.ndarray:
    """Two random colours mixed by a gradient, by stripes or by noise of random grain."""
    kind = generator.integers(3)
    angle, wave = generator.uniform(0, 2 * np.pi), generator.uniform(6, 40)
    y, x = np.mgrid[:size, :size]
    along = x * np.cos(angle) + y * np.sin(angle)
    if kind == 0:
        mix = (along - along.min()) / np.ptp(along)
    elif kind == 1:
        mix = (np.sin(2 * np.pi * along / wave) > 0).astype(float)
    else:
        cells = int(generator.integers(3, size // 2))
        grain = Image.fromarray(generator.random((cells, cells)).astype(np.float32))
        mix = np.asarray(grain.resize((size, size), Image.Resampling.BICUBIC)).clip(0, 1)
    colours = generator.integers(0, 256, (2, 3))
    return (colours[0] + (colours[1] - colours[0]) * mix[..., None]).round().astype(np.uint8)


def altered(photos: list[Image.Image], size: int, generator: Generator) -> np.ndarray:
    """A crop in other colours: channels swapped, each with its own gamma, some negative, some grey; turned."""
    pixels = np.rot90(crop(photos, size, generator, smallest=size // 2), int(generator.integers(4))) / 255
    pixels = pixels[..., generator.permutation(3)] ** 2 ** generator.uniform(-GAMMA, GAMMA, 3)
    if generator.random() < 0.2:
        pixels = np.broadcast_to(pixels.mean(-1, keepdims=True), pixels.shape)
    if generator.random() < 0.2:
        pixels = 1 - pixels
    return (pixels * 255).round().astype(np.uint8)


def leaves(photos: list[Image.Image], size: int, generator: Generator) -> np.ndarray:
    """Shapes that hide one another, filled with photos, patterns and plain colours: objects that are no drawing.

    The dead leaves model of natural scenes: radii with density r^-3. Source: Lee, Mumford and Huang 2001, section 3.
    """
    count = round(2 ** generator.uniform(1, np.log2(MOST_LEAVES)))
    heap = Image.new("I", (size, size))
    draw = ImageDraw.Draw(heap)
    ratio = (SMALLEST_LEAF / LARGEST_LEAF) ** 2
    radii = size * SMALLEST_LEAF / np.sqrt(1 - generator.random(count) * (1 - ratio))
    for label, radius in enumerate(radii, start=1):
        corners = int(generator.integers(3, 24))  # from triangles to what looks round
        angles = np.sort(generator.uniform(0, 2 * np.pi, corners))
        x, y = generator.uniform(0, size, 2)[:, None] + radius * np.stack([np.cos(angles), np.sin(angles)])
        draw.polygon([*zip(x.tolist(), y.tolist(), strict=True)], fill=label)
    labels = np.asarray(heap)
    layers = np.stack(
        [
            altered(photos, size, generator) if generator.random() < 0.5 else pattern(size, generator)
            for _ in range(LAYERS)
        ]
    )
    layer = generator.integers(LAYERS, size=count + 1)[labels]
    contrast = (generator.random(count + 1) * (generator.random(count + 1) < 0.5))[labels][..., None]  # half are plain
    colours = generator.uniform(0, 255, (count + 1, 3))[labels]
    texture = np.take_along_axis(layers, layer[None, ..., None], axis=0)[0]
    return (colours + (texture - colours) * contrast).round().astype(np.uint8)
