"""What a program must do to be measured, and sdlite as the first of them."""

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import torch
from PIL.Image import Image
from torch import Tensor

from sdlite.contracts import Conditioning, TextFeatures
from sdlite.pipeline import Pipeline
from sdlite.request import Request


class Side(Protocol):
    """A program that draws with the weights of one model. `speed.PEERS` makes one of (pipe, folder of its model)."""

    def evaluation(self, x: Tensor, t: Tensor, features: TextFeatures) -> Callable[[int], object]:
        """Evaluates the denoiser once per call. x: (B, C, H, W). t: (B,). features: of B prompts.

        What a program does once per image, such as projecting the text, comes before the calls.
        """

    def image(self, request: Request) -> Image:
        """Draws one image. request: with its size."""

    def command(self, request: Request, out: Path) -> list[str]:
        """Arguments of a Python process that loads the model, draws the request and writes it to `out`, a PNG."""


class Sdlite:
    """The pipeline itself."""

    def __init__(self, pipe: Pipeline, model: Path) -> None:
        self.pipe, self.model = pipe, model

    def evaluation(self, x: Tensor, t: Tensor, features: TextFeatures) -> Callable[[int], object]:
        memory = self.pipe.denoiser.prepare(Conditioning(*features))

        @torch.no_grad()
        def evaluate(_: int) -> object:
            return self.pipe.denoiser(x, t, memory)

        return evaluate

    def image(self, request: Request) -> Image:
        return self.pipe.generate(request, progress=False)[0]

    def command(self, request: Request, out: Path) -> list[str]:
        flags = {"model": self.model, "device": self.pipe.device, "dtype": self.pipe.about.dtype, "output": out}
        flags |= {name: getattr(request, name) for name in ("steps", "width", "height")}
        words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
        return ["-m", "sdlite", "generate", request.prompt, "--force", "--quiet", *words]
