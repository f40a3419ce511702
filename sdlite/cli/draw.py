"""`sdlite generate` and `sdlite regen`: from flags to requests, images and files."""

import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sdlite.checkpoints.concepts import knows_none, nearest, read_names
from sdlite.checkpoints.places import SHIPPED, shipped_folder
from sdlite.cli.app import (
    INTERRUPTED,
    AsJson,
    Force,
    NoMetadata,
    Output,
    Quiet,
    Threads,
    app,
    examples,
    load,
)
from sdlite.cli.flags import Flags, options
from sdlite.cli.output import Interrupts, Names, Report, shown
from sdlite.cli.words import check_there, checked
from sdlite.config import LoadOptions
from sdlite.request import Request

if TYPE_CHECKING:
    from PIL.Image import Image

    from sdlite.images.recipe import Recipe
    from sdlite.pipeline import Pipeline

SUGGESTED = 3  # names, for a prompt that the shipped model does not know
MAX_IMAGES = 10_000  # of one command; beyond that a batch file is the better record
RANDOM = ("random", "-1")  # as a seed; the second is Automatic1111's word for it
DEFAULT = Request(prompt="")


@app.command(
    epilog=examples(
        'sdlite generate "a red apple" -s 7 --num-images 4 -o apples/',
        'sdlite generate "a dog face" --image sketch.png --strength 0.6 -o dog.png',
    )
)
@options
def generate(
    request: Annotated[Request, Flags(without=("seed",))],
    load_options: LoadOptions,
    seed: Annotated[
        str, typer.Option("--seed", "-s", help="Seed of the first image; the others count up. random or -1 picks one.")
    ] = str(DEFAULT.seed),
    num_images: Annotated[int, typer.Option(min=1, max=MAX_IMAGES, help="Number of images.")] = 1,
    batch_size: Annotated[
        int, typer.Option("--batch-size", "-b", min=1, max=64, help="Images drawn at the same time.")
    ] = 1,
    threads: Threads = None,
    output: Output = None,
    contact_sheet: Annotated[Path | None, typer.Option(help="Also write all images into this one PNG.")] = None,
    attention: Annotated[
        Path | None, typer.Option(help="Also write a PNG that shows where the model looked for each word.")
    ] = None,
    no_metadata: NoMetadata = False,
    force: Force = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Draw images from a prompt.

    Prints the path of each image. Without -o the files are 000000-SEED.png, 000001-SEED.png, ... in this folder. With
    -o FOLDER they have the same names in that folder. With -o NAME.png (or .jpg, .webp) and --num-images above 1 they
    are NAME-1.png, NAME-2.png, ... No file is replaced without --force. Ctrl-C finishes the current image; a second one
    stops at once.
    """
    request = request.replace(seed=_seed(seed))
    requests = [request.replace(seed=request.seed + i) for i in range(num_images)]
    names = Names(output, num_images, force)
    for option, path in (("--contact-sheet", contact_sheet), ("--attention", attention)):
        if path is not None:
            _check_sheet(option, path, names, force)
    if not no_metadata:
        _check_room(names, request)
    report = Report(quiet, as_json)
    given = {name: Path(file) for name in ("image", "mask") if (file := getattr(request, name)) is not None}
    opened = _opened(given, report)
    if str(request.seed) != seed.strip():
        report.note(f"seed {request.seed}")
    if request.image is None and request.strength != DEFAULT.strength:
        report.note("--strength has no effect without --image")
    pipe = load(load_options, report, threads)
    if pipe.name == SHIPPED:
        _check_words(request.prompt, report)
    pictures, interrupted = _draw(pipe, requests, opened, names, report, batch_size, not no_metadata)
    if contact_sheet is not None and pictures:
        from sdlite.images.files import save_picture
        from sdlite.images.sheet import contact_sheet as sheet_of

        labels = [f"seed {request.seed}" for request in requests]
        save_picture(sheet_of(pictures, labels), contact_sheet, force=force)
        report.path(contact_sheet, "contact_sheet")
    if attention is not None and pictures:
        from sdlite.images.files import save_picture
        from sdlite.inspect import attention_sheet, word_maps

        sources = {f"{name}s": [source] for name, source in opened.items()}
        with report.busy("drawing where the model looked"):
            heat = attention_sheet(*word_maps(pipe, request, **sources))
        save_picture(heat, attention, force=force)
        report.path(attention, "attention")
    report.event("done", images=len(pictures), interrupted=interrupted)
    raise typer.Exit(INTERRUPTED if interrupted else 0)


@app.command(
    epilog=examples("sdlite regen star.png", "sdlite regen star.png --set steps=50 --set solver=euler -o better.png")
)
@options
def regen(
    picture: Annotated[
        Path,
        typer.Argument(
            metavar="IMAGE", callback=checked(check_there), help="An image that sdlite or Automatic1111 drew."
        ),
    ],
    load_options: LoadOptions,
    changes: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a setting, e.g. steps=50.")
    ] = None,
    output: Output = None,
    threads: Threads = None,
    anyway: Annotated[
        bool, typer.Option("--anyway", help="Draw even if the model or a source image is not the recorded one.")
    ] = False,
    no_metadata: NoMetadata = False,
    force: Force = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Draw an image again from its metadata.

    --set takes any field of the request (`sdlite info IMAGE` lists them); "none" clears width, height, image or mask.
    An image that was started from another one needs that one again: --set image=FILE. Its pixels are compared with the
    record.
    """
    changed = dict(_pair(change) for change in changes or ())
    given = {name: Path(path) for name, path in changed.items() if name in ("image", "mask") and path is not None}
    for path in given.values():
        check_there(path)
    names, report = Names(output, 1, force), Report(quiet, as_json)
    sources = _opened(given, report)
    from sdlite.images.files import open_picture, read_any_metadata
    from sdlite.images.pixels import largest_difference

    recipe, notes = read_any_metadata(picture)
    request = _regenerated(picture, recipe, changed, sources, anyway)
    for note in notes:
        report.note(note)
    if (changed.get("seed") or "").strip().lower() in RANDOM:
        report.note(f"seed {request.seed}")
    pipe = load(load_options.replace(prediction=load_options.prediction or recipe.prediction), report, threads)
    ours = recipe.prediction is not None
    if not ours and load_options.model is None and recipe.model:
        report.note(f"it was drawn by model {shown(recipe.model)!r}, which --model gives; now by {pipe.name!r}")
    if ours and pipe.model_hash != recipe.model_hash and not anyway:
        raise ValueError(
            f"{picture} was drawn by model {shown(recipe.model)!r} ({recipe.model_hash[:10]}), not by {pipe.name!r} "
            f"({pipe.model_hash[:10]}); give the first with --model, or add --anyway"
        )
    pictures, interrupted = _draw(pipe, [request], sources, names, report, 1, not no_metadata)
    if ours and not set(changed) - {"image", "mask"}:
        difference = largest_difference(pictures[0], open_picture(picture))
        report.event("compared", largest_difference=difference)
        lossy = picture.suffix.lower() in (".jpg", ".jpeg")
        why = "which is rounding" if difference <= 1 else "from another device, --dtype, --prediction or version"
        hint = "as JPEG changes pixels" if lossy else why
        differs = f"differs from {picture} by up to {difference} of 255, {hint}; `sdlite info {picture}` says more"
        report.note(differs if difference else f"same as {picture}")
    report.event("done", images=1, interrupted=interrupted)
    raise typer.Exit(INTERRUPTED if interrupted else 0)


def _seed(text: str) -> int:
    """Reads a seed; the words in RANDOM draw one."""
    if text.strip().lower() in RANDOM:
        return secrets.randbelow(2**32)
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"--seed={text:.40} must be a whole number, or random") from None


def _check_words(prompt: str, report: Report) -> None:
    """Notes that the model knows no word of the prompt: none is in the names that it was trained on."""
    names = read_names(shipped_folder())
    if names and knows_none(prompt, names):
        report.note(
            f"{SHIPPED} was trained on {len(names)} names, none of which has a word of this prompt; the nearest in "
            f"spelling: {', '.join(nearest(prompt, names, SUGGESTED))}; `sdlite info {SHIPPED}` lists all"
        )


def _check_room(names: Names, request: Request) -> None:
    """Raises ValueError if a JPEG has no room for the prompts."""
    from sdlite.images.recipe import fits_jpeg

    lossy = [path for path in names.paths if path.suffix.lower() in (".jpg", ".jpeg")]
    if lossy and not fits_jpeg((request.prompt, request.negative_prompt)):
        raise ValueError(f"{lossy[0]}: a JPEG has no room for prompts of that length; write .png or add --no-metadata")


def _check_sheet(option: str, sheet: Path, names: Names, force: bool) -> None:
    if Names(str(sheet), 1, force).paths != [sheet]:
        raise ValueError(f"{option}={sheet} must be a file, e.g. {sheet / 'sheet.png'}")
    if sheet.absolute() in [path.absolute() for path in names.paths]:
        raise ValueError(f"{option}={sheet} is where a picture goes; give it another name")


def _opened(paths: dict[str, Path], report: Report) -> dict[str, "Image"]:
    """Opens image and mask. This loads PyTorch, which takes a while."""
    if not paths:
        return {}
    with report.busy(f"reading {', '.join(path.name for path in paths.values())}"):
        from sdlite.images.files import open_picture

        return {name: open_picture(path, for_mask=name == "mask") for name, path in paths.items()}


def _draw(
    pipe: "Pipeline",
    requests: Sequence[Request],
    sources: dict[str, "Image"],
    names: Names,
    report: Report,
    batch_size: int,
    with_metadata: bool,
) -> tuple[list["Image"], bool]:
    """Draws and saves batch by batch. Returns the images, and whether Ctrl-C ended it."""
    from sdlite.images.pixels import digest

    for remark in pipe.remarks(requests[0], sources.get("image"), sources.get("mask")):
        report.note(remark)
    digests = {name: digest(source) for name, source in sources.items()}
    requests = [pipe.resolve(request.replace(**digests), sources.get("image")) for request in requests]
    report.event(
        "start", model=pipe.name, model_hash=pipe.model_hash, images=len(requests), request=requests[0].model_dump()
    )
    pictures: list[Image] = []
    evaluations = pipe.num_evaluations(requests[0])
    bar = report.bar()
    task = bar.add_task("", total=evaluations * -(-len(requests) // batch_size))
    with Interrupts() as interrupts:
        for first in range(0, len(requests), batch_size):
            batch = requests[first : first + batch_size]
            bar.update(task, description=f"picture {first + 1}/{len(requests)}")
            given = {f"{name}s": [source] * len(batch) for name, source in sources.items()}
            with bar:  # gone while a path is printed
                for i, x_t in enumerate(pipe.sample_latents(batch, **given)):
                    latents = x_t
                    bar.advance(task)
                    report.event("step", image=first, step=i + 1, of=evaluations)
                bar.update(task, description=f"picture {first + 1}/{len(requests)}, decoding")
                drawn = pipe.decode(latents, batch, **given)
            for picture, request in zip(drawn, batch, strict=True):
                path = names.save(picture, len(pictures), request.seed, with_metadata)
                pictures.append(picture)
                report.path(path, seed=request.seed)
            if interrupts.asked:
                break
    return pictures, interrupts.asked


def _pair(change: str) -> tuple[str, str | None]:
    """Splits key=value; the value "none" clears a field that may be empty."""
    key, equals, value = change.partition("=")
    if not equals:
        raise ValueError(f"--set {change} must be KEY=VALUE, e.g. --set steps=50")
    clears = value == "none" and key in ("width", "height", "image", "mask")
    return key.strip().replace("-", "_"), None if clears else value


def _regenerated(
    picture: Path, recipe: "Recipe", changed: dict[str, str | None], sources: dict[str, "Image"], anyway: bool
) -> Request:
    """The recorded request with the changes; checks source images against their digests."""
    from sdlite.images.pixels import digest
    from sdlite.images.recipe import UNKNOWN_SOURCE

    for name in ("image", "mask"):
        recorded = getattr(recipe.request, name)
        if recorded is not None and name not in changed:
            known = "" if recorded == UNKNOWN_SOURCE else f" ({recorded[:17]})"
            raise ValueError(f"{picture} was drawn from another {name}{known}; give it with --set {name}=FILE")
        if recorded in (None, UNKNOWN_SOURCE) or name not in sources or anyway:
            continue
        if digest(sources[name]) != recorded:
            raise ValueError(f"--set {name}={changed[name]}: not the recorded one ({recorded[:17]}); or add --anyway")
    if (seed := changed.get("seed")) is not None:
        changed = changed | {"seed": str(_seed(seed))}
    return recipe.request.replace(**changed)
