"""The run of a batch from where it begins, noise or part of the way from noise to an image, to images with metadata.

Noise is drawn in diffusers' order, so that seeds give the same images: for the image, the run, the masked image.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from PIL.Image import Image
from torch import Tensor

from sdlite.contracts import Codec, Conditioning, Denoiser, Solver
from sdlite.diffusion.sampling import Constrain, Guided, ImageNoise, WithChannels, denoise, keep_known
from sdlite.diffusion.solvers import solver_for
from sdlite.images.pixels import Opened, from_pil, mask_from_pil, pasted, to_pil
from sdlite.images.recipe import metadata
from sdlite.pipeline.job import Job, Model, mask_cells
from sdlite.request import Request


@dataclass(frozen=True, slots=True)
class Step:
    """A batch has run `step` of its `of` steps; step 0 comes before the first one. batch: indices of its jobs.

    done, total: steps of all batches. latents: (B, C, H/f, W/f) after the step, for previews; None at step 0.
    """

    batch: list[int]
    step: int
    of: int
    done: int
    total: int
    latents: Tensor | None


@dataclass(frozen=True, slots=True)
class Finished:
    """The image of jobs[index], with its metadata in `.info`."""

    index: int
    picture: Image


def begin(
    model: Model, jobs: Sequence[Job], solver: Solver, noise: ImageNoise
) -> tuple[Tensor, Denoiser, Constrain | None]:
    """Latents (B, C, h, w) to start from, the denoiser to use, and what holds the known part of the image."""
    first, codec, denoiser = jobs[0], model.codec, model.denoiser
    if first.image is None:
        return noise.draw() * solver.initial_scale, denoiser, None
    size = (noise.shape[2] * codec.factor, noise.shape[1] * codec.factor)
    pixels = torch.cat([from_pil(picture_of(job.image), size) for job in jobs]).to(noise.device)
    from_noise = first.mask is not None and first.request.strength == 1
    x_0 = torch.empty(0) if from_noise and model.inpainting else encode(codec, pixels, noise)  # (B, C, h, w)
    eps = noise.draw()
    x = eps * solver.initial_scale if from_noise else solver.noised(x_0, eps, first.start)
    if first.mask is None:
        return x, denoiser, None
    mask = torch.cat([mask_from_pil(picture_of(job.mask), size) for job in jobs]).to(noise.device)
    cells = mask_cells(mask, *x.shape[-2:])  # (B, 1, h, w)
    if model.inpainting:
        masked = encode(codec, pixels * (mask < 0.5), noise)
        return x, WithChannels(denoiser, torch.cat([cells, masked], dim=1)), None
    if not codec.deterministic:
        noise.draw()  # diffusers encodes the masked image for these models too, and only its draw has an effect
    return x, denoiser, keep_known(solver, x_0, eps, cells)


def picture_of(opened: Opened | None) -> Image:
    """The pixels of an opened image."""
    assert opened is not None and opened.picture is not None, "a job that is drawn has its images open"
    return opened.picture


def encode(codec: Codec, pixels: Tensor, noise: ImageNoise) -> Tensor:
    """Latents sampled from the posterior of (B, 3, H, W), one at a time so that none depends on its neighbours."""
    drawn = [None] * len(pixels) if codec.deterministic else noise.draw().chunk(len(pixels))
    return torch.cat([codec.encode(image, n) for image, n in zip(pixels.chunk(len(pixels)), drawn, strict=True)])


@torch.no_grad()
def sample(model: Model, jobs: Sequence[Job]) -> Iterator[Tensor]:
    """Yields the latents (B, C, h, w) of B jobs that share a batch, after every step."""
    first, (width, height) = jobs[0], (side // model.codec.factor for side in jobs[0].size)
    shape = (model.codec.latent_channels, height, width)
    noise = ImageNoise([job.request.seed for job in jobs], shape, model.device)
    solver = solver_for(first.request, model.schedule, model.denoiser.prediction, noise.generators, first.start)
    x, denoiser, constrain = begin(model, jobs, solver, noise)
    if first.guided:
        columns = zip(*((job.request.guidance_scale, job.request.guidance_rescale) for job in jobs), strict=True)
        denoiser = Guided(denoiser, *(torch.tensor(c, device=model.device).view(-1, 1, 1, 1) for c in columns))
    memory = denoiser.prepare(conditioning(model, jobs))
    yield from denoise(denoiser, solver, x, memory, noise.draw, start=first.start, constrain=constrain)


def finished(model: Model, z: Tensor, request: Request, image: Opened | None, mask: Opened | None) -> Image:
    """Latents (1, C, h, w) to an image with its metadata. Raises FloatingPointError if it is not finite."""
    decoded = model.codec.decode(z.float())  # (1, 3, H, W)
    if not decoded.isfinite().all():
        reason = "the image is not finite (inf or nan); try dtype float32 or another solver"
        raise FloatingPointError(f"seed={request.seed}: {reason}")
    picture = to_pil(decoded)[0]
    paste = request.paste and image is not None and mask is not None
    if paste:
        picture = pasted(picture, picture_of(image), picture_of(mask), request.mask_blur)
    drawn = request.replace(paste=paste, width=picture.width, height=picture.height)
    facts = {"model": model.about.name, "model_hash": model.about.hash, **model.about.bits}
    picture.info.update(metadata(drawn, prediction=model.denoiser.prediction, **facts).items())
    return picture


def conditioning(model: Model, jobs: Sequence[Job]) -> Conditioning:
    """B rows, or with guidance 2B with the negative prompts first."""
    prompts = [job.request.prompt for job in jobs]
    if jobs[0].guided:
        prompts = [job.request.negative_prompt for job in jobs] + prompts
    return Conditioning(*model.text.encode(prompts, clip_skip=jobs[0].request.clip_skip))
