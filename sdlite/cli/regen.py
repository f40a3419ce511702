"""`sdlite regen`: draws an image again from the metadata in its file."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sdlite.cli.app import Threads, app, examples, load
from sdlite.cli.draw import RANDOM, Sources, draw, end, open_sources, read_seed
from sdlite.cli.flags import options
from sdlite.cli.output import LOSSY, Names, Report, SaveOptions, shown
from sdlite.cli.words import check_there, checked
from sdlite.config import LoadOptions
from sdlite.request import Request

if TYPE_CHECKING:
    from PIL.Image import Image

    from sdlite.images.recipe import Recipe
    from sdlite.pipeline import Pipeline

Changes = Mapping[str, str | None]


@app.command(
    epilog=examples("sdlite regen star.png", "sdlite regen star.png --set steps=50 --set solver=euler -o better.png")
)
@options
def regen(
    path: Annotated[
        Path,
        typer.Argument(
            metavar="IMAGE", callback=checked(check_there), help="An image that sdlite or Automatic1111 drew."
        ),
    ],
    *,
    changes: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a setting, e.g. steps=50.")
    ] = None,
    anyway: Annotated[
        bool, typer.Option("--anyway", help="Draw even if the model or a source image is not the recorded one.")
    ] = False,
    save_options: SaveOptions,
    load_options: LoadOptions,
    threads: Threads = None,
    report: Report,
) -> None:
    """Draw an image again from its metadata.

    --set takes any field of the request (`sdlite info IMAGE` lists them); "none" clears width, height, image or mask.
    An image that was started from another one needs that one again: --set image=FILE. The new pixels are compared with
    those of IMAGE.
    """
    changed = dict(_pair(change) for change in changes or ())
    files = {name: changed.get(name) for name in ("image", "mask")}
    for file in filter(None, files.values()):
        check_there(file)
    names = Names(save_options, 1)
    sources = open_sources(files, report)
    from sdlite.images.files import read_any_metadata

    recipe, notes = read_any_metadata(path)
    _check_sources(path, recipe.request, changed, sources, anyway)
    if (seed := changed.get("seed")) is not None:
        changed["seed"] = str(read_seed(seed))
    request = recipe.request.replace(**changed)
    for note in notes:
        report.note(note)
    if seed is not None and seed.strip().lower() in RANDOM:
        report.note(f"seed {request.seed}")
    pipe = load(load_options.replace(prediction=load_options.prediction or recipe.prediction), report, threads)
    ours = recipe.prediction is not None  # Automatic1111 does not record it
    if ours and not anyway:
        _check_model(path, recipe, pipe)
    elif not ours and load_options.model is None and recipe.model:
        report.note(f"it was drawn by model {shown(recipe.model)!r}, which --model gives; now by {pipe.name!r}")
    images, interrupted = draw(pipe, [request], sources, names, report)
    if ours and not set(changed) - {"image", "mask"}:
        _compare(images[0], path, report)
    end(report, 1, interrupted)


def _pair(change: str) -> tuple[str, str | None]:
    """Splits key=value; the value "none" clears a field that may be empty."""
    key, equals, value = change.partition("=")
    if not equals:
        raise ValueError(f"--set {change} must be KEY=VALUE, e.g. --set steps=50")
    clears = value == "none" and key in ("width", "height", "image", "mask")
    return key.strip().replace("-", "_"), None if clears else value


def _check_sources(path: Path, recorded: Request, changed: Changes, sources: Sources, anyway: bool) -> None:
    """Raises ValueError if a source image is missing or, unless anyway, is not the recorded one."""
    from sdlite.images.recipe import UNKNOWN_SOURCE

    for name in ("image", "mask"):
        checksum = getattr(recorded, name)
        if checksum is None:
            continue
        if name not in changed:
            known = "" if checksum == UNKNOWN_SOURCE else f" ({checksum[:17]})"
            raise ValueError(f"{path} was drawn from another {name}{known}; give it with --set {name}=FILE")
        is_known = name in sources and checksum != UNKNOWN_SOURCE and not anyway
        if is_known and sources[name].checksum != checksum:
            raise ValueError(f"--set {name}={changed[name]}: not the recorded one ({checksum[:17]}); or add --anyway")


def _check_model(path: Path, recipe: "Recipe", pipe: "Pipeline") -> None:
    if pipe.model_hash != recipe.model_hash:
        raise ValueError(
            f"{path} was drawn by model {shown(recipe.model)!r} ({recipe.model_hash[:10]}), not by {pipe.name!r} "
            f"({pipe.model_hash[:10]}); give the first with --model, or add --anyway"
        )


def _compare(image: "Image", path: Path, report: Report) -> None:
    """Reports how far the pixels are from those of the file, and the likely cause."""
    from sdlite.images.files import open_picture
    from sdlite.images.pixels import largest_difference

    difference = largest_difference(image, open_picture(path))
    report.event("compared", largest_difference=difference)
    if not difference:
        report.note(f"same as {path}")
        return
    cause = "which is rounding" if difference == 1 else "from another device, --dtype, --prediction or version"
    if path.suffix.lower() in LOSSY:
        cause = "as JPEG changes pixels"
    report.note(f"differs from {path} by up to {difference} of 255, {cause}; `sdlite info {path}` says more")
