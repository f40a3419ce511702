"""`sdlite generate` draws images from a prompt; `sdlite regen` draws one again from the metadata in its file."""

import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sdlite.checkpoints.concepts import knows_none, nearest, read_names
from sdlite.checkpoints.places import SHIPPED, shipped_folder
from sdlite.cli.app import INTERRUPTED, Threads, command, load
from sdlite.cli.flags import Flags, check_there, checked
from sdlite.cli.output import LOSSY, Names, Report, SaveOptions, check_free, file_named, shown
from sdlite.config import LoadOptions
from sdlite.request import Request
from sdlite.training.stop import Stop

if TYPE_CHECKING:
    from PIL.Image import Image

    from sdlite.images.pixels import Opened
    from sdlite.images.recipe import Recipe
    from sdlite.pipeline import Pipeline

SUGGESTED = 3  # names, for a prompt that the shipped model does not know
MAX_IMAGES = 10_000  # of one command; beyond that a batch file is the better record
RANDOM = ("random", "-1")  # as a seed; the second is Automatic1111's word for it
DRAWN_BY = "An image that sdlite or Automatic1111 drew."
DEFAULT = Request(prompt="")
Sources = Mapping[str, "Opened"]  # "image" and "mask", as far as there are any
Changes = Mapping[str, str | None]


@command(
    'sdlite generate "a red apple" -s 7 --num-images 4 -o apples/',
    'sdlite generate "a dog face" --image sketch.png --strength 0.6 -o dog.png',
)
def generate(
    request: Annotated[Request, Flags(without=("seed",))],
    *,
    seed: Annotated[
        str, typer.Option("--seed", "-s", help="Seed of the first image; the others count up. random or -1 picks one.")
    ] = str(DEFAULT.seed),
    num_images: Annotated[int, typer.Option(min=1, max=MAX_IMAGES, help="Number of images.")] = 1,
    batch_size: Annotated[
        int, typer.Option("--batch-size", "-b", min=1, max=64, help="Images drawn at the same time.")
    ] = 1,
    save_options: SaveOptions,
    contact_sheet: Annotated[Path | None, typer.Option(help="Also write all images into this one PNG.")] = None,
    attention: Annotated[
        Path | None, typer.Option(help="Also write a PNG that shows where the model looked for each word.")
    ] = None,
    load_options: LoadOptions,
    threads: Threads = None,
    report: Report,
) -> None:
    """Draw images from a prompt.

    Prints the path of each image. Without -o the files are 000000-SEED.png, 000001-SEED.png, ... in this folder. With
    -o FOLDER they have the same names in that folder. With -o NAME.png (or .jpg, .webp) and --num-images above 1 they
    are NAME-1.png, NAME-2.png, ... No file is replaced without --force. Ctrl-C finishes the current image; a second one
    stops at once.
    """
    request = request.replace(seed=_read_seed(seed, report))
    requests = [request.replace(seed=request.seed + i) for i in range(num_images)]
    names = Names(save_options, num_images)
    _check_sheets({"--contact-sheet": contact_sheet, "--attention": attention}, names)
    names.check_room(request)
    sources = _open_sources({"image": request.image, "mask": request.mask}, report)
    if request.image is None and request.strength != DEFAULT.strength:
        report.note("--strength has no effect without --image")
    pipe = load(load_options, report, threads)
    if pipe.name == SHIPPED:
        _note_unknown_words(request.prompt, report)
    images, interrupted = _draw(pipe, requests, sources, names, report, batch_size)
    if contact_sheet is not None and images:
        from sdlite.images.sheet import contact_sheet as sheet_of

        sheet = sheet_of(images, [f"seed {each.seed}" for each in requests])
        _save_sheet(sheet, contact_sheet, "contact_sheet", names, report)
    if attention is not None and images:
        from sdlite.inspect import attention_sheet, word_maps

        with report.busy("drawing where the model looked"):
            columns = {f"{name}s": [source] for name, source in sources.items()}
            sheet = attention_sheet(*word_maps(pipe, request, **columns))
        _save_sheet(sheet, attention, "attention", names, report)
    report.event("done", images=len(images), interrupted=interrupted)
    raise typer.Exit(INTERRUPTED if interrupted else 0)


@command("sdlite regen star.png", "sdlite regen star.png --set steps=50 --set solver=euler -o better.png")
def regen(
    path: Annotated[Path, typer.Argument(metavar="IMAGE", callback=checked(check_there), help=DRAWN_BY)],
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
    sources = _open_sources(files, report)
    from sdlite.images.files import read_any_metadata

    recipe, notes = read_any_metadata(path)
    _check_sources(path, recipe.request, changed, sources, anyway)
    if (seed := changed.get("seed")) is not None:
        changed["seed"] = str(_read_seed(seed, report))
    request = recipe.request.replace(**changed)
    report.note(*notes)
    pipe = load(load_options.replace(prediction=load_options.prediction or recipe.prediction), report, threads)
    ours = recipe.prediction is not None  # Automatic1111 does not record it
    if ours and not anyway:
        _check_model(path, recipe, pipe)
    elif not ours and load_options.model is None and recipe.model:
        report.note(f"it was drawn by model {shown(recipe.model)!r}, which --model gives; now by {pipe.name!r}")
    images, interrupted = _draw(pipe, [request], sources, names, report)
    if images and ours and not set(changed) - {"image", "mask"}:
        _compare(images[0], path, report)
    report.event("done", images=len(images), interrupted=interrupted)
    raise typer.Exit(INTERRUPTED if interrupted else 0)


def _read_seed(text: str, report: Report) -> int:
    if text.strip().lower() in RANDOM:
        seed = secrets.randbelow(2**32)
        report.note(f"seed {seed}")
        return seed
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"--seed={text:.40} must be a whole number, or random") from None


def _open_sources(files: Mapping[str, str | Path | None], report: Report) -> Sources:
    """Opens the "image" and "mask" that are given. This loads PyTorch, which takes a while."""
    paths = {name: Path(file) for name, file in files.items() if file is not None}
    if not paths:
        return {}
    with report.busy(f"reading {', '.join(path.name for path in paths.values())}"):
        from sdlite.pipeline.job import opened

        return {name: opened(path, for_mask=name == "mask") for name, path in paths.items()}


def _draw(
    pipe: "Pipeline", requests: Sequence[Request], sources: Sources, names: Names, report: Report, batch_size: int = 1
) -> tuple[list["Image"], bool]:
    """Draws and saves the images of requests that share a batch. Returns them, and whether Ctrl-C ended it."""
    from sdlite.pipeline import Finished

    jobs = pipe.jobs(requests, **{f"{name}s": [source] * len(requests) for name, source in sources.items()})
    report.note(*jobs[0].remarks)
    first = jobs[0].request.model_dump()
    report.event("start", model=pipe.name, model_hash=pipe.model_hash, images=len(jobs), request=first)
    images: list[Image] = []
    bar = report.bar()
    task = bar.add_task("")
    with Stop("sdlite: finishing the current image") as stop:
        for event in pipe.draw(jobs, batch_size):
            if isinstance(event, Finished):
                bar.stop()  # gone while a path is printed
                seed = jobs[event.index].request.seed
                report.path(names.save(event.picture, len(images), seed), seed=seed)
                images.append(event.picture)
                continue
            if event.step == 0 and stop.asked:
                break
            bar.start()
            text = f"image {event.batch[0] + 1}/{len(jobs)}" + (", decoding" if event.step == event.of else "")
            bar.update(task, description=text, completed=event.done, total=event.total)
            if event.step:
                report.event("step", image=event.batch[0], step=event.step, of=event.of)
    return images, stop.asked


def _note_unknown_words(prompt: str, report: Report) -> None:
    names = read_names(shipped_folder())
    if names and knows_none(prompt, names):
        near = ", ".join(nearest(prompt, names, SUGGESTED))
        fact = f"{SHIPPED} was trained on {len(names)} names, none of which has a word of this prompt"
        report.note(f"{fact}; the nearest in spelling: {near}; `sdlite info {SHIPPED}` lists all")


def _check_sheets(sheets: Mapping[str, Path | None], names: Names) -> None:
    """Raises in one line if a sheet cannot be written, or takes the place of an image."""
    for option, sheet in sheets.items():
        if sheet is None:
            continue
        if file_named(sheet) is None:
            raise ValueError(f"{option}={sheet} must be a file, e.g. {sheet / 'sheet.png'}")
        check_free([sheet], names.options.force)
        if sheet.absolute() in [path.absolute() for path in names.paths]:
            raise ValueError(f"{option}={sheet} is also the name of an image of this run; choose another name")


def _save_sheet(sheet: "Image", path: Path, event: str, names: Names, report: Report) -> None:
    from sdlite.images.files import save_picture

    save_picture(sheet, path, force=names.options.force)
    report.path(path, event)


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
        first, ours = f"{shown(recipe.model)!r} ({recipe.model_hash[:10]})", f"{pipe.name!r} ({pipe.model_hash[:10]})"
        rule = "give the first with --model, or add --anyway"
        raise ValueError(f"{path} was drawn by model {first}, not by {ours}; {rule}")


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
    cause = "as JPEG changes pixels" if path.suffix.lower() in LOSSY else cause
    report.note(f"differs from {path} by up to {difference} of 255, {cause}; `sdlite info {path}` says more")
