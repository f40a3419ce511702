"""The `sdlite` command. This folder is the only place that reads flags and the environment.

stdout holds the paths of the images, or with --json one event per line; notes and the progress bar go to stderr. Heavy
modules are imported inside the commands, so that `--help` is quick.

Exit codes: 0 done, 1 some of many failed, 2 wrong input (one line says what to type instead), 3 disk full, 70 a fault
of sdlite (SDLITE_DEBUG=1 shows where), 130 interrupted: the first Ctrl-C finishes the current image, a second one stops
at once. `sdlite --install-completion` lets the shell complete commands and options.

A command computes with one thread for each core that it may use. taskset, the limits of a container and OMP_NUM_THREADS
are obeyed; --threads N sets another number, which `batch --workers` shares out. Threads that wait for each other lose
much time on busy cores, so the command sets GOMP_SPINCOUNT=10000, unless you have set that or OMP_WAIT_POLICY. In your
own programs, set it before torch is imported. notebooks/06_faster.ipynb has the times.
"""

from sdlite.cli import draw  # noqa: F401  each adds its commands to the app, in the order of --help

# isort: split
from sdlite.cli import batch, bench, learn, models, segment  # noqa: F401
from sdlite.cli.app import main as main
