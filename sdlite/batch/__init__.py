"""Many images from a file of requests; a run may be interrupted at any time.

    read, rows (files to rows) -> plan, keys, names (rows to items) -> parts (who draws what)
    -> drawer (items to images) -> store, manifest, shards (images to files)

`local` runs this on one machine, in one process or, with `workers`, in several; `ray_runner` runs it on a cluster.
`check` is --verify. Each public name is fetched on first use, so that planning alone loads no PyTorch.
"""

from typing import TYPE_CHECKING

from sdlite.package import fetching

_HOME = {
    "Batch": "sdlite.batch.local",
    "BatchReport": "sdlite.batch.local",
    "DiskFull": "sdlite.files",
    "Event": "sdlite.batch.local",
    "Options": "sdlite.batch.options",
    "prepare": "sdlite.batch.local",
    "run": "sdlite.batch.local",
    "verify": "sdlite.batch.check",
}
__all__ = sorted(_HOME)
__getattr__, __dir__ = fetching("sdlite.batch", _HOME)

if TYPE_CHECKING:
    from sdlite.batch.check import verify as verify
    from sdlite.batch.local import (
        Batch as Batch,
        BatchReport as BatchReport,
        Event as Event,
        prepare as prepare,
        run as run,
    )
    from sdlite.batch.options import Options as Options
    from sdlite.files import DiskFull as DiskFull
