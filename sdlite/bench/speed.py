"""One evaluation of the denoiser, one image, and a cold start: of sdlite alone or against a peer (see `Side`)."""

import tempfile
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL.Image import Image
from torch import Tensor

from sdlite.bench.diffusers import Diffusers
from sdlite.bench.machine import machine_facts, run_python
from sdlite.bench.timing import Timings, alternate, row
from sdlite.contracts import Conditioning, TextFeatures
from sdlite.images.pixels import largest_difference
from sdlite.pipeline import Pipeline
from sdlite.request import Request

COLD_RUNS = 3


class Side(Protocol):
    """A program that draws with the weights of one model. PEERS makes one of (pipe, folder of its model)."""

    def evaluation(self, x: Tensor, t: Tensor, features: TextFeatures) -> Callable[[int], object]:
        """Evaluates the denoiser once per call. x: (B, C, H, W). t: (B,). features: of B prompts.

        What a program does once per image, such as projecting the text, comes before the calls.
        """

    def image(self, request: Request) -> Image:
        """Draws one image. request: with its size."""

    def command(self, request: Request, out: Path) -> list[str]:
        """Arguments of a Python process that loads the model, draws the request and writes it to `out`, a PNG."""


class Sdlite:
    def __init__(self, pipe: Pipeline, model: Path) -> None:
        self.pipe, self.model = pipe, model

    def evaluation(self, x: Tensor, t: Tensor, features: TextFeatures) -> Callable[[int], object]:
        memory = self.pipe.denoiser.prepare(Conditioning(*features))
        return torch.no_grad()(lambda _: self.pipe.denoiser(x, t, memory))

    def image(self, request: Request) -> Image:
        return self.pipe.generate(request, progress=False)[0]

    def command(self, request: Request, out: Path) -> list[str]:
        flags = {"model": self.model, "device": self.pipe.device, "dtype": self.pipe.about.dtype, "output": out}
        flags |= {name: getattr(request, name) for name in ("steps", "width", "height")}
        words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
        return ["-m", "sdlite", "generate", request.prompt, "--force", "--quiet", *words]


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
        size, pictures = f"{request.width}x{request.height}", [side.image(request) for side in sides.values()]
        difference = {"largest difference of 255": largest_difference(*pictures)} if versus else {}
    setting = {"model": pipe.name, "size": size, "precision": pipe.about.dtype, **difference, "runs": runs}
    return {"machine": machine_facts(pipe.device, load), "setting": setting, "rows": rows}


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
