"""`sdlite generate`: from flags to requests, images and files."""

import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sdlite.checkpoints.concepts import knows_none, nearest, read_names
from sdlite.checkpoints.places import SHIPPED, shipped_folder
from sdlite.cli.app import INTERRUPTED, Threads, app, examples, load
from sdlite.cli.flags import Flags, options
from sdlite.cli.output import Names, Report, SaveOptions
from sdlite.config import LoadOptions
from sdlite.request import Request
from sdlite.training.stop import Stop

if TYPE_CHECKING:
    from PIL.Image import Image

    from sdlite.images.pixels import Opened
    from sdlite.pipeline import Pipeline

SUGGESTED = 3  # names, for a prompt that the shipped model does not know
MAX_IMAGES = 10_000  # of one command; beyond that a batch file is the better record
RANDOM = ("random", "-1")  # as a seed; the second is Automatic1111's word for it
DEFAULT = Request(prompt="")
Sources = Mapping[str, "Opened"]  # "image" and "mask", as far as there are any


@app.command(
    epilog=examples(
        'sdlite generate "a red apple" -s 7 --num-images 4 -o apples/',
        'sdlite generate "a dog face" --image sketch.png --strength 0.6 -o dog.png',
    )
)
@options
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
    request = request.replace(seed=read_seed(seed))
    requests = [request.replace(seed=request.seed + i) for i in range(num_images)]
    names = Names(save_options, num_images)
    for option, path in (("--contact-sheet", contact_sheet), ("--attention", attention)):
        _check_sheet(option, path, names)
    names.check_room(request)
    sources = open_sources({"image": request.image, "mask": request.mask}, report)
    if str(request.seed) != seed.strip():
        report.note(f"seed {request.seed}")
    if request.image is None and request.strength != DEFAULT.strength:
        report.note("--strength has no effect without --image")
    pipe = load(load_options, report, threads)
    if pipe.name == SHIPPED:
        _note_unknown_words(request.prompt, report)
    images, interrupted = draw(pipe, requests, sources, names, report, batch_size)
    if contact_sheet is not None and images:
        from sdlite.images.sheet import contact_sheet as sheet_of

        labels = [f"seed {each.seed}" for each in requests]
        _save_sheet(sheet_of(images, labels), contact_sheet, "contact_sheet", names, report)
    if attention is not None and images:
        from sdlite.inspect import attention_sheet, word_maps

        with report.busy("drawing where the model looked"):
            heat = attention_sheet(*word_maps(pipe, request, **_columns(sources, 1)))
        _save_sheet(heat, attention, "attention", names, report)
    end(report, len(images), interrupted)


def read_seed(text: str) -> int:
    """Reads a seed; the words in RANDOM draw one."""
    if text.strip().lower() in RANDOM:
        return secrets.randbelow(2**32)
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"--seed={text:.40} must be a whole number, or random") from None


def open_sources(files: Mapping[str, str | Path | None], report: Report) -> Sources:
    """Opens the "image" and "mask" that are given. This loads PyTorch, which takes a while."""
    paths = {name: Path(file) for name, file in files.items() if file is not None}
    if not paths:
        return {}
    with report.busy(f"reading {', '.join(path.name for path in paths.values())}"):
        from sdlite.pipeline.job import opened

        return {name: opened(path, for_mask=name == "mask") for name, path in paths.items()}


def draw(
    pipe: "Pipeline",
    requests: Sequence[Request],
    sources: Sources,
    names: Names,
    report: Report,
    batch_size: int = 1,
) -> tuple[list["Image"], bool]:
    """Draws and saves the images of requests that share a batch. Returns them, and whether Ctrl-C ended it."""
    from sdlite.pipeline import Finished

    jobs = pipe.jobs(requests, **_columns(sources, len(requests)))
    for remark in jobs[0].remarks:
        report.note(remark)
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
            decoding = ", decoding" if event.step == event.of else ""
            text = f"image {event.batch[0] + 1}/{len(jobs)}{decoding}"
            bar.update(task, description=text, completed=event.done, total=event.total)
            if event.step:
                report.event("step", image=event.batch[0], step=event.step, of=event.of)
    return images, stop.asked


def end(report: Report, images: int, interrupted: bool) -> None:
    """Ends the command with its last event and its exit code."""
    report.event("done", images=images, interrupted=interrupted)
    raise typer.Exit(INTERRUPTED if interrupted else 0)


def _columns(sources: Sources, count: int) -> dict[str, list["Opened"]]:
    """Keywords for `Pipeline.jobs`: each source for all of count requests."""
    return {f"{name}s": [source] * count for name, source in sources.items()}


def _note_unknown_words(prompt: str, report: Report) -> None:
    """Notes that the model knows no word of the prompt: none is in the names that it was trained on."""
    names = read_names(shipped_folder())
    if names and knows_none(prompt, names):
        report.note(
            f"{SHIPPED} was trained on {len(names)} names, none of which has a word of this prompt; the nearest in "
            f"spelling: {', '.join(nearest(prompt, names, SUGGESTED))}; `sdlite info {SHIPPED}` lists all"
        )


def _check_sheet(option: str, sheet: Path | None, names: Names) -> None:
    """Raises in one line if the sheet cannot be written, or takes the place of an image."""
    if sheet is None:
        return
    if Names(names.options.replace(output=str(sheet)), 1).paths != [sheet]:
        raise ValueError(f"{option}={sheet} must be a file, e.g. {sheet / 'sheet.png'}")
    if sheet.absolute() in [path.absolute() for path in names.paths]:
        raise ValueError(f"{option}={sheet} is where an image goes; give it another name")


def _save_sheet(sheet: "Image", path: Path, event: str, names: Names, report: Report) -> None:
    from sdlite.images.files import save_picture

    save_picture(sheet, path, force=names.options.force)
    report.path(path, event)
