"""The peer diffusers: StableDiffusionPipeline with DDIM on the saved model."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor

from sdlite.contracts import TextFeatures
from sdlite.models.unet import UNet
from sdlite.pipeline import Pipeline
from sdlite.request import Request

PROGRAM = """
import sys, torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
folder, out, prompt, steps, width, height, device, dtype = sys.argv[1:]
options = {"torch_dtype": getattr(torch, dtype), "local_files_only": True, "use_safetensors": True}
pipe = StableDiffusionPipeline.from_pretrained(folder, **options)
pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
pipe.set_progress_bar_config(disable=True)
pipe.to(device)(prompt, num_inference_steps=int(steps), width=int(width), height=int(height)).images[0].save(out)
"""


class Diffusers:
    """diffusers' pipeline of the saved model; its UNet uses our tensors, not a copy.

    Raises ValueError if the denoiser is no UNet of ours.
    """

    def __init__(self, pipe: Pipeline, model: Path) -> None:
        if not isinstance(pipe.denoiser, UNet):
            kind = type(pipe.denoiser).__name__
            raise ValueError(f"diffusers has no pipeline for this {kind} with CLIP; measure it alone")
        from diffusers import DDIMScheduler, StableDiffusionPipeline
        from diffusers.utils import logging

        logging.disable_progress_bar()
        self.model, self.dtype, self.device = model, pipe.about.dtype, pipe.device
        options: dict[str, Any] = {"torch_dtype": getattr(torch, self.dtype), "local_files_only": True}
        with warnings.catch_warnings(action="ignore"):  # torch_dtype has a new name, which diffusers 0.36 does not know
            self.pipe = StableDiffusionPipeline.from_pretrained(model, use_safetensors=True, **options)
        self.pipe.scheduler = DDIMScheduler.from_config(self.pipe.scheduler.config)
        self.pipe.set_progress_bar_config(disable=True)
        self.pipe.to(pipe.device)
        self.pipe.unet.load_state_dict(pipe.denoiser.state_dict(), assign=True)  # strict

    def evaluation(self, x: Tensor, t: Tensor, features: TextFeatures) -> Callable[[int], object]:
        return torch.no_grad()(lambda _: self.pipe.unet(x, t, encoder_hidden_states=features.context))

    def image(self, request: Request) -> Image:
        fields = request.model_dump(include={"prompt", "negative_prompt", "width", "height", "guidance_scale"})
        generator = torch.Generator().manual_seed(request.seed)
        return self.pipe(**fields, num_inference_steps=request.steps, generator=generator).images[0]

    def command(self, request: Request, out: Path) -> list[str]:
        size = (request.width, request.height)
        words = (self.model, out, request.prompt, request.steps, *size, self.device, self.dtype)
        return ["-c", PROGRAM, *map(str, words)]
