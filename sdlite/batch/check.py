"""Is a batch's folder what was written? Every picture read again, the damaged ones put aside."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from sdlite.batch.disk import read_file, sha256
from sdlite.batch.names import checked
from sdlite.batch.shards import DAMAGED, hash_of, members, stats_of
from sdlite.batch.sheet import is_sheet
from sdlite.batch.store import SHEET, Store, read_settings
from sdlite.files import write_file
from sdlite.images.files import read_metadata


class Check(NamedTuple):
    """What `verify` found, file names each. corrupt: now called NAME.corrupt. extra: pictures of no batch."""

    good: list[str]
    missing: list[str]
    corrupt: list[str]
    extra: list[str]


def verify(root: Path) -> Check:
    """Reads every picture of a batch again and holds it against the manifest.

    A picture that is not what was written is renamed to NAME.corrupt, so that the same batch command makes exactly
    those again. Of a damaged shard the good pictures are taken out first. Raises ValueError if the folder holds no
    batch.
    """
    settings = read_settings(root)
    store, check = Store(root, packs=settings.get("format") == "webdataset"), Check([], [], [], [])
    for shard in store.shards.paths() if store.shards else ():
        _verify_shard(shard, store, check)
    listed, folder = store.listed(), store.pictures
    pictures = {name for name in store.names() if name.endswith(".png") and name != SHEET}
    for name in sorted((pictures | listed.keys()) - {*check.good, *check.corrupt}):
        if name not in pictures:
            check.missing.append(name)
        elif name in listed and _hash(folder / name) == listed[name].sha256:
            check.good.append(name)
        elif name in listed:
            (folder / name).replace(folder / f"{name}.corrupt")
            check.corrupt.append(name)
        elif _is_drawn_by(folder / name, settings.get("model_hash")):
            check.good.append(name)
        elif not is_sheet(folder / name):
            check.extra.append(name)
    for names in check:
        names.sort()
    return check


def _verify_shard(path: Path, store: Store, check: Check) -> None:
    """Holds the pictures of a shard against their hashes, and the shard against its own; unpacks a damaged one."""
    names = {name: data is not None for name, data in _pictures(path)}
    if all(names.values()):
        check.good.extend(names)
        return
    for name, data in _pictures(path):
        if data is not None and not (store.pictures / name).exists():
            write_file(store.pictures / name, data)
    check.corrupt.extend(name for name, whole in names.items() if not whole)
    path.replace(path.with_name(f"{path.name}.corrupt"))


def _pictures(path: Path) -> Iterator[tuple[str, bytes | None]]:
    """File name and bytes of each picture in a shard, None for a damaged one and for the shard itself if that is."""
    row: dict[str, str] = {}
    try:
        for name, data in members(path):
            if name.endswith(".json"):
                row = json.loads(data)
            elif name.endswith(".png"):
                yield checked(row["file_name"]), data if sha256(data) == row["sha256"] else None
        with path.open("rb") as file:
            if hash_of(file) != json.loads(read_file(stats_of(path)))["sha256"]:
                yield path.name, None
    except (*DAMAGED, OSError):
        yield path.name, None


def _hash(path: Path) -> str:
    """SHA-256 of a file; of one that cannot be read, or is a link, empty."""
    try:
        return sha256(read_file(path))
    except OSError:
        return ""


def _is_drawn_by(path: Path, model_hash: object) -> bool:
    """Whether a picture that no manifest lists holds together and is of the batch's model."""
    try:
        return not path.is_symlink() and read_metadata(path).model_hash == model_hash
    except (ValueError, OSError):
        return False
