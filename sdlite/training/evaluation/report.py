"""Measures offline what a model draws, against held-out images.

For held-out pairs of concept and style, the judge gives the R-precision of the concept (is it the likeliest of 100
candidates, and of all?) and the accuracy of the style. The same figures for the real held-out images are the ceiling,
those for drawn images with shuffled captions the floor. MMD compares sets of images; the copy rate looks for
training images that the model drew again.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor

from sdlite.files import read_json, write_file
from sdlite.images.files import save_picture
from sdlite.images.pixels import to_pil
from sdlite.images.sheet import contact_sheet
from sdlite.models.prompt import escaped
from sdlite.pipeline import Finished, Pipeline
from sdlite.request import Request
from sdlite.training.codec import psnr
from sdlite.training.datasets.captions import with_article
from sdlite.training.datasets.folder import Records, fingerprints, read_records
from sdlite.training.datasets.pixels import load_pixels, on_white
from sdlite.training.evaluation.figures import mmd, named, named_nouns, nearest
from sdlite.training.evaluation.judge import JudgeTask, judged, load_judge
from sdlite.training.evaluation.probes import NOUNS, probes, right_and_chance
from sdlite.training.loop import fit
from sdlite.training.options import EvaluationOptions, TrainConfig

BATCH = 16
KNOWN = 2_000  # images of the training data, about, that drawn ones are compared with
BLANK = 0.02  # deviation of an image's values, of a range of 2, below which nothing is on it
Progress = Callable[[str, int, int], None]


@torch.no_grad()
def evaluate(
    model: str,
    data: Path,
    out: Path,
    options: EvaluationOptions,
    *,
    allow_links: Sequence[str | Path] = (),
    progress: Progress = lambda *_: None,
) -> str:
    """Writes report.json, report.md and sheets into `out`, which keeps the judge; returns the table in Markdown.

    allow_links: as for Pipeline.load. progress: called with what is drawn, how many are done and how many there are.
    """
    _check_judge(out / "judge", data)
    pipe = Pipeline.load(model, allow_links=allow_links)  # before the judge takes its minutes
    if not (out / "judge" / "export").is_dir():
        with torch.enable_grad():
            fit(JudgeTask(data), TrainConfig(batch_size=64, lr=2e-3, minutes=options.minutes), out / "judge")
    judge, names, styles, digest = load_judge(out / "judge" / "export")
    held, trained = _held_out(data, names, styles, options.images), read_records(data)
    wanted = torch.tensor([[names.index(r["concept"]), styles.index(r["style"])] for r in held])
    side = pipe.default_size[0]
    real = on_white(load_pixels(data, held, side))
    known = on_white(load_pixels(data, trained[:: max(1, len(trained) // KNOWN)], side))
    fields = options.model_dump(include={"steps", "guidance_scale"})
    drawn = draw(pipe, [escaped(r["text"]) for r in held], fields, "held-out pairs", progress)
    decoded = torch.cat([pipe.codec.decode(pipe.codec.encode(part)) for part in torch.split(real, BATCH)])
    rows = {
        "real": named(judge(real), wanted),
        "through the codec": named(judge(decoded), wanted),
        "drawn": named(judge(drawn), wanted),
        "shuffled": named(judge(drawn), wanted.roll(1, 0)),
    }
    nouns = {noun: {names.index(c) for c in right if c in names} for noun, right in NOUNS.items()}
    asked = probes()
    prompts = [with_article(noun) for noun in nouns] + [probe.prompt for probe in asked]
    free = draw(pipe, prompts, fields, "nouns and probes", progress)
    features = [judge.features(x) for x in (real, drawn, known)]
    figures = {
        "codec_psnr": psnr(decoded, real).mean().item(),
        "mmd_drawn_to_real": mmd(features[1], features[0]),
        "mmd_known_to_real": mmd(features[2], features[0]),
        "copy_rate": (nearest(drawn, known) < nearest(real, known).quantile(0.01)).float().mean().item(),
        "blank_rate": (drawn.flatten(1).std(1) < BLANK).float().mean().item(),
        "nouns_of_50": named_nouns(judge(free[: len(nouns)])[0], list(nouns.values())),
    }
    for kind, (right, chance) in right_and_chance(to_pil(free[len(nouns) :]), asked).items():
        figures |= {f"{kind}_right": right, f"{kind}_by_chance": chance}
    facts = {"model": pipe.name, "model_hash": pipe.model_hash, "judge": digest, "pictures": len(held), **fields}
    report = facts | {"judged": rows, "measured": figures}
    text = table(report)
    write_file(out / "report.json", (json.dumps(report, indent=1) + "\n").encode(), force=True)
    write_file(out / "report.md", f"{text}\n".encode(), force=True)
    for name, images, captions in (("drawn", drawn, [r["text"] for r in held]), ("free", free, prompts)):
        save_picture(contact_sheet(to_pil(images), captions), out / f"{name}.png", force=True)
    return text


def _held_out(data: Path, names: list[str], styles: list[str], count: int) -> Records:
    """Held-out pairs that the judge can name, in a random order. Raises ValueError if there are none."""
    held = [r for r in read_records(data, "validation") if r["concept"] in names and r["style"] in styles]
    if len(held) < 2:
        raise ValueError(f"{data} has no held-out pairs; make it with `sdlite data emoji`")
    return [held[i] for i in np.random.default_rng(0).permutation(len(held))[:count]]


def draw(pipe: Pipeline, prompts: Sequence[str], fields: Mapping[str, Any], what: str, progress: Progress) -> Tensor:
    """(B, 3, H, W) in [-1, 1], prompt i with seed i. what: for progress."""
    requests = [Request(prompt=prompt, seed=i, **fields) for i, prompt in enumerate(prompts)]
    pictures: dict[int, Image] = {}
    progress(what, 0, len(requests))
    for event in pipe.draw(pipe.jobs(requests), BATCH):
        if isinstance(event, Finished):
            pictures[event.index] = event.picture
            progress(what, len(pictures), len(requests))
    arrays = [np.asarray(pictures[i], np.float32) for i in range(len(requests))]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2) / 127.5 - 1


def _check_judge(run: Path, data: Path) -> None:
    """Raises ValueError if a run that trained a judge was of other data; older runs do not say."""
    if not (run / "export").is_dir() or not (run / "config.json").is_file():
        return
    stated = read_json(run / "config.json")
    for name, value in fingerprints(data, judged(data)).items():
        if stated.get(name, value) != value:
            what = name.replace("pictures", "images")
            raise ValueError(f"{run} holds a judge that was trained on other {what}; give another --output")


def table(report: Mapping[str, Any]) -> str:
    """The report in Markdown: means in per cent with 95 % intervals, then the other figures."""
    judged = report["judged"]
    heads = list(judged["real"])
    lines = ["| images | " + " | ".join(h.replace("_", " ") for h in heads) + " |", "|---" * (len(heads) + 1) + "|"]
    for name, row in judged.items():
        cells = [f"{100 * mean:.0f} ({100 * low:.0f}-{100 * high:.0f})" for mean, low, high in row.values()]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    lines += ["", *(f"- {name.replace('_', ' ')}: {value:.4g}" for name, value in report["measured"].items())]
    return "\n".join([*lines, f"- {report['pictures']} held-out pairs, judge {report['judge'][:12]}"])
