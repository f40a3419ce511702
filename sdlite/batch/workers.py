"""A batch over several workers, each with the model loaded once: processes of this machine, or of a cluster.

Groups of items are handed out as workers ask for them. A worker that dies (killed, out of memory) is replaced. Items
that it had not reported are handed out again one at a time, so that only the item that kills its worker fails. Each
worker has a pipe of its own: a process that dies while it holds the lock of a shared queue would stop all others.
"""

import multiprocessing
import signal
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, Generic, Protocol, TypeVar

from sdlite.batch.drawer import Drawer, Result
from sdlite.batch.plan import Item
from sdlite.request import reason

MAX_TRIES = 3  # of an item on which processes die
MAX_STARTS_LOST = 3  # processes that died before they had an item


class Gone(Exception):
    """A worker has ended or died. ended: in order, because there were no more groups."""

    def __init__(self, ended: bool, why: str = "") -> None:
        super().__init__(why)
        self.ended = ended


class Worker(Protocol):
    """Draws in another process. It first gives an empty list of results, then a list for every group."""

    def send(self, group: Sequence[Item] | None) -> None:
        """Hands out a group; None: there are no more. Raises Gone."""

    def receive(self) -> list[Result]:
        """Results of items handed out. Raises Gone, or what was raised while drawing."""

    def stop(self) -> None:
        """Ends the worker at once, if it runs."""


W = TypeVar("W", bound=Worker)


class Team(Protocol[W]):
    """Where workers come from."""

    def start(self, number: int) -> W: ...
    def wait(self, workers: Sequence[W]) -> Sequence[W]:
        """Those that have something to receive, at least one."""


@dataclass
class _Hand(Generic[W]):
    """One worker, and the items that it was given and has not reported."""

    worker: W
    number: int
    items: dict[int, Item] = field(default_factory=dict)


def spread(
    team: Team[W], groups: Iterable[Sequence[Item]], count: int, halted: Callable[[], bool]
) -> Iterator[list[Result]]:
    """Results of all groups, drawn by `count` workers; no more are handed out once `halted`.

    Raises what a worker raised, and RuntimeError if workers die before they draw.
    """
    rest, again = iter(groups), deque[Sequence[Item]]()
    deaths: Counter[int] = Counter()
    lost_starts = 0
    hands = [_Hand(team.start(number), number) for number in range(count)]
    try:
        while hands:
            ready = team.wait([hand.worker for hand in hands])
            for hand in [hand for hand in hands if hand.worker in ready]:
                try:
                    results = hand.worker.receive()
                    for result in results:
                        del hand.items[result.index]
                    yield results
                    group = None if halted() else (again.popleft() if again else next(rest, None))
                    hand.items |= {item.index: item for item in group or ()}
                    hand.worker.send(group)
                except Gone as gone:
                    hands.remove(hand)
                    hand.worker.stop()
                    if gone.ended and not hand.items:
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
                    hands.append(_Hand(team.start(hand.number), hand.number))
    finally:
        for hand in hands:
            hand.worker.stop()


class Processes:
    """Workers on this machine. make_drawer: called in each process, with its number; it must be picklable."""

    def __init__(self, make_drawer: Callable[[int], Drawer]) -> None:
        self.make_drawer = make_drawer

    def start(self, number: int) -> "Process":
        spawn = multiprocessing.get_context("spawn")  # a fork would copy PyTorch's threads half
        ours, theirs = spawn.Pipe()
        process = spawn.Process(target=_work, args=(self.make_drawer, number, theirs), daemon=True)
        process.start()
        theirs.close()
        return Process(process, ours)

    def wait(self, workers: Sequence["Process"]) -> Sequence["Process"]:
        ready = wait([worker.pipe for worker in workers])
        return [worker for worker in workers if worker.pipe in ready]


class Process:
    def __init__(self, process: BaseProcess, pipe: "Connection[Any, Any]") -> None:
        self.process, self.pipe = process, pipe

    def send(self, group: Sequence[Item] | None) -> None:
        try:
            self.pipe.send(group)
        except ConnectionError:
            raise self._gone() from None

    def receive(self) -> list[Result]:
        try:
            message = self.pipe.recv()
        except (EOFError, ConnectionError):
            raise self._gone() from None
        if isinstance(message, Exception):
            raise message
        return message

    def stop(self) -> None:
        self.process.kill()

    def _gone(self) -> Gone:
        self.process.join()
        return Gone(self.process.exitcode == 0, f"exit code {self.process.exitcode}")


def _work(make_drawer: Callable[[int], Drawer], number: int, pipe: "Connection[Any, Any]") -> None:
    """The main function of a process: asks for a group by sending results, until there are no more."""
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, signal.SIG_IGN)  # a terminal sends them to all; the first process decides
    try:
        drawer = make_drawer(number)
        results: list[Result] = []
        while True:
            pipe.send(results)
            group = pipe.recv()
            if group is None:
                break
            drawer.submit(group)
            results = drawer.results()
        results = drawer.results(wait=True)
        if results:
            pipe.send(results)
            pipe.recv()
    except (EOFError, ConnectionError):
        pass  # the first process is gone; saved images stay saved
    except Exception as error:
        pipe.send(carried(error))


def carried(error: Exception) -> Exception:
    """An error that another process can unpickle; classes of libraries often cannot be."""
    return error if isinstance(error, ValueError | OSError) else RuntimeError(reason(error))
