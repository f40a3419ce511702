"""The names of things that a model was trained to draw, where its folder lists them in concepts.txt, one a line."""

import re
from collections.abc import Sequence
from difflib import SequenceMatcher
from pathlib import Path

from sdlite.files import read_text

FILE = "concepts.txt"
MAX_BYTES = 2**20
AS_START, AS_PART, MIN_PART = 0.97, 0.95, 4  # likeness of a word inside another, and its least length
NOT_NAMES = {"and", "face", "for", "from", "in", "of", "on", "style", "the", "with"}  # say nothing about what is drawn


def read_names(folder: Path) -> list[str]:
    """The names in a model's folder; none if it has no list. Raises ValueError for a file that is too large."""
    file = folder / FILE
    text = read_text(file, MAX_BYTES) if file.is_file() else ""
    return [line.strip() for line in text.splitlines() if line.strip()]


def nearest(text: str, names: Sequence[str], count: int) -> list[str]:
    """The names most like a text in spelling, best first; a name is as near as the nearest of its words."""
    words = _words(text) or {text.lower()}

    def likeness(name: str) -> float:
        parts = (name.lower(), *re.findall(r"[^\W_]+", name.lower()))
        return max(_likeness(word, part) for word in words for part in parts)

    return sorted(names, key=likeness, reverse=True)[:count]


def knows_none(text: str, names: Sequence[str]) -> bool:
    """Whether no word of a text is part of any name. Plurals count as the word itself."""
    known = {_singular(word) for name in names for word in _words(name)}
    return not known & {_singular(word) for word in _words(text)}


def _likeness(word: str, part: str) -> float:
    """How much of the letters is the same, 0 to 1; one inside the other ("lock" and "locked") counts more."""
    short, long = sorted((word, part), key=len)
    ratio = SequenceMatcher(None, word, part).ratio()
    if short == long or len(short) < MIN_PART or short not in long:
        return ratio
    return max(ratio, AS_START if long.startswith(short) else AS_PART)


def _words(text: str) -> set[str]:
    return {word for word in re.findall(r"[^\W_]{3,}", text.lower()) if word not in NOT_NAMES}


def _singular(word: str) -> str:
    return word[:-1] if word.endswith("s") else word
