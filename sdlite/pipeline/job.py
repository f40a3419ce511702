"""A request resolved against a model, once: everything that drawing needs to know before the first step.

Request + images --Pipeline.jobs--> Job --batches--> groups of jobs that run together --Pipeline.draw--> images
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL.Image import Image
from torch import Tensor

from sdlite.contracts import Codec, Denoiser, TextModel
from sdlite.diffusion.schedule import Schedule
from sdlite.images.files import open_picture
from sdlite.images.pixels import Opened
from sdlite.request import Request

Source = Image | str | Path | bytes  # what `open_picture` reads
Sources = Sequence[Source | Opened | None] | None
PER_IMAGE = ("prompt", "negative_prompt", "seed", "guidance_scale", "guidance_rescale", "image", "mask")


@dataclass(frozen=True, slots=True)
class Job:
    """A request with its size filled in, and what the model makes of it.

    request: `image` and `mask` are checksums of pixels. size: (width, height). image, mask: what the run starts from.
    start: index of the first step; 0 unless there is an image. evaluations: how many steps `Pipeline.draw` runs, with
    one call of the denoiser in each. guided: whether the negative prompt is used. chunks: of tokens, in the longest
    prompt that is used. remarks: what the user should know about the request.
    """

    request: Request
    size: tuple[int, int]
    image: Opened | None
    mask: Opened | None
    start: int
    evaluations: int
    guided: bool
    chunks: int
    remarks: tuple[str, ...] = ()

    @property
    def batch_key(self) -> Hashable:
        """Equal for jobs that may share a batch: all but the fields in PER_IMAGE, and how many chunks there are."""
        shared = (getattr(self.request, name) for name in Request.model_fields if name not in PER_IMAGE)
        return *shared, self.guided, self.image is None, self.mask is None, self.chunks


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


class Model(Protocol):
    """The parts of a Pipeline, which resolve and run jobs."""

    text: TextModel
    denoiser: Denoiser
    codec: Codec
    schedule: Schedule
    inpainting: bool  # the denoiser also takes mask and masked image
    size_unit: int  # sides of images are multiples of it, in pixels

    @property
    def name(self) -> str: ...
    @property
    def device(self) -> torch.device: ...
    @property
    def default_size(self) -> tuple[int, int]: ...


def batches(jobs: Sequence[Job], size: int | None = None) -> list[list[int]]:
    """Groups the indices of jobs that may run together, up to `size` in a group, in the order of their first job."""
    groups: dict[Hashable, list[int]] = {}
    for i, job in enumerate(jobs):
        groups.setdefault(job.batch_key, []).append(i)
    step = max(len(jobs), 1) if size is None else size
    return [group[first : first + step] for group in groups.values() for first in range(0, len(group), step)]


def opened(source: Source | Opened, *, for_mask: bool = False) -> Opened:
    """Opens an image or mask, unless it is opened already. Raises what `open_picture` raises."""
    if isinstance(source, Opened):
        return source
    return Opened.of(open_picture(source, for_mask=for_mask), for_mask=for_mask)


def opened_columns(images: Sources, masks: Sources, count: int) -> list[list[Opened | None]]:
    """The images and the masks of count requests, each source opened once."""
    columns = []
    for name, sources in (("images", images), ("masks", masks)):
        column = _each(name, sources, count)
        known = {id(s): opened(s, for_mask=name == "masks") for s in column if s is not None}
        columns.append([known.get(id(source)) for source in column])
    return columns


def spread(columns: dict[str, Any], num_images: int) -> tuple[list[Request], list[Opened | None], list[Opened | None]]:
    """Requests, images and masks of a call such as pipe(["a", "b"], seed=[1, 2], steps=20).

    columns: fields of Request, each one value or one for each prompt. num_images: for each prompt, with seeds that
    count up. Raises ValueError.
    """
    prompts = columns["prompt"]
    count = len(prompts) if isinstance(prompts, list | tuple) else 1
    repeats = _whole("num_images", num_images)
    if repeats < 1:
        raise ValueError(f"num_images={repeats} must be at least 1")
    lists = {name: _each(name, value, count) for name, value in columns.items()}
    starts, areas = opened_columns(lists.pop("image"), lists.pop("mask"), count)
    requests = []
    for row, image, mask in zip(zip(*lists.values(), strict=True), starts, areas, strict=True):
        fields = dict(zip(lists, row, strict=True))
        fields |= {"image": image and image.checksum, "mask": mask and mask.checksum}
        first = _whole("seed", fields["seed"])
        requests += [Request(**fields | {"seed": first + i}) for i in range(repeats)]
    images, masks = ([opened for opened in column for _ in range(repeats)] for column in (starts, areas))
    return requests, images, masks


def _each(name: str, value: Any, count: int) -> list[Any]:
    """One value for each of count prompts: those of a list, or one value for all. Checks that images are images."""
    several = isinstance(value, list | tuple) and not isinstance(value, Opened)
    values = list(value) if several else [value] * count
    if len(values) != count:
        raise ValueError(f"{name} has {len(values)} entries for {count} prompts; give one for all, or one for each")
    if name in ("image", "mask", "images", "masks"):
        for source in values:
            if source is not None and not isinstance(source, Source | Opened):
                raise ValueError(f"{name} must be a PIL image, a file or its bytes, not {type(source).__name__}")
    return values


def _whole(name: str, value: Any) -> int:
    """Any integer, also of numpy and torch. Raises ValueError for everything else."""
    try:
        return value.__index__()
    except (AttributeError, TypeError):
        raise ValueError(f"{name}={value!r:.40} must be a whole number") from None
