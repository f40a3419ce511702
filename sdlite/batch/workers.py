"""A batch over several workers, each with the model loaded once: processes of this machine, or of a cluster.

Groups of items are handed out as workers ask for them. A worker that dies (killed, out of memory) is replaced. Items
that it had not reported are handed out again one at a time, so that only the item that kills its worker fails. Each
worker has a pipe of its own: a process that dies while it holds the lock of a shared queue would stop all others.
"""

import multiprocessing
import signal
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.connection import Connection, wait
from typing import Any, Protocol

from sdlite.batch.drawer import Drawer, Result
from sdlite.batch.plan import Item
from sdlite.request import reason

MAX_TRIES = 3  # of an item on which processes die
MAX_STARTS_LOST = 3  # processes that died before they had an item
Answer = list[Result] | Exception


class Gone(Exception):
    """A worker has died."""


class Worker(Protocol):
    """A RemoteDrawer in another process. It first answers [], and then every group. send and receive raise Gone.

    wait: gives those of several workers that have an answer, at least one.
    """

    def send(self, group: Sequence[Item] | None) -> None: ...
    def receive(self) -> Answer: ...
    def stop(self) -> None: ...
    @staticmethod
    def wait(workers: Sequence[Any]) -> Sequence[Any]: ...


class RemoteDrawer:
    """A Drawer in a worker. It answers with an error instead of raising it, so that no library in between wraps it."""

    def __init__(self, make_drawer: Callable[[int], Drawer], number: int) -> None:
        self.make = partial(make_drawer, number)
        self.drawer: Drawer | None = None

    def draw(self, group: Sequence[Item] | None) -> Answer:
        """Draws a group; None: waits until all is saved. The first call, with an empty group, loads the model."""
        try:
            if self.drawer is None:
                signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to all; the first process decides
                self.drawer = self.make()
            if group is not None:
                self.drawer.submit(group)
            return self.drawer.results(wait=group is None)
        except Exception as error:
            return carried(error)


def carried(error: Exception) -> Exception:
    """An error that another process can unpickle: its class is Python's or ours, as those of libraries often cannot be.

    One that stands for wrong input, ValueError or OSError, stays one.
    """
    kind = next((kind for kind in (ValueError, OSError) if isinstance(error, kind)), RuntimeError)
    known = type(error).__module__.partition(".")[0] in ("builtins", "sdlite")
    return error if known and kind is not RuntimeError else kind(reason(error))


@dataclass
class _Hand:
    """One worker, and the items that it was given and has not reported. ending: it was told that there are no more."""

    worker: Worker
    number: int
    items: dict[int, Item] = field(default_factory=dict)
    ending: bool = False

    def results(self) -> list[Result]:
        """Raises Gone, or what was raised while drawing."""
        answer = self.worker.receive()
        if isinstance(answer, Exception):
            raise answer
        for result in answer:
            del self.items[result.index]
        return answer


def hand_out(
    start: Callable[[int], Worker], groups: Iterable[Sequence[Item]], count: int, halted: Callable[[], bool]
) -> Iterator[list[Result]]:
    """Results of all groups, drawn by `count` workers; once `halted`, no group is handed out and no worker started.

    start: of a worker, by number. Raises what a worker raised, and RuntimeError if workers die before they draw.
    """
    rest, again = iter(groups), deque[Sequence[Item]]()
    deaths: Counter[int] = Counter()
    lost_starts = 0
    hands = [_Hand(start(number), number) for number in range(count)]
    try:
        while hands:
            ready = hands[0].worker.wait([hand.worker for hand in hands])
            for hand in [hand for hand in hands if hand.worker in ready]:
                try:
                    yield hand.results()
                    group = None if halted() else (again.popleft() if again else next(rest, None))
                    if group is None and hand.ending:
                        raise Gone
                    hand.items |= {item.index: item for item in group or ()}
                    hand.ending = group is None
                    hand.worker.send(group)
                except Gone as gone:
                    hands.remove(hand)
                    hand.worker.stop()
                    if hand.ending and not hand.items:
                        continue
                    deaths.update(hand.items.keys())
                    lost_starts += not hand.items
                    if lost_starts > MAX_STARTS_LOST:
                        raise RuntimeError(f"worker processes end before they draw ({gone})") from None
                    yield [
                        Result(index, error=f"the process that drew it died, {MAX_TRIES} times")
                        for index in hand.items
                        if deaths[index] >= MAX_TRIES
                    ]
                    again += [[item] for index, item in hand.items.items() if deaths[index] < MAX_TRIES]
                    if not halted():
                        hands.append(_Hand(start(hand.number), hand.number))
    finally:
        for hand in hands:
            hand.worker.stop()


class WorkerProcess:
    """A worker on this machine. make_drawer: called in the process, with the worker's number; it must be picklable."""

    def __init__(self, make_drawer: Callable[[int], Drawer], number: int) -> None:
        spawn = multiprocessing.get_context("spawn")  # a fork would copy PyTorch's threads half
        self.pipe, theirs = spawn.Pipe()
        self.process = spawn.Process(target=_work, args=(make_drawer, number, theirs), daemon=True)
        self.process.start()
        theirs.close()

    @staticmethod
    def wait(workers: Sequence["WorkerProcess"]) -> Sequence["WorkerProcess"]:
        ready = wait([worker.pipe for worker in workers])
        return [worker for worker in workers if worker.pipe in ready]

    def send(self, group: Sequence[Item] | None) -> None:
        try:
            self.pipe.send(group)
        except ConnectionError:
            raise self._gone() from None

    def receive(self) -> Answer:
        try:
            return self.pipe.recv()
        except (EOFError, ConnectionError):
            raise self._gone() from None

    def stop(self) -> None:
        self.process.kill()

    def _gone(self) -> Gone:
        self.process.join()
        return Gone(f"exit code {self.process.exitcode}")


def _work(make_drawer: Callable[[int], Drawer], number: int, pipe: "Connection[Any, Any]") -> None:
    """The main function of a process, until it is stopped or the first process is gone; saved images stay saved."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    drawer = RemoteDrawer(make_drawer, number)
    with suppress(EOFError, ConnectionError):
        pipe.send(drawer.draw([]))
        while True:
            pipe.send(drawer.draw(pipe.recv()))
