"""A batch on this machine: requests checked, missing images drawn, the folder's index written.

prepare: options -> model -> plan     Batch.run: missing items -> groups -> Drawer here, or in workers -> index
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from itertools import islice
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import torch

from sdlite.batch.drawer import EXACT_BATCH, Drawer, Result, draw
from sdlite.batch.names import DEFAULT, SCHEMA
from sdlite.batch.plan import Item, Options, Plan, Resolved, groups, in_part, make_plan, parse_part
from sdlite.batch.read import Source
from sdlite.batch.shards import shard_of
from sdlite.batch.store import Store
from sdlite.batch.workers import Worker, WorkerProcess, hand_out
from sdlite.images.files import png_bytes
from sdlite.images.pixels import Opened
from sdlite.images.recipe import versions
from sdlite.pipeline import Pipeline
from sdlite.request import Request


@dataclass(frozen=True, slots=True)
class Event:
    """One image was saved, or failed if `error` gives a reason. done of total: images of this run."""

    index: int
    file_name: str
    sha256: str | None
    seconds: float | None
    error: str | None
    done: int
    total: int


@dataclass(frozen=True)
class BatchReport:
    """done: drawn now. skipped: done before, or by another process. failed: index -> reason. seconds: of the run."""

    done: int
    skipped: int
    failed: dict[int, str]
    seconds: float
    interrupted: bool = False


class Estimate(NamedTuple):
    """Images, seconds and bytes that are missing, estimated from one batch that was drawn and thrown away.

    processes: how many would draw them.
    """

    images: int
    seconds: float
    size: int
    processes: int


def run(
    requests: Source,
    output: str | Path,
    *,
    progress: Callable[[Event], None] | None = None,
    stop: Callable[[], bool] | None = None,
    pipe: Pipeline | None = None,
    **options: Any,
) -> BatchReport:
    """Draws all requests, or those whose images are missing, into a folder.

    requests: a file (.txt, .jsonl, .csv, .tsv, .parquet, a grid in .json), "-", or Requests, dicts and prompts.
    progress: called for each image. stop: called between batches; True ends the run in order. pipe: a loaded model
    instead of `model`, for one worker. options: fields of `Options`. Raises ValueError with one line per fault before
    anything is drawn, and DiskFull when the disk is full.
    """
    return prepare(requests, output, pipe=pipe, **options).run(progress, stop)


def prepare(requests: Source, output: str | Path, *, pipe: Pipeline | None = None, **options: Any) -> "Batch":
    """Loads the model and checks everything; writes nothing. See `run`."""
    former = {"part": options.pop("shard")} if "shard" in options else {}  # the option's former name
    chosen = Options(**options, **former)
    part = None if chosen.part is None else parse_part(chosen.part)
    if pipe is not None and (chosen.workers > 1 or chosen.on_ray):
        raise ValueError("workers and actors load the model by its name; give model instead of pipe")
    if chosen.on_ray:
        import_module("sdlite.batch.ray_runner")  # raises if Ray is missing
    if pipe is None:
        pipe = Pipeline.load(chosen.model, **chosen.keywords())
    model = {"model": pipe.model_hash, "prediction": pipe.denoiser.prediction, "exact": chosen.exact, **pipe.about.bits}
    plan = make_plan(requests, chosen, resolve=partial(_resolve, pipe), model=model)
    mine = [item for item in plan.items if part is None or in_part(item, part)]
    return Batch(pipe, plan, mine, _store(chosen, Path(output)), chosen)


class Batch:
    """A checked batch that is ready to run. items: those of this part; plan: all."""

    def __init__(self, pipe: Pipeline, plan: Plan, items: Sequence[Item], store: Store, options: Options) -> None:
        self.pipe, self.plan, self.items, self.store, self.options = pipe, plan, items, store, options
        self.size = EXACT_BATCH if options.exact else options.batch_size
        self.threads = 1 if options.exact else max(1, torch.get_num_threads() // options.workers)

    @property
    def notes(self) -> list[str]:
        """What a user should know before the run: notes on the model, the file and the prompts, each once."""
        return [*self.pipe.notes, *self.plan.notes]

    @property
    def settings(self) -> dict[str, Any]:
        """The content of run.json: everything that decides an image besides its request, and the names of files.

        The number of threads and the batch size are not in it, though the last bits depend on them: another machine, or
        another number of workers, may continue a folder. So without `exact` an image is promised to one grey level;
        with it, to the byte.
        """
        return {
            "schema": SCHEMA,
            "model": self.pipe.name,
            "model_hash": self.pipe.model_hash,
            "prediction": self.pipe.denoiser.prediction,
            "device": self.pipe.device.type,
            "dtype": self.pipe.about.dtype,
            **self.pipe.about.bits,
            "exact": self.options.exact,
            **({"compute_batch": self.size} if self.options.exact else {}),
            "seed": self.options.seed,
            "name": DEFAULT if self.options.name is None else self.options.name,
            "format": self.options.format,
            "versions": versions(),
        }

    def missing(self) -> list[Item]:
        """Items of this part whose images are not in the folder."""
        done = self.store.done(self.items)
        return [item for item in self.items if item.index not in done]

    def run(
        self, progress: Callable[[Event], None] | None = None, stop: Callable[[], bool] | None = None
    ) -> BatchReport:
        """Draws what is missing; see `run` of this module."""
        start, drawn = perf_counter(), 0
        self.store.open(self.settings)
        todo = {item.index: item for item in self.missing()}
        left = Counter(shard_of(index) for index in todo)
        failed: dict[int, str] = {}
        asked = False

        def halted() -> bool:
            nonlocal asked
            asked = asked or (stop is not None and stop())
            return asked or (bool(failed) and not self.options.keep_going)

        try:
            for number, result in enumerate(self._results(list(todo.values()), halted), 1):
                drawn += result.entry is not None
                if result.error is not None:
                    failed[result.index] = result.error
                if progress is not None:
                    progress(_event(result, todo[result.index].file_name, number, len(todo)))
                shard = shard_of(result.index)
                left[shard] -= 1
                if not left[shard]:
                    self.store.pack([item for item in self.plan.items if shard_of(item.index) == shard], failed)
        finally:
            found = self.store.finish(self.plan.items, failed)
        done = sum(item.index in found for item in self.items)
        stopped = asked and done + len(failed) < len(self.items)
        return BatchReport(drawn, done - drawn, failed, perf_counter() - start, stopped)

    def estimate(self) -> Estimate:
        """Time and disk space for what is missing, measured on its first batch and scaled by steps and pixels."""
        missing = self.missing()
        first = next(groups(missing, self.size), None)
        if first is None:
            return Estimate(0, 0.0, 0, processes=1)
        start = perf_counter()
        with _threads(self.threads):
            size = sum(len(png_bytes(picture)) for picture in draw(self.pipe, first, self.size))
        processes = self._num_processes(missing)
        seconds = (perf_counter() - start) / processes
        pixels = sum(item.pixels for item in missing) / sum(item.pixels for item in first)
        work, measured = (sum(item.pixels * item.request.steps for item in some) for some in (missing, first))
        return Estimate(len(missing), seconds * work / measured, round(size * pixels), processes)

    def _results(self, items: Sequence[Item], halted: Callable[[], bool]) -> Iterator[Result]:
        handed, count = groups(items, self.size), self._num_processes(items)
        if not items or (count == 1 and not self.options.on_ray):
            with closing(Drawer(self.pipe, self.store, self.size, self.options.exact)) as drawer:
                while not halted() and (group := next(handed, None)):
                    with _threads(self.threads):
                        drawer.submit(group)
                    yield from drawer.results()
                yield from drawer.results(wait=True)
            return
        with self._workers(count) as start:
            for results in hand_out(start, handed, count, halted):
                yield from results

    def _num_processes(self, items: Sequence[Item]) -> int:
        """How many processes or actors draw the items: one for a single batch, and no more than there are batches."""
        few = len(items) <= self.size and not self.options.on_ray
        return 1 if few else sum(1 for _ in islice(groups(items, self.size), self.options.workers))

    def _workers(self, count: int) -> AbstractContextManager[Callable[[int], Worker]]:
        """Starts workers: processes of this machine, or actors of a Ray cluster."""
        model = self.options.model  # workers may run in another working folder
        absolute = self.options.replace(model=str(Path(model).absolute()) if model and Path(model).exists() else model)
        make = partial(_drawer, absolute, self.store.root.absolute(), self.size)
        if not self.options.on_ray:
            return nullcontext(partial(WorkerProcess, partial(make, threads=self.threads)))
        from sdlite.batch.ray_runner import cluster

        address, on_gpu = self.options.ray_address, self.pipe.device.type == "cuda"
        threads = None if address and not self.options.exact else self.threads
        return cluster(make, address=address, count=count, threads=threads, on_gpu=on_gpu)


def _resolve(pipe: Pipeline, request: Request, image: Opened | None, mask: Opened | None) -> Resolved:
    """Resolves a row. An error that nobody foresaw is left to drawing, where it fails this row only."""
    try:
        job = pipe.jobs(request, [image], [mask])[0]
        return Resolved(job.request, job.batch_key, job.remarks)
    except (ValueError, OSError):
        raise
    except Exception:
        alone = pipe.resolve(request, image)
        return Resolved(alone, batch_key=alone)


def _event(result: Result, file_name: str, done: int, total: int) -> Event:
    sha256, seconds = (result.entry.sha256, result.entry.seconds) if result.entry else (None, None)
    return Event(result.index, file_name, sha256, seconds, result.error, done, total)


def _drawer(options: Options, root: Path, size: int, number: int, threads: int) -> Drawer:
    """Called in a worker process. With several GPUs each process has its own, in turn."""
    torch.set_num_threads(threads)
    gpus = torch.cuda.device_count() if options.device in ("auto", "cuda") else 0
    keywords = options.keywords() | ({"device": f"cuda:{number % gpus}"} if gpus else {})
    pipe = Pipeline.load(options.model, **keywords)
    return Drawer(pipe, _store(options, root, str(number)), size, options.exact)


def _store(options: Options, root: Path, worker: str = "0") -> Store:
    return Store(root, worker, options.exact, packs=options.format == "webdataset")


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """PyTorch with that many threads: their number decides how kernels sum, and so the last bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
