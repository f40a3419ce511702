"""Where a run begins: at noise, or part of the way along a picture (img2img, inpainting).

Noise is drawn in diffusers' order, so that a seed means the same picture there: for the picture's latents, for the run,
for the masked picture's latents.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from PIL.Image import Image
from torch import Tensor
from torch.nn import functional as F

from sdlite.config import MAX_SIDE
from sdlite.contracts import Denoiser, Solver
from sdlite.diffusion.inpainting import WithChannels, keep_known
from sdlite.diffusion.noise import ImageNoise
from sdlite.diffusion.sampling import Constrain
from sdlite.images.pixels import from_pil, mask_from_pil
from sdlite.models.codec import LatentCodec
from sdlite.request import Request


class Job(NamedTuple):
    """A request with its size filled in, and the pictures that it starts from."""

    request: Request
    image: Image | None
    mask: Image | None


def first_step(request: Request) -> int:
    """Index of the first step: 0 from noise, later from a picture, rounded as diffusers does.

    Raises ValueError if strength leaves no step to run.
    """
    if request.image is None:
        return 0
    run = min(int(request.steps * request.strength), request.steps)
    if run == 0:
        least = math.ceil(100 / request.steps) / 100
        raise ValueError(
            f"strength={request.strength:g} of {request.steps} steps runs none; use strength {least:g} or more steps"
        )
    return request.steps - run


def fitted_size(request: Request, given: tuple[int, int] | None, own: tuple[int, int], unit: int) -> tuple[int, int]:
    """(width, height) as asked for; what is left open has the picture's shape, or is the model's own.

    given: size of the picture to start from. One larger than the model's area is fitted into it, and a smaller one is
    cut. own: the model's. unit: that sides are multiples of.
    """
    asked = (request.width, request.height)
    if given is None or None not in asked:
        width, height = (there if side is None else side for side, there in zip(asked, own, strict=True))
        return width, height
    scales = [side / there for side, there in zip(asked, given, strict=True) if side is not None]
    scale = scales[0] if scales else min(1, math.sqrt(math.prod(own) / math.prod(given)))
    cells = [side * scale / unit for side in given]
    sides = (min(max(int(n) if scale == 1 else round(n), 1) * unit, MAX_SIDE // unit * unit) for n in cells)
    width, height = (fitted if side is None else side for side, fitted in zip(asked, sides, strict=True))
    return width, height


def check_size(width: int, height: int, unit: int, factor: int) -> None:
    """Raises ValueError unless both sides are multiples of unit. factor: pixels to a latent cell."""
    for name, side in (("width", width), ("height", height)):
        if side % unit:
            lower, patch = side // unit * unit, unit // factor
            cells = f" and the DiT's patches have {patch} cells a side" if patch > 1 else ""
            raise ValueError(
                f"{name}={side} must be a multiple of {unit}, as the codec shrinks images by {factor}{cells}; "
                f"use {f'{lower} or ' if lower else ''}{lower + unit}"
            )


def check_mask(mask: Image, width: int, height: int, factor: int) -> None:
    """Raises ValueError if nothing white is left of an opened mask in latent cells, of factor pixels a side."""
    if not _cells(mask_from_pil(mask, (width, height)), height // factor, width // factor).any():
        raise ValueError(
            f"the white parts of the mask are too small to be redrawn at {width}x{height}; paint them larger than "
            f"{factor} pixels"
        )


def _cells(mask: Tensor, height: int, width: int) -> Tensor:
    """(B, 1, H, W) in pixels to (B, 1, height, width) in latent cells, the nearest pixel of each, as diffusers does."""
    return F.interpolate(mask, size=(height, width))


def begin(
    jobs: Sequence[Job], solver: Solver, noise: ImageNoise, codec: LatentCodec, denoiser: Denoiser, inpainting: bool
) -> tuple[Tensor, Denoiser, Constrain | None]:
    """Latents (B, C, h, w) to start from, the denoiser to use, and what holds the known part of the picture.

    jobs: B that share a batch. inpainting: the denoiser wants mask and masked picture as further channels.
    """
    request = jobs[0].request
    if request.image is None:
        return noise.draw() * solver.initial_scale, denoiser, None
    size = (noise.shape[2] * codec.factor, noise.shape[1] * codec.factor)
    pixels = torch.cat([from_pil(job.image, size) for job in jobs if job.image is not None]).to(noise.device)
    from_noise = request.mask is not None and request.strength == 1
    x_0 = torch.empty(0) if from_noise and inpainting else encode(codec, pixels, noise)  # (B, C, h, w)
    eps = noise.draw()
    x = eps * solver.initial_scale if from_noise else solver.noised(x_0, eps, first_step(request))
    if request.mask is None:
        return x, denoiser, None
    mask = torch.cat([mask_from_pil(job.mask, size) for job in jobs if job.mask is not None]).to(noise.device)
    cells = _cells(mask, *x.shape[-2:])  # (B, 1, h, w)
    masked = encode(codec, pixels * (mask < 0.5), noise)
    if inpainting:
        return x, WithChannels(denoiser, torch.cat([cells, masked], dim=1)), None
    return x, denoiser, keep_known(solver, x_0, eps, cells)


def encode(codec: LatentCodec, pixels: Tensor, noise: ImageNoise) -> Tensor:
    """Latents sampled from the posterior of (B, 3, H, W), one at a time so that none depends on its neighbours."""
    drawn = [None] * len(pixels) if codec.deterministic else noise.draw().chunk(len(pixels))
    return torch.cat([codec.encode(image, n) for image, n in zip(pixels.chunk(len(pixels)), drawn, strict=True)])
