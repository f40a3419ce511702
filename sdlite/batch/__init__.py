"""Many pictures from a file of requests, interrupted at will: `run` and what it takes and gives.

    read (files to rows) -> plan (rows to items) -> draw (items to pictures) -> store (pictures to files)
    local runs them on this machine, in one process or, with workers, in several

Each public name is fetched from its module on first use, so that planning alone loads no PyTorch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

_HOME = {
    "Batch": "sdlite.batch.local",
    "BatchReport": "sdlite.batch.local",
    "DiskFull": "sdlite.batch.disk",
    "Event": "sdlite.batch.local",
    "Options": "sdlite.batch.local",
    "prepare": "sdlite.batch.local",
    "run": "sdlite.batch.local",
    "verify": "sdlite.batch.check",
}
__all__ = sorted(_HOME)

if TYPE_CHECKING:
    from sdlite.batch.check import verify as verify
    from sdlite.batch.disk import DiskFull as DiskFull
    from sdlite.batch.local import (
        Batch as Batch,
        BatchReport as BatchReport,
        Event as Event,
        Options as Options,
        prepare as prepare,
        run as run,
    )


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'sdlite.batch' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(import_module(_HOME[name]), name)
