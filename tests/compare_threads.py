"""How long threads that wait should spin: sdlite under several OpenMP settings, in turn, each in a fresh process.

    python tests/compare_threads.py [--busy N] [--rounds 5]

--busy N: N busy loops run beside it; 0 is for an idle machine. Prints for each setting the median (least to most) of
the wall and CPU seconds of `sdlite generate` from start to file.
"""

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time

SETTINGS = {
    "libgomp's default": {"GOMP_SPINCOUNT": "300000"},  # its own value; without one sdlite sets 10000
    "spin count 1000": {"GOMP_SPINCOUNT": "1000"},
    "spin count 10000 (sdlite)": {"GOMP_SPINCOUNT": "10000"},
    "passive": {"OMP_WAIT_POLICY": "PASSIVE"},
    "one thread": {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"},
}
READ = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT")


def timed(setting: dict[str, str]) -> tuple[float, float]:
    """Wall and CPU seconds of one picture."""
    environment = {name: value for name, value in os.environ.items() if name not in READ} | setting
    before, begin = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "sdlite", "generate", "a red apple", "-q", "-o", folder]
        subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
    wall, after = time.perf_counter() - begin, resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--busy", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.2f} at the start, {options.busy} busy loops")
    loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(options.busy)]
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in SETTINGS}
    try:
        for _ in range(options.rounds):
            for name, setting in SETTINGS.items():
                found[name].append(timed(setting))
    finally:
        for loop in loops:
            loop.kill()
    for name, rows in found.items():
        wall, cpu = (f"{statistics.median(x):.2f} ({min(x):.2f} to {max(x):.2f})" for x in zip(*rows, strict=True))
        print(f"{name:26} wall {wall} s, CPU {cpu} s")


if __name__ == "__main__":
    main()
