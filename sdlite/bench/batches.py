"""The time that a batch adds to its images, and the cost of exact bytes."""

import itertools
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL.Image import Image

from sdlite.bench.machine import machine_facts
from sdlite.bench.timing import Timings, row, spent
from sdlite.files import write_file
from sdlite.images.files import png_bytes
from sdlite.pipeline import Finished, Job, Pipeline
from sdlite.request import Request

IMAGES = 500  # of a timing of the batch machinery


class RunBatch(Protocol):
    """Draws requests into a folder: `sdlite.batch.run`."""

    def __call__(self, requests: Any, output: Path, /, *, pipe: Pipeline, exact: bool = False) -> object: ...


def measure_batch(
    pipe: Pipeline, request: Request, run_batch: RunBatch, folder: Path, *, load: float, runs: int = 5
) -> dict[str, Any]:
    """Times what a batch adds to each image besides drawing it, on the disk of a folder.

    Returns what `measure` does. The machinery is that of a whole run (request checked, grouped, encoded as PNG,
    committed, listed) with images that are there already; the rows after it are its parts.
    """
    picture = pipe.generate(request.replace(steps=1), progress=False)[0]
    data = png_bytes(picture)
    requests = [{"prompt": f"a red apple {i}", "steps": 2} for i in range(IMAGES)]
    idle = _Idle(pipe, picture)
    parts: dict[str, Callable[[Path], object]] = {
        "batch machinery, an image": lambda place: run_batch(requests, place, pipe=idle),
        "of which PNG encoding": lambda _: [png_bytes(picture) for _ in range(IMAGES)],
        "of which file, 2 fsyncs and link": partial(_write_files, data),
    }
    timings: dict[str, Timings] = {what: {"CPU": [], "wall": []} for what in parts}
    with tempfile.TemporaryDirectory(prefix="sdlite-bench-", dir=folder) as place:
        for run in range(runs + 1):
            for number, (what, call) in enumerate(parts.items()):
                took = spent(partial(call, Path(place) / f"{run}-{number}"))
                for side, seconds in zip(timings[what], took, strict=True):
                    timings[what][side] += [seconds / IMAGES] if run else []  # the first warms up
    rows = [row(what, "s", sides, compare=False) for what, sides in timings.items()]
    size = f"{picture.width}x{picture.height}, {len(data)} bytes"
    setting = {"picture": size, "pictures": IMAGES, "runs": runs}
    return {"machine": machine_facts(pipe.device, load), "setting": setting, "rows": rows}


def measure_exact(
    pipe: Pipeline, request: Request, run_batch: RunBatch, size: int, *, load: float, runs: int = 5
) -> dict[str, Any]:
    """Times an image of a batch with `exact` against one without: both on one thread, and on all.

    size: of an exact batch. Returns what `measure` does.
    """
    requests = [request.replace(prompt=f"{request.prompt} {i}") for i in range(2 * size)]
    rows, threads, folders = [], torch.get_num_threads(), itertools.count()
    with tempfile.TemporaryDirectory(prefix="sdlite-bench-") as place:

        def seconds(exact: bool) -> float:
            folder = Path(place) / str(next(folders))
            return spent(lambda: run_batch(requests, folder, pipe=pipe, exact=exact))[1] / len(requests)

        for number in sorted({1, threads}):
            torch.set_num_threads(number)
            pairs = [(seconds(True), seconds(False)) for _ in range(runs + 1)][1:]  # the first warms up
            ours, theirs = map(list, zip(*pairs, strict=True))
            what = f"an image of {request.steps} steps, --exact on 1 thread, default on {number}"
            rows.append(row(what, "s", {"--exact": ours, "default": theirs}))
    torch.set_num_threads(threads)
    setting = {"model": pipe.name, "precision": pipe.about.dtype, "batch": size, "runs": runs}
    return {"machine": machine_facts(pipe.device, load), "setting": setting, "rows": rows}


def _write_files(data: bytes, folder: Path) -> None:
    for i in range(IMAGES):
        write_file(folder / f"{i}.png", data)


class _Idle(Pipeline):
    """A pipeline that has drawn its image already."""

    def __init__(self, pipe: Pipeline, picture: Image) -> None:
        super().__init__(pipe.text, pipe.denoiser, pipe.codec, pipe.schedule, about=pipe.about)
        self._picture = picture

    def draw(self, jobs: Sequence[Job], batch_size: int | None = None) -> Iterator[Finished]:
        return (Finished(index, self._picture) for index in range(len(jobs)))
