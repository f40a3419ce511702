"""The segmentation task: pictures and the class of each of their pixels.

    DIR/train/metadata.jsonl   one line per picture: {"file_name": "a.png", "mask_file_name": "masks/a.png", ...}
    mask                       8 bits: the class number of each pixel, 255 where it does not count

validation/ or test/ is alike and measured. Hugging Face datasets loads the folder as "imagefolder".
A sample is a square cut out of a picture at random, in one of its 8 turns and reflections; where the network looks
further than the square, the picture goes on or is mirrored.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from sdlite.images import contact_sheet, decoded
from sdlite.segmentation.losses import combined
from sdlite.segmentation.metrics import boundary_counts, boundary_f1, confusion, iou, mean_iou
from sdlite.segmentation.models import SegmentationUNet
from sdlite.segmentation.segmenter import (
    FCNPlan,
    Plan,
    Segmenter,
    SegmenterConfig,
    UNetPlan,
    build,
    mask_image,
    mirrored,
    pixels_of,
    standardized,
)
from sdlite.train.data import Records, read_records, sample_generator

IGNORED = 255  # in masks, as in PASCAL VOC
FIELDS = ("file_name", "mask_file_name")
SHOWN = 8  # pictures of the preview
BOTH = {"cross_entropy": 1.0, "dice": 1.0}


class Pair:
    """A picture, (C, H, W), and its mask, (H, W), both uint8 where they can be."""

    def __init__(self, folder: Path, record: Mapping[str, str], channels: int) -> None:
        self.pixels = pixels_of(decoded(folder / record["file_name"]), channels)
        mask = decoded(folder / record["mask_file_name"])
        if mask.mode not in ("L", "P"):
            raise ValueError(f"{record['mask_file_name']} is {mask.mode}; a mask has 8 bits: class numbers")
        classes = torch.frombuffer(bytearray(mask.tobytes()), dtype=torch.uint8)
        self.mask = classes.view(mask.height, mask.width)
        if self.mask.shape != self.pixels.shape[1:]:
            raise ValueError(f"{record['mask_file_name']} and its picture must have one size")

    def sample(self, side: int, margin: int, generator: np.random.Generator) -> tuple[Tensor, Tensor]:
        """Picture (C, side + 2 margin, the same), standardized over the whole picture, and mask (side, side)."""
        lines, inner = [], []
        for size in self.mask.shape:
            start = int(generator.integers(min(0, size - side), max(0, size - side) + 1))
            line = mirrored(start - margin, start + side + margin, size)
            line = line.flip(0) if generator.random() < 0.5 else line
            lines.append(line)
            inner.append(line[margin : margin + side])
        values = standardized(self.pixels)[:, lines[0]][:, :, lines[1]]
        mask = self.mask[inner[0]][:, inner[1]].long()
        return (values.mT, mask.mT) if generator.random() < 0.5 else (values, mask)


def read_pairs(folder: Path, records: Records, channels: int) -> list[Pair]:
    return [Pair(folder, record, channels) for record in records]


class SegmentationTask(nn.Module):
    """Classes of the pixels of a data folder. terms: of the loss, see `combined`. seed: of weights and samples."""

    def __init__(
        self, data: Path, config: SegmenterConfig, *, terms: Mapping[str, float] | None = None, seed: int = 0
    ) -> None:
        super().__init__()
        records = read_records(data, fields=FIELDS)
        held_out = read_records(data, "validation", FIELDS) or read_records(data, "test", FIELDS) or records
        self.config, self.seed, self.terms = config, seed, BOTH if terms is None else terms
        channels = config.network.in_channels
        self.pairs, self.held_out = read_pairs(data, records, channels), read_pairs(data, held_out, channels)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.network = build(config.network)
        self.margin, self.side = 0, config.tile
        if isinstance(self.network, SegmentationUNet) and self.network.valid:
            self.margin = self.network.margin // 2
            self.side = self.network.input_side(config.tile + 2 * self.margin) - 2 * self.margin

    @property
    def size(self) -> int:
        return len(self.pairs)

    def forward(self, indices: Tensor, numbers: Tensor) -> Tensor:
        samples = [
            self.pairs[int(i)].sample(self.side, self.margin, sample_generator(self.seed, int(n)))
            for i, n in zip(indices, numbers, strict=True)
        ]
        images, target = (torch.stack(part) for part in zip(*samples, strict=True))  # (B, C, h, w), (B, side, side)
        device = next(self.parameters()).device
        logits = self.network(images.to(device))  # (B, K, side, side)
        return combined(logits, target.to(device), terms=self.terms, ignore_index=IGNORED)

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
        contact_sheet(rows, columns=3).save(path)

    def export(self, folder: Path) -> None:
        Segmenter(self.network, self.config).save(folder)


def figures(segmenter: Segmenter, pairs: list[Pair]) -> dict[str, float]:
    """Mean IoU, IoU and boundary F1 (2 pixels) of everything but class 0, over whole pictures."""
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
    """A network for a data folder that trains on a CPU in minutes; grey or colour and the classes as in its masks.

    Raises ValueError for masks that are black and white, 0 and 255, since white does not count.
    """
    records = read_records(data, fields=FIELDS)
    mode = decoded(data / records[0]["file_name"]).mode
    channels = 1 if mode in ("L", "I", "F", "1") or mode.startswith("I;") else 3
    masks = [pair.mask for pair in read_pairs(data, records, channels)]
    highest = max((int(mask[mask != IGNORED].max()) for mask in masks if (mask != IGNORED).any()), default=0)
    if highest == 0 and any((mask == IGNORED).any() for mask in masks):
        raise ValueError(f"the masks of {data} have no class but 0; {IGNORED} does not count: write 1 in its place")
    classes = max(highest + 1, 2)
    unet = UNetPlan(in_channels=channels, num_classes=classes, depth=3, base_width=16, padding="same", batch_norm=True)
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
