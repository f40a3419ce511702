"""How the work of a batch is divided: into parts for machines, and into groups that are computed together."""

import re
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import NamedTuple, Self

from sdlite.batch.plan import Item

WINDOW = 256  # items looked at together to find those that may share a batch


class Part(NamedTuple):
    """Part `number` of `of` parts, counted from 1."""

    number: int
    of: int

    @classmethod
    def parse(cls, text: str) -> Self:
        """Reads "2/8", the second of eight parts. Raises ValueError."""
        match = re.fullmatch(r"(\d{1,18})/(\d{1,18})", text, re.ASCII)
        if match is None:
            raise ValueError(f"part={text!r:.40} must be I/N, e.g. 2/8 for the second of eight parts")
        part = cls(int(match[1]), int(match[2]))
        if not 1 <= part.number <= part.of:
            raise ValueError(f"part={text!r:.40}: the part must be 1 to {part.of}")
        return part

    def has(self, item: Item) -> bool:
        """Whether an item belongs to this part. It depends on the item's key, so rows added later move no item."""
        return int(item.sample_key, 16) % self.of == self.number - 1


def groups(items: Sequence[Item], size: int) -> Iterator[list[Item]]:
    """The items in lists of up to `size` that may share a batch, about in their order."""
    rest = iter(items)
    left: list[Item] = []
    while window := left + list(islice(rest, WINDOW)):
        alike: dict[int, list[Item]] = {}
        for item in window:
            alike.setdefault(item.kind, []).append(item)
        ended = len(window) - len(left) < WINDOW
        left = []
        for group in alike.values():
            whole = len(group) if ended else len(group) // size * size
            yield from (group[first : first + size] for first in range(0, whole, size))
            left += group[whole:]
