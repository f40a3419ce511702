"""Metrics of hard predictions: counts that add up over batches, and metrics that are computed from their sum.

    prediction, target --confusion--> (K, K) --+--> sum --> iou, mean_iou, dice, pixel_accuracy
    prediction, target --boundary_counts--> (K, 4) --> sum --> boundary_f1

prediction: logits (B, K, ...), or classes (B, ...) int64. target: (B, ...) int64. K is num_classes.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from sdlite.segmentation.losses import counted_pixels


def confusion(prediction: Tensor, target: Tensor, num_classes: int, ignore_index: int | None = None) -> Tensor:
    """(K, K) int64: number of pixels of each true class (row) that were predicted as each class (column)."""
    classes = _checked(prediction, target, num_classes)
    counted = counted_pixels(target, num_classes, ignore_index)
    pairs = target[counted] * num_classes + classes[counted]
    return torch.bincount(pairs, minlength=num_classes**2).view(num_classes, num_classes)


def iou(counts: Tensor) -> Tensor:
    """(K,) TP / (TP + FP + FN) of summed `confusion`; nan for a class that is neither there nor predicted."""
    hits = counts.diagonal().double()
    return hits / (counts.sum(0) + counts.sum(1) - hits)


def mean_iou(counts: Tensor) -> Tensor:
    """Mean of `iou` over the classes for which it is defined; nan without any pixel."""
    return iou(counts).nanmean()


def dice(counts: Tensor) -> Tensor:
    """(K,) 2 TP / (2 TP + FP + FN), which is also F1; nan for a class that is neither there nor predicted."""
    return 2 * counts.diagonal().double() / (counts.sum(0) + counts.sum(1))


def pixel_accuracy(counts: Tensor) -> Tensor:
    """Fraction of the pixels whose class is right; nan without any pixel."""
    return counts.diagonal().sum().double() / counts.sum()


def boundary_counts(
    prediction: Tensor, target: Tensor, num_classes: int, *, tolerance: int = 2, ignore_index: int | None = None
) -> Tensor:
    """(K, 4) int64 counts of boundary pixels: predicted, those near a true one, true, those near a predicted one.

    A boundary pixel has the class, and one of its 8 neighbours does not; the image's edge is no boundary. Near means
    at most `tolerance` pixels away along each axis. Pixels that touch an ignored pixel do not count.
    Source: Csurka et al. 2013 (BF score), with a square in place of their disc and counts in place of a mean of images.
    """
    if tolerance < 0:
        raise ValueError(f"tolerance={tolerance} must be 0 or more pixels")
    classes = _checked(prediction, target, num_classes)
    counted = counted_pixels(target, num_classes, ignore_index)
    usable = ~_dilated(~counted[:, None], 1)  # (B, 1, H, W)
    ours, theirs = (_boundaries(c, num_classes) & usable for c in (classes, torch.where(counted, target, 0)))
    near_ours, near_theirs = _dilated(ours, tolerance), _dilated(theirs, tolerance)  # (B, K, H, W)
    columns = (ours, ours & near_theirs, theirs, theirs & near_ours)
    return torch.stack([column.sum((0, 2, 3)) for column in columns], dim=1)


def boundary_f1(counts: Tensor) -> Tensor:
    """(K,) harmonic mean of precision and recall of boundary pixels; nan where neither side has a boundary."""
    predicted, right, actual, found = counts.double().unbind(1)
    precision, recall = right / predicted.clamp(min=1), found / actual.clamp(min=1)
    f1 = 2 * precision * recall / (precision + recall).clamp(min=torch.finfo(torch.float64).tiny)
    return f1.where(predicted + actual > 0, torch.nan)


def _boundaries(classes: Tensor, num_classes: int) -> Tensor:
    """(B, H, W) to (B, K, H, W) bool."""
    masks = F.one_hot(classes, num_classes).movedim(-1, 1).bool()
    return masks & _dilated(~masks, 1)


def _dilated(masks: Tensor, radius: int) -> Tensor:
    """(B, K, H, W) bool: the pixels at most `radius` pixels, along each axis, from a pixel of the mask."""
    return F.max_pool2d(masks.float(), 2 * radius + 1, stride=1, padding=radius).bool()


def _checked(prediction: Tensor, target: Tensor, num_classes: int) -> Tensor:
    """(B, ...) int64: the class of the highest logit; classes are returned unchanged."""
    classes = prediction.argmax(1) if prediction.is_floating_point() else prediction
    if classes.shape != target.shape:
        shapes = f"prediction of {tuple(classes.shape)} and target of {tuple(target.shape)}"
        raise ValueError(f"{shapes} must have one shape")
    if classes.numel() and not 0 <= int(classes.min()) <= int(classes.max()) < num_classes:
        raise ValueError(f"prediction has a class out of 0 to {num_classes - 1}; num_classes must be the network's")
    return classes
