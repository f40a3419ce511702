"""From requests to images: text model, denoiser and codec in the order of the README's data-flow line.

A Pipeline holds the parts of a model and no seed. `jobs` resolves requests, and `draw` is the one loop that draws them.
The noise of an image comes from its own seed, so that the image does not depend on its batch, except for rounding.
"""

import copy
import html
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from PIL.Image import Image
from torch import Tensor

from sdlite.checkpoints.folder import save_folder
from sdlite.checkpoints.load import read_model
from sdlite.checkpoints.parts import gathered
from sdlite.config import LoadOptions, Prediction
from sdlite.contracts import Codec, Denoiser, TextModel
from sdlite.diffusion.schedule import Schedule
from sdlite.images.files import Images
from sdlite.images.pixels import Opened
from sdlite.pipeline.about import About, device_of, find_device, num_weights
from sdlite.pipeline.job import Job, Source, Sources, batches, make_job, opened_columns, size_of, spread, with_checksums
from sdlite.pipeline.progress import Progress, watched
from sdlite.pipeline.run import Finished, Step, finished, sample
from sdlite.request import Request


class Pipeline:
    """Text model, denoiser, codec and noise schedule: any objects with the methods of `sdlite.contracts`."""

    def __init__(
        self, text: TextModel, denoiser: Denoiser, codec: Codec, schedule: Schedule, *, about: About | None = None
    ) -> None:
        self.text = text
        self.denoiser = self._sized = denoiser
        self.codec = codec
        self.schedule = schedule
        self.about = about or About()
        self._measure()

    def _measure(self) -> None:
        """What the parts ask of images. Further channels of the denoiser are for mask and masked image.

        A wrapper that has no in_channels or patch_size takes what the last denoiser with both takes.
        """
        if hasattr(self.denoiser, "in_channels") and hasattr(self.denoiser, "patch_size"):
            self._sized = self.denoiser
        self.inpainting = self._sized.in_channels > self.codec.latent_channels
        self.size_unit = self.codec.factor * self._sized.patch_size  # in pixels; sides are multiples of it

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

        "tiny", "tiny-dit", "sd15" and "sd21" are untrained models, unless a file or folder here has that name. The
        others are the fields of `LoadOptions`. The codec runs in float32 whatever the dtype.
        Raises CheckpointError, a ValueError, with one line that names the file and what is wrong with it.
        """
        files: dict[str, Any] = {"variant": variant, "vae": vae, "allow_links": tuple(allow_links)}
        options = LoadOptions(**files, model=path, device=device, dtype=dtype, prediction=prediction)
        place = find_device(device)
        precision = dtype if dtype != "auto" else "float32" if place.type == "cpu" else "float16"
        parts, kind = read_model(options), getattr(torch, precision)
        about = About(
            name=parts.name,
            hash=parts.hash,
            notes=tuple(parts.notes),
            sample_size=parts.config.sample_size,
            dtype=precision,
            device=str(place),
        )
        text, denoiser = parts.text.to(place, kind), parts.denoiser.to(place, kind)
        return cls(text, denoiser, parts.codec.to(place), Schedule(parts.config.schedule), about=about)

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
        parts = {"text": text, "denoiser": denoiser, "codec": codec, "about": about}
        vars(other).update({name: part for name, part in parts.items() if part is not None})
        other._measure()
        return other

    def with_denoiser(self, wrap: Callable[[Denoiser], Denoiser], *, about: About | None = None) -> Self:
        """A pipeline with the same parts, except the denoiser: it is wrap(denoiser). about: as for `with_parts`."""
        return self.with_parts(denoiser=wrap(self.denoiser), about=about)

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
        return device_of(self.codec, self.denoiser, self.text, default=self.about.device)

    @property
    def default_size(self) -> tuple[int, int]:
        """Default (width, height) of an image in pixels."""
        size = self.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        return width * self.codec.factor, height * self.codec.factor

    def summary(self) -> dict[str, str]:
        """The pipeline in words, which repr and notebooks show. Parts without weights are left out."""
        parts = {"text": self.text, "denoiser": self.denoiser, "codec": self.codec}
        sizes = {name: num_weights(part) for name, part in parts.items()}
        kinds = {name: type(part).__name__ for name, part in parts.items() if sizes[name]}
        return {
            "model": self.name or "unnamed",
            **{name: f"{kind}, {sizes[name] / 1e6:.1f} million weights" for name, kind in kinds.items()},
            "draws": "{} x {} pixels, prediction {}".format(*self.default_size, self.denoiser.prediction),
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
        black-and-white image; white parts of `image` are redrawn (inpainting). fields: those of Request. A list gives
        one value for each prompt. Warns of prompts and images that may not be read as you expect (`Job.remarks`).
        progress, errors: as for `generate`.
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
        the time left, None only in a terminal or notebook, False never; a function is called with the steps done and
        the total. Raises ValueError for a request that cannot be drawn, FloatingPointError for an infinite image.
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

        images, masks: as for `generate`. Raises ValueError for requests that cannot be drawn or do not fit the images.
        """
        requests = [requests] if isinstance(requests, Request) else list(requests)
        if not requests:
            raise ValueError("there are no requests; give at least one")
        rows = zip(requests, *opened_columns(images, masks, len(requests)), strict=True)
        return [make_job(self, *row) for row in rows]

    def resolve(self, request: Request, image: Image | Opened | None = None) -> Request:
        """The request with its size filled in: that of the image, scaled down to the model's area, or the model's size.

        Raises ValueError if this model cannot draw it.
        """
        width, height = size_of(self, request, image, request.mask)
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
        each group. Raises ValueError for a batch_size below 1, and FloatingPointError if an image is not finite.
        """
        groups = batches(jobs, batch_size)
        total, done = sum(jobs[group[0]].evaluations for group in groups), 0
        for group in groups:
            mine = [jobs[i] for i in group]
            count, latents = mine[0].evaluations, None
            yield Step(group, 0, count, done, total, None)
            for step, latents in enumerate(sample(self, mine), 1):
                yield Step(group, step, count, done + step, total, latents)
            done += count
            assert latents is not None, "a run has at least one step"
            for i, job, z in zip(group, mine, latents.chunk(len(latents)), strict=True):
                yield Finished(i, finished(self, z, job.request, job.image, job.mask))

    def sample_latents(
        self, requests: Request | Sequence[Request], *, images: Sources = None, masks: Sources = None
    ) -> Iterator[Tensor]:
        """Yields the latents (B, C, H/f, W/f) of a batch after every step, for previews and for stopping early.

        images, masks: as for `generate`. Raises ValueError if the requests may not share a batch.
        """
        jobs = self.jobs(requests, images, masks)
        if len(batches(jobs)) > 1:
            raise ValueError("these requests cannot share a batch; `draw` groups them")
        return sample(self, jobs)

    @torch.no_grad()
    def decode(
        self, latents: Tensor, requests: Request | Sequence[Request], *, images: Sources = None, masks: Sources = None
    ) -> list[Image]:
        """Decodes final latents (B, C, H/f, W/f), one after the other, to images with their metadata in `.info`.

        images, masks: as for `generate`; where request.paste is true, the part outside the mask is put back. Raises
        FloatingPointError if an image is not finite.
        """
        requests = [requests] if isinstance(requests, Request) else requests
        rows = zip(latents.chunk(len(latents)), requests, *opened_columns(images, masks, len(requests)), strict=True)
        return [finished(self, z, with_checksums(request, *given), *given) for z, request, *given in rows]
