"""How many threads a command computes with, and how they wait for each other; tests/compare_threads.py measures it."""

import os
from collections.abc import Iterator
from math import ceil
from pathlib import Path

# Turns of the loop in which the threads of GCC's OpenMP (in PyTorch's wheels for Linux) wait for the last one, before
# they sleep. 10,000 bridge the gap between two operations and lose little time if another program has a thread's core.
# GCC's default is 300,000, or 1,000 with more threads than cores.
SPIN_COUNT = "10000"
CGROUPS, OWN_CGROUP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def spin_briefly() -> None:
    """Must come before torch is imported: OpenMP reads the environment once. Keeps the user's own settings."""
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
        os.environ["GOMP_SPINCOUNT"] = SPIN_COUNT


def use_threads(asked: int | None = None, cgroups: Path = CGROUPS, own: Path = OWN_CGROUP) -> None:
    """Makes PyTorch compute with `asked` threads, or else with one for each core that this process may use.

    PyTorch counts the cores of the machine, not a container's share of them; threads beyond that share only wait for
    each other. OMP_NUM_THREADS, where the user has set it, is obeyed.
    """
    import torch

    if asked is not None:
        torch.set_num_threads(asked)
    elif "OMP_NUM_THREADS" not in os.environ:
        allowed = [torch.get_num_threads(), *_quotas(cgroups, own)]
        if hasattr(os, "sched_getaffinity"):  # Linux: the cores that taskset or a container's cpuset leaves
            allowed.append(len(os.sched_getaffinity(0)))
        torch.set_num_threads(max(1, ceil(min(allowed))))


def _quotas(cgroups: Path, own: Path) -> Iterator[float]:
    """Limits on CPU time, in cores, of the control groups that this process is in; each holds for those below it.

    A line of /proc/self/cgroup is "0::/path" in version 2 and "4:cpu,cpuacct:/path" in version 1. In a container the
    path is often the host's, of which only the top is there to be read: the container's own group.
    """
    for line in own.read_text().splitlines() if own.is_file() else ():
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        names = ("cpu.cfs_quota_us", "cpu.cfs_period_us") if controllers else ("cpu.max",)
        for group in (Path(path), *Path(path).parents):
            for mount in {controllers, "cpu"} if controllers else ("unified", ""):
                files = [cgroups / mount / group.relative_to("/") / name for name in names]
                values = " ".join(file.read_text() for file in files if file.is_file()).split()
                if len(values) == 2 and values[0] not in ("max", "-1"):
                    yield int(values[0]) / int(values[1])
