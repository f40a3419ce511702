"""Composes new training images from images, with captions that say what was composed.

Every function takes and returns examples (an RGBA image and what it shows) and draws its choices from a generator. It
returns the example unchanged if the change would make the caption wrong (a recoloured rainbow, a mirrored "right
arrow"). The style is a field of its own, so that "a cat and a dog, noto style" names it once.
"""

import re
from typing import NamedTuple

import numpy as np
from PIL import Image

from sdlite.training.datasets.captions import article, is_plural, plural, with_article
from sdlite.training.datasets.draws import Generator

COLOURS = {  # name -> hue in degrees; as most people name them at full saturation
    "red": 0,
    "orange": 28,
    "yellow": 52,
    "green": 120,
    "cyan": 182,
    "blue": 222,
    "purple": 276,
    "pink": 328,
}
BACKGROUNDS = {
    "white": (255, 255, 255),
    "black": (0, 0, 0),
    "grey": (128, 128, 128),
    "red": (220, 40, 40),
    "orange": (245, 150, 40),
    "yellow": (250, 220, 60),
    "green": (60, 170, 80),
    "blue": (50, 100, 220),
    "purple": (140, 70, 190),
    "pink": (250, 160, 200),
    "brown": (130, 85, 50),
}
SIDED = re.compile(r"\b(left|right|clockwise|arrow|letter|sign|clock|calendar|text|number|\d+)\b", re.IGNORECASE)
COLOURED = re.compile(rf"\b({'|'.join({*COLOURS, *BACKGROUNDS, 'gold', 'silver', 'rainbow', 'face'})})\b")
NUMBERS = ("", "a", "two", "three", "four")
SATURATED = 0.35  # from here on a pixel has a hue that one would name
DARK = 110  # of 255: below it a hue is hard to see
MAIN_PART = 0.6  # of the covered pixels must have about one hue for the image to have a colour
HUE_WIDTH = 25  # degrees that count as one hue
CORNERS = ("top left", "top right", "bottom left", "bottom right")


class Example(NamedTuple):
    """image: RGBA. subject: what it shows, without article ("red apple"). words: what the caption adds after it."""

    image: Image.Image
    subject: str
    style: str = ""
    words: str = ""

    @property
    def caption(self) -> str:
        named = self.subject if self.subject.startswith((*NUMBERS[2:], "a ", "an ")) else with_article(self.subject)
        return named + (f" {self.words}" if self.words else "") + (f", {self.style} style" if self.style else "")


def mirrored(example: Example, generator: Generator) -> Example:
    """Mirrors left and right, unless the subject names a side."""
    if SIDED.search(example.subject) or generator.random() < 0.5:
        return example
    return example._replace(image=example.image.transpose(Image.Transpose.FLIP_LEFT_RIGHT))


def main_hue(image: Image.Image) -> float | None:
    """The hue, in degrees, of most of the image; None if there is no such hue."""
    pixels = np.asarray(image.convert("RGBA"))
    hsv = np.asarray(image.convert("RGB").convert("HSV"), np.float32)
    covered = pixels[..., 3] > 127
    coloured = covered & (hsv[..., 1] > 255 * SATURATED) & (hsv[..., 2] > DARK)
    if not covered.any() or coloured.sum() < MAIN_PART * covered.sum():
        return None
    hues = hsv[..., 0][coloured] * (360 / 256)
    histogram, _ = np.histogram(hues, 36, (0, 360))
    peak = float(histogram.argmax() * 10 + 5)
    away = (hues - peak + 180) % 360 - 180
    near = np.abs(away) < HUE_WIDTH
    return peak + float(away[near].mean()) if near.sum() > MAIN_PART * covered.sum() else None


def recoloured(example: Example, generator: Generator) -> Example:
    """Turns all hues so that the main one becomes another, which the subject then names ("blue apple")."""
    hue = None if COLOURED.search(example.subject) else main_hue(example.image)
    if hue is None:
        return example
    name = str(generator.choice([c for c, h in COLOURS.items() if abs((h - hue + 180) % 360 - 180) > 2 * HUE_WIDTH]))
    alpha = example.image.getchannel("A")
    hsv = np.asarray(example.image.convert("RGB").convert("HSV")).copy()
    hsv[..., 0] = (hsv[..., 0].astype(int) + round((COLOURS[name] - hue) * 256 / 360)) % 256
    image = Image.fromarray(hsv, "HSV").convert("RGB")
    image.putalpha(alpha)
    return example._replace(image=image, subject=f"{name} {example.subject}")


def on_background(example: Example, generator: Generator) -> Example:
    """Puts the example on a background of one named colour; the result has no transparency."""
    name = str(generator.choice(list(BACKGROUNDS)))
    image = Image.new("RGBA", example.image.size, (*BACKGROUNDS[name], 255))
    image.alpha_composite(example.image)
    return example._replace(image=image, words=f"{example.words} on {article(name)} {name} background".strip())


def _shrunk(image: Image.Image, part: float) -> Image.Image:
    side = round(image.width * part)
    return image.resize((side, side), Image.Resampling.BOX)


def in_corner(example: Example, generator: Generator) -> Example:
    """Puts the example at half size into a corner that the caption names."""
    i = int(generator.integers(len(CORNERS)))
    small = _shrunk(example.image, 0.5)
    image = Image.new("RGBA", example.image.size)
    rest = image.width - small.width
    image.paste(small, (rest * (i % 2), rest * (i // 2)))
    return example._replace(image=image, words=f"{example.words} in the {CORNERS[i]} corner".strip())


def side_by_side(first: Example, second: Example, generator: Generator) -> Example:
    """Two examples at half size next to each other: "a cat and a dog", or "a cat left of a dog"."""
    small = [_shrunk(example.image, 0.5) for example in (first, second)]
    image = Image.new("RGBA", first.image.size)
    top = (image.height - small[0].height) // 2
    image.paste(small[0], (0, top))
    image.paste(small[1], (image.width - small[1].width, top))
    joint = "left of" if generator.random() < 0.5 else "and"
    style = first.style if first.style == second.style else ""
    return Example(image, f"{with_article(first.subject)} {joint} {with_article(second.subject)}", style)


def several(example: Example, generator: Generator) -> Example:
    """Two, three or four copies at half size; if the example is plural already, one copy in a corner."""
    if is_plural(example.subject):
        return in_corner(example, generator)
    number = int(generator.integers(2, len(NUMBERS)))
    small = _shrunk(example.image, 0.5)
    image, half = Image.new("RGBA", example.image.size), example.image.width // 2
    quarter = half // 2
    places = {
        2: [(0, quarter), (half, quarter)],
        3: [(quarter, 0), (0, half), (half, half)],
        4: [(0, 0), (half, 0), (0, half), (half, half)],
    }[number]
    for place in places:
        image.paste(small, place)
    return example._replace(image=image, subject=f"{NUMBERS[number]} {plural(example.subject)}")


def augmented(example: Example, other: Example, generator: Generator) -> Example:
    """Applies one random composition of those above; `other` is the second example if it needs two."""
    example = mirrored(example, generator)
    kind = generator.random()
    for share, change in ((0.25, recoloured), (0.5, on_background), (0.65, in_corner)):
        if kind < share:
            return change(example, generator)
    return side_by_side(example, other, generator) if kind < 0.85 else several(example, generator)
