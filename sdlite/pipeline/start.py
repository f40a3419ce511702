"""Where a run begins: at noise, or part of the way from noise to an image (img2img, inpainting).

Noise is drawn in diffusers' order, so that a seed gives the same image there: for the image's latents, for the run, for
the masked image's latents.
"""

from collections.abc import Sequence

import torch
from PIL.Image import Image
from torch import Tensor
from torch.nn import functional as F

from sdlite.contracts import Codec, Denoiser, Solver
from sdlite.diffusion.inpainting import WithChannels, keep_known
from sdlite.diffusion.noise import ImageNoise
from sdlite.diffusion.sampling import Constrain
from sdlite.images.pixels import Opened, from_pil, mask_from_pil
from sdlite.pipeline.job import Job


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
    jobs: Sequence[Job], solver: Solver, noise: ImageNoise, codec: Codec, denoiser: Denoiser
) -> tuple[Tensor, Denoiser, Constrain | None]:
    """Latents (B, C, h, w) to start from, the denoiser to use, and what holds the known part of the image.

    jobs: B that share a batch. A denoiser with more input channels than the codec's latents is an inpainting model,
    which takes mask and masked image as further channels.
    """
    first, inpainting = jobs[0], denoiser.in_channels > codec.latent_channels
    if first.image is None:
        return noise.draw() * solver.initial_scale, denoiser, None
    size = (noise.shape[2] * codec.factor, noise.shape[1] * codec.factor)
    pixels = torch.cat([from_pil(picture_of(job.image), size) for job in jobs]).to(noise.device)
    from_noise = first.mask is not None and first.request.strength == 1
    x_0 = torch.empty(0) if from_noise and inpainting else encode(codec, pixels, noise)  # (B, C, h, w)
    eps = noise.draw()
    x = eps * solver.initial_scale if from_noise else solver.noised(x_0, eps, first.start)
    if first.mask is None:
        return x, denoiser, None
    mask = torch.cat([mask_from_pil(picture_of(job.mask), size) for job in jobs]).to(noise.device)
    cells = _cells(mask, *x.shape[-2:])  # (B, 1, h, w)
    masked = encode(codec, pixels * (mask < 0.5), noise)
    if inpainting:
        return x, WithChannels(denoiser, torch.cat([cells, masked], dim=1)), None
    return x, denoiser, keep_known(solver, x_0, eps, cells)


def picture_of(opened: Opened | None) -> Image:
    """The pixels of an opened image."""
    assert opened is not None and opened.picture is not None, "a job that is drawn has its images open"
    return opened.picture


def encode(codec: Codec, pixels: Tensor, noise: ImageNoise) -> Tensor:
    """Latents sampled from the posterior of (B, 3, H, W), one at a time so that none depends on its neighbours."""
    drawn = [None] * len(pixels) if codec.deterministic else noise.draw().chunk(len(pixels))
    return torch.cat([codec.encode(image, n) for image, n in zip(pixels.chunk(len(pixels)), drawn, strict=True)])
