"""Learning curves of a run's log, as a PNG, and with the previews as one page that plays them like a film."""

import base64
import io
import json
from collections import defaultdict
from functools import cache
from pathlib import Path

from PIL import Image

from sdlite.files import atomic_file, write_file

SETTINGS = {"samples", "lr", "samples_per_second", "time", "changed"}  # of a line; the rest are figures
FILM_WIDTH = 1_000  # pixels of a frame at most, so that a page of 50 frames stays below 10 MB
PAGE = Path(__file__).with_name("progress.html")


def read_log(log: Path) -> dict[str, list[tuple[int, float]]]:
    """Each figure of log.jsonl with the samples at which it was taken; an incomplete last line is ignored."""
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
    """Draws one panel per unit: all losses share one, every other figure has its own."""
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


def draw_progress(out: Path) -> None:
    """Writes OUT/curves.png, and OUT/progress.html, one file that contains the curves and all previews."""
    draw_curves(out / "log.jsonl", out / "curves.png")
    previews = sorted(out.glob("preview-*.png"))
    if previews:
        frames = [(int(path.stem.rpartition("-")[2]), _frame(path, path.stat().st_mtime_ns)) for path in previews]
        curves = _inline((out / "curves.png").read_bytes(), "png")
        page = PAGE.read_text().replace("{{curves}}", curves).replace("{{frames}}", json.dumps(frames))
        write_file(out / "progress.html", page.encode(), force=True)


@cache
def _frame(path: Path, changed: int) -> str:
    """An image as a data URL. changed: when the file was; the same file is encoded once only."""
    with Image.open(path) as image:
        small = image.convert("RGB")
    small.thumbnail((FILM_WIDTH, FILM_WIDTH))
    stream = io.BytesIO()
    small.save(stream, "JPEG", quality=80)
    return _inline(stream.getvalue(), "jpeg")


def _inline(data: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
