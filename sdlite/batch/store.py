"""The output folder of a batch: pictures that are there whole or not at all, and an index that can be lost.

    temporary file -> fsync -> link to the final name -> fsync of the folder -> a line in the manifest

A picture is done when its final name exists; the name appears only once the bytes are on disk. Names are claimed by
link, so of two processes that draw the same picture the second finds it there, compares and drops its own. The manifest
(`.manifest-*.jsonl`: SHA-256 and seconds of each) is an index: a line that a crash tore is ignored, and a picture
without one is read back. No link inside the folder is followed; the folder itself may be one.
"""

import json
import os
import stat
import zlib
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from sdlite.batch.disk import append, guarded, read_file, read_lines, sha256
from sdlite.batch.plan import Item
from sdlite.batch.shards import Sample, Shards, key_of, shard_of
from sdlite.config import Record
from sdlite.files import HOST, sweep, write_file
from sdlite.images.files import read_metadata

RUN, INDEX, ERRORS, SHEET = "run.json", "metadata.jsonl", "errors.jsonl", "contact-sheet.png"
MAX_RUN_BYTES = 1024 * 1024
PICTURES = ".pictures"  # where they wait for their shard


class Entry(NamedTuple):
    """What the manifest says of a picture. seconds: of computing, its share of the batch."""

    key: str
    sha256: str
    seconds: float


class Listed(Record):
    """A line of a manifest, besides its checksum."""

    file_name: str
    key: str
    sha256: str
    seconds: float


class Failed(Record):
    """A line of errors.jsonl."""

    index: int
    key: str
    error: str


class Store:
    """Writes into one output folder, and is all that does.

    worker: tells apart the manifests of processes on one machine. exact: every process draws the same bytes,
    so that others in its place are a fault. packs: pictures lie in a hidden folder inside until their shard is whole.
    reached: called at each point of a commit, for tests that end the process there.
    """

    def __init__(
        self,
        root: Path,
        worker: str = "0",
        exact: bool = True,
        packs: bool = False,
        reached: Callable[[str], None] = lambda point: None,
    ) -> None:
        self.root = root
        self.pictures = root / PICTURES if packs else root
        self.shards = Shards(root) if packs else None
        self.exact = exact
        self.reached = reached
        self._manifest = self.pictures / f".manifest-{HOST}-{worker}.jsonl"

    def open(self, settings: Mapping[str, Any]) -> None:
        """Makes the folder, or finds it made by the same settings. Raises ValueError naming each that differs."""
        with guarded(self.root):
            self.pictures.mkdir(parents=True, exist_ok=True)
            if not (self.root / RUN).exists():
                with suppress(FileExistsError):  # another process was first; it is compared like any other
                    self._write(RUN, json.dumps(settings, indent=2) + "\n", force=False)
        found = read_settings(self.root)
        if not found.get("exact"):
            found.pop("compute_batch", None)  # folders of earlier versions have it
        differing = [
            f"{name:.40}={found.get(name)!r:.80} there, {settings.get(name)!r} now"
            for name in sorted(found.keys() | settings.keys())
            if found.get(name) != settings.get(name)
        ]
        if differing:
            raise ValueError(
                f"{self.root} holds a batch of other settings: {'; '.join(differing)}; give another folder"
            )
        self._sweep()

    def done(self, items: Iterable[Item]) -> dict[int, Entry]:
        """Which of the items are there, by index. A picture that no manifest lists is read back and listed.

        Raises ValueError for a file that has an item's name and is not its picture.
        """
        items, listed, names = list(items), self.listed(), self.names()
        packed = self.shards.rows() if self.shards else {}  # after the names: what is packed meanwhile is not missed
        found: dict[int, Entry] = {}
        for item in items:
            if (row := packed.get(key_of(item.index))) is not None:
                same = {**row, **_fields(item)} == row
                entry = Entry(item.key if same else "", row["sha256"], 0.0)
            elif item.file_name not in names:
                continue
            else:
                try:
                    entry = listed.get(item.file_name) or self._adopt(item)
                except FileNotFoundError:  # packed by another process since
                    return self.done(items)
            if entry.key != item.key:
                raise ValueError(
                    f"{self.root}: picture {item.index}, {item.file_name}, was drawn from another request than it is "
                    "now; give another folder"
                )
            found[item.index] = entry
        return found

    def has(self, item: Item) -> bool:
        """Whether a file has the item's name, for a quick look; `done` reads what it is."""
        return os.path.lexists(self.pictures / item.file_name)

    def save(self, item: Item, data: bytes, seconds: float) -> Entry:
        """Commits the bytes of a picture's file; the same picture a second time is no harm, the first stays.

        Raises DiskFull, or ValueError if the name is taken by another picture, or with `exact` by other bytes.
        """
        path = self.pictures / item.file_name
        entry = Entry(item.key, sha256(data), round(seconds, 4))
        with guarded(self.root):
            try:
                write_file(path, data, reached=self.reached)
            except FileExistsError:
                try:
                    there = sha256(read_file(path))
                    if there != entry.sha256 and (self.exact or not _shows(path, item)):
                        raise ValueError(_not_ours(path)) from None
                except FileNotFoundError:  # another process drew it too, and has packed it since
                    return self.save(item, data, seconds)
                entry = entry._replace(sha256=there)
            self._list(item.file_name, entry)
        return entry

    def finish(self, items: Sequence[Item], failures: Mapping[int, str]) -> dict[int, Entry]:
        """Writes metadata.jsonl, or shards, of all items that are there, and errors.jsonl; returns the items.

        Also removes what workers that were killed left half-written.
        failures: index -> why, of this run; what earlier runs listed stays listed while it is not done.
        """
        self._sweep()
        found = self.done(items)
        by_index = {item.index: item for item in items}
        lines = (line for row in _lines(self.root / ERRORS) if (line := _record(Failed, row)) is not None)
        old = {line.index: line.error for line in lines if line.index in by_index}
        left = {index: error for index, error in sorted({**old, **failures}.items()) if index not in found}
        errors = [{"index": i, "key": by_index[i].key, "error": error} for i, error in left.items()]
        with guarded(self.root):
            if self.shards:
                self.pack(items, left)
            else:
                rows = [_metadata(item, found[item.index]) for item in items if item.index in found]
                self._write(INDEX, _json_lines(rows), force=True)
            if errors:
                self._write(ERRORS, _json_lines(errors), force=True)
            else:
                (self.root / ERRORS).unlink(missing_ok=True)
        return found

    def pack(self, items: Sequence[Item], failed: Container[int]) -> None:
        """Packs each shard whose items are all there or failed, and removes the files of what is packed.

        Raises DiskFull, or ValueError for a picture that is not what was drawn.
        """
        if self.shards is None:
            return
        with guarded(self.root), self.shards.lock(self.pictures):
            found, names = self.done(items), self.names()
            for number, group in groupby(items, lambda item: shard_of(item.index)):
                shard = list(group)
                loose = [item for item in shard if item.file_name in names]
                if loose and all(item.index in found or item.index in failed for item in shard):
                    self.shards.write(number, {key_of(item.index): self._sample(item, found) for item in loose})
                    for item in loose:
                        (self.pictures / item.file_name).unlink()

    def _sample(self, item: Item, found: Mapping[int, Entry]) -> Sample:
        expected, path = found[item.index].sha256, self.pictures / item.file_name

        def png() -> bytes:
            data = read_file(path)
            if sha256(data) != expected:
                raise ValueError(f"{path} is damaged; `sdlite batch --verify {self.root}` puts it aside")
            return data

        row = {"key": key_of(item.index), "file_name": item.file_name, **_fields(item), **item.extra}
        return Sample(row | {"sha256": expected}, png)

    def _list(self, file_name: str, entry: Entry) -> None:
        """One write to the manifest. The newline in front ends a line that a crash may have torn."""
        row = json.dumps({"file_name": file_name, **entry._asdict()})
        append(self._manifest, f'\n{row[:-1]}, "crc32": "{_crc32(row)}"}}\n'.encode())

    def listed(self) -> dict[str, Entry]:
        """Every picture that any manifest lists, by file name; lines that a crash tore are left out."""
        rows = (row for path in sorted(self.pictures.glob(".manifest-*.jsonl")) for row in _lines(path))
        whole = (row for row in rows if row.pop("crc32", None) == _crc32(json.dumps(row)))
        lines = (line for row in whole if (line := _record(Listed, row)) is not None)
        return {line.file_name: Entry(line.key, line.sha256, line.seconds) for line in lines}

    def names(self) -> set[str]:
        if not self.pictures.is_dir():
            return set()
        with os.scandir(self.pictures) as entries:
            return {entry.name for entry in entries}

    def _adopt(self, item: Item) -> Entry:
        """Lists a picture that no manifest does, if it is the item's. Raises FileNotFoundError if it is gone."""
        path = self.pictures / item.file_name
        if not _shows(path, item):
            raise ValueError(_not_ours(path))
        entry = Entry(item.key, sha256(read_file(path)), 0.0)
        with guarded(self.root):
            self._list(item.file_name, entry)
        return entry

    def _sweep(self) -> None:
        for folder in {self.root, self.pictures}:
            sweep(folder)

    def _write(self, name: str, text: str, *, force: bool) -> None:
        path = self.root / name
        write_file(path, text.encode(), force=force, reached=lambda point: self.reached(f"{name} {point}"))


def read_settings(root: Path) -> dict[str, Any]:
    """What run.json holds. Raises ValueError if there is none or it is broken."""
    if not (root / RUN).is_file():
        raise ValueError(f"{root} holds no batch: there is no {RUN} in it")
    try:
        settings = json.loads(read_file(root / RUN, MAX_RUN_BYTES))
        if not isinstance(settings, dict):
            raise ValueError
        return settings
    except (ValueError, RecursionError):
        raise ValueError(f"{root / RUN} is damaged; give another folder") from None


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """Objects of a JSON-lines file, none if there is no file; what is no object is left out."""
    if path.exists():
        for line in read_lines(path):
            with suppress(ValueError, RecursionError):
                row = json.loads(line)
                if isinstance(row, dict):
                    yield row


R = TypeVar("R", bound=Record)


def _record(kind: type[R], row: Mapping[str, Any]) -> R | None:
    """The row as a record, None for one that somebody else wrote."""
    try:
        return kind(**row)
    except (ValueError, TypeError):
        return None


def _json_lines(rows: Iterable[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def _metadata(item: Item, entry: Entry) -> dict[str, Any]:
    """A row of metadata.jsonl."""
    return {
        "file_name": item.file_name,
        **_fields(item),
        **item.extra,
        "sha256": entry.sha256,
        "seconds": entry.seconds,
    }


def _fields(item: Item) -> dict[str, Any]:
    """The request. Pictures to start from are called otherwise: `image` is the drawn one in `datasets`."""
    return {
        f"init_{name}" if name in ("image", "mask") else name: value for name, value in item.request.deciding().items()
    }


def _crc32(text: str) -> str:
    return f"{zlib.crc32(text.encode()):08x}"


def _shows(path: Path, item: Item) -> bool:
    """Whether a file that is no link holds the item's picture, by the request in it. Raises FileNotFoundError."""
    try:
        ours = stat.S_ISREG(path.lstat().st_mode)
        return ours and read_metadata(path).request.deciding() == item.request.deciding()
    except FileNotFoundError:
        raise
    except (ValueError, OSError):
        return False


def _not_ours(path: Path) -> str:
    return f"{path} is not the picture that goes there; move it away, or see `sdlite batch --verify {path.parent}`"
