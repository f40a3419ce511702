"""Is a batch's folder what was written? Every picture read again, the damaged ones put aside."""

from pathlib import Path
from typing import NamedTuple

from sdlite.batch.disk import read_file, sha256
from sdlite.batch.store import SHEET, Store, read_settings
from sdlite.images import read_metadata


class Check(NamedTuple):
    """What `verify` found, file names each. corrupt: now called NAME.corrupt. extra: pictures of no batch."""

    good: list[str]
    missing: list[str]
    corrupt: list[str]
    extra: list[str]


def verify(root: Path) -> Check:
    """Reads every picture of a batch again and holds it against the manifest.

    A picture that is not what was written is renamed to NAME.corrupt, so that the same batch command makes exactly
    those again. Raises ValueError if the folder holds no batch.
    """
    store, check = Store(root), Check([], [], [], [])
    listed = store.listed()
    model_hash = read_settings(root).get("model_hash")
    pictures = {name for name in store.names() if name.endswith(".png") and name != SHEET}
    for name in sorted(pictures | listed.keys()):
        if name not in pictures:
            check.missing.append(name)
        elif name in listed and _hash(root / name) == listed[name].sha256:
            check.good.append(name)
        elif name in listed:
            (root / name).replace(root / f"{name}.corrupt")
            check.corrupt.append(name)
        else:
            (check.good if _is_drawn_by(root / name, model_hash) else check.extra).append(name)
    return check


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
