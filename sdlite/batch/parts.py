"""How the work of a batch is divided: into parts for machines, and into groups that are computed together."""

import re
from collections.abc import Iterator, Sequence
from itertools import islice

from sdlite.batch.plan import Item

WINDOW = 256  # items looked at together to find those that may share a batch


def parse_part(text: str) -> tuple[int, int]:
    """Reads "2/8", the second of eight parts. Raises ValueError."""
    match = re.fullmatch(r"(\d{1,18})/(\d{1,18})", text, re.ASCII)
    if match is None:
        raise ValueError(f"part={text!r:.40} must be I/N, e.g. 2/8 for the second of eight parts")
    number, count = map(int, match.groups())
    if not 1 <= number <= count:
        raise ValueError(f"part={text!r:.40}: the part must be 1 to {count}")
    return number, count


def in_part(item: Item, part: tuple[int, int]) -> bool:
    """Whether an item belongs to part I of N. It depends on the item's key, so rows added later move no item."""
    return int(item.sample_key, 16) % part[1] == part[0] - 1


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
