"""Learning curves of a run's log, as a PNG."""

import json
from collections import defaultdict
from pathlib import Path

from sdlite.files import atomic_file

SETTINGS = {"samples", "lr", "samples_per_second", "time", "changed"}  # of a line; the rest are figures


def read_log(log: Path) -> dict[str, list[tuple[int, float]]]:
    """Each figure of log.jsonl with the samples at which it was taken; a torn last line is left out."""
    series: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for text in log.read_text().splitlines():
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            continue
        for name in line.keys() - SETTINGS:
            series[name].append((line["samples"], line[name]))
    return dict(sorted(series.items()))


def draw_curves(log: Path, path: Path) -> None:
    """One panel per unit: losses share theirs, every other figure has its own."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError('drawing curves needs matplotlib; install it with: pip install "sdlite[train]"') from None
    panels: dict[str, dict[str, list[tuple[int, float]]]] = defaultdict(dict)
    for name, points in read_log(log).items():
        panels["loss" if name.endswith("loss") else name][name] = points
    figure = Figure(figsize=(4 * max(len(panels), 1), 3), layout="constrained")
    axes = figure.subplots(1, max(len(panels), 1), squeeze=False)[0]
    for axis, (title, curves) in zip(axes, panels.items(), strict=False):
        for name, points in curves.items():
            axis.plot(*zip(*points, strict=True), marker="." if len(points) < 20 else "", label=name)
        axis.set(xlabel="samples", title=title)
        axis.legend()
    with atomic_file(path, force=True) as temporary:
        figure.savefig(temporary, dpi=100, format="png")
