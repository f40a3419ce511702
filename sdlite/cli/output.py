"""The output of a run: file names, events, notes and the progress bar."""

import hashlib
import json
import os
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from sdlite.config import UNTRAINED_NOTE, Record
from sdlite.files import check_file, sweep
from sdlite.request import Request

if TYPE_CHECKING:
    from PIL.Image import Image

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")  # of images that are written
LOSSY = (".jpg", ".jpeg")  # these change pixels and have little room for metadata
# What would drive the terminal that shows a foreign file's text, or turn the order of its letters.
CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def shown(text: str) -> str:
    """The text without characters that move a terminal's cursor or change its colours."""
    return CONTROL.sub("\N{REPLACEMENT CHARACTER}", text)


def check_free(paths: Sequence[Path], force: bool) -> None:
    """Raises in one line if one of these files, all in one folder, or the folder may not be written."""
    for path in paths:
        check_file(path, force)
    check_writable(paths[0].absolute().parent)


def check_writable(folder: Path) -> None:
    """Raises in one line unless the folder, or its nearest existing parent, can be written."""
    nearest = next(place for place in (folder, *folder.parents) if place.exists())
    try:
        tempfile.TemporaryFile(dir=nearest).close()
    except OSError as error:
        raise ValueError(f"cannot write into {nearest}: {error.strerror}") from None


class SaveOptions(Record):
    """Where images go. output: a file or a folder."""

    output: str | None = None
    force: bool = False
    metadata: bool = True


class Names:
    """The files of a run. They are checked before anything is drawn; nothing is created before the first save."""

    def __init__(self, options: SaveOptions, count: int) -> None:
        output = options.output
        if output == "":
            raise ValueError("--output is empty; give FILE.png or a folder, or leave it out")
        path = Path("." if output is None else output)
        is_folder = path.is_dir() or (not path.suffix and not path.is_file()) or str(output).endswith(("/", os.sep))
        self.folder = path if is_folder else path.parent
        self.options = options
        self.paths: list[Path] = []
        if not is_folder:
            if path.suffix.lower() not in SUFFIXES:
                raise ValueError(
                    f"--output={output}: images are written as {', '.join(SUFFIXES)}; use {output}.png, or {output}/ "
                    "for a folder"
                )
            many = [path.with_name(f"{path.stem}-{i + 1}{path.suffix}") for i in range(count)]
            self.paths = [path] if count == 1 else many
        check_free(self.paths or [self.folder / "*"], options.force)

    def check_room(self, request: Request) -> None:
        """Raises ValueError if a JPEG has no room for the prompts."""
        from sdlite.images.recipe import fits_jpeg

        lossy = self.options.metadata and self.paths and self.paths[0].suffix.lower() in LOSSY
        if lossy and not fits_jpeg((request.prompt, request.negative_prompt)):
            raise ValueError(
                f"{self.paths[0]}: a JPEG has no room for prompts of that length; write .png or add --no-metadata"
            )

    def save(self, picture: "Image", index: int, seed: int) -> Path:
        """Writes image number `index` of the run and returns its path."""
        from sdlite.images.files import save_numbered, save_picture

        if index == 0:
            sweep(self.folder)
        if not self.paths:
            return save_numbered(picture, self.folder, seed, with_metadata=self.options.metadata)
        path, options = self.paths[index], self.options
        save_picture(picture, path, force=options.force, with_metadata=options.metadata)
        return path


class Report(Record):
    """The messages of a run: paths or events on stdout, notes and a bar on stderr."""

    quiet: bool = False
    as_json: bool = False

    def note(self, text: str) -> None:
        if not self.quiet or text == UNTRAINED_NOTE:  # or a typing error in --model would pass unseen
            typer.echo(f"sdlite: note: {shown(text)}", err=True)

    def failed(self, error: str, **fields: Any) -> None:
        """One of several things has failed; the run goes on."""
        self.event("failed", **fields, error=error)
        typer.echo(f"sdlite: error: {shown(error)}", err=True)

    def event(self, event: str, **fields: Any) -> None:
        if self.as_json:
            typer.echo(json.dumps({"event": event} | fields))

    def path(self, path: Path, event: str = "image", **fields: Any) -> None:
        if self.as_json:
            self.event(event, path=str(path), **fields, sha256=hashlib.sha256(path.read_bytes()).hexdigest())
        else:
            typer.echo(path)

    def bar(self) -> Any:
        """A rich progress bar, invisible unless stderr is a terminal."""
        from rich.console import Console
        from rich.progress import Progress, TimeRemainingColumn

        hidden = self.quiet or self.as_json or not sys.stderr.isatty()
        columns = (*Progress.get_default_columns()[:-1], TimeRemainingColumn(elapsed_when_finished=True))
        console = Console(stderr=True)
        return Progress(*columns, console=console, transient=True, redirect_stdout=False, disable=hidden)

    @contextmanager
    def busy(self, what: str) -> Iterator[None]:
        """Shows a bar without percentage while the block runs, and removes it afterwards."""
        bar = self.bar()
        bar.add_task(shown(what), total=None)
        with bar:
            yield
