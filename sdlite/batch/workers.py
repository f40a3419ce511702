"""A batch over several processes, each with the model loaded once.

Chunks are handed out as processes ask for them. One that dies (killed, out of memory) is replaced, and what it had not
reported is given out again, an item at a time so that only the one that kills fails; results come over a pipe each,
for a process that dies while it holds the lock of a shared queue would stop all others.
"""

import multiprocessing
import signal
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

from sdlite.batch.draw import Engine, Result
from sdlite.batch.plan import Item

MAX_TRIES = 3  # of an item on which processes die
MAX_STARTS_LOST = 3  # processes that died before they had an item


@dataclass
class _Hand:
    """One process, and what it was given and has not reported."""

    process: BaseProcess
    pipe: Connection
    items: dict[int, Item] = field(default_factory=dict)


def spread(
    make_engine: Callable[[int], Engine], chunks: Iterable[Sequence[Item]], count: int, halted: Callable[[], bool]
) -> Iterator[list[Result]]:
    """Results of all chunks, drawn by `count` processes; no more are handed out once `halted`.

    make_engine: called with the process's number in each, so it must be picklable. Raises what a process raised, and
    RuntimeError if they die before they draw.
    """
    rest, again = iter(chunks), deque[Sequence[Item]]()
    deaths: Counter[int] = Counter()
    lost_starts = 0
    hands = [_start(make_engine, number) for number in range(count)]
    try:
        while hands:
            for pipe in wait([hand.pipe for hand in hands]):
                hand = next(hand for hand in hands if hand.pipe is pipe)
                try:
                    message = hand.pipe.recv()
                    if isinstance(message, Exception):
                        raise message
                    for result in message:
                        del hand.items[result.index]
                    yield message
                    chunk = None if halted() else (again.popleft() if again else next(rest, None))
                    hand.items |= {item.index: item for item in chunk or ()}
                    hand.pipe.send(chunk)
                except (EOFError, ConnectionError):
                    number = hands.index(hand)
                    hands.remove(hand)
                    hand.process.join()
                    if hand.process.exitcode == 0 and not hand.items:
                        continue
                    deaths.update(hand.items.keys())
                    lost_starts += not hand.items
                    if lost_starts > MAX_STARTS_LOST:
                        raise RuntimeError(
                            f"worker processes end before they draw (exit code {hand.process.exitcode})"
                        ) from None
                    yield [
                        Result(index, error=f"the process that drew it died, {MAX_TRIES} times")
                        for index in hand.items
                        if deaths[index] >= MAX_TRIES
                    ]
                    again += [[item] for index, item in hand.items.items() if deaths[index] < MAX_TRIES]
                    hands.append(_start(make_engine, number))
    finally:
        for hand in hands:
            hand.process.kill()


def _start(make_engine: Callable[[int], Engine], number: int) -> _Hand:
    spawn = multiprocessing.get_context("spawn")  # a fork would copy PyTorch's threads half
    ours, theirs = spawn.Pipe()
    process = spawn.Process(target=_work, args=(make_engine, number, theirs), daemon=True)
    process.start()
    theirs.close()
    return _Hand(process, ours)


def _work(make_engine: Callable[[int], Engine], number: int, pipe: "Connection[Any, Any]") -> None:
    """What a process does: asks for a chunk by sending results, until it is given none."""
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, signal.SIG_IGN)  # a terminal sends them to all; the first process decides
    try:
        engine = make_engine(number)
        results: list[Result] = []
        while True:
            pipe.send(results)
            chunk = pipe.recv()
            if chunk is None:
                break
            engine.submit(chunk)
            results = engine.results()
        results = engine.results(wait=True)
        if results:
            pipe.send(results)
            pipe.recv()
    except (EOFError, ConnectionError):
        pass  # the first process is gone; what is saved is saved
    except Exception as error:
        pipe.send(error)
