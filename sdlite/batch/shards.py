"""WebDataset shards: the finished images of a batch in tar files, laid out as img2dataset does.

    00000.tar: 000000000.json, .png, .txt, 000000001.json, ...    00000_stats.json: count, and the tar's SHA-256

The stem of an image's three files is five digits for its shard and four for its place there, both from its index
(WebDataset calls it the key). The text is the prompt; the JSON holds the request, the row's other columns and the PNG's
SHA-256. The bytes of a shard follow from its images alone. A shard is replaced as a whole, and is on disk before its
images lose their own files: after a crash each image is in at least one place, and those in both are packed again.
"""

import hashlib
import json
import os
import re
import sys
import tarfile
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing, contextmanager
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

from sdlite.batch.manifest import MAX_FILE_BYTES, NO_LINKS, read_file, sha256
from sdlite.files import atomic_file, write_file

SHARD = 10_000  # images; four digits of a stem
MEMBERS = 3 * SHARD  # of a tar file
ODD = (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError)  # from odd JSON or headers
DAMAGED = (tarfile.TarError, EOFError, *ODD)
Row = dict[str, Any]  # the JSON of an image


def shard_of(index: int) -> int:
    return index // SHARD


def stem_of(index: int) -> str:
    return f"{shard_of(index):05}{index % SHARD:04}"


class Shards:
    """The tar files of a folder. Each is read once as long as it does not change. loose: images not packed yet."""

    def __init__(self, root: Path, loose: Path) -> None:
        self.root, self.loose = root, loose
        self._read: dict[Path, tuple[tuple[int, int], list[Row]]] = {}

    def paths(self) -> list[Path]:
        return sorted(path for path in self.root.glob("[0-9]" * 5 + ".tar") if not path.is_symlink())

    def path_of(self, index: int) -> Path:
        return self.root / f"{shard_of(index):05}.tar"

    def rows(self) -> dict[str, Row]:
        """The JSON of every packed image, by its stem. Raises ValueError for a damaged shard."""
        for path in self.paths():
            facts = path.stat()
            stamp = facts.st_mtime_ns, facts.st_size
            if path not in self._read or self._read[path][0] != stamp:
                self._read[path] = stamp, _rows(path)
        return {row["key"]: row for path in self.paths() for row in self._read[path][1]}

    def write(self, path: Path, rows: Iterable[Row]) -> None:
        """Packs loose images together with those that the shard holds already; these stay as they are.

        Raises ValueError for an image whose bytes are not those of its row.
        """
        held = {row["key"]: row for row in _rows(path)} if path.exists() else {}
        samples = sorted(({row["key"]: row for row in rows} | held).items())
        with atomic_file(path, force=True) as making, making.open("w+b") as file, closing(members(path)) as old:
            with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
                for stem, row in samples:
                    _add(tar, f"{stem}.json", (json.dumps(row) + "\n").encode())
                    _add(tar, f"{stem}.png", _packed_png(path, old, stem) if stem in held else self._loose_png(row))
                    _add(tar, f"{stem}.txt", row["prompt"].encode())
            stats = {"count": len(samples), "sha256": hash_of(file)}
        write_file(stats_of(path), (json.dumps(stats) + "\n").encode(), force=True)

    def _loose_png(self, row: Row) -> bytes:
        path = self.loose / row["file_name"]
        data = read_file(path)
        if sha256(data) != row["sha256"]:
            raise _damaged(path, self.root)
        return data

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Only one process packs at a time; the lock of a process that dies is free.

        Windows has no such lock: pack in one process there.
        """
        if sys.platform == "win32":
            yield
            return
        import fcntl

        handle = os.open(self.loose / ".lock", os.O_RDWR | os.O_CREAT | NO_LINKS, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield
        finally:
            os.close(handle)


def stats_of(path: Path) -> Path:
    return path.with_name(f"{path.stem}_stats.json")


def hash_of(file: BinaryIO) -> str:
    """SHA-256 of an open file, from its beginning."""
    file.seek(0)
    return hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]  # typeshed wants more of a file


def members(path: Path) -> Generator[tuple[str, Callable[[], bytes]], None, None]:
    """Name of each file in a shard, in order, and what reads it. Raises one of DAMAGED if the shard is damaged."""
    with tarfile.open(path, "r:") as tar:
        for number, member in enumerate(tar):
            if number >= MEMBERS or not member.isreg() or member.issparse() or member.size > MAX_FILE_BYTES:
                raise tarfile.ReadError("too many files, one too large, or no plain file")
            yield member.name, partial(_bytes, tar, member)


def _bytes(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    assert file is not None, "checked to be a plain file"
    return file.read()


def _rows(path: Path) -> list[Row]:
    try:
        rows = [json.loads(read()) for name, read in members(path) if name.endswith(".json")]
        texts = [row[name] for row in rows for name in ("key", "file_name", "sha256", "prompt")]
        if all(isinstance(text, str) for text in texts) and all(re.fullmatch("[0-9]{9}", row["key"]) for row in rows):
            return rows
    except DAMAGED:
        pass
    raise _damaged(path, path.parent)


def _damaged(path: Path, root: Path) -> ValueError:
    return ValueError(f"{path} is damaged; `sdlite batch --verify {root}` puts it aside")


def _packed_png(path: Path, old: Iterator[tuple[str, Callable[[], bytes]]], stem: str) -> bytes:
    """The PNG of a stem, read from what is left of a shard's members, which are sorted."""
    data = next((read() for name, read in old if name == f"{stem}.png"), None)
    if data is None:
        raise _damaged(path, path.parent)
    return data


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    """Adds a file without owner and time, so that the same images give the same shard."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, BytesIO(data))
