"""Files of a batch's folder: read and appended to without following links, and one error for a full disk."""

import errno
import hashlib
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from sdlite.files import FULL, DiskFull

NO_LINKS = getattr(os, "O_NOFOLLOW", 0)  # Windows has none
NO_WAIT = getattr(os, "O_NONBLOCK", 0)  # a named pipe in a file's place would wait for its other end
MAX_FILE_BYTES = 128 * 1024 * 1024  # of an image: the largest that can be drawn has less, uncompressed
MAX_LIST_BYTES = 1024**3  # of a manifest: a million images take 250 MB
MAX_LINE_BYTES = 64 * 1024


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


def read_lines(path: Path) -> Iterator[bytes]:
    """The lines of a file that is no link, except those too long to be ours. Raises OSError."""
    with _opened(path, MAX_LIST_BYTES) as file:
        inside = False  # of a long line
        while line := file.readline(MAX_LINE_BYTES):
            if not inside and (line.endswith(b"\n") or len(line) < MAX_LINE_BYTES):
                yield line
            inside = not line.endswith(b"\n")


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
