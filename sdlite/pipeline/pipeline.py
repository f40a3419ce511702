"""From requests to images: text model, denoiser and codec in the order of the README's data-flow line.

A Pipeline holds the parts of a model and no seed. `jobs` resolves requests, and `draw` is the one loop that samples,
decodes and finishes images. The noise of an image comes from its own seed, so the image does not depend on its batch,
except for rounding.
"""

import copy
import html
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Self

import torch
from PIL.Image import Image
from torch import Tensor

from sdlite.checkpoints.load import load_model
from sdlite.checkpoints.places import SHIPPED
from sdlite.checkpoints.save import gathered, save_folder
from sdlite.config import Prediction
from sdlite.contracts import Codec, Conditioning, Denoiser, TextModel
from sdlite.diffusion.guidance import Guided
from sdlite.diffusion.noise import ImageNoise
from sdlite.diffusion.sampling import denoise
from sdlite.diffusion.schedule import Schedule
from sdlite.diffusion.solvers import solver_for
from sdlite.images.files import Images
from sdlite.images.pixels import Opened, pasted, to_pil
from sdlite.images.recipe import metadata
from sdlite.models.device import device_of, find_device, find_dtype, num_weights, total_memory
from sdlite.pipeline.about import UNKNOWN, About
from sdlite.pipeline.job import (
    Job,
    Source,
    Sources,
    batches,
    check_size,
    first_step,
    fitted_size,
    opened,
    opened_columns,
    remarks_on,
    spread,
)
from sdlite.pipeline.progress import Progress, watched
from sdlite.pipeline.start import begin, check_mask, picture_of
from sdlite.request import Request, SolverName


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


class Pipeline:
    """Text model, denoiser, codec and noise schedule, which draw images together.

    Any objects with the methods of `sdlite.contracts` can be parts.
    """

    def __init__(
        self, text: TextModel, denoiser: Denoiser, codec: Codec, schedule: Schedule, *, about: About = UNKNOWN
    ) -> None:
        self.text = text
        self.denoiser = denoiser
        self.codec = codec
        self.schedule = schedule
        self.about = about

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
        about = About(parts.name, parts.hash, tuple(parts.notes), parts.config.sample_size, str(kind)[len("torch.") :])
        return cls(
            parts.text.to(place, kind),
            parts.denoiser.to(place, kind),
            parts.codec.to(place),
            Schedule(parts.config.schedule),
            about=about,
        )

    def save(self, folder: str | Path) -> None:
        """Writes a folder that this class and diffusers' StableDiffusionPipeline load (a DiT: this class only).

        The dtype is that of the loaded model: float16 rounds the weights, and the copy then has another hash. Raises
        ValueError for a part that is no network of sdlite, such as a wrapped denoiser.
        """
        about, schedule = self.about, self.schedule.config
        save_folder(gathered(self.text, self.denoiser, self.codec, schedule, about.sample_size, about.notes), folder)

    def with_parts(
        self,
        *,
        text: TextModel | None = None,
        denoiser: Denoiser | None = None,
        codec: Codec | None = None,
        about: About | None = None,
    ) -> Self:
        """A pipeline with some parts replaced. If that changes images by more than rounding, name it in `about`.

        fast = pipe.with_parts(denoiser=Faster(pipe.denoiser), about=replace(pipe.about, backend="faster"))
        """
        other = copy.copy(self)
        for name, part in (("text", text), ("denoiser", denoiser), ("codec", codec), ("about", about)):
            if part is not None:
                setattr(other, name, part)
        return other

    def with_denoiser(self, wrap: Callable[[Denoiser], Denoiser]) -> Self:
        """A pipeline with the same parts, except the denoiser, which is replaced by wrap(denoiser)."""
        return self.with_parts(denoiser=wrap(self.denoiser))

    @property
    def name(self) -> str:
        return self.about.name

    @property
    def model_hash(self) -> str:
        return self.about.hash

    @property
    def notes(self) -> tuple[str, ...]:
        return self.about.notes

    @property
    def sample_size(self) -> int | tuple[int, int]:
        return self.about.sample_size

    @property
    def device(self) -> torch.device:
        return device_of(self.codec, self.denoiser, self.text)

    @property
    def default_size(self) -> tuple[int, int]:
        """Default (width, height) of an image in pixels."""
        size = self.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        return width * self.codec.factor, height * self.codec.factor

    @property
    def size_unit(self) -> int:
        """Sides of images are multiples of it, in pixels."""
        return self.codec.factor * self.denoiser.patch_size

    def summary(self) -> dict[str, str]:
        """The parts of the pipeline in words; repr and notebooks show it."""
        parts = {"text": self.text, "denoiser": self.denoiser, "codec": self.codec}
        weights = {name: f"{num_weights(part) / 1e6:.1f} million weights" for name, part in parts.items()}
        return {
            "model": self.name or "unnamed",
            **{name: f"{type(part).__name__}, {weights[name]}" for name, part in parts.items() if num_weights(part)},
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
        image: Source | Sequence[Source] | None = None,
        mask: Source | Sequence[Source] | None = None,
        progress: bool | Progress | None = None,
        **fields: Any,
    ) -> Images:
        """Draws `num_images` images of every prompt, with seeds counting up from the prompt's seed.

        image: start from this image (img2img) and change it by `strength`; a PIL image, a file or its bytes. mask:
        black-and-white image; white parts of `image` are redrawn (inpainting). progress: as for `generate`. fields:
        those of Request. A list gives one value for each prompt. Warns if a prompt or an image may not be read as you
        expect (`Job.remarks`). Raises ValueError with one line for a request that cannot be drawn.
        """
        columns = {"prompt": prompt, "seed": seed, "image": image, "mask": mask} | fields
        jobs = self.jobs(*spread(columns, num_images))
        for remark in dict.fromkeys(remark for job in jobs for remark in job.remarks):
            warnings.warn(remark, stacklevel=2)
        return self._all(jobs, progress)

    def generate(
        self,
        requests: Request | Sequence[Request],
        *,
        images: Sources = None,
        masks: Sources = None,
        progress: bool | Progress | None = None,
    ) -> Images:
        """Draws one image for each request, in their order, each with its metadata in `.info`.

        images, masks: one image, file or None per request, for img2img and inpainting. progress: True shows a line with
        the time left, None shows it in a terminal or notebook only; a function is called with the number of steps done
        and the total. Raises ValueError with one line for a request that cannot be drawn, FloatingPointError if an
        image is not finite.
        """
        return self._all(self.jobs(requests, images, masks), progress)

    def _all(self, jobs: Sequence[Job], progress: bool | Progress | None) -> Images:
        drawn: dict[int, Image] = {}
        with watched(progress, len(jobs)) as tell:
            for event in self.draw(jobs):
                if isinstance(event, Finished):
                    drawn[event.index] = event.picture
                elif event.step or not event.done:
                    tell(event.done, event.total)
        return Images(drawn[i] for i in range(len(jobs)))

    def jobs(self, requests: Request | Sequence[Request], images: Sources = None, masks: Sources = None) -> list[Job]:
        """Resolves requests against this model: what `draw` draws. Opens each image once.

        images, masks: as for `generate`. Raises ValueError for a request that this model cannot draw and for images
        that do not fit the requests.
        """
        requests = [requests] if isinstance(requests, Request) else list(requests)
        if not requests:
            raise ValueError("there are no requests; give at least one")
        rows = zip(requests, *opened_columns(images, masks, len(requests)), strict=True)
        return [self._job(*row) for row in rows]

    def _job(self, request: Request, image: Opened | None, mask: Opened | None) -> Job:
        for name, given in (("image", image), ("mask", mask)):
            if getattr(request, name) is not None and given is None:
                raise ValueError(f"{name}={getattr(request, name)!r}: open the image and give it as well")
        width, height = self._size(request, image, mask)
        checksums = {"image": image and image.checksum, "mask": mask and mask.checksum}
        resolved = request.replace(width=width, height=height, **checksums)
        return Job(
            resolved,
            (width, height),
            image,
            mask,
            start=first_step(resolved),
            evaluations=self.num_evaluations(resolved),
            guided=request.guidance_scale > 1,
            chunks=self._chunks(request),
            remarks=remarks_on(request, image, mask, (width, height), self.default_size),
        )

    def _chunks(self, request: Request) -> int:
        texts = [request.negative_prompt, request.prompt] if request.guidance_scale > 1 else [request.prompt]
        return max(map(self.text.num_chunks, texts))

    def _size(self, request: Request, image: Opened | Image | None, mask: object) -> tuple[int, int]:
        """(width, height) in pixels. Raises ValueError if this model cannot draw it."""
        if self.denoiser.in_channels > self.codec.latent_channels and mask is None:
            raise ValueError(f"{self.name or 'this'} is an inpainting model, which only repaints: give image and mask")
        width, height = fitted_size(request, None if image is None else image.size, self.default_size, self.size_unit)
        check_size(width, height, self.size_unit, self.codec.factor)
        needed, there = self.codec.decode_bytes(width, height), total_memory(self.device)
        if needed > there:
            raise ValueError(
                f"width={width}, height={height}: to decode it takes {needed / 2**30:.1f} GiB of memory or more, and "
                f"{self.device} has {there / 2**30:.1f}; draw it smaller"
            )
        if isinstance(mask, Opened) and mask.picture is not None:
            check_mask(mask.picture, width, height, self.codec.factor)
        return width, height

    def resolve(self, request: Request, image: Image | Opened | None = None) -> Request:
        """The request with its size filled in: that of the image, scaled down to the model's area, or the model's size.

        Raises ValueError if this model cannot draw it.
        """
        width, height = self._size(request, image, request.mask)
        return request.replace(width=width, height=height)

    @torch.no_grad()
    def draw(self, jobs: Sequence[Job], batch_size: int | None = None) -> Iterator[Step | Finished]:
        """Draws jobs batch by batch: the loop behind every image that sdlite draws.

            for event in pipe.draw(pipe.jobs(requests), batch_size=4):
                if isinstance(event, Finished):
                    event.picture.save(f"{event.index}.png")     # jobs[event.index]
                elif event.step == 0 and asked_to_stop:
                    break                                        # between two batches, all images so far are finished
                else:
                    bar.update(completed=event.done, total=event.total)

        For each batch: a Step with step 0, one Step after each step, then each image as soon as it is decoded. Jobs
        that may share a batch run together, up to batch_size of them (None: no limit), in the order of the first job of
        each group. Raises FloatingPointError if an image is not finite.
        """
        groups = batches(jobs, batch_size)
        total, done = sum(jobs[group[0]].evaluations for group in groups), 0
        for group in groups:
            mine = [jobs[i] for i in group]
            count, latents = mine[0].evaluations, None
            yield Step(group, 0, count, done, total, None)
            for step, latents in enumerate(self._sample(mine), 1):
                yield Step(group, step, count, done + step, total, latents)
            done += count
            assert latents is not None, "a run has at least one step"
            for i, job, z in zip(group, mine, latents.chunk(len(latents)), strict=True):
                yield Finished(i, self._finish(z, job.request, job.image, job.mask))

    def sample_latents(
        self, requests: Request | Sequence[Request], *, images: Sources = None, masks: Sources = None
    ) -> Iterator[Tensor]:
        """Yields the latents (B, C, H/f, W/f) of a batch after every step, for previews and for stopping early.

        images, masks: as for `generate`. Raises ValueError if the requests may not share a batch.
        """
        jobs = self.jobs(requests, images, masks)
        if len(batches(jobs)) > 1:
            raise ValueError("these requests cannot share a batch; `draw` groups them")
        return self._sample(jobs)

    @torch.no_grad()
    def _sample(self, jobs: Sequence[Job]) -> Iterator[Tensor]:
        """jobs: of one batch."""
        first, codec = jobs[0], self.codec
        width, height = (side // codec.factor for side in first.size)
        shape = (codec.latent_channels, height, width)
        noise = ImageNoise([job.request.seed for job in jobs], shape, self.device)
        solver = solver_for(first.request, self.schedule, self.denoiser.prediction, noise.generators, first.start)
        x, denoiser, constrain = begin(jobs, solver, noise, codec, self.denoiser)
        if first.guided:
            columns = zip(*((job.request.guidance_scale, job.request.guidance_rescale) for job in jobs), strict=True)
            denoiser = Guided(denoiser, *(torch.tensor(c, device=self.device).view(-1, 1, 1, 1) for c in columns))
        memory = denoiser.prepare(self._conditioning(jobs))
        yield from denoise(denoiser, solver, x, memory, noise.draw, start=first.start, constrain=constrain)

    def _conditioning(self, jobs: Sequence[Job]) -> Conditioning:
        """B rows, or with guidance 2B with the negative prompts first."""
        prompts = [job.request.prompt for job in jobs]
        if jobs[0].guided:
            prompts = [job.request.negative_prompt for job in jobs] + prompts
        return Conditioning(*self.text.encode(prompts, clip_skip=jobs[0].request.clip_skip))

    @torch.no_grad()
    def decode(
        self,
        latents: Tensor,
        requests: Request | Sequence[Request],
        *,
        images: Sources = None,
        masks: Sources = None,
    ) -> list[Image]:
        """Decodes final latents (B, C, H/f, W/f) to images, one after the other, each with its metadata in `.info`.

        images, masks: as for `generate`; if a request's paste is true, the part of the image outside the mask is put
        back. Raises FloatingPointError if an image is not finite.
        """
        requests = [requests] if isinstance(requests, Request) else requests
        rows = zip(latents.chunk(len(latents)), requests, *opened_columns(images, masks, len(requests)), strict=True)
        return [self._finish(*row) for row in rows]

    def _finish(self, z: Tensor, request: Request, image: Opened | None, mask: Opened | None) -> Image:
        """Latents (1, C, H/f, W/f) to an image with its metadata."""
        decoded = self.codec.decode(z.float())  # (1, 3, H, W)
        if not decoded.isfinite().all():
            raise FloatingPointError(
                f"seed={request.seed}: the image is not finite (inf or nan); try dtype float32 or another solver"
            )
        picture = to_pil(decoded)[0]
        paste = request.paste and image is not None and mask is not None
        if paste:
            picture = pasted(picture, picture_of(image), picture_of(mask), request.mask_blur)
        texts = metadata(
            request.replace(paste=paste, width=picture.width, height=picture.height),
            model=self.name,
            model_hash=self.model_hash,
            prediction=self.denoiser.prediction,
            **self.about.bits,
        )
        picture.info.update(texts.items())
        return picture

    def num_evaluations(self, request: Request) -> int:
        """How many steps `draw` runs for a request. Raises ValueError if solver or text model cannot do it."""
        start = first_step(request)
        if request.clip_skip:
            self.text.encode([""], clip_skip=request.clip_skip)  # raises ValueError for more layers than there are
        settings = (request.solver, request.steps, request.eta)
        return _grid_length(*settings, self.schedule, self.denoiser.prediction, start) - start

    def batches(self, requests: Sequence[Request]) -> list[list[int]]:
        """Groups the indices of requests, with checksums for images, that may run together."""
        jobs = []
        for request in map(self.resolve, requests):
            size, guided = (request.width or 0, request.height or 0), request.guidance_scale > 1
            image, mask = (None if name is None else Opened(name, size) for name in (request.image, request.mask))
            jobs.append(Job(request, size, image, mask, 0, 0, guided, self._chunks(request)))
        return batches(jobs)

    def remarks(self, request: Request, image: Any = None, mask: Any = None) -> list[str]:
        """What the user should know about a request; see `Job.remarks`."""
        given = None if image is None else Opened("", image.size)
        area = None if mask is None else opened(mask, for_mask=True)
        size = fitted_size(request, given and given.size, self.default_size, self.size_unit)
        return list(remarks_on(request, given, area, size, self.default_size))


@lru_cache(maxsize=1024)
def _grid_length(
    solver: SolverName, steps: int, eta: float, schedule: Schedule, prediction: Prediction, start: int
) -> int:
    """How many timesteps a run of these settings has; the solver is built once to see whether it can do them."""
    request = Request(prompt="", solver=solver, steps=steps, eta=eta)
    return len(solver_for(request, schedule, prediction, (), start).timesteps)
