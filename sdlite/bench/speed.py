"""One evaluation of the denoiser, one image, and a cold start: of sdlite alone or against a peer."""

import tempfile
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch

from sdlite.bench.diffusers import Diffusers
from sdlite.bench.machine import machine_facts, run_python
from sdlite.bench.sides import Sdlite, Side
from sdlite.bench.timing import Timings, alternate, row
from sdlite.images.pixels import largest_difference
from sdlite.pipeline import Pipeline
from sdlite.request import Request

COLD_RUNS = 3
PEERS: dict[str, Callable[[Pipeline, Path], Side]] = {"diffusers": Diffusers}
Sides = dict[str, Side]


def measure(
    pipe: Pipeline, request: Request, *, load: float, versus: str | None = None, runs: int = 5
) -> dict[str, Any]:
    """Times one evaluation of the denoiser, one image and a cold start of what request says.

    versus: a name in PEERS, or None. load: `machine_load` before the model was loaded.
    Returns {"machine": ..., "setting": ..., "rows": [...]}, ready for JSON and for `table`. Without a peer, a pipeline
    that cannot be saved has no row for the cold start. Raises ValueError for a model that the peer does not have.
    """
    request, kind = pipe.jobs(request)[0].request, type(pipe.denoiser).__name__
    with tempfile.TemporaryDirectory(prefix="sdlite-bench-") as folder:
        model = Path(folder) / "model"
        with suppress(*() if versus else (ValueError,)):  # parts that are no networks of ours
            pipe.save(model)
        sides: Sides = {"sdlite": Sdlite(pipe, model)} | ({versus: PEERS[versus](pipe, model)} if versus else {})
        rows = [
            row(f"one {kind} evaluation, batch 2", "s", _evaluations(pipe, request, sides, runs)),
            row(f"one image, {request.steps} steps", "s", _images(request, sides, runs)),
            *(_cold_rows(request, sides, model.parent) if model.exists() else ()),
        ]
        size, precision = f"{request.width}x{request.height}", pipe.about.dtype
        setting: dict[str, Any] = {"model": pipe.name, "size": size, "precision": precision}
        if versus:
            setting["largest difference of 255"] = largest_difference(*(side.image(request) for side in sides.values()))
    return {"machine": machine_facts(pipe.device, load), "setting": setting | {"runs": runs}, "rows": rows}


def _evaluations(pipe: Pipeline, request: Request, sides: Sides, runs: int) -> Timings:
    """A guided step: batch 2, at a timestep in the middle of the schedule."""
    features = pipe.text.encode([request.negative_prompt, request.prompt])
    width, height = (side // pipe.codec.factor for side in (request.width or 0, request.height or 0))
    shape = (2, pipe.denoiser.in_channels, height, width)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(pipe.device, getattr(torch, pipe.about.dtype))
    t = torch.full((2,), 500, device=x.device)
    return alternate({name: side.evaluation(x, t, features) for name, side in sides.items()}, runs)


def _images(request: Request, sides: Sides, runs: int) -> Timings:
    def draw(side: Side, run: int) -> object:
        return side.image(request.replace(prompt=f"{request.prompt} {run}"))

    return alternate({name: partial(draw, side) for name, side in sides.items()}, runs)


def _cold_rows(request: Request, sides: Sides, folder: Path) -> list[dict[str, Any]]:
    """Seconds from the start of a process to its end with the PNG on disk, and the most memory it held."""
    seconds: Timings = {name: [] for name in sides}
    memory: Timings = {name: [] for name in sides}
    for _ in range(COLD_RUNS):
        for name, side in sides.items():
            out = folder / f"{name}.png"
            spent, peak = run_python(*side.command(request, out))
            assert out.is_file(), f"{name} wrote no image"
            seconds[name].append(spent)
            memory[name].append(peak)
    return [row("peak memory of a process", "bytes", memory), row("cold start to the first PNG", "s", seconds)]
