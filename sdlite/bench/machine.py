"""The machine that is measured, and the cost of whole processes on it."""

import os
import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from sdlite.package import __version__

MAX_LOAD = 0.3  # of the cores, on average over the last minute: above it a timing says more about the others
# Linux counts into a child's peak what its parent held at the fork, so a small process starts the child, not this one.
LAUNCHER = """
import resource, subprocess, sys, time
start = time.perf_counter()
code = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL).returncode
print(time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
sys.exit(code)
"""


def machine_load() -> float:
    """Processes that wanted a core, on average over the last minute; ask before you load a model."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0


def machine_facts(device: torch.device, load: float) -> dict[str, Any]:
    """What a timing was measured on. publishable: whether the machine was idle enough. load: from `machine_load`."""
    cores = os.cpu_count() or 1
    names = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    cpu = next((line.split(": ")[1] for line in names if line.startswith("model name")), platform.processor())
    place = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu
    return {
        "machine": f"{place}, {cores} cores, {platform.system()}",
        "threads": torch.get_num_threads(),
        "load": round(load, 2),
        "publishable": load <= MAX_LOAD * cores,
        "sdlite": __version__,
        **{name: version(name) for name in ("torch", "diffusers", "transformers")},
    }


def run_python(*arguments: str) -> tuple[float, float]:
    """(seconds, peak resident bytes) of a Python process with as many threads as this one, which must succeed."""
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    launch = [sys.executable, "-c", LAUNCHER, sys.executable, *arguments]
    result = subprocess.run(launch, capture_output=True, text=True, check=False, env=environment)
    if result.returncode:
        raise RuntimeError(f"{arguments[:3]} failed: {result.stderr[-500:]}")
    seconds, peak = map(float, result.stdout.split())
    return seconds, peak * (1 if sys.platform == "darwin" else 1024)
