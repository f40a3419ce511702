"""The time that a batch adds to its images, and the cost of exact bytes."""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image

from sdlite.bench.machine import machine_facts
from sdlite.bench.timing import alternate, row, spent
from sdlite.files import write_file
from sdlite.images.files import png_bytes
from sdlite.pipeline import Finished, Job, Pipeline
from sdlite.request import Request

IMAGES = 500  # of a timing of the batch machinery
RunBatch = Callable[..., object]  # draws (requests, folder, pipe=, exact=): `sdlite.batch.run`


def measure_batch(
    pipe: Pipeline, request: Request, run_batch: RunBatch, folder: Path, *, load: float, runs: int = 5
) -> dict[str, Any]:
    """Times what a batch adds to each image besides drawing it, on the disk of a folder.

    Returns what `measure` does. The first row is a whole run (requests checked, grouped, encoded as PNG, committed,
    listed) with images that are drawn already; the rows after it are parts of it.
    """
    picture = pipe.generate(request.replace(steps=1), progress=False)[0]
    data = png_bytes(picture)
    requests = [{"prompt": f"a red apple {i}", "steps": 2} for i in range(IMAGES)]
    idle = _Idle(pipe, picture)

    def write(place: Path) -> None:
        for i in range(IMAGES):
            write_file(place / f"{i}.png", data)

    parts: dict[str, Callable[[Path], object]] = {
        "overhead of the batch, per image": lambda place: run_batch(requests, place, pipe=idle),
        "of which PNG encoding": lambda _: [png_bytes(picture) for _ in range(IMAGES)],
        "of which file, 2 fsyncs and link": write,
    }
    took: dict[str, list[tuple[float, float]]] = {what: [] for what in parts}
    with tempfile.TemporaryDirectory(prefix="sdlite-bench-", dir=folder) as place:
        for run in range(runs + 1):
            for number, (what, call) in enumerate(parts.items()):
                took[what].append(spent(partial(call, Path(place) / f"{run}-{number}")))
    rows = []
    for what, times in took.items():
        cpu, wall = (
            [seconds / IMAGES for seconds in side] for side in zip(*times[1:], strict=True)
        )  # the first warms up
        rows.append(row(what, "s", {"CPU": cpu, "wall": wall}, compare=False))
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
    rows, threads = [], torch.get_num_threads()
    with tempfile.TemporaryDirectory(prefix="sdlite-bench-") as place:

        def draw(number: int, side: str, run: int) -> object:
            return run_batch(requests, Path(place) / f"{number} {side} {run}", pipe=pipe, exact=side == "--exact")

        for number in sorted({1, threads}):
            torch.set_num_threads(number)
            timings = alternate({side: partial(draw, number, side) for side in ("--exact", "default")}, runs)
            what = f"an image of {request.steps} steps, --exact on 1 thread, default on {number}"
            rows.append(row(what, "s", {side: [t / len(requests) for t in times] for side, times in timings.items()}))
    torch.set_num_threads(threads)
    setting = {"model": pipe.name, "precision": pipe.about.dtype, "batch": size, "runs": runs}
    return {"machine": machine_facts(pipe.device, load), "setting": setting, "rows": rows}


class _Idle(Pipeline):
    """A pipeline that has drawn its image already."""

    def __init__(self, pipe: Pipeline, picture: Image) -> None:
        super().__init__(pipe.text, pipe.denoiser, pipe.codec, pipe.schedule, about=pipe.about)
        self._picture = picture

    def draw(self, jobs: Sequence[Job], batch_size: int | None = None) -> Iterator[Finished]:
        return (Finished(index, self._picture) for index in range(len(jobs)))
