"""From a request to a job: its size, its steps, and the errors of requests that a model cannot draw."""

import math
from functools import lru_cache

from PIL.Image import Image

from sdlite.config import MAX_SIDE, Prediction
from sdlite.diffusion.schedule import Schedule
from sdlite.diffusion.solvers import solver_for
from sdlite.images.pixels import Opened, mask_from_pil, mask_notes
from sdlite.models.device import total_memory
from sdlite.models.prompt import foreign_marks
from sdlite.pipeline.job import Job, Model
from sdlite.pipeline.start import mask_cells
from sdlite.request import Request, SolverName


def make_job(model: Model, request: Request, image: Opened | None, mask: Opened | None) -> Job:
    """Raises ValueError for a request that the model cannot draw."""
    for name, given in (("image", image), ("mask", mask)):
        if getattr(request, name) is not None and given is None:
            raise ValueError(f"{name}={getattr(request, name)!r}: open the image and give it as well")
    width, height = size_of(model, request, image, mask)
    checksums = {"image": image and image.checksum, "mask": mask and mask.checksum}
    resolved = request.replace(width=width, height=height, **checksums)
    start = first_step(resolved)
    return Job(
        resolved,
        (width, height),
        image,
        mask,
        start=start,
        evaluations=num_evaluations(model, resolved, start),
        guided=request.guidance_scale > 1,
        chunks=num_chunks(model, request),
        remarks=remarks_on(request, image, mask, (width, height), model.default_size),
    )


def num_chunks(model: Model, request: Request) -> int:
    """Chunks of tokens of the longest prompt that is used."""
    texts = [request.negative_prompt, request.prompt] if request.guidance_scale > 1 else [request.prompt]
    return max(map(model.text.num_chunks, texts))


def num_evaluations(model: Model, request: Request, start: int) -> int:
    """How many steps a run has from step `start` on. Raises ValueError if solver or text model cannot do it."""
    if request.clip_skip:
        model.text.encode([""], clip_skip=request.clip_skip)  # raises ValueError for more layers than there are
    settings = (request.solver, request.steps, request.eta)
    return _grid_length(*settings, model.schedule, model.denoiser.prediction, start) - start


@lru_cache(maxsize=1024)
def _grid_length(
    solver: SolverName, steps: int, eta: float, schedule: Schedule, prediction: Prediction, start: int
) -> int:
    """How many timesteps a run of these settings has; the solver is built once to see whether it can do them."""
    request = Request(prompt="", solver=solver, steps=steps, eta=eta)
    return len(solver_for(request, schedule, prediction, (), start).timesteps)


def size_of(model: Model, request: Request, image: Opened | Image | None, mask: object) -> tuple[int, int]:
    """(width, height) in pixels. Raises ValueError if this model cannot draw it."""
    if model.inpainting and mask is None:
        raise ValueError(f"{model.name or 'this'} is an inpainting model, which only repaints: give image and mask")
    width, height = fitted_size(request, None if image is None else image.size, model.default_size, model.size_unit)
    check_size(width, height, model.size_unit, model.codec.factor)
    needed, there = model.codec.decode_bytes(width, height), total_memory(model.device)
    if needed > there:
        raise ValueError(
            f"width={width}, height={height}: to decode it takes {needed / 2**30:.1f} GiB of memory or more, and "
            f"{model.device} has {there / 2**30:.1f}; draw it smaller"
        )
    if isinstance(mask, Opened) and mask.picture is not None:
        check_mask(mask.picture, width, height, model.codec.factor)
    return width, height


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


def check_size(width: int, height: int, unit: int, factor: int) -> None:
    """Raises ValueError unless both sides are multiples of unit. factor: pixels along a latent cell."""
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
    if not mask_cells(mask_from_pil(mask, (width, height)), height // factor, width // factor).any():
        raise ValueError(
            f"the white parts of the mask are too small to be redrawn at {width}x{height}; paint them larger than "
            f"{factor} pixels"
        )


def remarks_on(
    request: Request, image: Opened | None, mask: Opened | None, size: tuple[int, int], own: tuple[int, int]
) -> tuple[str, ...]:
    """What the user should know: parts of the prompts that mean nothing here, and how image and mask are read.

    size: (width, height) that will be drawn. own: the model's.
    """
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
