"""Measures offline what a model draws, against held-out pictures.

For held-out pairs of concept and style, the judge gives the R-precision of the concept (is it the likeliest of 100
candidates, and of all?) and the accuracy of the style. The same figures for the real held-out pictures are the ceiling,
those for drawn pictures with shuffled captions the floor. MMD compares sets of pictures; the copy rate looks for
training pictures that the model drew again.
"""

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
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
from sdlite.pipeline import Pipeline
from sdlite.request import Request
from sdlite.training.codec import psnr
from sdlite.training.datasets.augment import a
from sdlite.training.datasets.data import load_pixels, on_white
from sdlite.training.datasets.folder import fingerprints, read_records
from sdlite.training.evaluation.judge import JudgeTask, judged, load_judge
from sdlite.training.evaluation.probes import NOUNS, probes, right_and_chance
from sdlite.training.loop import TrainConfig, fit

CANDIDATES = 100  # of R-precision, as in published text-to-image evaluations
BATCH = 16
RESAMPLES = 1_000  # of the bootstrap
BLANK = 0.02  # deviation of a picture's values, of a range of 2, below which nothing is on it
JUDGE_SETTINGS = {"batch_size": 64, "lr": 2e-3, "warmup": 3_000, "half_life": 20_000}


def interval(values: Tensor, seed: int = 0) -> tuple[float, float, float]:
    """Mean and the ends of its 95 % bootstrap interval (percentiles)."""
    generator = np.random.default_rng(seed)
    array = values.double().numpy()
    means = array[generator.integers(0, len(array), (RESAMPLES, len(array)))].mean(1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(array.mean()), float(low), float(high)


def ranks(logits: Tensor, wanted: Tensor, candidates: int, seed: int = 0) -> Tensor:
    """Rank, from 0, of the wanted class among itself and candidates - 1 others of each row. (B, N), (B,) -> (B,)"""
    generator = np.random.default_rng(seed)
    rows = []
    for row, label in zip(logits, wanted.tolist(), strict=True):
        others = np.delete(np.arange(len(row)), label)
        chosen = generator.choice(others, min(candidates, len(row)) - 1, replace=False)
        rows.append(int((row[torch.from_numpy(chosen)] >= row[label]).sum()))
    return torch.tensor(rows)


def mmd(first: Tensor, second: Tensor) -> float:
    """Unbiased squared maximum mean discrepancy, KID's cubic kernel (Binkowski et al. 2018). (N, D), (M, D)"""
    n, m, d = len(first), len(second), first.shape[1]

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        return (x @ y.T / d + 1) ** 3

    own = [
        (k.sum() - k.diagonal().sum()) / (c * (c - 1))
        for k, c in ((kernel(first, first), n), (kernel(second, second), m))
    ]
    return float(own[0] + own[1] - 2 * kernel(first, second).mean())


def named(logits: tuple[Tensor, Tensor], wanted: Tensor) -> dict[str, tuple[float, float, float]]:
    """R-precision and style accuracy of pictures whose (concept, style) is `wanted`, (B, 2)."""
    concepts, styles = logits
    among, total = ranks(concepts, wanted[:, 0], CANDIDATES), ranks(concepts, wanted[:, 0], concepts.shape[1])
    return {
        "concept_at_1_of_100": interval(among < 1),
        "concept_at_5_of_100": interval(among < 5),
        "concept_at_1_of_all": interval(total < 1),
        "concept_at_5_of_all": interval(total < 5),
        "style": interval(styles.argmax(1) == wanted[:, 1]),
    }


def named_nouns(logits: Tensor, right: Sequence[Collection[int]], seed: int = 0) -> int:
    """How many pictures have one of their right concepts as the likeliest of it and 99 wrong ones. (B, N)"""
    count = 0
    for row, concepts in zip(logits, right, strict=True):
        if concepts:
            best = max(concepts, key=lambda concept: float(row[concept]))
            wrong = torch.tensor([i not in concepts or i == best for i in range(len(row))])
            label = wrong[:best].sum()
            count += int(ranks(row[wrong][None], label[None], CANDIDATES, seed)[0] < 1)
    return count


def nearest(images: Tensor, references: Tensor) -> Tensor:
    """Distance of each image, at 32 pixels, to the nearest reference: mean absolute difference. (B,)"""
    small, others = (
        torch.nn.functional.interpolate(x, size=(32, 32), mode="area").flatten(1) for x in (images, references)
    )
    return torch.cdist(small, others, p=1).min(1).values / small.shape[1]


def draw(pipe: Pipeline, prompts: Sequence[str], fields: Mapping[str, Any], tell: Callable[[int, int], None]) -> Tensor:
    """(B, 3, H, W) in [-1, 1], prompt i with seed i. tell: called with the pictures drawn and those in all."""
    requests = [Request(prompt=prompt, seed=i, **fields) for i, prompt in enumerate(prompts)]
    drawn: list[Image] = []
    for i in range(0, len(requests), BATCH):
        tell(i, len(requests))
        drawn += pipe.generate(requests[i : i + BATCH], progress=False)
    tell(len(requests), len(requests))
    return (
        torch.from_numpy(np.stack([np.asarray(picture, np.float32) for picture in drawn])).permute(0, 3, 1, 2) / 127.5
        - 1
    )


@torch.no_grad()
def evaluate(
    model: str,
    data: Path,
    out: Path,
    *,
    pictures: int,
    minutes: float,
    fields: Mapping[str, Any],
    allow_links: Sequence[Path] = (),
    progress: Callable[[str, int, int], None] = lambda *_: None,
) -> str:
    """Writes report.json, report.md and sheets into `out`, which keeps the judge; returns the table in Markdown.

    allow_links: as for Pipeline.load. progress: called with what is drawn, the pictures drawn of it and those in all.
    """
    _check_judge(out / "judge", data)
    pipe = Pipeline.load(model, allow_links=allow_links)  # before the judge takes its minutes
    if not (out / "judge" / "export").is_dir():
        with torch.enable_grad():
            fit(JudgeTask(data), TrainConfig(minutes=minutes, **JUDGE_SETTINGS), out / "judge")
    judge, names, styles, digest = load_judge(out / "judge" / "export")
    trained = read_records(data)
    held = [r for r in read_records(data, "validation") if r["concept"] in names and r["style"] in styles]
    held = [held[i] for i in np.random.default_rng(0).permutation(len(held))[:pictures]]
    if len(held) < 2:
        raise ValueError(f"{data} has no held-out pairs; make it with `sdlite data emoji`")
    wanted = torch.tensor([[names.index(r["concept"]), styles.index(r["style"])] for r in held])
    side = pipe.default_size[0]
    real = on_white(load_pixels(data, held, side))
    known = on_white(load_pixels(data, trained[:: max(1, len(trained) // 2000)], side))
    drawn = draw(pipe, [escaped(r["text"]) for r in held], fields, partial(progress, "held-out pairs"))
    decoded = torch.cat([pipe.codec.decode(pipe.codec.encode(part)) for part in torch.split(real, BATCH)])
    shuffled = wanted.roll(1, 0)
    rows = {
        "real": named(judge(real), wanted),
        "through the codec": named(judge(decoded), wanted),
        "drawn": named(judge(drawn), wanted),
        "shuffled": named(judge(drawn), shuffled),
    }
    nouns = {noun: {names.index(c) for c in right if c in names} for noun, right in NOUNS.items()}
    asked = probes()
    prompts = [a(noun) for noun in nouns] + [probe.prompt for probe in asked]
    free = draw(pipe, prompts, fields, partial(progress, "nouns and probes"))
    features = {name: judge.features(x) for name, x in (("real", real), ("drawn", drawn), ("known", known))}
    closest = nearest(drawn, known)
    figures = {
        "codec_psnr": psnr(decoded, real).mean().item(),
        "mmd_drawn_to_real": mmd(features["drawn"], features["real"]),
        "mmd_known_to_real": mmd(features["known"], features["real"]),
        "copy_rate": (closest < nearest(real, known).quantile(0.01)).float().mean().item(),
        "blank_rate": (drawn.flatten(1).std(1) < BLANK).float().mean().item(),
        "nouns_of_50": named_nouns(judge(free[: len(nouns)])[0], list(nouns.values())),
    }
    for kind, (right, chance) in right_and_chance(to_pil(free[len(nouns) :]), asked).items():
        figures |= {f"{kind}_right": right, f"{kind}_by_chance": chance}
    report = {
        "model": pipe.name, "model_hash": pipe.model_hash, "judge": digest, "pictures": len(held), **dict(fields),
        "judged": rows, "measured": figures,
    }  # fmt: skip
    text = table(report)
    write_file(out / "report.json", (json.dumps(report, indent=1) + "\n").encode(), force=True)
    write_file(out / "report.md", f"{text}\n".encode(), force=True)
    save_picture(contact_sheet(to_pil(drawn), [r["text"] for r in held]), out / "drawn.png", force=True)
    save_picture(contact_sheet(to_pil(free), prompts), out / "free.png", force=True)
    return text


def _check_judge(run: Path, data: Path) -> None:
    """Raises ValueError if a run that trained a judge was of other data; older runs do not say."""
    if not (run / "export").is_dir() or not (run / "config.json").is_file():
        return
    stated = read_json(run / "config.json")
    for name, value in fingerprints(data, judged(data)).items():
        if stated.get(name, value) != value:
            raise ValueError(f"{run} holds a judge that was trained on other {name}; give another --output")


def table(report: Mapping[str, Any]) -> str:
    """The report in Markdown: means in per cent with 95 % intervals, then the other figures."""
    judged = report["judged"]
    heads = list(judged["real"])
    lines = ["| pictures | " + " | ".join(h.replace("_", " ") for h in heads) + " |", "|---" * (len(heads) + 1) + "|"]
    for name, row in judged.items():
        cells = [f"{100 * mean:.0f} ({100 * low:.0f}-{100 * high:.0f})" for mean, low, high in row.values()]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    lines += ["", *(f"- {name.replace('_', ' ')}: {value:.4g}" for name, value in report["measured"].items())]
    return "\n".join([*lines, f"- {report['pictures']} held-out pairs, judge {report['judge'][:12]}"])
