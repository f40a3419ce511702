"""A request resolved against a model, once: everything that drawing needs to know before the first step.

    Request + images --make_job--> Job --batches--> groups of jobs that run together --Pipeline.draw--> images

All errors of requests that a model cannot draw are raised here.
"""

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from operator import index
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL.Image import Image
from torch import Tensor
from torch.nn import functional as F

from sdlite.config import MAX_SIDE, Prediction
from sdlite.contracts import Codec, Denoiser, TextModel
from sdlite.diffusion.schedule import Schedule
from sdlite.diffusion.solvers import solver_for
from sdlite.images.files import open_picture
from sdlite.images.pixels import Opened, mask_from_pil, mask_notes
from sdlite.models.prompt import foreign_marks
from sdlite.pipeline.about import About, total_memory
from sdlite.request import SOLVERS, Request, SolverEntry

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


class Model(Protocol):
    """The parts of a Pipeline, which resolve and run jobs."""

    text: TextModel
    denoiser: Denoiser
    codec: Codec
    schedule: Schedule
    about: About
    inpainting: bool  # the denoiser also takes mask and masked image
    size_unit: int  # sides of images are multiples of it, in pixels

    @property
    def device(self) -> torch.device: ...
    @property
    def default_size(self) -> tuple[int, int]: ...


def batches(jobs: Sequence[Job], size: int | None = None) -> list[list[int]]:
    """Groups the indices of jobs that may run together, up to `size` in a group, in the order of their first job."""
    if size is not None and size < 1:
        raise ValueError(f"batch_size={size} must be at least 1")
    groups: dict[Hashable, list[int]] = {}
    for i, job in enumerate(jobs):
        groups.setdefault(job.batch_key, []).append(i)
    step = max(len(jobs), 1) if size is None else size
    return [group[first : first + step] for group in groups.values() for first in range(0, len(group), step)]


def opened(source: Source | Opened, *, for_mask: bool = False) -> Opened:
    """Opens an image or mask, unless it is opened already. Raises what `open_picture` raises."""
    if isinstance(source, Opened):
        return source
    if not isinstance(source, Source):
        name, found = "mask" if for_mask else "image", type(source).__name__
        raise ValueError(f"{name} must be a PIL image, a file or its bytes, not {found}")
    return Opened.of(open_picture(source, for_mask=for_mask), for_mask=for_mask)


def opened_columns(images: Sources, masks: Sources, count: int) -> list[list[Opened | None]]:
    """The images and the masks of count requests, each source opened once."""
    columns = []
    for name, sources in (("images", images), ("masks", masks)):
        known: dict[Hashable, Opened | None] = {None: None}
        column = [(_key(source), source) for source in _each(name, sources, count)]
        for key, source in column:
            if key not in known:
                known[key] = opened(source, for_mask=name == "masks")
        columns.append([known[key] for key, _ in column])
    return columns


def _key(source: Any) -> Hashable:
    """Equal for equal files and bytes. A PIL image has no hash, so it is known by its identity."""
    return source if source is None or isinstance(source, str | Path | bytes) else id(source)


def spread(columns: dict[str, Any], num_images: int) -> tuple[list[Request], list[Opened | None], list[Opened | None]]:
    """Requests, images and masks of a call such as pipe(["a", "b"], seed=[1, 2], steps=20).

    columns: fields of Request, each one value or one per prompt. num_images: per prompt, with seeds that count up.
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
    """One value for each of count prompts: those of a list, or one value for all."""
    values = list(value) if isinstance(value, list | tuple) else [value] * count
    if len(values) != count:
        raise ValueError(f"{name} has {len(values)} entries for {count} prompts; give one for all, or one for each")
    return values


def _whole(name: str, value: Any) -> int:
    """Any integer, also of numpy and torch."""
    try:
        return index(value)
    except TypeError:
        raise ValueError(f"{name}={value!r:.40} must be a whole number") from None


def with_checksums(request: Request, image: Opened | None, mask: Opened | None) -> Request:
    """The request with the checksums of the opened images in place of file names."""
    given = {"image": image, "mask": mask}
    return request.replace(**{name: source.checksum for name, source in given.items() if source is not None})


def make_job(model: Model, request: Request, image: Opened | None, mask: Opened | None) -> Job:
    """Raises ValueError for a request that the model cannot draw."""
    for name, given in (("image", image), ("mask", mask)):
        if getattr(request, name) is not None and given is None:
            raise ValueError(f"{name}={getattr(request, name)!r}: open the image and give it as well")
    width, height = size_of(model, request, image, mask)
    resolved = with_checksums(request, image, mask).replace(width=width, height=height)
    start, guided = first_step(resolved), request.guidance_scale > 1
    settings = Request(prompt="", solver=request.solver, steps=request.steps, eta=request.eta)
    entry = SOLVERS[request.solver]  # in the key of the cache, as a name may get another entry
    if request.clip_skip:
        model.text.encode([""], clip_skip=request.clip_skip)  # raises ValueError for more layers than there are
    return Job(
        resolved,
        (width, height),
        image,
        mask,
        start=start,
        evaluations=_num_timesteps(settings, entry, model.schedule, model.denoiser.prediction, start) - start,
        guided=guided,
        chunks=max(map(model.text.num_chunks, [request.prompt, request.negative_prompt][: 1 + guided])),
        remarks=_remarks(request, image, mask, (width, height), model.default_size),
    )


@lru_cache(maxsize=1024)
def _num_timesteps(
    settings: Request, entry: SolverEntry, schedule: Schedule, prediction: Prediction, start: int
) -> int:
    """Builds the solver to see whether it can do these settings, once for equal ones. entry: of their solver."""
    return len(solver_for(settings, schedule, prediction, (), start).timesteps)


def size_of(model: Model, request: Request, image: Opened | Image | None, mask: object) -> tuple[int, int]:
    """(width, height) in pixels. Raises ValueError if this model cannot draw it."""
    if model.inpainting and mask is None:
        raise ValueError(
            f"{model.about.name or 'this'} is an inpainting model, which only repaints: give image and mask"
        )
    size = fitted_size(request, None if image is None else image.size, model.default_size, model.size_unit)
    factor, unit = model.codec.factor, model.size_unit
    for name, side in zip(("width", "height"), size, strict=True):
        if side % unit:
            lower, patch = side // unit * unit, unit // factor
            cells = f" and the DiT's patches have {patch} cells a side" if patch > 1 else ""
            raise ValueError(
                f"{name}={side} must be a multiple of {unit}, as the codec shrinks images by {factor}{cells}; "
                f"use {f'{lower} or ' if lower else ''}{lower + unit}"
            )
    width, height = size
    needed, there = model.codec.decode_bytes(width, height), total_memory(model.device)
    if needed > there:
        raise ValueError(
            f"width={width}, height={height}: to decode it takes {needed / 2**30:.1f} GiB of memory or more, and "
            f"{model.device} has {there / 2**30:.1f}; draw it smaller"
        )
    if isinstance(mask, Opened) and mask.picture is not None:
        white = mask_cells(mask_from_pil(mask.picture, size), height // factor, width // factor)
        if not white.any():
            raise ValueError(
                f"the white parts of the mask are too small to be redrawn at {width}x{height}; paint them larger than "
                f"{factor} pixels"
            )
    return size


def mask_cells(mask: Tensor, height: int, width: int) -> Tensor:
    """(B, 1, H, W) in pixels to (B, 1, height, width) in latent cells, the nearest pixel of each, as diffusers does."""
    return F.interpolate(mask, size=(height, width))


def first_step(request: Request) -> int:
    """Index of the first step: 0 from noise, later from an image, rounded as diffusers does.

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
    """(width, height) of the request; sides that it leaves open have the given image's shape, or are the model's own.

    given: size of the image to start from. If it is larger than the model's area, it is fitted into that area; else it
    is cut. own: the model's. unit: sides are multiples of it.
    """
    asked = (request.width, request.height)
    if given is None or None not in asked:
        width, height = (default if side is None else side for side, default in zip(asked, own, strict=True))
        return width, height
    scales = [side / length for side, length in zip(asked, given, strict=True) if side is not None]
    scale = scales[0] if scales else min(1, math.sqrt(math.prod(own) / math.prod(given)))
    cells = [side * scale / unit for side in given]
    sides = (min(max(int(n) if scale == 1 else round(n), 1) * unit, MAX_SIDE // unit * unit) for n in cells)
    width, height = (fitted if side is None else side for side, fitted in zip(asked, sides, strict=True))
    return width, height


def _remarks(
    request: Request, image: Opened | None, mask: Opened | None, size: tuple[int, int], own: tuple[int, int]
) -> tuple[str, ...]:
    """Parts of the prompts that mean nothing here, and how image and mask are read. size: drawn. own: the model's."""
    remarks = [*foreign_marks(request.prompt), *foreign_marks(request.negative_prompt)]
    open_size = request.width is None and request.height is None
    if image is not None and open_size and math.prod(image.size) > math.prod(own):
        remarks.append(
            "the image to start from has {} pixels and is made {}, the area that this model draws; "
            "width or height sets another size".format(*("{}x{}".format(*sides) for sides in (image.size, size)))
        )
    if image is not None and mask is not None:
        remarks += mask_notes(mask.size, mask.grey, image.size)
    return tuple(remarks)
