"""The `sdlite` command. This folder is the only place that reads flags and the environment.

stdout holds the paths of the images, or with --json one event per line; notes and the progress bar go to stderr.
Heavy modules are imported inside the commands, so that `--help` is quick.
"""

import os
import sys
from collections.abc import Sequence
from io import TextIOWrapper

from sdlite.cli import draw, regen  # noqa: F401  each adds its commands to the app, in the order of --help

# isort: split
from sdlite.cli import batch, bench, learn, models, segment  # noqa: F401
from sdlite.cli.app import run
from sdlite.cli.threads import spin_briefly


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line and exits with its code; wrong input gives one line on stderr."""
    spin_briefly()
    for name in ("TRANSFORMERS_VERBOSITY", "DIFFUSERS_VERBOSITY"):
        os.environ.setdefault(name, "error")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a name that the terminal's encoding lacks is no error
    sys.exit(run(arguments))
