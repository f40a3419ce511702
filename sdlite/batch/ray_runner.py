"""A batch over a Ray cluster: the chunks of a local run, drawn by actors that load the model once each.

    driver: chunks of requests --> actor: Engine --> Store on the shared folder; back come ids and hashes only

An actor is a worker like a process of this machine (`workers`): one that dies is replaced and what it had is handed out
again. Ray itself retries nothing, so that an item is tried as often here as there.
"""

import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, NoReturn

from sdlite.batch.draw import Engine, Result
from sdlite.batch.plan import Item
from sdlite.batch.workers import Gone, carried

try:
    import ray as library
    from ray.exceptions import RayError
except ImportError:
    raise ValueError("--ray needs the package ray: pip install 'sdlite[ray]'") from None

ray: Any = library  # its types leave out half of what it has
ANSWER_SECONDS = 10.0  # of a cluster's head
STORE_BYTES = 80 * 1024 * 1024  # of Ray's own object store, nearly its least: no picture passes through it


class Drawer:
    """The actor. An error is a result, since one that is raised would come wrapped in Ray's."""

    def begin(self, make_engine: Callable[[int], Engine], number: int) -> list[Result] | Exception:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to all; the driver decides
        try:
            self.engine = make_engine(number)
        except Exception as error:
            return carried(error)
        return []

    def draw(self, items: Sequence[Item] | None) -> list[Result] | Exception:
        """Draws a chunk; None: saves what is left."""
        try:
            if items is not None:
                self.engine.submit(items)
            return self.engine.results(wait=items is None)
        except Exception as error:
            return carried(error)


class Actor:
    """A Drawer as its driver sees it. pending: what it is about to say."""

    def __init__(self, handle: Any, pending: Any) -> None:
        self.handle, self.pending, self.last = handle, pending, False

    def send(self, chunk: Sequence[Item] | None) -> None:
        self.last = chunk is None
        self.pending = self.handle.draw.remote(None if chunk is None else [_absolute(item) for item in chunk])

    def receive(self) -> list[Result]:
        try:
            message = ray.get(self.pending)
        except RayError as error:
            _gone(error)
        if isinstance(message, Exception):
            raise message
        if self.last and not message:
            raise Gone(ended=True)
        return message

    def stop(self) -> None:
        ray.kill(self.handle)


class Actors:
    """Where actors come from. resources: of the cluster, for each."""

    def __init__(self, make_engine: Callable[[int], Engine], resources: dict[str, float]) -> None:
        self.make_engine = make_engine
        self.drawer = ray.remote(**resources, max_restarts=0, max_task_retries=0)(Drawer)

    def start(self, number: int) -> Actor:
        handle = self.drawer.remote()
        return Actor(handle, handle.begin.remote(self.make_engine, number))

    def wait(self, workers: Sequence[Actor]) -> Sequence[Actor]:
        ready, _ = ray.wait([worker.pending for worker in workers])
        return [worker for worker in workers if worker.pending in ready]


@contextmanager
def cluster(
    make_engine: Callable[..., Engine], *, address: str | None, count: int, threads: int | None, on_gpu: bool
) -> Iterator[Actors]:
    """Actors on the cluster at an address, or on one of this machine that ends with them.

    make_engine: called with a number and `threads`. threads: None shares out the cluster's cores. Raises ValueError if
    the cluster cannot be reached or has no room for `count` actors.
    """
    ours = not ray.is_initialized()  # a caller's own connection stays
    if ours:
        _connect(address, count * (threads or 1))
    try:
        cores = threads or _share(count)
        kind, needed = ("GPU", count) if on_gpu else ("CPU", count * cores)
        there = int(ray.cluster_resources().get(kind, 0))
        if there < needed:
            raise ValueError(f"workers={count} need {needed} {kind}s, the cluster has {there}; give fewer --workers")
        yield Actors(partial(make_engine, threads=cores), {"num_gpus": 1} if on_gpu else {"num_cpus": cores})
    finally:
        if ours:
            ray.shutdown()


def _connect(address: str | None, cores: int) -> None:
    """Starts or joins a cluster without a word, a dashboard or a report of usage to Ray's makers."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    own: dict[str, Any] = {"num_cpus": cores, "object_store_memory": STORE_BYTES, "include_dashboard": False}
    before = signal.getsignal(signal.SIGTERM)
    try:
        host, _, port = (address or "").rpartition(":")
        if port.isdecimal() and "/" not in host:
            socket.create_connection((host, int(port)), ANSWER_SECONDS).close()  # Ray itself tries for minutes
        ray.init(address or "local", log_to_driver=False, logging_level="ERROR", **({} if address else own))
    except (RayError, OSError, OverflowError, RuntimeError, ValueError) as error:
        where = f"no Ray cluster at {address}" if address else "Ray does not start"
        raise ValueError(f"{where}: {' '.join(str(error).split()):.200}") from None
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)  # Ray puts its own there, which would end us at once


def _share(count: int) -> int:
    """Cores of each of `count` actors, which are spread over machines with as many as the smallest of them."""
    cores = [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]]
    return max(1, min(cores) // -(-count // len(cores)))


def _absolute(item: Item) -> Item:
    """Its pictures to start from by full paths: an actor's folder is another."""
    if item.image is None and item.mask is None:
        return item
    image, mask = (None if path is None else path.absolute() for path in (item.image, item.mask))
    return replace(item, image=image, mask=mask)


def _gone(error: RayError) -> NoReturn:
    raise Gone(False, (str(error).splitlines() or [type(error).__name__])[0]) from None
