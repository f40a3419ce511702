"""Learning curves of a run's log, as a PNG, and with the previews as one page that plays them like a film."""

import base64
import io
import json
from collections import defaultdict
from pathlib import Path

from PIL import Image

from sdlite.files import atomic_file, write_file

SETTINGS = {"samples", "lr", "samples_per_second", "time", "changed"}  # of a line; the rest are figures


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


FILM_WIDTH = 1_000  # pixels of a frame at most, so that a page of 50 frames stays below 10 MB
PAGE = """<!doctype html>
<meta charset="utf-8"><title>%(title)s</title>
<style>body{font:16px system-ui;margin:1em auto;max-width:1100px}img{max-width:100%%}input{width:70%%}</style>
<h1>%(title)s</h1>
<p><button id="play">Play</button> <input id="at" type="range" min="0" value="0"> <output id="said"></output></p>
<img id="frame" alt="previews of the run">
<h2>Curves</h2><img src="%(curves)s" alt="loss and figures over the samples">
<script>
const frames = %(frames)s
const at = document.getElementById("at"), play = document.getElementById("play")
at.max = frames.length - 1
function show() {
  const [samples, picture] = frames[at.value]
  document.getElementById("frame").src = picture
  document.getElementById("said").textContent = samples.toLocaleString() + " samples"
}
let timer = 0
play.onclick = () => {
  play.textContent = timer ? "Play" : "Stop"
  timer = timer ? clearInterval(timer) : setInterval(() => { at.value = (+at.value + 1) %% frames.length; show() }, 400)
}
at.oninput = show
at.value = frames.length - 1
show()
</script>
"""


def draw_progress(out: Path) -> None:
    """Writes OUT/curves.png, and OUT/progress.html, one file that contains the curves and all previews."""
    draw_curves(out / "log.jsonl", out / "curves.png")
    previews = sorted(out.glob("preview-*.png"))
    if not previews:
        return
    frames = json.dumps([(int(path.stem.rpartition("-")[2]), _frame(path)) for path in previews])
    curves = _inline((out / "curves.png").read_bytes(), "png")
    page = PAGE % {"title": "Progress of a training run", "frames": frames, "curves": curves}
    write_file(out / "progress.html", page.encode(), force=True)


def _frame(path: Path) -> str:
    with Image.open(path) as image:
        small = image.convert("RGB")
    small.thumbnail((FILM_WIDTH, FILM_WIDTH))
    stream = io.BytesIO()
    small.save(stream, "JPEG", quality=80)
    return _inline(stream.getvalue(), "jpeg")


def _inline(data: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
