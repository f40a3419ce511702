"""The manifest of a batch: a line of JSON for each saved image, appended by the process that saved it.

    .manifest-HOST-WORKER.jsonl: {"file_name": ..., "key": ..., "sha256": ..., "seconds": ..., "crc32": ...}

It is an index and may be lost. Its lines are untrusted: a line that a crash tore, or that another program wrote, is
left out.
"""

import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sdlite.batch.disk import append, read_lines
from sdlite.config import Record
from sdlite.files import HOST, parse_json


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
        rows = (row for path in sorted(self.folder.glob(".manifest-*.jsonl")) for row in read_rows(path))
        whole = (row for row in rows if row.pop("crc32", None) == _crc32(json.dumps(row)))
        return {entry.file_name: entry for row in whole if (entry := _entry(row)) is not None}


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Objects of a JSON-lines file, none if there is no file. Lines that hold anything else are left out."""
    for line in read_lines(path) if path.exists() else ():
        try:
            row = parse_json(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            yield row


def _entry(row: dict[str, Any]) -> Entry | None:
    """The row as an entry, or None if its fields do not fit."""
    try:
        return Entry(**row)
    except (ValueError, TypeError):
        return None


def _crc32(text: str) -> str:
    return f"{zlib.crc32(text.encode()):08x}"
