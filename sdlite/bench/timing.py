"""Timings of sides that take turns, the ratios within each pair, and their table."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

MIN_SECONDS = 0.2  # of one timing; shorter calls are repeated
Timings = dict[str, list[float]]


def alternate(sides: dict[str, Callable[[int], object]], runs: int) -> Timings:
    """Seconds per call. The calls get a running number.

    The first call of each side warms up and sets how many calls make a timing long enough; who goes first changes every
    pair.
    """
    first = max(seconds(call, range(1)) for call in sides.values())
    repeats = max(1, int(MIN_SECONDS / first))
    timings: Timings = {side: [] for side in sides}
    for run in range(runs):
        for side in list(sides)[:: -1 if run % 2 else 1]:
            numbers = range(1 + run * repeats, 1 + (run + 1) * repeats)
            timings[side].append(seconds(sides[side], numbers) / repeats)
    return timings


def seconds(call: Callable[[int], object], numbers: range) -> float:
    """Seconds of the calls together, until a GPU has finished them too."""
    start = time.perf_counter()
    for number in numbers:
        call(number)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def spent(call: Callable[[], object]) -> tuple[float, float]:
    """Seconds of all our threads on their cores, and on the wall."""
    cpu, wall = time.process_time(), time.perf_counter()
    call()
    return time.process_time() - cpu, time.perf_counter() - wall


def row(what: str, unit: str, timings: Timings, *, compare: bool = True) -> dict[str, Any]:
    """Medians per side. With two sides, the first divided by the second within each pair: below 1, it needs less."""
    ratio = None
    if compare and len(timings) == 2:
        ours, theirs = timings.values()
        pairs = [a / b for a, b in zip(ours, theirs, strict=True)]
        ratio = {"median": statistics.median(pairs), "least": min(pairs), "most": max(pairs)}
    medians = {side: statistics.median(values) for side, values in timings.items()}
    return {"what": what, "unit": unit, "median": medians, "ratio": ratio, "runs": timings}


def table(result: dict[str, Any]) -> str:
    """Markdown: the rows, then what they were measured on and whether they may be quoted."""
    sides = list(result["rows"][0]["median"])
    ratio = ["ratio: median (least to most)"] if any(row["ratio"] for row in result["rows"]) else []
    lines = [" | ".join(["", "", *sides, *ratio, ""]).strip(" ")]
    lines.append("|---" * (lines[0].count("|") - 1) + "|")
    for row in result["rows"]:
        cells = [row["what"], *(_shown(row["median"][side], row["unit"]) for side in sides)]
        if row["ratio"]:
            cells.append("{median:.3f} ({least:.3f} to {most:.3f})".format(**row["ratio"]))
        lines.append("| " + " | ".join(cells) + " |")
    facts = result["setting"] | result["machine"]
    lines += ["", ", ".join(f"{name}: {value}" for name, value in facts.items() if name != "publishable")]
    if not result["machine"]["publishable"]:
        lines.append("NOT TO BE QUOTED: the machine had other work when this started; run it again when it is idle.")
    return "\n".join(lines)


def _shown(value: float, unit: str) -> str:
    if unit == "bytes":
        return f"{value / 2**20:.0f} MiB"
    return f"{value:.3g} s" if value >= 1 else f"{value * 1e3:.3g} ms"
