"""Archives of packages, read as untrusted files."""

import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

MAX_MEMBER_BYTES = 256 * 2**20  # of a file in an archive


@contextmanager
def opened(path: Path, package: str) -> Iterator[tarfile.TarFile]:
    """Opens a package's archive. Any fault in it, also one found inside the block, is a ValueError of one line."""
    try:
        with tarfile.open(path) as tar:
            yield tar
    except Exception as error:  # tar, gzip, JSON and what the contents lead to each raise their own
        raise ValueError(f"{path} {damaged(error)} {package}") from None


def damaged(error: Exception) -> str:
    """The middle of the sentence "PATH ... PACKAGE"."""
    said = " ".join(str(error).split()) or "it ends too early"
    return f"is damaged ({type(error).__name__}: {said:.100}), or is not"


def content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> Any:
    """A file in an archive, to read from."""
    file = tar.extractfile(member)
    if file is None or member.size > MAX_MEMBER_BYTES:
        raise ValueError(f"{member.name} is no file of up to {MAX_MEMBER_BYTES >> 20} MiB")
    return file
