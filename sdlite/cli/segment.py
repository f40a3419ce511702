"""`sdlite segment`: labels every pixel of an image; writes a mask, an overlay or a cutout."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sdlite.cli.app import INTERRUPTED, Force, Quiet, Threads, app, check_there, checked, examples
from sdlite.cli.output import Interrupts, Report, check_free, shown
from sdlite.cli.threads import use_threads
from sdlite.files import DiskFull, sweep, write_file

if TYPE_CHECKING:
    from PIL.Image import Image

SOME_FAILED = 1  # exit code
Task = Callable[["Image", Callable[[float], None]], "Image"]


@app.command(
    epilog=examples(
        "sdlite segment photo.jpg -m run/export -o mask.png",
        "sdlite segment photos/ -m run/export --cutout -o cut-out/",
    )
)
def segment(
    images: Annotated[
        list[Path],
        typer.Argument(
            metavar="IMAGE...",
            callback=checked(check_there),
            help="Images (PNG, JPEG, WebP, TIFF, BMP, ...) or folders of them.",
        ),
    ],
    model: Annotated[
        Path,
        typer.Option(
            "--model", "-m", callback=checked(check_there), help="Folder OUTPUT/export of `sdlite train segmentation`."
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="FILE.png, or a folder for NAME.png of each image. The values of a mask are class numbers.",
            show_default="mask.png for one image",
        ),
    ] = None,
    overlay: Annotated[bool, typer.Option("--overlay", help="Write the image with coloured classes instead.")] = False,
    cutout: Annotated[bool, typer.Option("--cutout", help="Write the image without its background instead.")] = False,
    threads: Threads = None,
    force: Force = False,
    quiet: Quiet = False,
) -> None:
    """Label every pixel of images with a network that was trained on masks.

    Images may have up to 128 megapixels and are labelled in tiles. If you give several images, those whose file is
    already in the output folder are skipped without --force, and an error in one does not stop the others. Ctrl-C
    finishes the current image. Exit codes: 0 all done, 1 some failed, 2 wrong input, 3 disk full, 130 interrupted.
    """
    if overlay and cutout:
        raise ValueError("--overlay and --cutout are two different pictures; give one of them")
    report = Report(quiet, as_json=False)
    with report.busy("loading"):
        pictures = list(_pictures(images))
    many = len(pictures) > 1 or images[0].is_dir()
    places = _places(pictures, output, many)
    check_free([place for _, place in places], force or many)
    sweep(places[0][1].parent)
    todo = [(picture, place) for picture, place in places if force or not (many and place.exists())]
    if len(todo) < len(places):
        report.note(f"{len(places) - len(todo)} of {len(places)} are there already; --force makes them again")
    with report.busy(f"loading {model}"):
        task = _task(model, overlay, cutout, threads)
    raise typer.Exit(_label(todo, task, force, report, many))


def _pictures(given: Sequence[Path]) -> Iterator[Path]:
    """The given pictures and those in given folders, found by suffix. Raises ValueError for a folder without any."""
    from PIL import Image

    from sdlite.segmentation.pixels import FORMATS

    Image.init()
    suffixes = {suffix for suffix, name in Image.EXTENSION.items() if name in FORMATS}
    for path in given:
        if not path.is_dir():
            yield path
            continue
        names = sorted(path.iterdir())
        found = [name for name in names if name.suffix.lower() in suffixes and not name.name.startswith(".")]
        if not found:
            raise ValueError(f"{path} holds no picture, of {len(names)} names; pictures end in .png, .jpg, .tif, ...")
        yield from found


def _places(pictures: Sequence[Path], output: Path | None, many: bool) -> list[tuple[Path, Path]]:
    """Pairs each picture with its output file. Raises ValueError for two equal outputs or one that is an input."""
    if many and output is None:
        raise ValueError("several pictures need a folder; give one with --output")
    path = Path("mask.png") if output is None else output
    if not many and path.suffix and not path.is_dir():
        if path.suffix.lower() != ".png":
            raise ValueError(f"{path} must end in .png: other formats change a mask's values")
        places = [(pictures[0], path)]
    else:
        places = [(picture, path / f"{picture.stem}.png") for picture in pictures]
    taken: dict[Path, Path] = {picture.absolute(): picture for picture in pictures}
    for picture, place in places:
        if (
            other := taken.setdefault(place.absolute(), picture)
        ) is not picture or place.absolute() == picture.absolute():
            raise ValueError(f"{place} would be made of {picture} and is also of {other}; give another folder or name")
    return places


def _task(model: Path, overlay: bool, cutout: bool, threads: int | None) -> Task:
    from sdlite.segmentation.pixels import cutout as cut, overlay as laid_over
    from sdlite.segmentation.segmenter import Segmenter

    use_threads(threads)
    segmenter = Segmenter.load(model)

    def made(picture: "Image", progress: Callable[[float], None]) -> "Image":
        mask = segmenter(picture, progress)
        return cut(picture, mask) if cutout else laid_over(picture, mask) if overlay else mask

    return made


def _label(todo: Sequence[tuple[Path, Path]], task: Task, force: bool, report: Report, many: bool) -> int:
    """Makes each file; if there are several, one failure does not stop the others. Returns the exit code."""
    from sdlite.request import reason

    failed = 0
    with Interrupts() as interrupts:
        for number, (picture, place) in enumerate(todo, 1):
            bar = report.bar()
            progress = _progress(bar, f"{number}/{len(todo)} {shown(picture.name)}")
            try:
                with bar:  # gone while a path is printed
                    _make(picture, place, task, force, report, progress)
                report.path(place)
            except Exception as error:
                if not many or isinstance(error, DiskFull):
                    raise
                failed += 1
                why = reason(error)
                typer.echo(f"sdlite: error: {shown(why if str(picture) in why else f'{picture}: {why}')}", err=True)
            if interrupts.asked:
                return INTERRUPTED
    if failed:
        report.note(f"{failed} of {len(todo)} failed")
    return SOME_FAILED if failed else 0


def _progress(bar: Any, name: str) -> Callable[[float], None]:
    line = bar.add_task(name, total=1.0)
    return lambda done: bar.update(line, completed=done)


def _make(
    picture: Path, place: Path, task: Task, force: bool, report: Report, progress: Callable[[float], None]
) -> None:
    from sdlite.images.files import decoded, png_bytes
    from sdlite.segmentation.pixels import FORMATS, MAX_PIXELS

    image = decoded(picture, FORMATS, MAX_PIXELS)
    if "pages" in image.info:
        report.note(f"{picture} has several pages; the first is labelled")
    result = task(image, progress)
    write_file(place, png_bytes(result, with_metadata=False), force=force)
