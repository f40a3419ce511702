"""The judge: a classifier that names what an image shows, for evaluation only.

It predicts concept and style. Its architecture (strided convolutions on 48 pixels, no transformer, no words) and its
seed differ from everything in the generator. It is trained on train/ alone and frozen before it sees an image that a
model drew. Every report holds its hash.
"""

from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sdlite.config import Record
from sdlite.files import checksum
from sdlite.training.datasets.draws import sample_generator
from sdlite.training.datasets.folder import Records, fingerprints, read_records
from sdlite.training.datasets.pixels import composed, load_pixels, on_white
from sdlite.training.exports import load_export, save_export
from sdlite.training.networks import draw_weights
from sdlite.training.state import Task

SIDE = 48  # pixels that it sees
WIDTHS = (3, 32, 64, 128, 192)
SMOOTHING = 0.1  # of labels


def judged(data: Path) -> Records:
    """The records that a judge can learn from. Raises ValueError if there are none."""
    records = [record for record in read_records(data) if "concept" in record and "style" in record]
    if not records:
        raise ValueError(f"{data} has no concepts and styles to judge by; make it with `sdlite data emoji`")
    return records


class Names(Record):
    """judge.json: what the outputs of the judge stand for."""

    concepts: list[str]
    styles: list[str]


class Judge(nn.Module):
    """(B, 3, 48, 48) in [-1, 1] to logits of concepts (B, N) and styles (B, M)."""

    def __init__(self, names: Names) -> None:
        super().__init__()
        self.names = names
        layers: list[nn.Module] = []
        for before, after in pairwise(WIDTHS):
            layers += [nn.Conv2d(before, after, 3, 2, 1), nn.BatchNorm2d(after), nn.ReLU()]
        self.body = nn.Sequential(*layers, nn.Flatten(), nn.Dropout(0.2), nn.Linear(WIDTHS[-1] * 9, 256), nn.ReLU())
        self.concepts, self.styles = nn.Linear(256, len(names.concepts)), nn.Linear(256, len(names.styles))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = self.features(images)
        return self.concepts(features), self.styles(features)

    def features(self, images: Tensor) -> Tensor:
        """(B, 256) of images of any size."""
        return self.body(F.interpolate(images, size=(SIDE, SIDE), mode="area"))


class JudgeTask(Task):
    """Classification of the train split, with random backgrounds, shifts and mirroring."""

    def __init__(self, data: Path, seed: int = 1_000_003) -> None:
        super().__init__()
        records = judged(data)
        self.settings = fingerprints(data, records)
        concepts, styles = (sorted({record[name] for record in records}) for name in ("concept", "style"))
        self.labels = torch.tensor([[concepts.index(r["concept"]), styles.index(r["style"])] for r in records])
        self.size = len(records)
        self.pixels = load_pixels(data, records, SIDE)
        self.seed = seed
        self.judge = Judge(Names(concepts=concepts, styles=styles))
        draw_weights(self.judge, seed, lambda _, fan_in: (2 / fan_in) ** 0.5)  # He et al. 2015

    def forward(self, indices: Tensor, numbers: Tensor) -> Tensor:
        images = torch.cat([self._sample(i, int(n)) for i, n in zip(indices, numbers, strict=True)])
        loss = torch.zeros(())
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed + int(numbers[0]))  # of the dropout
            named = self.judge(images)
        for logits, labels in zip(named, self.labels[indices].T, strict=True):
            loss = loss + F.cross_entropy(logits, labels, label_smoothing=SMOOTHING)
        return loss

    def _sample(self, index: Tensor, number: int) -> Tensor:
        generator = sample_generator(self.seed, number)
        colour = torch.ones(1, 3) if generator.random() < 0.7 else torch.from_numpy(generator.random((1, 3))).float()
        image = composed(self.pixels[index][None], colour)
        image = image.flip(-1) if generator.random() < 0.5 else image
        dy, dx = generator.integers(-4, 5, 2)
        return image.roll((int(dy), int(dx)), (-2, -1))

    def evaluate(self) -> dict[str, float]:
        logits, styles = self.judge(on_white(self.pixels[:512]))
        wanted = self.labels[:512]
        return {
            "trained_concepts": (logits.argmax(1) == wanted[:, 0]).float().mean().item(),
            "trained_styles": (styles.argmax(1) == wanted[:, 1]).float().mean().item(),
        }

    def preview(self, path: Path) -> None:
        """Nothing to show."""

    def export(self, folder: Path) -> None:
        save_export("judge", self.judge, self.judge.names, folder)


def load_judge(folder: Path) -> tuple[Judge, list[str], list[str], str]:
    """The frozen judge, its concepts, its styles, and the sha256 of its weights."""
    judge = load_export("judge", folder, Names, Judge)
    digest = checksum(folder / "judge.safetensors")
    return judge, judge.names.concepts, judge.names.styles, digest
