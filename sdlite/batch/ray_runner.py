"""A batch over a Ray cluster: the groups of a local run, drawn by actors that load the model once each.

    driver: groups of items --> actor: Drawer --> Store on the shared folder; only numbers and hashes come back

An actor is a worker, as a process of this machine is (`workers`). Ray itself retries nothing.
"""

import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from sdlite.batch.drawer import Drawer
from sdlite.batch.plan import Item
from sdlite.batch.workers import Answer, Gone, RemoteDrawer

try:
    import ray as library
    from ray.exceptions import RayError
except ImportError:
    raise ValueError("--ray needs the package ray: pip install 'sdlite[ray]'") from None

ray: Any = library  # its types leave out half of its names
ANSWER_SECONDS = 10.0  # of a cluster's head
STORE_BYTES = 80 * 1024 * 1024  # of Ray's own object store, near its minimum: no image passes through it


class Actor:
    """A worker on the cluster, as its driver sees it. kind: of Ray's actors. pending: the worker's next answer."""

    def __init__(self, kind: Any, make_drawer: Callable[[int], Drawer], number: int) -> None:
        self.handle = kind.remote(make_drawer, number)
        self.send([])

    @staticmethod
    def wait(workers: Sequence["Actor"]) -> Sequence["Actor"]:
        ready, _ = ray.wait([worker.pending for worker in workers])
        return [worker for worker in workers if worker.pending in ready]

    def send(self, group: Sequence[Item] | None) -> None:
        self.pending = self.handle.draw.remote(group)

    def receive(self) -> Answer:
        try:
            return ray.get(self.pending)
        except RayError as error:
            raise Gone((str(error).splitlines() or [type(error).__name__])[0]) from None

    def stop(self) -> None:
        ray.kill(self.handle)


@contextmanager
def cluster(
    make_drawer: Callable[..., Drawer], *, address: str | None, count: int, threads: int | None, on_gpu: bool
) -> Iterator[Callable[[int], Actor]]:
    """Starts actors on the cluster at an address, or on one of this machine that ends with them.

    make_drawer: called with a number and `threads`. threads: None shares out the cluster's cores. Raises ValueError if
    the cluster cannot be reached or has no room for `count` actors.
    """
    ours = not ray.is_initialized()  # a caller's own connection stays
    if ours:
        _connect(address, count * (threads or 1))
    try:
        cores = threads or _share(count)
        unit, needed = ("GPU", count) if on_gpu else ("CPU", count * cores)
        there = int(ray.cluster_resources().get(unit, 0))
        if there < needed:
            raise ValueError(f"workers={count} need {needed} {unit}s, the cluster has {there}; give fewer --workers")
        resources = {"num_gpus": 1} if on_gpu else {"num_cpus": cores}
        kind = ray.remote(**resources, max_restarts=0, max_task_retries=0)(RemoteDrawer)
        yield partial(Actor, kind, partial(make_drawer, threads=cores))
    finally:
        if ours:
            ray.shutdown()


def _connect(address: str | None, cores: int) -> None:
    """Starts or joins a cluster, with no log, no dashboard and no usage report to Ray's makers."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    own: dict[str, Any] = {"num_cpus": cores, "object_store_memory": STORE_BYTES, "include_dashboard": False}
    before = signal.getsignal(signal.SIGTERM)
    try:
        host, _, port = (address or "").rpartition(":")
        if port.isdecimal() and "/" not in host:
            socket.create_connection((host, int(port)), ANSWER_SECONDS).close()  # Ray itself would try for minutes
        ray.init(address or "local", log_to_driver=False, logging_level="ERROR", **({} if address else own))
    except (RayError, OSError, OverflowError, RuntimeError, ValueError) as error:
        where = f"no Ray cluster at {address}" if address else "Ray does not start"
        raise ValueError(f"{where}: {' '.join(str(error).split()):.200}") from None
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)  # Ray installs its own, which would end us at once


def _share(count: int) -> int:
    """Cores of each of `count` actors, which are spread over machines with as many as the smallest of them."""
    cores = [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]]
    return max(1, min(cores) // -(-count // len(cores)))
