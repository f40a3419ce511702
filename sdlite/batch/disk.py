"""What a batch does to a disk beside writing whole files: reads and appends without following links, one error when
the disk takes no more.
"""

import errno
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sdlite.files import FULL, DiskFull as DiskFull

NO_LINKS = getattr(os, "O_NOFOLLOW", 0)  # Windows has none


def append(path: Path, line: bytes) -> None:
    """One write at the end of a file. Raises OSError if not all of it was taken."""
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | NO_LINKS, 0o666)
    try:
        if os.write(handle, line) < len(line):
            raise OSError(errno.ENOSPC, "the disk took half a line")
    finally:
        os.close(handle)


def read_file(path: Path) -> bytes:
    """The bytes of a file that is no link. Raises OSError."""
    with os.fdopen(os.open(path, os.O_RDONLY | NO_LINKS), "rb") as file:
        return file.read()


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@contextmanager
def guarded(root: Path) -> Iterator[None]:
    """Turns the system's errors for a disk that takes no more into DiskFull."""
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        why = f"{root}: {os.strerror(error.errno)}; what is done stays done: make space and give the same command again"
        raise DiskFull(error.errno, why) from None
