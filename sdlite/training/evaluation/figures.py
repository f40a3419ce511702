"""Figures of images and of the judge's answers, as pure functions of tensors."""

from collections.abc import Collection, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

CANDIDATES = 100  # of R-precision, as in published text-to-image evaluations
RESAMPLES = 1_000  # of the bootstrap


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
    """R-precision and style accuracy of images whose (concept, style) is `wanted`, (B, 2)."""
    concepts, styles = logits
    among, total = ranks(concepts, wanted[:, 0], CANDIDATES), ranks(concepts, wanted[:, 0], concepts.shape[1])
    rows = (("100", among), ("all", total))
    found = {f"concept_at_{k}_of_{name}": interval(rank < k) for name, rank in rows for k in (1, 5)}
    return found | {"style": interval(styles.argmax(1) == wanted[:, 1])}


def named_nouns(logits: Tensor, right: Sequence[Collection[int]], seed: int = 0) -> int:
    """How many images have one of their right concepts as the likeliest of it and 99 wrong ones. (B, N)"""
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
    small, others = (F.interpolate(x, size=(32, 32), mode="area").flatten(1) for x in (images, references))
    return torch.cdist(small, others, p=1).min(1).values / small.shape[1]
