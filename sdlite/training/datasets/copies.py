"""Finds images that are nearly the same, so that training never sees a copy of a held-out image."""

from collections.abc import Sequence

import numpy as np
from PIL import Image

SIDE = 12  # cells of a thumbnail: small enough to forgive rendering, large enough to tell two clock faces apart
NEAR = 2.0  # mean difference of thumbnails in grey levels; different drawings of one thing differ by 10 and more


def thumbnail(picture: Image.Image) -> np.ndarray:
    """(SIDE * SIDE * 3,) float32, the image on white."""
    white = Image.new("RGBA", picture.size, "white")
    small = Image.alpha_composite(white, picture.convert("RGBA")).convert("RGB")
    return np.asarray(small.resize((SIDE, SIDE), Image.Resampling.BOX), np.float32).ravel()


def near_copies(pictures: Sequence[Image.Image], held_out: Sequence[bool]) -> set[int]:
    """Indices to leave out: of two near copies the trained one if the other is held out, else the later one."""
    order = np.argsort(~np.asarray(held_out, bool), kind="stable")  # held-out images come first
    thumbs = np.stack([thumbnail(pictures[i]) for i in order])
    means = thumbs.mean(1)  # two thumbnails differ at least as much as their means
    out: set[int] = set()
    for i in range(len(order)):
        if int(order[i]) in out:
            continue
        later = i + 1 + np.flatnonzero(np.abs(means[i + 1 :] - means[i]) < NEAR)
        near = later[np.abs(thumbs[later] - thumbs[i]).mean(1) < NEAR]
        out |= {int(order[j]) for j in near}
    return out
