"""Files of a batch's folder, read and appended to without following links, and the manifest of its images.

    .manifest-HOST-WORKER.jsonl: {"file_name": ..., "key": ..., "sha256": ..., "seconds": ..., "crc32": ...}

The manifest has a line for each saved image, appended by the process that saved it. It is an index and may be lost. Its
lines are untrusted: a line that a crash tore, or that another program wrote, is left out.
"""

import errno
import hashlib
import json
import os
import stat
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from sdlite.config import Record
from sdlite.files import FULL, HOST, DiskFull, parse_json

NO_LINKS = getattr(os, "O_NOFOLLOW", 0)  # Windows has none
NO_WAIT = getattr(os, "O_NONBLOCK", 0)  # a named pipe in a file's place would wait for its other end
MAX_FILE_BYTES = 128 * 1024 * 1024  # of an image: the largest that can be drawn has less, uncompressed
MAX_LIST_BYTES = 1024**3  # of a manifest: a million images take 250 MB
MAX_LINE_BYTES = 64 * 1024


class Entry(Record):
    """What the manifest says of an image. key: the item's sample key. seconds: of computing, its share of the batch."""

    file_name: str
    key: str
    sha256: str
    seconds: float


class Manifest:
    """The manifests of a folder. worker: tells apart the processes of one machine; each writes its own."""

    def __init__(self, folder: Path, worker: str) -> None:
        self.folder = folder
        self._own = folder / f".manifest-{HOST}-{worker}.jsonl"

    def add(self, entry: Entry) -> None:
        """One write. The newline in front ends a line that a crash may have torn."""
        row = json.dumps(entry.model_dump())
        append(self._own, f'\n{row[:-1]}, "crc32": "{_crc32(row)}"}}\n'.encode())

    def entries(self) -> dict[str, Entry]:
        """Every image that any of the manifests lists, by file name."""
        found = {}
        for row in (row for path in sorted(self.folder.glob(".manifest-*.jsonl")) for row in read_rows(path)):
            if row.pop("crc32", None) == _crc32(json.dumps(row)):
                with suppress(ValueError, TypeError):  # another program's fields
                    entry = Entry(**row)
                    found[entry.file_name] = entry
        return found


def _crc32(text: str) -> str:
    return f"{zlib.crc32(text.encode()):08x}"


def append(path: Path, line: bytes) -> None:
    """One write at the end of a file. Raises OSError if not all of it was taken."""
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | NO_LINKS | NO_WAIT, 0o666)
    try:
        if os.write(handle, line) < len(line):
            raise OSError(errno.ENOSPC, "the disk took half a line")
    finally:
        os.close(handle)


def read_file(path: Path, limit: int = MAX_FILE_BYTES) -> bytes:
    """The bytes of a file that is no link. Raises OSError, also if it is larger or not a file."""
    with _opened(path, limit) as file:
        return file.read()


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Objects of a JSON-lines file that is no link, none if there is no file. Raises OSError.

    Lines that hold anything else, or are too long to be ours, are left out.
    """
    if not path.exists():
        return
    with _opened(path, MAX_LIST_BYTES) as file:
        inside = False  # of a long line
        while line := file.readline(MAX_LINE_BYTES):
            ended, row = line.endswith(b"\n"), None
            if not inside and (ended or len(line) < MAX_LINE_BYTES):
                with suppress(ValueError):
                    row = parse_json(line)
            if isinstance(row, dict):
                yield row
            inside = not ended


def _opened(path: Path, limit: int) -> BinaryIO:
    handle = os.open(path, os.O_RDONLY | NO_LINKS | NO_WAIT)
    facts = os.fstat(handle)
    if not stat.S_ISREG(facts.st_mode) or facts.st_size > limit:
        os.close(handle)
        fault = f"is larger than {limit >> 20} MiB" if stat.S_ISREG(facts.st_mode) else "is not a file"
        raise OSError(errno.EINVAL, fault, str(path))
    return os.fdopen(handle, "rb")


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@contextmanager
def guarded(root: Path) -> Iterator[None]:
    """Turns the system's errors for a full or read-only disk into DiskFull."""
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        why = f"{root}: {os.strerror(error.errno)}; finished images are kept: make space and run the same command again"
        raise DiskFull(error.errno, why) from None
