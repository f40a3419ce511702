"""Draws items and saves their images, with one model in one process.

    group of items --padded--> Pipeline.jobs --Pipeline.draw--> images --thread--> Store

A group is padded to the full batch with copies of its last request, and the images of the copies are dropped. Kernels
choose their order of summation by the size of a batch, so only batches of equal size give equal bits for an item,
whatever its place.
"""

from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from time import perf_counter

from PIL.Image import Image

from sdlite.batch.manifest import Entry
from sdlite.batch.plan import Item
from sdlite.batch.store import Store
from sdlite.images.files import png_bytes
from sdlite.pipeline import Finished, Pipeline
from sdlite.request import is_out_of_memory, reason

EXACT_BATCH = 4  # batch size of every `exact` run; changing it changes every exact image
WAITING = 2  # batches drawn and not yet saved, at most
SIDES = ("image", "mask")


@dataclass(frozen=True, slots=True)
class Result:
    """What became of an item: saved by us (entry), failed (error), or found saved by another process (neither)."""

    index: int
    entry: Entry | None = None
    error: str | None = None


def draw(pipe: Pipeline, items: Sequence[Item], size: int) -> list[Image]:
    """Images of items that share a batch, computed in a batch of `size`. Raises as Pipeline.generate does."""
    padded = [*items, *[items[-1]] * (size - len(items))]
    images, masks = ([getattr(item, side) for item in padded] for side in SIDES)
    jobs = pipe.jobs([item.request for item in padded], images, masks)
    for item, job in zip(items, jobs, strict=False):
        for side in SIDES:
            if getattr(job.request, side) != getattr(item.request, side):
                raise ValueError(f"{side}={getattr(item, side)} was changed while the batch ran")
    wanted = set(range(len(items)))  # the rest is padding, and is not decoded
    finished = (event for event in pipe.draw(jobs) if isinstance(event, Finished) and event.index in wanted)
    pictures = {event.index: event.picture for event in islice(finished, len(items))}
    return [pictures[i] for i in range(len(items))]


class Drawer:
    """Draws groups of items. A thread saves them, so that the next group is computed meanwhile.

    size: of every batch computed. exact: never computed in another size, not even when memory runs out.
    """

    def __init__(self, pipe: Pipeline, store: Store, size: int, exact: bool) -> None:
        self.pipe, self.store, self.size, self.exact = pipe, store, size, exact
        self._saver = ThreadPoolExecutor(1, thread_name_prefix="sdlite-save")
        self._saving: deque[Future[Result]] = deque()
        self._ready: list[Result] = []

    def submit(self, items: Sequence[Item]) -> None:
        """Draws the items of a group that are not done yet. Raises what saving an earlier one raised."""
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
        """Results since the last call; with wait, of all submitted items. Raises what saving raised (DiskFull)."""
        self._collect(0 if wait else len(self._saving))
        ready, self._ready = self._ready, []
        return ready

    def close(self) -> None:
        """Waits until everything is saved."""
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
        """Each item with its image or the reason of its failure: a batch that fails is drawn again one by one.

        Whatever a library raises for one item fails that item only. When memory runs out, batches of half the size are
        drawn, once; then, and with `exact`, their items fail.
        """
        step = 1
        try:
            return list(zip(items, draw(self.pipe, items, size), strict=True))
        except Exception as error:
            if is_out_of_memory(error):
                if self.exact or size < self.size or size == 1:
                    return [(item, f"out of memory at {size} in a batch; draw it smaller") for item in items]
                step = size = size // 2
            elif len(items) == 1:
                return [(items[0], reason(error))]
        starts = range(0, len(items), step)
        return [pair for first in starts for pair in self._drawn(items[first : first + step], size)]
