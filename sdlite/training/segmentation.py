"""The segmentation task: images and the class of each of their pixels; pairs.py says how a folder holds them.

A sample is a square cut out of an image at random, in one of its 8 rotations and reflections. Around the square the
network sees the rest of the image; beyond the image's edge it sees the mirrored image.
"""

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from sdlite.images.files import save_picture
from sdlite.images.sheet import contact_sheet
from sdlite.segmentation.losses import combined
from sdlite.segmentation.metrics import boundary_counts, boundary_f1, confusion, iou, mean_iou
from sdlite.segmentation.models import SegmentationUNet
from sdlite.segmentation.pixels import mask_image
from sdlite.segmentation.segmenter import FCNPlan, Plan, Segmenter, SegmenterConfig, UNetPlan, build
from sdlite.training.datasets.draws import sample_generator
from sdlite.training.datasets.folder import MASKED, fingerprints, read_records
from sdlite.training.datasets.pairs import IGNORED, Pair, channels_of, labels_of
from sdlite.training.options import SegmentationOptions
from sdlite.training.state import Task

SHOWN = 8  # images of the preview


class SegmentationTask(Task):
    """Classes of the pixels of a data folder."""

    def __init__(self, data: Path, config: SegmenterConfig, options: SegmentationOptions) -> None:
        super().__init__()
        records = read_records(data, fields=MASKED)
        held_out = read_records(data, "validation", MASKED) or read_records(data, "test", MASKED) or records
        self.config, self.seed, self.terms = config, options.seed, options.terms
        self.settings = fingerprints(data, records, MASKED) | {
            "network": config.model_dump(mode="json"),
            **options.model_dump(mode="json", include={"terms", "class_weights"}),
        }
        class_weights = options.class_weights
        self.weight = None if class_weights is None else _weights(class_weights, config.network.num_classes)
        labels = labels_of(data)
        self.notes = list(labels.notes)
        self.settings["white_is_class_1"] = labels.white
        self.size = len(records)
        channels = config.network.in_channels
        self.pairs, self.held_out = (
            [Pair(data, record, channels, labels.white) for record in part] for part in (records, held_out)
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(options.seed)
            self.network = build(config.network)
        self.margin, self.side = 0, config.tile
        if isinstance(self.network, SegmentationUNet) and self.network.valid:
            self.margin = self.network.margin // 2
            self.side = self.network.input_side(config.tile + 2 * self.margin) - 2 * self.margin

    def forward(self, indices: Tensor, numbers: Tensor) -> Tensor:
        samples = [
            self.pairs[int(i)].sample(self.side, self.margin, sample_generator(self.seed, int(n)))
            for i, n in zip(indices, numbers, strict=True)
        ]
        images, target = (torch.stack(part) for part in zip(*samples, strict=True))  # (B, C, h, w), (B, side, side)
        device = next(self.parameters()).device
        logits = self.network(images.to(device))  # (B, K, side, side)
        weight = None if self.weight is None else self.weight.to(device)
        return combined(logits, target.to(device), terms=self.terms, weight=weight, ignore_index=IGNORED)

    def evaluate(self) -> dict[str, float]:
        return figures(Segmenter(self.network, self.config), self.held_out)

    def preview(self, path: Path) -> None:
        segmenter = Segmenter(self.network, self.config)
        rows: list[Image.Image] = []
        for pair in self.held_out[:SHOWN]:
            shown = pair.pixels.float() / max(float(pair.pixels.max()), 1.0) * 255
            rgb = shown.byte().expand(3, -1, -1).movedim(0, -1).contiguous()
            found = segmenter.probabilities(pair.pixels).argmax(0)
            rows += [Image.fromarray(rgb.numpy()), mask_image(pair.mask).convert("RGB")]
            rows.append(mask_image(found).convert("RGB"))
        save_picture(contact_sheet(rows, columns=3), path, force=True)

    def export(self, folder: Path) -> None:
        Segmenter(self.network, self.config).save(folder)


def _weights(weights: Sequence[float], classes: int) -> Tensor:
    if len(weights) != classes or not all(math.isfinite(w) and w >= 0 for w in weights) or not any(weights):
        shown = ",".join(f"{weight:g}" for weight in weights)
        raise ValueError(f"class_weights={shown} must be {classes} numbers from 0 on, one for each class from 0 on")
    return torch.tensor(weights, dtype=torch.float32)


def figures(segmenter: Segmenter, pairs: list[Pair]) -> dict[str, float]:
    """Mean IoU, IoU and boundary F1 (2 pixels) of everything but class 0, over whole images."""
    num_classes = segmenter.config.network.num_classes
    counts = torch.zeros(num_classes, num_classes, dtype=torch.int64)
    edges = torch.zeros(num_classes, 4, dtype=torch.int64)
    for pair in pairs:
        found = segmenter.probabilities(pair.pixels).argmax(0).cpu()[None]
        target = pair.mask.long()[None]
        counts += confusion(found, target, num_classes, IGNORED)
        edges += boundary_counts(found, target, num_classes, ignore_index=IGNORED)
    return {
        "mean_iou": mean_iou(counts).item(),
        "iou": iou(counts)[1:].nanmean().item(),
        "boundary_f1": boundary_f1(edges)[1:].nanmean().item(),
    }


def plan_for(data: Path, arch: str) -> SegmenterConfig:
    """A network for a data folder that trains on a CPU in minutes; channels and classes are those of its files."""
    unet = UNetPlan(
        in_channels=channels_of(data),
        num_classes=labels_of(data).classes,
        depth=3,
        base_width=16,
        padding="same",
        batch_norm=True,
    )
    return SegmenterConfig(network=equal_fcn(unet) if arch == "fcn" else unet, tile=96)


def parameters(plan: Plan) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in build(plan).parameters())


def equal_fcn(plan: UNetPlan) -> FCNPlan:
    """The FCN-8s whose number of parameters is nearest to that of a UNet."""
    want = parameters(plan)
    common = {"in_channels": plan.in_channels, "num_classes": plan.num_classes, "batch_norm": plan.batch_norm}
    fcns = [FCNPlan(base_width=width, **common) for width in range(1, plan.base_width * 4)]
    return min(fcns, key=lambda fcn: abs(parameters(fcn) - want))


def make_task(data: Path, out: Path, options: SegmentationOptions) -> SegmentationTask:
    """The task of `sdlite train segmentation`."""
    return SegmentationTask(data, plan_for(data, options.arch), options)
