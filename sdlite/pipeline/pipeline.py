"""From requests to images: text encoder, denoiser and codec in the order of the README's data-flow line.

A Pipeline holds the parts of a model and no seed. Requests that may share a batch (`batches`) run together. The noise
of an image comes from its own seed, so the image does not depend on its batch, except for rounding.
"""

import copy
import html
import math
import warnings
from collections.abc import Callable, Hashable, Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from PIL.Image import Image
from torch import Tensor, nn

from sdlite.checkpoints.load import ModelParts, load_model
from sdlite.checkpoints.places import SHIPPED
from sdlite.checkpoints.save import save_folder
from sdlite.config import ModelConfig, Prediction
from sdlite.contracts import Conditioning, Denoiser, Solver
from sdlite.diffusion.guidance import Guided
from sdlite.diffusion.noise import ImageNoise
from sdlite.diffusion.sampling import denoise
from sdlite.diffusion.schedule import Schedule
from sdlite.diffusion.solver_names import solver_for
from sdlite.images.files import Images, open_picture
from sdlite.images.pixels import digest, has_grey, mask_notes, pasted, to_pil
from sdlite.images.recipe import metadata
from sdlite.models.codec import LatentCodec
from sdlite.models.device import find_device, find_dtype, total_memory
from sdlite.models.networks import Network
from sdlite.models.prompt import foreign_marks
from sdlite.models.text import TextEncoder
from sdlite.pipeline.progress import Progress, watched
from sdlite.pipeline.start import Job, begin, check_mask, check_size, first_step, fitted_size
from sdlite.request import Request

Picture = Image | str | Path | bytes  # what `open_picture` reads
Pictures = Sequence[Picture | None] | None


class Pipeline:
    """Text encoder, denoiser, codec and noise schedule, which draw images together.

    sample_size: default size of an image in latent cells, one number for both sides or (height, width).
    name, model_hash: go into the images' metadata. notes: what loading had to guess; the caller should show them.
    """

    def __init__(
        self,
        text: TextEncoder,
        denoiser: Denoiser,
        codec: LatentCodec,
        schedule: Schedule,
        *,
        sample_size: int | tuple[int, int] = 64,
        name: str = "",
        model_hash: str = "",
        notes: Sequence[str] = (),
    ) -> None:
        self.text = text
        self.denoiser = denoiser
        self.codec = codec
        self.schedule = schedule
        self.sample_size = sample_size
        self.inpainting = denoiser.in_channels > codec.latent_channels  # further channels: mask and masked image
        self.size_unit = codec.factor * denoiser.patch_size  # pixels; sides are multiples of it
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
        variant: str | None = None,
        vae: str | Path | None = None,
        allow_links: Sequence[str | Path] = (),
    ) -> Self:
        """Loads the model of a diffusers folder, an original single file or a hub id; None loads the one that ships.

        "tiny", "tiny-dit", "sd15" and "sd21" are untrained models, unless a file or folder here has that name.
        device: "auto" takes a GPU if there is one. dtype: for text encoder and denoiser; "auto" is float32 on a CPU and
        float16 on a GPU; the codec always runs in float32. prediction: overrides what the files say or sdlite guesses.
        variant: which weights of a folder, such as "fp16". vae: file, folder, hub id or "tiny" (TAESD) of a VAE to use
        instead of the model's. allow_links: links in a model's folder may lead into these folders.
        Raises CheckpointError, a ValueError, with one line that names the file and what is wrong with it.
        """
        place = find_device(device)
        kind = find_dtype(dtype, place)
        parts = load_model(
            SHIPPED if path is None else path, prediction=prediction, variant=variant, vae=vae, allow_links=allow_links
        )
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
        """Writes a folder that this class and diffusers' StableDiffusionPipeline load (a DiT: this class only).

        The dtype is that of the loaded model: float16 rounds the weights, and the copy then has another hash.
        """
        if not isinstance(self.denoiser, Network):
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
        """A pipeline with the same parts, except the denoiser, which is replaced by wrap(denoiser)."""
        other = copy.copy(self)
        other.denoiser = wrap(self.denoiser)
        return other

    @property
    def device(self) -> torch.device:
        return next(self.codec.parameters()).device

    @property
    def default_size(self) -> tuple[int, int]:
        """Default (width, height) of an image in pixels."""
        size = self.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        return width * self.codec.factor, height * self.codec.factor

    def summary(self) -> dict[str, str]:
        """The parts of the pipeline in words; repr and notebooks show it."""
        parts = {"text": self.text, "denoiser": self.denoiser, "codec": self.codec}
        sizes = {name: sum(p.numel() for p in m.parameters()) for name, m in parts.items() if isinstance(m, nn.Module)}
        return {
            "model": self.name or "unnamed",
            **{name: f"{type(parts[name]).__name__}, {size / 1e6:.1f} million weights" for name, size in sizes.items()},
            "draws": "{} x {} pixels, {}".format(*self.default_size, f"prediction {self.denoiser.prediction}"),
            "device": str(self.device),
            "sha256": self.model_hash[:10] or "none",
            **{f"note {i}": note for i, note in enumerate(self.notes, 1)},
        }

    def __repr__(self) -> str:
        return f"Pipeline({', '.join(f'{name}: {value}' for name, value in self.summary().items())})"

    def _repr_html_(self) -> str:
        rows = (f"<tr><th>{name}</th><td>{html.escape(value)}</td></tr>" for name, value in self.summary().items())
        return f"<table>{''.join(rows)}</table>"

    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        seed: int | Sequence[int] = 0,
        num_images: int = 1,
        image: Picture | Sequence[Picture] | None = None,
        mask: Picture | Sequence[Picture] | None = None,
        progress: bool | Progress | None = None,
        **fields: Any,
    ) -> Images:
        """Draws `num_images` images of every prompt, with seeds counting up from the prompt's seed.

        image: start from this image (img2img) and change it by `strength`; a PIL image, a file or its bytes. mask:
        black-and-white image; white parts of `image` are redrawn (inpainting). progress: as for `generate`. fields:
        those of Request. A list gives one value for each prompt. Warns if a prompt or an image may not be read as you
        expect (see `remarks`). Raises ValueError with one line for a request that cannot be drawn.
        """
        prompts = list(prompt) if isinstance(prompt, list | tuple) else [prompt]
        count = _whole("num_images", num_images)
        if count < 1:
            raise ValueError(f"num_images={count} must be at least 1")
        columns = {"seed": seed, "image": image, "mask": mask} | fields
        rows = zip(*(_each(name, value, len(prompts)) for name, value in columns.items()), strict=True)
        requests, images, masks = [], [], []
        for text, row in zip(prompts, rows, strict=True):
            values = dict(zip(columns, row, strict=True))
            first, picture, repaint = _whole("seed", values.pop("seed")), values.pop("image"), values.pop("mask")
            picture, repaint = _opened(picture), _opened(repaint, for_mask=True)
            values |= {"image": _named(picture), "mask": _named(repaint)}
            requests += [Request(prompt=text, seed=first + i, **values) for i in range(count)]
            images += [picture] * count
            masks += [repaint] * count
        rows = zip(requests, images, masks, strict=True)
        for remark in dict.fromkeys(remark for row in rows for remark in self.remarks(*row)):
            warnings.warn(remark, stacklevel=2)
        return self.generate(requests, images=images, masks=masks, progress=progress)

    def generate(
        self,
        requests: Request | Sequence[Request],
        *,
        images: Pictures = None,
        masks: Pictures = None,
        progress: bool | Progress | None = None,
    ) -> Images:
        """Draws one image for each request, in their order, each with its metadata in `.info`.

        images, masks: one image, file or None per request, for img2img and inpainting. progress: True shows a line with
        the time left, None shows it in a terminal or notebook only; a function is called with the number of steps done
        and the total. Raises ValueError with one line for a request that cannot be drawn, FloatingPointError if an
        image is not finite.
        """
        jobs = self.jobs(requests, images, masks)
        drawn: dict[int, Image] = {}
        batches = self.batches([job.request for job in jobs])
        # Before anything is drawn, because solvers raise their errors here.
        total, done = sum(self.num_evaluations(jobs[batch[0]].request) for batch in batches), 0
        with watched(progress, len(jobs)) as tell:
            tell(done, total)
            for batch in batches:
                mine = [jobs[i] for i in batch]
                for x_t in self._sample(mine):
                    latents, done = x_t, done + 1
                    tell(done, total)
                requests, images, masks = zip(*mine, strict=True)
                drawn |= zip(batch, self.decode(latents, requests, images=images, masks=masks), strict=True)
        return Images(drawn[i] for i in range(len(jobs)))

    def sample_latents(
        self, requests: Request | Sequence[Request], *, images: Pictures = None, masks: Pictures = None
    ) -> Iterator[Tensor]:
        """Yields the latents (B, C, H/f, W/f) of a batch after every step, for previews and for stopping early.

        images, masks: as for `generate`. Raises ValueError if the requests may not share a batch (see `batches`).
        """
        jobs = self.jobs(requests, images, masks)
        if len(self.batches([job.request for job in jobs])) > 1:
            raise ValueError("these requests cannot share a batch; group them with Pipeline.batches")
        return self._sample(jobs)

    @torch.no_grad()
    def decode(
        self,
        latents: Tensor,
        requests: Request | Sequence[Request],
        *,
        images: Pictures = None,
        masks: Pictures = None,
    ) -> list[Image]:
        """Decodes final latents (B, C, H/f, W/f) to images, one after the other, each with its metadata in `.info`.

        images, masks: as for `generate`; if a request's paste is true, the part of the image outside the mask is put
        back. Raises FloatingPointError if an image is not finite.
        """
        requests = [requests] if isinstance(requests, Request) else requests
        columns = [_each(name, value, len(requests)) for name, value in (("images", images), ("masks", masks))]
        pictures = []
        for z, request, image, mask in zip(latents.chunk(len(latents)), requests, *columns, strict=True):
            decoded = self.codec.decode(z.float())  # (1, 3, H, W)
            if not decoded.isfinite().all():
                raise FloatingPointError(
                    f"seed={request.seed}: the image is not finite (inf or nan); try dtype float32 or another solver"
                )
            picture = to_pil(decoded)[0]
            paste = request.paste and image is not None and mask is not None
            if paste:
                picture = pasted(picture, _opened(image), _opened(mask, for_mask=True), request.mask_blur)
            width, height = picture.size
            texts = metadata(
                request.replace(paste=paste),
                model=self.name,
                model_hash=self.model_hash,
                prediction=self.denoiser.prediction,
                width=width,
                height=height,
            )
            picture.info.update(texts.items())
            pictures.append(picture)
        return pictures

    def num_evaluations(self, request: Request) -> int:
        """Number of steps that `sample_latents` yields."""
        return len(self._solver(request, []).timesteps) - first_step(request)

    def batches(self, requests: Sequence[Request]) -> list[list[int]]:
        """Groups the indices of requests that may run together.

        In a group the prompts (of equally many chunks), seeds and strengths of guidance may differ.
        """
        groups: dict[Hashable, list[int]] = {}
        for i, request in enumerate(requests):
            groups.setdefault(self._batch_key(request), []).append(i)
        return list(groups.values())

    def jobs(self, requests: Request | Sequence[Request], images: Pictures = None, masks: Pictures = None) -> list[Job]:
        """Requests with their images; sizes are filled in, and images are recorded by their digests.

        Raises ValueError for a request that this model cannot draw and for images that do not fit the requests.
        """
        requests = [requests] if isinstance(requests, Request) else list(requests)
        if not requests:
            raise ValueError("there are no requests; give at least one")
        columns = [_each(name, value, len(requests)) for name, value in (("images", images), ("masks", masks))]
        jobs = []
        for request, image, mask in zip(requests, *columns, strict=True):
            for name, named, given in (("image", request.image, image), ("mask", request.mask, mask)):
                if named is not None and given is None:
                    raise ValueError(f"{name}={named!r}: open the picture and give it as well")
            image, mask = _opened(image), _opened(mask, for_mask=True)
            request = request.replace(image=image and digest(image), mask=mask and digest(mask))
            jobs.append(Job(self.resolve(request, image), image, mask))
            if mask is not None:
                check_mask(mask, *self._size(jobs[-1].request, image), self.codec.factor)
        return jobs

    def remarks(self, request: Request, image: Image | None = None, mask: Image | None = None) -> list[str]:
        """Warnings for the user about parts of a request that may not be read as expected.

        image, mask: results of `open_picture`.
        """
        remarks = [*foreign_marks(request.prompt), *foreign_marks(request.negative_prompt)]
        open_size = request.width is None and request.height is None
        if image is not None and open_size and math.prod(image.size) > math.prod(self.default_size):
            sizes = ["{}x{}".format(*size) for size in (image.size, self._size(request, image))]
            remarks.append(
                "the picture to start from has {} pixels and is made {}, the area that this model draws; "
                "width or height sets another size".format(*sizes)
            )
        if image is not None and mask is not None:
            remarks += mask_notes(mask.size, has_grey(mask), image.size)
        return remarks

    def _size(self, request: Request, image: Image | None) -> tuple[int, int]:
        return fitted_size(request, None if image is None else image.size, self.default_size, self.size_unit)

    def resolve(self, request: Request, image: Image | None = None) -> Request:
        """The request with its size filled in: that of the image, scaled down to the model's area, or the model's size.

        Raises ValueError if this model cannot draw it.
        """
        if self.inpainting and request.mask is None:
            raise ValueError(f"{self.name or 'this'} is an inpainting model, which only repaints: give image and mask")
        width, height = self._size(request, image)
        check_size(width, height, self.size_unit, self.codec.factor)
        needed, there = self.codec.decode_bytes(width, height), total_memory(self.device)
        if needed > there:
            raise ValueError(
                f"width={width}, height={height}: to decode it takes {needed / 2**30:.1f} GiB of memory or more, and "
                f"{self.device} has {there / 2**30:.1f}; draw it smaller"
            )
        return request.replace(width=width, height=height)

    @torch.no_grad()
    def _sample(self, jobs: Sequence[Job]) -> Iterator[Tensor]:
        requests = [job.request for job in jobs]
        noise = self._noise(requests)
        solver = self._solver(requests[0], noise.generators)
        x, denoiser, constrain = begin(jobs, solver, noise, self.codec, self.denoiser, self.inpainting)
        if requests[0].guidance_scale > 1:
            scale, rescale = (
                torch.tensor(column, device=self.device).view(-1, 1, 1, 1)  # (B, 1, 1, 1)
                for column in zip(*((r.guidance_scale, r.guidance_rescale) for r in requests), strict=True)
            )
            denoiser = Guided(denoiser, scale, rescale)
        memory = denoiser.prepare(self._conditioning(requests))
        start = first_step(requests[0])
        yield from denoise(denoiser, solver, x, memory, noise.draw, start=start, constrain=constrain)

    def _batch_key(self, request: Request) -> Hashable:
        """Equal for requests that may share a batch. It holds whether there is guidance, an image and a mask."""
        guided = request.guidance_scale > 1
        texts = [request.negative_prompt, request.prompt] if guided else [request.prompt]
        chunks = max(map(self.text.num_chunks, texts))
        alike = {"prompt": "", "negative_prompt": "", "seed": 0, "guidance_scale": float(guided), "guidance_rescale": 0}
        sources = {"image": _named(request.image), "mask": _named(request.mask)}
        return self.resolve(request).replace(**alike, **sources), chunks

    def _noise(self, requests: Sequence[Request]) -> ImageNoise:
        resolved = self.resolve(requests[0]).model_dump()
        height, width = resolved["height"] // self.codec.factor, resolved["width"] // self.codec.factor
        shape = (self.codec.latent_channels, height, width)
        return ImageNoise([request.seed for request in requests], shape, self.device)

    def _conditioning(self, requests: Sequence[Request]) -> Conditioning:
        """B rows, or with guidance 2B rows with the negative prompts first."""
        prompts = [request.prompt for request in requests]
        if requests[0].guidance_scale > 1:
            prompts = [request.negative_prompt for request in requests] + prompts
        return Conditioning(*self.text.encode(prompts, clip_skip=requests[0].clip_skip))

    def _solver(self, request: Request, generators: Sequence[torch.Generator]) -> Solver:
        return solver_for(request, self.schedule, self.denoiser.prediction, generators, first_step(request))


def _opened(picture: Any, *, for_mask: bool = False) -> Any:
    return None if picture is None else open_picture(picture, for_mask=for_mask)


def _each(name: str, value: Any, count: int) -> list[Any]:
    """One value for each of count prompts: those of a list, or one value for all. Checks that images are images."""
    values = list(value) if isinstance(value, list | tuple) else [value] * count
    if len(values) != count:
        raise ValueError(f"{name} has {len(values)} entries for {count} prompts; give one for all, or one for each")
    if name in ("image", "mask", "images", "masks"):
        for picture in values:
            if picture is not None and not isinstance(picture, Picture):
                raise ValueError(f"{name} must be a PIL image, a file or its bytes, not {type(picture).__name__}")
    return values


def _whole(name: str, value: Any) -> int:
    try:
        return value.__index__()  # also the integers of numpy and torch
    except (AttributeError, TypeError):
        raise ValueError(f"{name}={value!r:.40} must be a whole number") from None


def _named(picture: Any) -> str | None:
    """A placeholder for the image in requests that are compared or not yet resolved."""
    return None if picture is None else "given"
