"""Stopping in order: the first Ctrl-C or SIGTERM ends the work after its current step, the next one at once."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Self


class Stop:
    """While active, sets `asked` at the first signal to stop and raises KeyboardInterrupt at the second.

    message: shown at the first. once: seconds in which a repeated signal counts as the first, because torchrun passes
    on a signal that the terminal has already sent to every process. Does nothing outside the main thread, because only
    that one gets signals.
    """

    def __init__(self, message: str) -> None:
        self._message = f"\n{message}; Ctrl-C again stops at once\n".encode()
        self.asked, self.once = False, 0.0
        self._first, self._idle = 0.0, False

    def __enter__(self) -> Self:
        main = threading.current_thread() is threading.main_thread()
        numbers = (signal.SIGINT, signal.SIGTERM) if main else ()
        self._before = {number: signal.signal(number, self._handle) for number in numbers}
        return self

    def __exit__(self, *_: object) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)

    @contextmanager
    def idle(self) -> Iterator[None]:
        """A block that may be broken off without loss: the first signal ends it, and the code after it runs."""
        self._idle = True
        try:
            yield
        except KeyboardInterrupt:
            if not self._idle:
                raise
        finally:
            self._idle = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.asked and time.monotonic() - self._first < self.once:
            return
        if self.asked:
            self._idle = False
            raise KeyboardInterrupt
        self.asked, self._first = True, time.monotonic()
        os.write(2, self._message)  # safe in a handler
        if self._idle:
            raise KeyboardInterrupt
