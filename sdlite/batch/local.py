"""A batch on this machine: requests checked, the missing ones drawn, the folder's index written.

    prepare: options -> model -> plan          Batch.run: what is there -> chunks -> engine or processes -> index

The same call again draws only what is missing, however the last one ended.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from time import perf_counter
from typing import Any, Literal, NamedTuple

import torch
from pydantic import Field

from sdlite.batch.draw import EXACT_BATCH, Engine, Result, chunks, draw
from sdlite.batch.names import DEFAULT
from sdlite.batch.plan import SCHEMA, Item, Plan, in_shard, make_plan, parse_shard, without_sizes
from sdlite.batch.read import SHOWN_FAULTS, Source
from sdlite.batch.shards import shard_of
from sdlite.batch.store import Store
from sdlite.batch.workers import Processes, spread
from sdlite.config import Prediction, Record
from sdlite.images.files import png_bytes
from sdlite.images.recipe import versions
from sdlite.pipeline import Pipeline
from sdlite.request import Request

SHORT_PROMPT = 300  # bytes: a shorter text never has more chunks than the text encoder takes


class Options(Record):
    """How to run a batch.

    model to allow_links: as for Pipeline.load. batch_size: computed together. workers: processes. exact:
    the same bytes whatever batch_size, workers and cores, by a fixed batch on one thread each. seed: base of the seeds
    of rows without one; same_seed: their seed itself. defaults: fields of a request, or num_images, of rows that do not
    have them. keep_going: past failures. shard: "I/N", part I of N. name: template of file names. format:
    a folder of PNGs, or WebDataset shards. ray: workers are actors of a Ray cluster, one of this machine unless
    ray_address names another, where all machines must see the folder, the model and the pictures to start from.
    """

    model: str | None = None
    device: str = "auto"
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    prediction: Prediction | None = None
    vae: str | None = None
    variant: str | None = None
    allow_links: tuple[str, ...] = ()
    batch_size: int = Field(4, ge=1, le=256)
    workers: int = Field(1, ge=1, le=256)
    exact: bool = False
    seed: int = Field(0, ge=0, lt=2**64)
    same_seed: bool = False
    defaults: dict[str, Any] = Field(default_factory=dict)
    keep_going: bool = False
    shard: str | None = None
    name: str | None = None
    format: Literal["folder", "webdataset"] = "folder"
    ray: bool = False
    ray_address: str | None = None

    @property
    def on_ray(self) -> bool:
        return self.ray or self.ray_address is not None


@dataclass(frozen=True, slots=True)
class Event:
    """One picture saved, or failed where `error` says why. done of total: pictures of this run."""

    index: int
    file_name: str
    sha256: str | None
    seconds: float | None
    error: str | None
    done: int
    total: int


@dataclass(frozen=True)
class BatchReport:
    """done: drawn now. skipped: there already, or drawn by another process. failed: index -> why. seconds: in all."""

    done: int
    skipped: int
    failed: dict[int, str]
    seconds: float
    interrupted: bool = False


class Estimate(NamedTuple):
    """Of what is missing: pictures, seconds and bytes, from one batch drawn and thrown away."""

    images: int
    seconds: float
    size: int


def run(
    requests: Source,
    output: str | Path,
    *,
    progress: Callable[[Event], None] | None = None,
    stop: Callable[[], bool] | None = None,
    pipe: Pipeline | None = None,
    **options: Any,
) -> BatchReport:
    """Draws all requests into a folder, or what is missing there; see `Options` for the rest.

    requests: a file (.txt, .jsonl, .csv, .tsv, .parquet, a grid in .json), "-", or Requests, dicts and prompts.
    progress: called for each picture. stop: called between batches; True ends the run in order. pipe: a loaded model
    instead of `model`, for one worker. Raises ValueError with a line per fault before anything is drawn, DiskFull when
    the disk is full.
    """
    return prepare(requests, output, pipe=pipe, **options).run(progress, stop)


def prepare(requests: Source, output: str | Path, *, pipe: Pipeline | None = None, **options: Any) -> "Batch":
    """Loads the model and checks everything; nothing is written. See `run`."""
    if isinstance(options.get("model"), Path):
        options["model"] = str(options["model"])
    chosen = Options(**options)
    shard = None if chosen.shard is None else parse_shard(chosen.shard)
    if pipe is not None and (chosen.workers > 1 or chosen.on_ray):
        raise ValueError("workers and actors load the model by its name; give model instead of pipe")
    if chosen.on_ray:
        import_module("sdlite.batch.ray_runner")  # raises if Ray is missing
    if pipe is None:
        pipe = _load(chosen, chosen.device)
    engine = {"model": pipe.model_hash, "prediction": pipe.denoiser.prediction, "exact": chosen.exact}
    remarks: dict[str, str] = {}  # of each kind the first
    plan = make_plan(
        requests,
        resolve=_checks(pipe, remarks),
        engine=engine,
        seed=chosen.seed,
        same_seed=chosen.same_seed,
        defaults=chosen.defaults,
        name=chosen.name,
    )
    plan = plan._replace(notes=[*plan.notes, *list(remarks.values())[:SHOWN_FAULTS]])
    mine = [item for item in plan.items if shard is None or in_shard(item, shard)]
    return Batch(pipe, plan, mine, _store(chosen, Path(output)), chosen)


class Batch:
    """A checked batch that is ready to run. items: those of this shard; plan: all."""

    def __init__(self, pipe: Pipeline, plan: Plan, items: Sequence[Item], store: Store, options: Options) -> None:
        self.pipe, self.plan, self.items, self.store, self.options = pipe, plan, items, store, options
        self.size = EXACT_BATCH if options.exact else options.batch_size
        self.threads = 1 if options.exact else max(1, torch.get_num_threads() // options.workers)

    @property
    def notes(self) -> list[str]:
        """What a user should know before it runs, each once: of the model, of the file, of prompts (ten of these)."""
        return [*self.pipe.notes, *self.plan.notes]

    @property
    def settings(self) -> dict[str, Any]:
        """What run.json holds: all that decides a picture besides its request, and how files are called.

        Not the number of threads or the batch size, on which the last bits depend: another machine, or another number
        of workers, may go on with a folder. Without `exact` a picture is therefore promised to one grey level; with it,
        to the byte.
        """
        return {
            "schema": SCHEMA,
            "model": self.pipe.name,
            "model_hash": self.pipe.model_hash,
            "prediction": self.pipe.denoiser.prediction,
            "device": self.pipe.device.type,
            "dtype": self.pipe.about.dtype,
            "exact": self.options.exact,
            **({"compute_batch": self.size} if self.options.exact else {}),
            "seed": self.options.seed,
            "name": DEFAULT if self.options.name is None else self.options.name,
            "format": self.options.format,
            "versions": versions(),
        }

    def missing(self) -> list[Item]:
        """Items of this shard that are not in the folder."""
        there = self.store.done(self.items)
        return [item for item in self.items if item.index not in there]

    def run(
        self, progress: Callable[[Event], None] | None = None, stop: Callable[[], bool] | None = None
    ) -> BatchReport:
        """Draws what is missing; see `run` of this module."""
        start = perf_counter()
        self.store.open(self.settings)
        todo = {item.index: item for item in self.missing()}
        failed: dict[int, str] = {}
        left = Counter(shard_of(index) for index in todo)
        drawn = count = 0
        asked = False

        def halted() -> bool:
            nonlocal asked
            asked = asked or (stop is not None and stop())
            return asked or (bool(failed) and not self.options.keep_going)

        try:
            for result in self._results(list(todo.values()), halted):
                count += 1
                drawn += result.entry is not None
                if result.error is not None:
                    failed[result.index] = result.error
                if progress is not None:
                    sha256, seconds = (result.entry.sha256, result.entry.seconds) if result.entry else (None, None)
                    name = todo[result.index].file_name
                    progress(Event(result.index, name, sha256, seconds, result.error, count, len(todo)))
                shard = shard_of(result.index)
                left[shard] -= 1
                if not left[shard]:
                    self.store.pack([item for item in self.plan.items if shard_of(item.index) == shard], failed)
        finally:
            found = self.store.finish(self.plan.items, failed)
        there = sum(item.index in found for item in self.items)
        return BatchReport(
            drawn, there - drawn, failed, perf_counter() - start, asked and there + len(failed) < len(self.items)
        )

    def estimate(self) -> Estimate:
        """Time and disk of what is missing, measured on its first batch and scaled by steps and pixels."""
        missing = self.missing()
        first = next(chunks(self.pipe, missing, self.size), None)
        if first is None:
            return Estimate(0, 0.0, 0)
        with _threads(self.threads):
            start = perf_counter()
            sizes = [len(png_bytes(picture)) for picture in draw(self.pipe, first, self.size)]
            seconds = perf_counter() - start
        work, pixels = _work_of(first[0].request) * len(first), _pixels(first[0].request) * len(first)
        per_work, per_pixel = seconds / work / self.options.workers, sum(sizes) / pixels
        return Estimate(
            len(missing),
            per_work * sum(_work_of(item.request) for item in missing),
            round(per_pixel * sum(_pixels(item.request) for item in missing)),
        )

    def _results(self, items: Sequence[Item], halted: Callable[[], bool]) -> Iterator[Result]:
        handed = chunks(self.pipe, items, self.size)
        count = min(self.options.workers, len(items))
        make = partial(_engine, self._settled(), self.store.root.absolute(), self.size)
        if self.options.on_ray and items:
            from sdlite.batch.ray_runner import cluster

            address, on_gpu = self.options.ray_address, self.pipe.device.type == "cuda"
            threads = None if address and not self.options.exact else self.threads
            with cluster(make, address=address, count=count, threads=threads, on_gpu=on_gpu) as actors:
                for results in spread(actors, handed, count, halted):
                    yield from results
        elif self.options.workers == 1 or len(items) <= self.size:
            yield from _here(Engine(self.pipe, self.store, self.size, self.options.exact), handed, halted, self.threads)
        else:
            for results in spread(Processes(partial(make, threads=self.threads)), handed, count, halted):
                yield from results

    def _settled(self) -> Options:
        """Options that mean the same in another folder."""
        model = self.options.model
        return self.options.replace(model=str(Path(model).absolute()) if model and Path(model).exists() else model)


def _here(
    engine: Engine, handed: Iterator[Sequence[Item]], halted: Callable[[], bool], threads: int
) -> Iterator[Result]:
    """Draws in this process."""
    try:
        while not halted() and (chunk := next(handed, None)):
            with _threads(threads):
                engine.submit(chunk)
            yield from engine.results()
        yield from engine.results(wait=True)
    finally:
        engine.close()


def _engine(options: Options, root: Path, size: int, number: int, threads: int) -> Engine:
    """What a worker process draws with. With several GPUs each process has its own, in turn."""
    torch.set_num_threads(threads)
    gpus = torch.cuda.device_count() if options.device in ("auto", "cuda") else 0
    pipe = _load(options, f"cuda:{number % gpus}" if gpus else options.device)
    return Engine(pipe, _store(options, root, str(number)), size, options.exact)


def _store(options: Options, root: Path, worker: str = "0") -> Store:
    return Store(root, worker, options.exact, packs=options.format == "webdataset")


def _load(options: Options, device: str) -> Pipeline:
    chosen = options.model_dump(include={"dtype", "prediction", "vae", "variant", "allow_links"})
    return Pipeline.load(options.model, device=device, **chosen)


def _checks(pipe: Pipeline, remarks: dict[str, str]) -> Callable[[Request, Any], Request]:
    """`Pipeline.resolve` and all else that a model wants of a request; settings that many rows share are tried once.

    remarks: takes what `Pipeline.remarks` says of them, by what it says but for sizes.
    """
    tried: set[tuple[object, ...]] = set()

    def resolve(request: Request, picture: Any) -> Request:
        for text in (request.prompt, request.negative_prompt):
            if len(text.encode()) > SHORT_PROMPT:
                pipe.text.num_chunks(text)
        settings = (
            request.solver,
            request.steps,
            request.eta,
            request.strength,
            request.image is None,
            request.clip_skip,
        )
        if settings not in tried:
            try:
                pipe.num_evaluations(request)
            except (ValueError, OSError):
                raise
            except Exception:  # nobody foresaw it: drawing meets it again, and there it fails one row
                pass
            tried.add(settings)
        for remark in pipe.remarks(request, picture):
            remarks.setdefault(without_sizes(remark), remark)
        return pipe.resolve(request, picture)

    return resolve


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """PyTorch with that many threads: their number decides how kernels sum, and so the last bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _pixels(request: Request) -> int:
    return (request.width or 0) * (request.height or 0)


def _work_of(request: Request) -> int:
    return request.steps * _pixels(request)
