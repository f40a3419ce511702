"""The output folder of a batch: each image is there whole or not at all, and the index can be lost.

    temporary file -> fsync -> link to the final name -> fsync of the folder -> a line in the manifest

An image is done when its final name exists; the name appears only once the bytes are on disk. Names are claimed by
link: of two processes that draw the same image the second finds the file, compares, and drops its own. An image without
a line in the manifest is read back. No link inside the folder is followed; the folder itself may be one.
"""

import json
import os
import stat
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from contextlib import suppress
from itertools import groupby
from pathlib import Path
from typing import Any

from sdlite.batch.manifest import Entry, Manifest, guarded, read_file, read_rows, sha256
from sdlite.batch.plan import Item
from sdlite.batch.shards import Shards, stem_of
from sdlite.files import parse_json, sweep, write_file
from sdlite.images.files import read_metadata

RUN, INDEX, ERRORS, SHEET = "run.json", "metadata.jsonl", "errors.jsonl", "contact-sheet.png"
MAX_RUN_BYTES = 1024 * 1024
LOOSE = ".pictures"  # the folder where images wait for their shard


class Store:
    """Writes into one output folder; nothing else does.

    worker: tells apart the manifests of processes on one machine. exact: every process draws the same bytes, so other
    bytes under an image's name are a fault. packs: images lie in a hidden folder inside until their shard is whole.
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
        self.root, self.exact, self.reached = root, exact, reached
        self.folder = root / LOOSE if packs else root
        self.shards = Shards(root, self.folder) if packs else None
        self.manifest = Manifest(self.folder, worker)

    def open(self, settings: Mapping[str, Any]) -> None:
        """Makes the folder, or finds it made by the same settings. Raises ValueError naming each that differs."""
        with guarded(self.root):
            self.folder.mkdir(parents=True, exist_ok=True)
            with suppress(FileExistsError):  # by another process or run; it is compared
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
        """The items that are done, by index. An image that no manifest lists is read back and listed.

        Raises ValueError for a file that has an item's name and is not its image.
        """
        items, listed, names = list(items), self.manifest.entries(), self.names()
        packed = self.shards.rows() if self.shards else {}  # after the names: nothing packed meanwhile is missed
        found: dict[int, Entry] = {}
        for item in items:
            if (row := packed.get(stem_of(item.index))) is not None:
                entry = _packed_entry(item, row)
            elif item.file_name not in names:
                continue
            else:
                try:
                    entry = listed.get(item.file_name) or self._adopt(item)
                except FileNotFoundError:  # packed by another process since
                    return self.done(items)
            if entry.key != item.sample_key:
                raise ValueError(
                    f"{self.root}: image {item.index}, {item.file_name}, was drawn from another request than it has "
                    "now; give another folder"
                )
            found[item.index] = entry
        return found

    def has(self, item: Item) -> bool:
        """Whether a file has the item's name: a quick look; `done` reads the file."""
        return os.path.lexists(self.folder / item.file_name)

    def names(self) -> set[str]:
        """Names of all files in the folder of images."""
        return {path.name for path in self.folder.iterdir()} if self.folder.is_dir() else set()

    def save(self, item: Item, data: bytes, seconds: float) -> Entry:
        """Commits the bytes of an image's file. If the same image is there already, that one stays.

        Raises DiskFull, or ValueError if another image has the name, or with `exact` other bytes.
        """
        path = self.folder / item.file_name
        entry = _entry(item, data, seconds)
        with guarded(self.root):
            try:
                write_file(path, data, reached=self.reached)
            except FileExistsError:
                try:
                    there = sha256(read_file(path))
                    if there != entry.sha256 and (self.exact or not _shows(path, item)):
                        raise _not_ours(path) from None
                except FileNotFoundError:  # another process drew it too, and has packed it since
                    return self.save(item, data, seconds)
                entry = entry.replace(sha256=there)
            self.manifest.add(entry)
        return entry

    def finish(self, items: Sequence[Item], failures: Mapping[int, str]) -> dict[int, Entry]:
        """Writes metadata.jsonl, or shards, of all items that are done, and errors.jsonl; returns these items.

        Also removes the temporary files of killed workers. failures: index -> why, of this run. Failures of earlier
        runs stay listed until their image is done.
        """
        self._sweep()
        found, by_index = self.done(items), {item.index: item for item in items}
        listed = [(row.get("index"), row.get("error")) for row in read_rows(self.root / ERRORS)]  # may be anything
        old = {index: error for index, error in listed if isinstance(index, int) and isinstance(error, str)}
        left = {i: error for i, error in sorted({**old, **failures}.items()) if i in by_index and i not in found}
        with guarded(self.root):
            self.pack(items, left)
            if self.shards is None:
                rows = [_row(by_index[i], entry) | {"seconds": entry.seconds} for i, entry in found.items()]
                self._write(INDEX, _lines(rows))
            if left:
                rows = [{"index": i, "key": by_index[i].sample_key, "error": error} for i, error in left.items()]
                self._write(ERRORS, _lines(rows))
            else:
                (self.root / ERRORS).unlink(missing_ok=True)
        return found

    def pack(self, items: Sequence[Item], failed: Container[int]) -> None:
        """Packs each shard whose items are all done or failed, and removes the files of packed images.

        Raises DiskFull, or ValueError for an image whose bytes have changed.
        """
        shards = self.shards
        if shards is None:
            return
        with guarded(self.root), shards.lock():
            found, names = self.done(items), self.names()
            for path, group in groupby(items, lambda item: shards.path_of(item.index)):
                inside = list(group)
                loose = [item for item in inside if item.file_name in names]
                if loose and all(item.index in found or item.index in failed for item in inside):
                    rows = [{"key": stem_of(item.index), **_row(item, found[item.index])} for item in loose]
                    shards.write(path, rows)
                    for item in loose:
                        (self.folder / item.file_name).unlink()

    def _adopt(self, item: Item) -> Entry:
        """Lists an image that no manifest lists, if it is the item's. Raises FileNotFoundError if it is gone."""
        path = self.folder / item.file_name
        if not _shows(path, item):
            raise _not_ours(path)
        entry = _entry(item, read_file(path), 0.0)
        with guarded(self.root):
            self.manifest.add(entry)
        return entry

    def _sweep(self) -> None:
        for folder in {self.root, self.folder}:
            sweep(folder)

    def _write(self, name: str, text: str, *, force: bool = True) -> None:
        path = self.root / name
        write_file(path, text.encode(), force=force, reached=lambda point: self.reached(f"{name} {point}"))


def read_settings(root: Path) -> dict[str, Any]:
    """The content of run.json. Raises ValueError if there is none or it is broken."""
    if not (root / RUN).is_file():
        raise ValueError(f"{root} holds no batch: there is no {RUN} in it")
    try:
        settings = parse_json(read_file(root / RUN, MAX_RUN_BYTES))
        if isinstance(settings, dict):
            return settings
    except ValueError:
        pass
    raise ValueError(f"{root / RUN} is damaged; give another folder")


def _lines(rows: Iterable[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def _fields(item: Item) -> dict[str, Any]:
    """The request in metadata.jsonl and in shards. `image` is the drawn one in `datasets`: start images are renamed."""
    starts = {"image": "init_image", "mask": "init_mask"}
    return {starts.get(name, name): value for name, value in item.request.deciding().items()}


def _row(item: Item, entry: Entry) -> dict[str, Any]:
    return {"file_name": item.file_name, **_fields(item), **item.extra, "sha256": entry.sha256}


def _entry(item: Item, data: bytes, seconds: float) -> Entry:
    return Entry(file_name=item.file_name, key=item.sample_key, sha256=sha256(data), seconds=round(seconds, 4))


def _packed_entry(item: Item, row: Mapping[str, Any]) -> Entry:
    """The entry of an image in a shard; its key is empty if it was drawn from another request."""
    key = item.sample_key if {**row, **_fields(item)} == row else ""
    return Entry(file_name=item.file_name, key=key, sha256=row["sha256"], seconds=0.0)


def _shows(path: Path, item: Item) -> bool:
    """Whether a file that is no link holds the item's image, by the request in it. Raises FileNotFoundError."""
    try:
        ours = stat.S_ISREG(path.lstat().st_mode)
        return ours and read_metadata(path).request.deciding() == item.request.deciding()
    except FileNotFoundError:
        raise
    except (ValueError, OSError):
        return False


def _not_ours(path: Path) -> ValueError:
    advice = f"move it away, or see `sdlite batch --verify {path.parent}`"
    return ValueError(f"{path} is not the image that goes there; {advice}")
