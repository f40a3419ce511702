"""From requests to images: text encoder, denoiser and codec in the order of the README's data-flow line.

A Pipeline is its parts and nothing else: it holds no seed, prints nothing and writes no file. Requests that may share
a batch (`same_batch`) run together; the noise of an image comes from its own seed, so the picture does not depend on
its batch.
"""

import copy
import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from PIL.Image import Image
from torch import Tensor
from torch.nn import functional as F

from sdlite.checkpoints.load import ModelParts, load_model, random_model
from sdlite.checkpoints.save import save_folder
from sdlite.config import ModelConfig, Prediction, Request, sd15, sd21, tiny
from sdlite.diffusion.guidance import Guided
from sdlite.diffusion.inpainting import WithChannels, keep_known
from sdlite.diffusion.sampling import Constrain, denoise
from sdlite.diffusion.schedule import Schedule
from sdlite.diffusion.solvers import Solver
from sdlite.images import digest, from_pil, mask_from_pil, metadata, to_pil
from sdlite.models.codec import LatentCodec
from sdlite.models.denoiser import Denoiser
from sdlite.models.text import TextEncoder
from sdlite.models.unet import UNet
from sdlite.noise import ImageNoise
from sdlite.schedulers import solver_for

TILED_ABOVE = 1024 * 1024  # pixels from which an image is decoded in tiles, to bound memory
PRESETS: dict[str, Callable[[], ModelConfig]] = {"tiny": tiny, "sd15": sd15, "sd21": sd21}


class Pipeline:
    """Text encoder, denoiser, codec and noise schedule, and how they make an image together.

    sample_size: latent cells along each side of the images drawn unless a request says otherwise. name, model_hash: go
    into the images' metadata. notes: what loading had to guess, for the caller to say.
    """

    def __init__(
        self,
        text: TextEncoder,
        denoiser: Denoiser,
        codec: LatentCodec,
        schedule: Schedule,
        *,
        sample_size: int = 64,
        name: str = "",
        model_hash: str = "",
        notes: Sequence[str] = (),
    ) -> None:
        self.text = text
        self.denoiser = denoiser
        self.codec = codec
        self.schedule = schedule
        self.sample_size = sample_size
        channels = denoiser.config.in_channels if isinstance(denoiser, UNet) else 0
        self.inpainting = channels > codec.config.latent_channels  # wants mask and masked image as further channels
        self.name = name
        self.model_hash = model_hash
        self.notes = tuple(notes)

    @classmethod
    def load(
        cls,
        path: str | Path | None = None,
        *,
        device: str = "auto",
        dtype: str = "auto",
        prediction: Prediction | None = None,
    ) -> Self:
        """The model of a diffusers folder, an original single file or a hub id; "tiny", "sd15", "sd21" are untrained.

        device: "auto" takes a GPU if there is one. dtype: of text encoder and denoiser; "auto" is float32 on a CPU and
        float16 on a GPU; the codec always runs in float32. prediction: overrides what the files say or what is guessed.
        Raises CheckpointError, a ValueError, with one line that says what is wrong with which file.
        """
        if path == "":
            raise ValueError("model is empty; give a model folder, a .safetensors file or a hub id (org/name)")
        place = torch.device(_auto_device() if device == "auto" else device)
        kind = _dtype(dtype, place)
        name = "tiny" if path is None else str(path)
        parts = random_model(PRESETS[name](), seed=0) if name in PRESETS else load_model(name, prediction=prediction)
        return cls(
            parts.text.to(place, kind),
            parts.denoiser.to(place, kind),
            parts.codec.to(place),
            Schedule(parts.config.schedule),
            sample_size=parts.config.sample_size,
            name=parts.name,
            model_hash=parts.hash,
            notes=parts.notes,
        )

    def save(self, folder: str | Path) -> None:
        """Writes the model as a folder that this class and diffusers' StableDiffusionPipeline load."""
        if not isinstance(self.denoiser, UNet):
            raise ValueError("a wrapped denoiser cannot be saved; save the pipeline that it was made from")
        config = ModelConfig(
            denoiser=self.denoiser.config,
            schedule=self.schedule.config,
            text=self.text.config,
            codec=self.codec.config,
            sample_size=self.sample_size,
        )
        parts = ModelParts(self.text, self.denoiser, self.codec, config, self.name, self.model_hash, self.notes)
        save_folder(parts, folder)

    def with_denoiser(self, wrap: Callable[[Denoiser], Denoiser]) -> Self:
        """A pipeline that shares all parts but the denoiser, which `wrap` replaces: a faster one, or your own."""
        other = copy.copy(self)
        other.denoiser = wrap(self.denoiser)
        return other

    @property
    def device(self) -> torch.device:
        return next(self.codec.parameters()).device

    @property
    def default_size(self) -> tuple[int, int]:
        """(width, height) in pixels of the images drawn unless a request says otherwise."""
        side = self.sample_size * self.codec.factor
        return side, side

    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        seed: int | Sequence[int] = 0,
        num_images: int = 1,
        image: Image | None = None,
        mask: Image | None = None,
        **fields: Any,
    ) -> list[Image]:
        """Draws `num_images` of every prompt, with seeds counting up from `seed`, or from each prompt's own of a list.

        image: start from this picture (img2img), changing it by `strength`. mask: repaint its white part only
        (inpainting). fields: those of Request. Raises ValueError with one line for whatever cannot be drawn.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        seeds = [seed] * len(prompts) if isinstance(seed, int) else list(seed)
        if len(seeds) != len(prompts):
            raise ValueError(f"{len(seeds)} seeds for {len(prompts)} prompts; give one seed, or one for each prompt")
        if num_images < 1:
            raise ValueError(f"num_images={num_images} must be at least 1")
        requests = [
            Request(prompt=p, seed=s + i, **fields)
            for p, s in zip(prompts, seeds, strict=True)
            for i in range(num_images)
        ]
        return self.generate(requests, images=[image] * len(requests), masks=[mask] * len(requests))

    def generate(
        self,
        requests: Request | Sequence[Request],
        *,
        images: Sequence[Image | None] | None = None,
        masks: Sequence[Image | None] | None = None,
    ) -> list[Image]:
        """Images in the order of the requests, each with its recipe in `.info`.

        images, masks: one picture or None per request, for img2img and inpainting. Raises ValueError with one line for
        what cannot be drawn, FloatingPointError when the latents of an image are not finite.
        """
        requests = [requests] if isinstance(requests, Request) else list(requests)
        images, masks = list(images or [None] * len(requests)), list(masks or [None] * len(requests))
        requests = [with_sources(*job) for job in zip(requests, images, masks, strict=True)]
        drawn: dict[int, Image] = {}
        for batch in self.batches(requests):
            mine = [requests[i] for i in batch]
            *_, latents = self.sample_latents(mine, images=[images[i] for i in batch], masks=[masks[i] for i in batch])
            drawn |= zip(batch, self.decode(latents, mine), strict=True)
        return [drawn[i] for i in range(len(requests))]

    def batches(self, requests: Sequence[Request]) -> list[list[int]]:
        """Indices of the requests, grouped by what may run together: all but prompt, seed and strength of guidance."""
        groups: dict[Hashable, list[int]] = {}
        for i, request in enumerate(requests):
            groups.setdefault(self._batch_key(request), []).append(i)
        return list(groups.values())

    @torch.no_grad()
    def sample_latents(
        self,
        requests: Sequence[Request],
        *,
        images: Sequence[Image | None] | None = None,
        masks: Sequence[Image | None] | None = None,
    ) -> Iterator[Tensor]:
        """Yields the latents (B, C, H/f, W/f) of a batch after every step: for progress, previews, stopping early.

        Raises ValueError if the requests may not share a batch (see `batches`).
        """
        if len({self._batch_key(request) for request in requests}) != 1:
            raise ValueError("these requests cannot share a batch; group them with Pipeline.batches")
        first = self.resolve(requests[0])
        noise = self._noise(requests)
        solver, denoiser, constrain = self._solver(first, noise.generators), self.denoiser, None
        if first.image is not None:
            pixels = self._pixels(first, images, from_pil)
            mask = None if first.mask is None else self._pixels(first, masks, mask_from_pil)
            x, denoiser, constrain = self._from_images(first, pixels, mask, noise, solver)
        else:
            x = noise.draw() * solver.initial_scale  # (B, C, H/f, W/f)
        if first.guidance_scale > 1:
            scale, rescale = self._per_image([(r.guidance_scale, r.guidance_rescale) for r in requests])
            denoiser = Guided(denoiser, scale, rescale)
        memory = denoiser.prepare(self._context(requests))
        yield from denoise(denoiser, solver, x, memory, noise.draw, start=self._start(first), constrain=constrain)

    @torch.no_grad()
    def decode(self, latents: Tensor, requests: Sequence[Request]) -> list[Image]:
        """Pictures of final latents (B, C, H/f, W/f), one at a time, with the recipe of each in `.info`.

        Raises FloatingPointError for latents that are not finite, rather than giving a black picture.
        """
        pictures = []
        for z, request in zip(latents.chunk(len(latents)), requests, strict=True):
            request = self.resolve(request)
            width, height = request.width or 0, request.height or 0
            images = self.codec.decode(z.float(), tiled=width * height > TILED_ABOVE)  # (1, 3, H, W)
            if not images.isfinite().all():
                raise FloatingPointError(
                    f"seed={request.seed}: the image is not finite (inf or nan); try dtype float32 or another solver"
                )
            picture = to_pil(images)[0]
            model = {"model": self.name, "model_hash": self.model_hash}
            texts = metadata(request, **model, prediction=self.denoiser.prediction, width=width, height=height)
            picture.info.update(texts.items())
            pictures.append(picture)
        return pictures

    def num_evaluations(self, request: Request) -> int:
        """How many steps `sample_latents` will yield."""
        return len(self._solver(request, []).timesteps) - self._start(request)

    def resolve(self, request: Request) -> Request:
        """The request with its size filled in. Raises ValueError if this model cannot draw it."""
        if self.inpainting and request.mask is None:
            raise ValueError(f"{self.name or 'this'} is an inpainting model, which only repaints: give image and mask")
        width, height = self.default_size
        request = request.replace(width=request.width or width, height=request.height or height)
        for name, side in (("width", request.width or 0), ("height", request.height or 0)):
            if side % self.codec.factor:
                lower = side // self.codec.factor * self.codec.factor
                raise ValueError(
                    f"{name}={side} must be a multiple of {self.codec.factor}, by which the codec shrinks images; "
                    f"use {f'{lower} or ' if lower else ''}{lower + self.codec.factor}"
                )
        return request

    def _batch_key(self, request: Request) -> Hashable:
        request = self.resolve(request)
        chunks = max(self.text.num_chunks(request.prompt), self.text.num_chunks(request.negative_prompt))
        alike = {
            "prompt": "",
            "negative_prompt": "",
            "seed": 0,
            "guidance_scale": 1.0 if request.guidance_scale <= 1 else 2.0,
        }
        alike |= {"guidance_rescale": 0.0, "image": request.image and "given", "mask": request.mask and "given"}
        return request.replace(**alike), chunks

    def _noise(self, requests: Sequence[Request]) -> ImageNoise:
        first = self.resolve(requests[0])
        height, width = (first.height or 0) // self.codec.factor, (first.width or 0) // self.codec.factor
        shape = (self.codec.config.latent_channels, height, width)
        return ImageNoise([request.seed for request in requests], shape, self.device)

    def _context(self, requests: Sequence[Request]) -> Tensor:
        """(B, T, D), or (2B, T, D) with the negative prompts first where there is guidance."""
        prompts = [request.prompt for request in requests]
        if requests[0].guidance_scale > 1:
            prompts = [request.negative_prompt for request in requests] + prompts
        return self.text.encode(prompts, clip_skip=requests[0].clip_skip)

    def _per_image(self, values: Sequence[tuple[float, ...]]) -> tuple[Tensor, ...]:
        """One (B, 1, 1, 1) tensor per column."""
        return tuple(torch.tensor(values, device=self.device).T[:, :, None, None, None])

    def _pixels(
        self,
        request: Request,
        pictures: Sequence[Image | None] | None,
        convert: Callable[[Image, tuple[int, int]], Tensor],
    ) -> Tensor:
        """(B, C, H, W) of the pictures, resized to what the requests draw."""
        size = (request.width or 0, request.height or 0)
        return torch.cat([convert(picture, size) for picture in pictures or [] if picture]).to(self.device)

    def _start(self, request: Request) -> int:
        """Index of the first step: 0 from noise, later from a picture (as diffusers rounds it)."""
        if request.image is None:
            return 0
        run = min(int(request.steps * request.strength), request.steps)
        if run == 0:
            least = math.ceil(100 / request.steps) / 100
            raise ValueError(f"strength={request.strength:g} of {request.steps} steps runs none; use {least:g} or more")
        return request.steps - run

    def _solver(self, request: Request, generators: Sequence[torch.Generator]) -> Solver:
        return solver_for(request, self.schedule, self.denoiser.prediction, generators, self._start(request))

    def _encode(self, pixels: Tensor, noise: ImageNoise) -> Tensor:
        """Latents sampled from the posterior, one image at a time so that none depends on its neighbours."""
        drawn = [None] * len(pixels) if self.codec.deterministic else noise.draw().chunk(len(pixels))
        return torch.cat(
            [self.codec.encode(image, n) for image, n in zip(pixels.chunk(len(pixels)), drawn, strict=True)]
        )

    def _from_images(
        self, request: Request, pixels: Tensor, mask: Tensor | None, noise: ImageNoise, solver: Solver
    ) -> tuple[Tensor, Denoiser, Constrain | None]:
        """Latents to start from, the denoiser to use, and what holds the known part: for img2img and inpainting.

        pixels: (B, 3, H, W). mask: (B, 1, H, W) or None. Draws noise in diffusers' order, so that seeds mean the same.
        """
        from_noise = mask is not None and request.strength == 1
        x_0 = torch.empty(0) if from_noise and self.inpainting else self._encode(pixels, noise)
        eps = noise.draw()
        x = eps * solver.initial_scale if from_noise else solver.noised(x_0, eps, self._start(request))
        if mask is None:
            return x, self.denoiser, None
        cells = F.interpolate(mask, size=x.shape[-2:])  # (B, 1, H/f, W/f), nearest
        masked = self._encode(pixels * (mask < 0.5), noise)
        if self.inpainting:
            return x, WithChannels(self.denoiser, torch.cat([cells, masked], dim=1)), None
        return x, self.denoiser, keep_known(solver, x_0, eps, cells)


def with_sources(request: Request, image: Image | None, mask: Image | None) -> Request:
    """The request with the digests of its pictures, as metadata records them."""
    if (request.image is not None and image is None) or (request.mask is not None and mask is None):
        raise ValueError(f"image={request.image!r}, mask={request.mask!r}: open the pictures and give them as well")
    return request.replace(image=image and digest(image), mask=mask and digest(mask))


def _auto_device() -> str:
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def _dtype(name: str, device: torch.device) -> torch.dtype:
    known = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
    known["auto"] = torch.float32 if device.type == "cpu" else torch.float16
    if name not in known:
        raise ValueError(f"dtype={name!r} must be one of {', '.join(known)}")
    return known[name]
