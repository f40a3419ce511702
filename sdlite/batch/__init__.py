r"""Draws many images from a file of requests. The same command again draws only the images that are missing.

    read (file -> rows) -> plan (rows -> items) -> drawer (items -> images) -> store (images -> files)
    local runs them on this machine, in one process or in several (workers); ray_runner runs them on a Ray cluster
    rows: what a row may hold; names: keys and file names; shards: tar files; manifest: the index; check: --verify

Every field of a request is a column, `num_images` repeats a row, and other columns go into the metadata. Options such
as `--steps` apply to rows without that column. A row without a seed gets one from `--seed` and its place in the file;
with `--same-seed` it gets `--seed` itself. The whole file is checked before anything is drawn; the first ten faults are
listed by line. A .json file is a grid: every value of one list with every value of the others.

    $ printf 'Prompt;Steps\na heart;5\na tree;\n' | sdlite batch - -o table --steps 10 --same-seed  # 5 and 10 steps
    $ echo '{"prompt": ["a heart", "a tree"], "steps": [2, 5, 10, 20], "seed": 3}' > grid.json
    $ sdlite batch grid.json -o grid --contact-sheet grid.png  # a sheet with labelled axes
    $ sdlite batch grid.json -o shards --format webdataset  # shards/00000.tar

`--workers` starts several processes, and `--exact` gives the same bytes for every number of them. Several machines that
see one folder draw a part each:

    $ sbatch --array=1-8 --wrap 'sdlite batch a.jsonl -o out -m model --exact --part $SLURM_ARRAY_TASK_ID/8'
    $ accelerate launch --multi_gpu --no_python \
        sh -c 'sdlite batch a.jsonl -o out -m model --part $((RANK+1))/$WORLD_SIZE --device cuda:$LOCAL_RANK'
    $ sdlite batch a.jsonl -o out -m model --workers 8 --ray-address head:6379  # --ray: a cluster of this machine

In Python: `sdlite.batch.run(requests, "out", model=...)`. Each public name is fetched from its module on first use, so
that planning alone loads no PyTorch. tests/README.md lists what a batch promises, with the tests.
"""

from typing import TYPE_CHECKING

from sdlite.package import fetching, homes_of

if TYPE_CHECKING:
    from sdlite.batch.check import verify as verify
    from sdlite.batch.local import (
        Batch as Batch,
        BatchReport as BatchReport,
        Event as Event,
        prepare as prepare,
        run as run,
    )
    from sdlite.batch.plan import Options as Options
    from sdlite.files import DiskFull as DiskFull

_HOMES = homes_of(
    {  # the same names as above, which only type checkers read
        "sdlite.batch.check": "verify",
        "sdlite.batch.local": "Batch BatchReport Event prepare run",
        "sdlite.batch.plan": "Options",
        "sdlite.files": "DiskFull",
    }
)
__all__ = sorted(_HOMES)
__getattr__, __dir__ = fetching(__name__, _HOMES)
