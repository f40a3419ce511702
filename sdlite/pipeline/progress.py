"""A line with the time left, for whoever waits in a terminal or a notebook for a call that draws.

It is gone when the call is over, and is left out where nobody watches: piped, in a log, or with `progress=False`.
This is the one place outside the command line and training that writes to stderr: calls from Python get a bar too.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import ceil
from time import monotonic
from typing import Any

Progress = Callable[[int, int], None]  # called with the steps done and those in all
WIDTH = 30  # of the bar, in characters
MIN_SECONDS = 0.1  # between two writings


@contextmanager
def watched(progress: bool | Progress | None, count: int) -> Iterator[Progress]:
    """What a call that draws `count` images calls after every step. progress: see `Pipeline.generate`."""
    if callable(progress):
        yield progress
        return
    notebook = None if progress is False else _notebook_display()
    if not progress and notebook is None and (progress is False or not (sys.stderr and sys.stderr.isatty())):
        yield lambda done, total: None
        return
    write = _on_terminal if notebook is None else notebook
    try:
        yield _Line(write, count)
    finally:
        write("")


class _Line:
    """Writes how far a call is, and how long the rest takes at the pace so far."""

    def __init__(self, write: Callable[[str], None], count: int) -> None:
        self.write, self.images = write, f"{count} image{'s' if count > 1 else ''}"
        self.begun = monotonic()
        self.written = float("-inf")

    def __call__(self, done: int, total: int) -> None:
        now = monotonic()
        if now - self.written < MIN_SECONDS and done < total:
            return
        self.written = now
        left = f", {ceil((now - self.begun) / done * (total - done))} s left" if done else ""
        full = WIDTH * done // max(total, 1)
        self.write(f"drawing {self.images} [{'#' * full}{'.' * (WIDTH - full)}] step {done} of {total}{left}")


def _on_terminal(text: str) -> None:
    """Replaces the line that the cursor is in."""
    sys.stderr.write(f"\r\x1b[K{text}")
    sys.stderr.flush()


def _notebook_display() -> Callable[[str], None] | None:
    """Writes into one output of the notebook's cell, where this runs in a notebook."""
    ipython = sys.modules.get("IPython")
    shell = None if ipython is None else ipython.get_ipython()
    if getattr(shell, "kernel", None) is None:
        return None
    display: Any = sys.modules["IPython.display"]
    handle = display.display(display.HTML(""), display_id=True)
    return lambda text: handle.update(display.HTML(f"<code>{text}</code>" if text else ""))
