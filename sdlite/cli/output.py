"""The output of a run: file names, events, notes and the progress bar."""

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
from pydantic import Field

from sdlite.config import UNTRAINED_NOTE, Record
from sdlite.files import check_file, checksum, sweep
from sdlite.images.recipe import SUFFIXES, fits_jpeg
from sdlite.request import Request

if TYPE_CHECKING:
    from PIL.Image import Image

LOSSY = [suffix for suffix, kind in SUFFIXES.items() if kind == "JPEG"]  # changes pixels, has little room for texts
# What would drive the terminal that shows a foreign file's text, or turn the order of its letters.
CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def shown(text: str) -> str:
    """The text without characters that move a terminal's cursor or change its colours."""
    return CONTROL.sub("\N{REPLACEMENT CHARACTER}", text)


def file_named(output: str | Path) -> Path | None:
    """The image file that an output names, None for a folder. Raises ValueError for a file of another kind."""
    path = Path(output)
    if path.is_dir() or (not path.suffix and not path.is_file()) or str(output).endswith(("/", os.sep)):
        return None
    if path.suffix.lower() not in SUFFIXES:
        suffixes = ", ".join(SUFFIXES)
        raise ValueError(
            f"--output={output}: images are written as {suffixes}; use {output}.png, or {output}/ for a folder"
        )
    return path


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
    """Where images go."""

    output: str | None = Field(None, description="FILE.png or a folder.")
    force: bool = Field(False, description="Replace existing files.")
    metadata: bool = Field(True, description="Write prompt and settings into the image file.")


class Names:
    """The files of a run. They are checked before anything is drawn; nothing is created before the first save.

    paths: of the images; empty for a folder, which numbers them.
    """

    def __init__(self, options: SaveOptions, count: int) -> None:
        output = options.output
        if output == "":
            raise ValueError("--output is empty; give FILE.png or a folder, or leave it out")
        self.options, file = options, None if output is None else file_named(output)
        if file is None:
            self.folder, self.paths = Path(output or "."), []
            check_writable(self.folder.absolute())
        else:
            many = [file.with_name(f"{file.stem}-{i + 1}{file.suffix}") for i in range(count)]
            self.folder, self.paths = file.parent, [file] if count == 1 else many
            check_free(self.paths, options.force)

    def check_room(self, request: Request) -> None:
        """Raises ValueError if a JPEG has no room for the prompts."""
        lossy = self.options.metadata and self.paths and self.paths[0].suffix.lower() in LOSSY
        if lossy and not fits_jpeg((request.prompt, request.negative_prompt)):
            rule = "a JPEG has no room for prompts of that length"
            raise ValueError(f"{self.paths[0]}: {rule}; write .png or add --no-metadata")

    def save(self, picture: "Image", index: int, seed: int) -> Path:
        """Writes image number `index` of the run and returns its path."""
        from sdlite.images.files import save_numbered, save_picture

        if index == 0:
            sweep(self.folder)
        options = self.options
        if not self.paths:
            return save_numbered(picture, self.folder, seed, with_metadata=options.metadata)
        save_picture(picture, self.paths[index], force=options.force, with_metadata=options.metadata)
        return self.paths[index]


class Report(Record):
    """The messages of a run: paths or events on stdout, notes and a bar on stderr."""

    quiet: bool = Field(
        False, description="Show no progress bar and no notes, except the note that a model is untrained."
    )
    as_json: bool = Field(False, description="Print JSON on stdout instead of text: one object per line.")

    def note(self, *texts: str) -> None:
        for text in texts:
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
            self.event(event, path=str(path), **fields, sha256=checksum(path))
        else:
            typer.echo(path)

    def bar(self) -> Any:
        """A rich progress bar, invisible unless stderr is a terminal."""
        from rich.console import Console
        from rich.progress import Progress, TimeRemainingColumn

        hidden = self.quiet or self.as_json or not sys.stderr.isatty()
        columns = (*Progress.get_default_columns()[:-1], TimeRemainingColumn(elapsed_when_finished=True))
        return Progress(*columns, console=Console(stderr=True), transient=True, redirect_stdout=False, disable=hidden)

    @contextmanager
    def busy(self, what: str) -> Iterator[None]:
        """Shows a bar without percentage while the block runs, and removes it afterwards."""
        with self.bar() as bar:
            bar.add_task(shown(what), total=None)
            yield
