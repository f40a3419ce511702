"""`sdlite batch --verify`: every image of a batch is read again, and the damaged ones are put aside."""

import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from sdlite.batch.manifest import Entry, read_file, sha256
from sdlite.batch.names import checked
from sdlite.batch.shards import DAMAGED, hash_of, members, stats_of
from sdlite.batch.sheet import is_sheet
from sdlite.batch.store import SHEET, Store, read_settings
from sdlite.files import write_file
from sdlite.images.files import read_metadata


class Check(NamedTuple):
    """What `verify` found, as file names. corrupt: renamed to NAME.corrupt. extra: PNGs that belong to no batch."""

    good: list[str]
    missing: list[str]
    corrupt: list[str]
    extra: list[str]


def verify(root: Path) -> Check:
    """Reads every image of a batch again and compares it with the manifest.

    An image that differs is renamed to NAME.corrupt, so that the same batch command draws exactly those again. The good
    images of a damaged shard are taken out first. Raises ValueError if the folder holds no batch.
    """
    settings = read_settings(root)
    store, check = Store(root, packs=settings.get("format") == "webdataset"), Check([], [], [], [])
    for shard in store.shards.paths() if store.shards else ():
        _verify_shard(shard, store, check)
    listed, folder = store.manifest.entries(), store.folder
    on_disk = {name for name in store.names() if name.endswith(".png") and name != SHEET}
    for name in (on_disk | listed.keys()) - {*check.good, *check.corrupt}:
        if name not in on_disk:
            check.missing.append(name)
        elif _is_good(folder / name, listed.get(name), settings.get("model_hash")):
            check.good.append(name)
        elif name in listed:
            (folder / name).replace(folder / f"{name}.corrupt")
            check.corrupt.append(name)
        elif not is_sheet(folder / name):
            check.extra.append(name)
    for names in check:
        names.sort()
    return check


def _verify_shard(path: Path, store: Store, check: Check) -> None:
    """Compares the images of a shard, and the shard itself, with their hashes; unpacks a damaged one."""
    whole = {name: data is not None for name, data in _images(path)}
    if all(whole.values()):
        check.good.extend(whole)
        return
    for name, data in _images(path):
        if data is not None and not (store.folder / name).exists():
            write_file(store.folder / name, data)
    check.corrupt.extend(name for name in whole if not whole[name])
    path.replace(path.with_name(f"{path.name}.corrupt"))


def _images(path: Path) -> Iterator[tuple[str, bytes | None]]:
    """File name and bytes of each image in a shard; None for a damaged image, and for the shard itself if it is."""
    row: dict[str, str] = {}
    try:
        for name, read in members(path):
            if name.endswith(".json"):
                row = json.loads(read())
            elif name.endswith(".png"):
                data = read()
                yield checked(row["file_name"]), data if sha256(data) == row["sha256"] else None
        with path.open("rb") as file:
            if hash_of(file) != json.loads(read_file(stats_of(path)))["sha256"]:
                yield path.name, None
    except (*DAMAGED, OSError):
        yield path.name, None


def _is_good(path: Path, entry: Entry | None, model_hash: object) -> bool:
    """Whether an image is as its entry says, or without one is whole and was drawn by the batch's model. No link is."""
    with suppress(ValueError, OSError):
        if entry is not None:
            return sha256(read_file(path)) == entry.sha256
        return not path.is_symlink() and read_metadata(path).model_hash == model_hash
    return False
