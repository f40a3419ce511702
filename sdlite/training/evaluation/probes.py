"""Free text that no caption holds word for word, and what its image must show: fifty nouns, and pixels that count.

The judge names the nouns. Colours, backgrounds, places and numbers are measured on the pixels: pixels that differ from
the colour at the image's edge belong to the drawing.
"""

import colorsys
from collections.abc import Callable, Collection
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from sdlite.training.datasets.augment import BACKGROUNDS, COLOURS, CORNERS
from sdlite.training.datasets.captions import plural, with_article

TABLE = Path(__file__).with_name("nouns.tsv").read_text(encoding="utf-8")
NOUNS: dict[str, Collection[str]] = {  # what people type -> the concepts that would be right
    noun: set(concepts.split("; ")) for noun, concepts in (line.split("\t") for line in TABLE.splitlines())
}
OBJECTS = ("heart", "car", "cup", "fish", "star", "book", "flower", "balloon")  # that come in any colour, at any place
DIFFERENT = 40  # of 255, of some channel, from the edge: part of the drawing
NEAR_HUE = 30  # degrees
SPECK = 0.01  # of an image's pixels; a smaller piece is none
Check = Callable[[np.ndarray], bool]  # of an image (H, W, 3) uint8


class Probe(NamedTuple):
    kind: str
    prompt: str
    holds: Check


def edge_colour(pixels: np.ndarray) -> np.ndarray:
    """Median colour of the outermost pixels, (3,)."""
    edge = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    return np.median(edge, axis=0)


def drawing(pixels: np.ndarray) -> np.ndarray:
    """(H, W) bool: pixels that are not background."""
    return np.abs(pixels.astype(int) - edge_colour(pixels)).max(-1) > DIFFERENT


def has_colour(name: str) -> Check:
    """Whether the median colour of the drawing's coloured part has that hue."""

    def holds(pixels: np.ndarray) -> bool:
        inside = pixels[drawing(pixels)]
        vivid = inside[np.ptp(inside, axis=-1) > DIFFERENT] if len(inside) else inside
        if not len(vivid):
            return False
        hue = 360 * colorsys.rgb_to_hsv(*(np.median(vivid, axis=0) / 255))[0]
        return bool(abs((hue - COLOURS[name] + 180) % 360 - 180) < NEAR_HUE)

    return holds


def has_background(name: str) -> Check:
    """Whether this is the background colour that is nearest to the edge's colour."""

    def holds(pixels: np.ndarray) -> bool:
        distances = {other: np.abs(edge_colour(pixels) - rgb).sum() for other, rgb in BACKGROUNDS.items()}
        return min(distances, key=lambda other: distances[other]) == name

    return holds


def is_in_corner(corner: str) -> Check:
    """Whether the drawing's centre of mass lies there, beyond the middle third."""

    def holds(pixels: np.ndarray) -> bool:
        rows, columns = np.nonzero(drawing(pixels))
        if not len(rows):
            return False
        down, right = rows.mean() / len(pixels), columns.mean() / pixels.shape[1]
        return bool(
            (down < 0.4 if "top" in corner else down > 0.6) and (right < 0.4 if "left" in corner else right > 0.6)
        )

    return holds


def has_pieces(number: int) -> Check:
    """Whether the drawing falls into that many pieces."""
    return lambda pixels: count_pieces(drawing(pixels)) == number


def count_pieces(mask: np.ndarray) -> int:
    """Connected parts (4 neighbours) of more than a speck of the image.

    Every pixel begins with a label of its own and takes the highest label of its row's run, then of its column's run,
    until no label changes.
    """
    runs = _runs(mask), _runs(mask.T).T
    labels, before = np.arange(1, mask.size + 1).reshape(mask.shape) * mask, np.zeros(mask.shape, int)
    while (labels != before).any():
        before = labels
        for run in runs:
            highest = np.zeros(run.max() + 1, int)
            np.maximum.at(highest, run, labels)
            labels = highest[run]
    return int((np.bincount(labels[mask]) / mask.size > SPECK).sum())


def _runs(mask: np.ndarray) -> np.ndarray:
    """For each pixel the number, from 1, of its run of True in its row; 0 for False."""
    starts = mask & ~np.pad(mask, ((0, 0), (1, 0)))[:, :-1]
    return np.asarray(starts.cumsum().reshape(mask.shape) * mask)


def probes() -> list[Probe]:
    """The prompts besides the nouns: eight of each kind."""
    found = []
    backgrounds = [name for name in BACKGROUNDS if name != "white"]
    numbers = {"two": 2, "three": 3, "four": 4}
    for i, noun in enumerate(OBJECTS):
        colour, background = list(COLOURS)[i], backgrounds[i]
        corner, number = CORNERS[i % 4], list(numbers)[i % 3]
        found += [
            Probe("colour", with_article(f"{colour} {noun}"), has_colour(colour)),
            Probe(
                "background",
                f"{with_article(noun)} on {with_article(background)} background",
                has_background(background),
            ),
            Probe("place", f"{with_article(noun)} in the {corner} corner", is_in_corner(corner)),
            Probe("number", f"{number} {plural(noun)}", has_pieces(numbers[number])),
        ]
    return found


def right_and_chance(pictures: list[Image.Image], asked: list[Probe]) -> dict[str, tuple[float, float]]:
    """For each kind, the part of the images that show what was asked, and what another prompt of the kind asked."""
    arrays = [np.asarray(picture.convert("RGB")) for picture in pictures]
    rates = {}
    for kind in dict.fromkeys(probe.kind for probe in asked):
        mine = [i for i, probe in enumerate(asked) if probe.kind == kind]
        right = [asked[i].holds(arrays[i]) for i in mine]
        chance = [asked[i].holds(arrays[j]) for i in mine for j in mine if asked[i].prompt != asked[j].prompt]
        rates[kind] = (sum(right) / len(right), sum(chance) / len(chance))
    return rates
