"""How fast sdlite is, alone or against diffusers on the same weights: the numbers of the README come from here.

The two sides run in turn in one process (A B, B A, A B, ...) and share one copy of the UNet's weights; what counts is
the ratio within a pair, its median, least and most. Memory and cold start are those of a process of its own that
loads the model and writes one PNG. Prompts differ from run to run, so that no side finds its text encoded already.
"""

import itertools
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor

from sdlite import __version__, batch
from sdlite.batch.draw import EXACT_BATCH
from sdlite.contracts import Conditioning
from sdlite.files import write_file
from sdlite.images.files import png_bytes
from sdlite.images.pixels import largest_difference
from sdlite.models.networks import Network
from sdlite.models.unet import UNet
from sdlite.pipeline import Pipeline
from sdlite.request import Request

MAX_LOAD = 0.3  # of the cores, on average over the last minute: above it a timing says more about the others
COLD_RUNS = 3
BATCH_IMAGES = 500  # of a timing of the batch machinery
MIN_SECONDS = 0.2  # of one timing; shorter calls are repeated
# Linux counts into a child's peak what its parent held at the fork, so a small process starts the child, not this one.
LAUNCHER = """
import resource, subprocess, sys, time
start = time.perf_counter()
code = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL).returncode
print(time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
sys.exit(code)
"""
DIFFUSERS = """
import sys, torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
folder, out, prompt, steps, width, height, device, dtype = sys.argv[1:]
options = {"torch_dtype": getattr(torch, dtype), "local_files_only": True, "use_safetensors": True}
pipe = StableDiffusionPipeline.from_pretrained(folder, **options)
pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
pipe.set_progress_bar_config(disable=True)
pipe.to(device)(prompt, num_inference_steps=int(steps), width=int(width), height=int(height)).images[0].save(out)
"""

Timings = dict[str, list[float]]


def machine_load() -> float:
    """Processes that wanted a core, on average over the last minute; to be asked before we load a model ourselves."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0


def measure(
    pipe: Pipeline, request: Request, *, load: float, versus: str | None = None, runs: int = 5
) -> dict[str, Any]:
    """Times one evaluation of the network, one image and a cold start of what request says.

    versus: None or "diffusers". load: `machine_load` before the model was loaded.
    Returns {"machine": ..., "setting": ..., "rows": [...]}, ready for JSON and for `table`. Raises ValueError for a DiT
    against diffusers.
    """
    request, net = pipe.resolve(request), _network(pipe)
    if versus and not isinstance(net, UNet):
        raise ValueError(f"diffusers has no pipeline for this {type(net).__name__} with CLIP; measure it alone")
    kind = type(net).__name__
    with tempfile.TemporaryDirectory(prefix="sdlite-bench-") as folder:
        model = Path(folder) / "model"
        pipe.save(model)
        theirs = _diffusers(net, model) if versus else None
        rows = [
            _row(f"one {kind} evaluation, batch 2", "s", _alternate(_evaluations(pipe, net, request, theirs), runs)),
            _row(f"one image, {request.steps} steps", "s", _alternate(_images(pipe, request, theirs), runs)),
            *_cold_rows(net, request, model, versus),
        ]
        setting: dict[str, Any] = {
            "model": pipe.name,
            "size": f"{request.width}x{request.height}",
            "precision": _precision(net),
        }
        if theirs:
            setting["largest difference of 255"] = _difference(pipe, request, theirs)
    return {"machine": _machine(net, load), "setting": setting | {"runs": runs}, "rows": rows}


def measure_batch(pipe: Pipeline, request: Request, folder: Path, *, load: float, runs: int = 5) -> dict[str, Any]:
    """Times what a batch adds to each picture besides drawing it, on the disk of a folder.

    Returns what `measure` does. The machinery is that of a whole run (request checked, grouped, encoded as PNG,
    committed, listed) with pictures that are there already; the rows after it are its parts.
    """
    picture = pipe.generate(pipe.resolve(request.replace(steps=1)), progress=False)[0]
    data = png_bytes(picture)
    parts: dict[str, Callable[[Path], object]] = {
        "batch machinery, a picture": partial(_idle_batch, _Idle(pipe, picture)),
        "of which PNG encoding": lambda _: [png_bytes(picture) for _ in range(BATCH_IMAGES)],
        "of which file, 2 fsyncs and link": partial(_files, data),
    }
    timings: dict[str, Timings] = {what: {"CPU": [], "wall": []} for what in parts}
    with tempfile.TemporaryDirectory(prefix="sdlite-bench-", dir=folder) as place:
        for run in range(runs + 1):
            for number, (what, call) in enumerate(parts.items()):
                spent = _spent(partial(call, Path(place) / f"{run}-{number}"))
                for side, seconds in zip(timings[what], spent, strict=True):
                    timings[what][side] += [seconds / BATCH_IMAGES] if run else []  # the first warms up
    rows = [_row(what, "s", sides) | {"ratio": None} for what, sides in timings.items()]
    setting = {
        "picture": f"{picture.width}x{picture.height}, {len(data)} bytes",
        "pictures": BATCH_IMAGES,
        "runs": runs,
    }
    return {"machine": _machine(_network(pipe), load), "setting": setting, "rows": rows}


def measure_exact(pipe: Pipeline, request: Request, *, load: float, runs: int = 5) -> dict[str, Any]:
    """Times a picture of a batch with `exact` against one without: on one thread both, and as it comes.

    Returns what `measure` does.
    """
    requests = [request.replace(prompt=f"{request.prompt} {i}") for i in range(2 * EXACT_BATCH)]
    rows, threads, folders = [], torch.get_num_threads(), itertools.count()
    with tempfile.TemporaryDirectory(prefix="sdlite-bench-") as place:

        def seconds(exact: bool) -> float:
            folder = Path(place) / str(next(folders))
            return _spent(lambda: batch.run(requests, folder, pipe=pipe, exact=exact))[1] / len(requests)

        for number in sorted({1, threads}):
            torch.set_num_threads(number)
            pairs = [(seconds(True), seconds(False)) for _ in range(runs + 1)][1:]  # the first warms up
            ours, theirs = map(list, zip(*pairs, strict=True))
            what = f"a picture of {request.steps} steps, --exact on 1 thread, default on {number}"
            rows.append(_row(what, "s", {"--exact": ours, "default": theirs}))
    torch.set_num_threads(threads)
    setting = {"model": pipe.name, "precision": _precision(_network(pipe)), "batch": EXACT_BATCH, "runs": runs}
    return {"machine": _machine(_network(pipe), load), "setting": setting, "rows": rows}


def _network(pipe: Pipeline) -> Network:
    assert isinstance(pipe.denoiser, Network), "Pipeline.load gives networks of our own"
    return pipe.denoiser


class _Idle:
    """A pipeline that draws in no time."""

    def __init__(self, pipe: Pipeline, picture: Image) -> None:
        self._pipe, self._picture = pipe, picture
        self._latents = torch.zeros(1)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._pipe, name)

    def sample_latents(self, *_: Any, **__: Any) -> Iterator[Tensor]:
        yield self._latents

    def decode(self, _: Tensor, requests: Sequence[Request], **__: Any) -> list[Image]:
        return [self._picture] * len(requests)


def _idle_batch(idle: Any, folder: Path) -> None:
    rows = [{"prompt": f"a red apple {i}", "steps": 2} for i in range(BATCH_IMAGES)]
    assert batch.run(rows, folder, pipe=idle).done == BATCH_IMAGES


def _files(data: bytes, folder: Path) -> None:
    folder.mkdir()
    for i in range(BATCH_IMAGES):
        write_file(folder / f"{i}.png", data)


def _spent(call: Callable[[], Any]) -> tuple[float, float]:
    """Seconds of all our threads on their cores, and on the wall."""
    cpu, wall = time.process_time(), time.perf_counter()
    call()
    return time.process_time() - cpu, time.perf_counter() - wall


def table(result: dict[str, Any]) -> str:
    """Markdown: the rows, then what they were measured on and whether they may be quoted."""
    sides = list(result["rows"][0]["median"])
    ratio = ["ratio: median (least to most)"] if any(row["ratio"] for row in result["rows"]) else []
    lines = [" | ".join(["", "", *sides, *ratio, ""]).strip(" ")]
    lines.append("|---" * (lines[0].count("|") - 1) + "|")
    for row in result["rows"]:
        cells = [row["what"], *(_shown(row["median"][side], row["unit"]) for side in sides)]
        if row["ratio"]:
            cells.append("{median:.3f} ({least:.3f} to {most:.3f})".format(**row["ratio"]))
        lines.append("| " + " | ".join(cells) + " |")
    facts = result["setting"] | result["machine"]
    lines += ["", ", ".join(f"{name}: {value}" for name, value in facts.items() if name != "publishable")]
    if not result["machine"]["publishable"]:
        lines.append("NOT TO BE QUOTED: the machine had other work when this started; run it again when it is idle.")
    return "\n".join(lines)


def _shown(value: float, unit: str) -> str:
    return (
        f"{value / 2**20:.0f} MiB" if unit == "bytes" else f"{value:.3g} s" if value >= 1 else f"{value * 1e3:.3g} ms"
    )


def _row(what: str, unit: str, timings: Timings) -> dict[str, Any]:
    """Medians per side, and sdlite divided by the other within each pair: below 1, sdlite needs less."""
    ratio = None
    if len(timings) == 2:
        ours, theirs = timings.values()
        pairs = [a / b for a, b in zip(ours, theirs, strict=True)]
        ratio = {"median": statistics.median(pairs), "least": min(pairs), "most": max(pairs)}
    medians = {side: statistics.median(values) for side, values in timings.items()}
    return {"what": what, "unit": unit, "median": medians, "ratio": ratio, "runs": timings}


def _alternate(sides: dict[str, Callable[[int], Any]], runs: int) -> Timings:
    """Seconds per call. The first call of each side warms up and sets how many calls make a timing long enough; who
    goes first changes every pair. The calls get a running number.
    """
    first = max(_seconds(call, range(1)) for call in sides.values())
    repeats = max(1, int(MIN_SECONDS / first))
    timings: Timings = {side: [] for side in sides}
    for run in range(runs):
        for side in list(sides)[:: -1 if run % 2 else 1]:
            numbers = range(1 + run * repeats, 1 + (run + 1) * repeats)
            timings[side].append(_seconds(sides[side], numbers) / repeats)
    return timings


def _seconds(call: Callable[[int], Any], numbers: range) -> float:
    start = time.perf_counter()
    for number in numbers:
        call(number)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _diffusers(unet: Network, folder: Path) -> Any:
    """diffusers' pipeline of the saved model; its UNet uses our tensors, not a copy."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline
    from diffusers.utils import logging

    logging.disable_progress_bar()
    weight = next(unet.parameters())
    with warnings.catch_warnings(action="ignore"):  # torch_dtype has a new name, which diffusers 0.36 does not know
        options = {"torch_dtype": weight.dtype, "local_files_only": True, "use_safetensors": True}
        theirs = StableDiffusionPipeline.from_pretrained(folder, **options)
    theirs.scheduler = DDIMScheduler.from_config(theirs.scheduler.config)
    theirs.set_progress_bar_config(disable=True)
    theirs.to(weight.device)
    theirs.unet.load_state_dict(unet.state_dict(), assign=True)  # strict
    return theirs


def _evaluations(pipe: Pipeline, net: Network, request: Request, theirs: Any) -> dict[str, Callable[[int], Any]]:
    """A guided step of both: batch 2, at a timestep in the middle of the schedule."""
    features = pipe.text.encode([request.negative_prompt, request.prompt])
    width, height = (side // pipe.codec.factor for side in (request.width or 0, request.height or 0))
    shape = (2, net.in_channels, height, width)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(next(net.parameters()))
    t = torch.full((2,), 500, device=x.device)
    memory = net.prepare(Conditioning(*features))  # once per image, so not part of a step

    @torch.no_grad()
    def ours(_: int) -> Any:
        return net(x, t, memory)

    @torch.no_grad()
    def other(_: int) -> Any:
        return theirs.unet(x, t, encoder_hidden_states=features.context)

    return {"sdlite": ours} | ({"diffusers": other} if theirs else {})


def _images(pipe: Pipeline, request: Request, theirs: Any) -> dict[str, Callable[[int], Any]]:
    def ours(run: int) -> Any:
        return pipe.generate(request.replace(prompt=f"{request.prompt} {run}"), progress=False)[0]

    def other(run: int) -> Any:
        fields = request.model_dump(include={"negative_prompt", "width", "height", "guidance_scale"})
        generator = torch.Generator().manual_seed(request.seed)
        prompt = f"{request.prompt} {run}"
        return theirs(prompt, num_inference_steps=request.steps, generator=generator, **fields).images[0]

    return {"sdlite": ours} | ({"diffusers": other} if theirs else {})


def _difference(pipe: Pipeline, request: Request, theirs: Any) -> int:
    """Grey levels between the two sides' picture of one request."""
    ours, other = _images(pipe, request, theirs).values()
    return largest_difference(ours(0), other(0))


def _cold_rows(net: Network, request: Request, model: Path, versus: str | None) -> list[dict[str, Any]]:
    """Seconds from the start of a process to its end with the PNG on disk, and the most memory it held."""
    numbers = {name: str(getattr(request, name)) for name in ("steps", "width", "height")}
    dtype, device = _precision(net), str(next(net.parameters()).device)
    ours = ["-m", "sdlite", "generate", request.prompt, "--model", str(model), "--force", "--quiet", "--dtype", dtype]
    ours += ["--device", device, *(word for name in numbers for word in (f"--{name}", numbers[name]))]
    other = ["-c", DIFFUSERS, str(model), "OUT", request.prompt, *numbers.values(), device, dtype]
    commands = {"sdlite": [*ours, "--output", "OUT"]} | ({"diffusers": other} if versus else {})
    seconds: Timings = {side: [] for side in commands}
    memory: Timings = {side: [] for side in commands}
    for _ in range(COLD_RUNS):
        for side, command in commands.items():
            out = model.parent / f"{side}.png"
            spent, peak = _child([sys.executable, *(str(out) if word == "OUT" else word for word in command)])
            assert out.is_file(), f"{side} wrote no picture"
            seconds[side].append(spent)
            memory[side].append(peak)
    return [_row("peak memory of a process", "bytes", memory), _row("cold start to the first PNG", "s", seconds)]


def _child(command: list[str]) -> tuple[float, float]:
    """(seconds, peak resident bytes) of a command that must succeed."""
    threads = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}  # as many for both sides as in here
    launch = [sys.executable, "-c", LAUNCHER, *command]
    result = subprocess.run(launch, capture_output=True, text=True, check=False, env=threads)
    if result.returncode:
        raise RuntimeError(f"{command[:4]} failed: {result.stderr[-500:]}")
    seconds, peak = map(float, result.stdout.split())
    return seconds, peak * (1 if sys.platform == "darwin" else 1024)


def _precision(net: Network) -> str:
    return str(next(net.parameters()).dtype).removeprefix("torch.")


def _machine(net: Network, load: float) -> dict[str, Any]:
    cores = os.cpu_count() or 1
    names = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    cpu = next((line.split(": ")[1] for line in names if line.startswith("model name")), platform.processor())
    place = torch.cuda.get_device_name() if next(net.parameters()).is_cuda else cpu
    versions = {name: version(name) for name in ("torch", "diffusers", "transformers")}
    return {
        "machine": f"{place}, {cores} cores, {platform.system()}",
        "threads": torch.get_num_threads(),
        "load": round(load, 2),
        "publishable": load <= MAX_LOAD * cores,
        "sdlite": __version__,
        **versions,
    }
