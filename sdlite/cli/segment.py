"""`sdlite segment`: labels every pixel of images; writes masks, overlays or cutouts."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated

import typer

from sdlite.cli.app import INTERRUPTED, SOME_FAILED, Force, Threads, command
from sdlite.cli.flags import check_there, checked
from sdlite.cli.output import Report, check_free, shown
from sdlite.cli.threads import use_threads
from sdlite.files import DiskFull, sweep, write_file
from sdlite.request import reason
from sdlite.training.stop import Stop

Make = Callable[[Path, Callable[[float], None]], bytes]


@command(
    "sdlite segment photo.jpg -m run/export -o mask.png", "sdlite segment photos/ -m run/export --cutout -o cut-out/"
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
    *,
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
    report: Report,
) -> None:
    """Label every pixel of images with a network that was trained on masks.

    Images may have up to 128 megapixels and are labelled in tiles. If you give several images, those whose file is
    already in the output folder are skipped without --force, and an error in one does not stop the others. Ctrl-C
    finishes the current image. Exit codes: 0 all done, 1 some failed, 2 wrong input, 3 disk full, 130 interrupted.
    """
    if overlay and cutout:
        raise ValueError("--overlay and --cutout write different images; give one")
    with report.busy("loading"):
        sources = list(_sources(images))
    many = len(sources) > 1 or images[0].is_dir()
    places = _places(sources, output, many)
    check_free([place for _, place in places], force or many)
    sweep(places[0][1].parent)
    todo = [(source, place) for source, place in places if force or not (many and place.exists())]
    if len(todo) < len(places):
        report.note(f"{len(places) - len(todo)} of {len(places)} are there already; --force makes them again")
    with report.busy(f"loading {model}"):
        use_threads(threads)
        make = _maker(model, overlay, cutout, report)
    raise typer.Exit(_label(todo, make, force, report, many))


def _sources(given: Sequence[Path]) -> Iterator[Path]:
    """The given images and those in given folders, found by suffix. Raises ValueError for a folder without any."""
    from PIL import Image

    from sdlite.segmentation.pixels import FORMATS

    Image.init()
    suffixes = {suffix for suffix, name in Image.EXTENSION.items() if name in FORMATS}
    for path in given:
        names = sorted(path.iterdir()) if path.is_dir() else []
        found = [name for name in names if name.suffix.lower() in suffixes and not name.name.startswith(".")]
        if path.is_dir() and not found:
            raise ValueError(f"{path} holds {len(names)} names and no image; images end in .png, .jpg, .tif, ...")
        yield from found or [path]


def _places(sources: Sequence[Path], output: Path | None, many: bool) -> list[tuple[Path, Path]]:
    """Pairs each image with its output file. Raises ValueError for two equal outputs or one that is an input."""
    if many and output is None:
        raise ValueError("several images need a folder; give one with --output")
    path = Path("mask.png") if output is None else output
    if many or not path.suffix or path.is_dir():
        places = [(source, path / f"{source.stem}.png") for source in sources]
    elif path.suffix.lower() == ".png":
        places = [(sources[0], path)]
    else:
        raise ValueError(f"{path} must end in .png: other formats change a mask's values")
    taken = {source.absolute(): source for source in sources}
    for source, place in places:
        other = taken.setdefault(place.absolute(), source)
        if other is not source or place.absolute() == source.absolute():
            raise ValueError(f"{place} would be made of {source} and is also of {other}; give another folder or name")
    return places


def _maker(model: Path, overlay: bool, cutout: bool, report: Report) -> Make:
    """What makes the PNG of an image file; it reports its progress from 0 to 1."""
    from sdlite.images.files import decoded, png_bytes
    from sdlite.segmentation import pixels
    from sdlite.segmentation.segmenter import Segmenter

    segmenter = Segmenter.load(model)

    def make(source: Path, progress: Callable[[float], None]) -> bytes:
        image = decoded(source, pixels.FORMATS, pixels.MAX_PIXELS)
        if "pages" in image.info:
            report.note(f"{source} has several pages; the first is labelled")
        mask = segmenter(image, progress)
        result = pixels.cutout(image, mask) if cutout else pixels.overlay(image, mask) if overlay else mask
        return png_bytes(result, with_metadata=False)

    return make


def _label(todo: Sequence[tuple[Path, Path]], make: Make, force: bool, report: Report, many: bool) -> int:
    """Makes each file; if there are several, one failure does not stop the others. Returns the exit code."""
    bar, failed = report.bar(), 0
    line = bar.add_task("", total=1.0)
    with Stop("sdlite: finishing the current image") as stop:
        for number, (source, place) in enumerate(todo, 1):
            bar.reset(line, description=f"{number}/{len(todo)} {shown(source.name)}")
            try:
                with bar:  # gone while a path is printed
                    write_file(place, make(source, lambda done: bar.update(line, completed=done)), force=force)
                report.path(place)
            except Exception as error:
                if not many or isinstance(error, DiskFull):
                    raise
                failed += 1
                why = reason(error)
                report.failed(why if str(source) in why else f"{source}: {why}", path=str(source))
            if stop.asked:
                return INTERRUPTED
    if failed:
        report.note(f"{failed} of {len(todo)} failed")
    return SOME_FAILED if failed else 0
