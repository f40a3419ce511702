"""Draws items and saves their pictures, with one model in one process.

    items --chunks--> items that may share a batch --padded--> latents --decode--> pictures --thread--> Store

A chunk is padded to the full batch with copies of its last request, whose pictures are dropped: kernels choose their
order of summation by the size of a batch, so only batches of equal size give equal bits wherever an item stands.
"""

import re
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from time import perf_counter

from PIL.Image import Image

from sdlite.batch.plan import Item
from sdlite.batch.store import Entry, Store
from sdlite.images.files import open_picture, png_bytes
from sdlite.images.pixels import digest
from sdlite.pipeline import Pipeline
from sdlite.request import reason

EXACT_BATCH = 4  # batch size of every `exact` run; changing it changes every exact picture
WINDOW = 256  # items looked at together for what may share a batch
WAITING = 2  # batches drawn and not yet saved, at most


@dataclass(frozen=True, slots=True)
class Result:
    """What became of an item: saved by us (entry), failed (error), or found saved by another process (neither)."""

    index: int
    entry: Entry | None = None
    error: str | None = None


def chunks(pipe: Pipeline, items: Sequence[Item], size: int) -> Iterator[list[Item]]:
    """The items in lists of up to `size` that may share a batch, about in their order."""
    rest = iter(items)
    left: list[Item] = []
    while window := left + list(islice(rest, WINDOW)):
        groups = [[window[i] for i in group] for group in pipe.batches([item.request for item in window])]
        ended = len(window) - len(left) < WINDOW
        left = []
        for group in groups:
            whole = len(group) if ended else len(group) // size * size
            yield from (group[first : first + size] for first in range(0, whole, size))
            left += group[whole:]


def draw(pipe: Pipeline, items: Sequence[Item], size: int) -> list[Image]:
    """Pictures of items that share a batch, computed in a batch of `size`. Raises as Pipeline.generate does."""
    padded = [*items, *[items[-1]] * (size - len(items))]
    files = {(path, side) for item in items for side, path in _files(item).items()}
    opened = {(path, side): open_picture(path, for_mask=side == "mask") for path, side in files}
    digests = {file: digest(image) for file, image in opened.items()}
    for item in items:
        for side, path in _files(item).items():
            if digests[path, side] != getattr(item.request, side):
                raise ValueError(f"{side}={path} was changed while the batch ran")
    images, masks = ([opened.get((getattr(item, side), side)) for item in padded] for side in ("image", "mask"))
    requests, count = [item.request for item in padded], len(items)
    for x_t in pipe.sample_latents(requests, images=images, masks=masks):
        latents = x_t  # (B, C, H/f, W/f)
    return pipe.decode(latents[:count], requests[:count], images=images[:count], masks=masks[:count])


def _files(item: Item) -> dict[str, Path]:
    return {side: path for side, path in (("image", item.image), ("mask", item.mask)) if path is not None}


class Engine:
    """Draws chunks and saves them in a thread beside, so that the next is computed meanwhile.

    size: of every batch computed. exact: never computed in another size, not even when memory runs out.
    """

    def __init__(self, pipe: Pipeline, store: Store, size: int, exact: bool) -> None:
        self.pipe, self.store, self.size, self.exact = pipe, store, size, exact
        self._saver = ThreadPoolExecutor(1, thread_name_prefix="sdlite-save")
        self._saving: deque[Future[Result]] = deque()
        self._ready: list[Result] = []

    def submit(self, items: Sequence[Item]) -> None:
        """Draws what is not there yet of a chunk. Raises what saving an earlier one raised (DiskFull, ValueError)."""
        missing = [item for item in items if not self.store.has(item)]
        self._ready += [Result(item.index) for item in items if item not in missing]
        if not missing:
            return
        start = perf_counter()
        drawn = self._drawn(missing, self.size)
        seconds = (perf_counter() - start) / len(missing)
        for item, picture in drawn:
            if isinstance(picture, str):
                self._ready.append(Result(item.index, error=picture))
            else:
                self._saving.append(self._saver.submit(self._save, item, picture, seconds))
        self._collect(WAITING * self.size)

    def results(self, wait: bool = False) -> list[Result]:
        """What became of items since the last call; with wait, of all. Raises what saving raised."""
        self._collect(0 if wait else len(self._saving))
        ready, self._ready = self._ready, []
        return ready

    def close(self) -> None:
        """Waits for what is being saved."""
        self._saver.shutdown()

    def _collect(self, waiting: int) -> None:
        while self._saving and (len(self._saving) > waiting or self._saving[0].done()):
            self._ready.append(self._saving.popleft().result())

    def _save(self, item: Item, picture: Image, seconds: float) -> Result:
        try:
            data = png_bytes(picture)
        except Exception as error:
            return Result(item.index, error=reason(error))
        return Result(item.index, self.store.save(item, data, seconds))

    def _drawn(self, items: Sequence[Item], size: int) -> list[tuple[Item, Image | str]]:
        """Each item with its picture or why there is none: a batch that fails is drawn again one by one.

        Whatever a library raises fails the item that it is raised for, and no other.
        """
        try:
            return list(zip(items, draw(self.pipe, items, size), strict=True))
        except Exception as error:
            if _is_out_of_memory(error):
                return self._halved(items, size)
            if len(items) == 1:
                return [(items[0], reason(error))]
        return [pair for item in items for pair in self._drawn([item], size)]

    def _halved(self, items: Sequence[Item], size: int) -> list[tuple[Item, Image | str]]:
        """The items drawn in batches of half the size, once; then, and with `exact`, they fail."""
        half = size // 2
        if self.exact or size < self.size or not half:
            return [(item, f"out of memory at {size} in a batch; draw it smaller") for item in items]
        return [pair for first in range(0, len(items), half) for pair in self._drawn(items[first : first + half], half)]


def _is_out_of_memory(error: Exception) -> bool:
    said = isinstance(error, RuntimeError) and re.search("out of memory|allocate memory", str(error))
    return isinstance(error, MemoryError) or bool(said)
