"""Losses of logits against classes: cross-entropy, and Dice and IoU as cases of the Tversky index.

    logits (B, K, ...)    any floating type; sums are in float32, or float64 for float64
    target (B, ...)       int64 classes 0..K-1, or ignore_index where a pixel does not count

(B, K) with (B,) is classification, (B, K, H, W) with (B, H, W) segmentation: the same function. weight: (K,), how much
each class counts. All return a scalar >= 0, or 0 (with gradient 0) if no pixel counts. A target out of range
raises ValueError, which costs one synchronisation with a GPU.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

Weight = Tensor | None  # (K,)
Ignored = int | None
EPS = 1e-7  # keeps an empty class's 0 / 0 finite


def cross_entropy(logits: Tensor, target: Tensor, *, weight: Weight = None, ignore_index: Ignored = None) -> Tensor:
    """Mean of -log softmax(logits)[target] over the pixels that count, weighted by the weight of each pixel's class."""
    counted = _checked(logits, target, weight, ignore_index)
    log_p = _wide(logits).log_softmax(1)  # (B, K, ...)
    classes = torch.where(counted, target, 0)
    nll = -log_p.gather(1, classes[:, None])[:, 0]  # (B, ...)
    weights = counted.to(nll.dtype) if weight is None else counted * weight.to(nll)[classes]
    return (nll * weights).sum() / weights.sum().clamp(min=EPS)


def tversky_loss(
    logits: Tensor, target: Tensor, *, alpha: float, beta: float, weight: Weight = None, ignore_index: Ignored = None
) -> Tensor:
    """1 - TP / (TP + alpha FP + beta FN) with soft counts over the whole batch, mean over the classes.

    The mean leaves out a class that no counted pixel of the batch has, because its index is 0 whatever is predicted.
    Its false positives still count, as false negatives of the other classes.
    Source: Salehi et al. 2017, eq. 3.
    """
    counted = _checked(logits, target, weight, ignore_index)
    p = _wide(logits).softmax(1) * counted[:, None]  # (B, K, ...)
    truth = F.one_hot(torch.where(counted, target, 0), p.shape[1]).movedim(-1, 1) * counted[:, None]  # (B, K, ...)
    others = [axis for axis in range(p.ndim) if axis != 1]
    hits, predicted, actual = (x.sum(others) for x in (p * truth, p, truth.to(p)))  # (K,) each
    index = hits / (hits + alpha * (predicted - hits) + beta * (actual - hits)).clamp(min=EPS)
    weights = (actual > 0).to(p) if weight is None else (actual > 0) * weight.to(p)
    return ((1 - index) * weights).sum() / weights.sum().clamp(min=EPS)


def dice_loss(logits: Tensor, target: Tensor, *, weight: Weight = None, ignore_index: Ignored = None) -> Tensor:
    """1 - 2 TP / (2 TP + FP + FN), the soft Dice loss. Source: Milletari et al. 2016, with Salehi's soft counts."""
    return tversky_loss(logits, target, alpha=0.5, beta=0.5, weight=weight, ignore_index=ignore_index)


def iou_loss(logits: Tensor, target: Tensor, *, weight: Weight = None, ignore_index: Ignored = None) -> Tensor:
    """1 - TP / (TP + FP + FN), the soft IoU or Jaccard loss. Source: Rahman and Wang 2016, eq. 3 to 5."""
    return tversky_loss(logits, target, alpha=1.0, beta=1.0, weight=weight, ignore_index=ignore_index)


LOSSES: dict[str, Callable[..., Tensor]] = {"cross_entropy": cross_entropy, "dice": dice_loss, "iou": iou_loss}


def combined(
    logits: Tensor, target: Tensor, *, terms: Mapping[str, float], weight: Weight = None, ignore_index: Ignored = None
) -> Tensor:
    """Weighted sum of losses. terms: name in LOSSES to factor, such as {"cross_entropy": 1, "dice": 1}."""
    unknown = terms.keys() - LOSSES.keys()
    if unknown or not terms:
        raise ValueError(f"terms={dict(terms)} must name at least one loss, of {', '.join(LOSSES)}")
    losses = [f * LOSSES[name](logits, target, weight=weight, ignore_index=ignore_index) for name, f in terms.items()]
    return torch.stack(losses).sum()


def _wide(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def _checked(logits: Tensor, target: Tensor, weight: Weight, ignore_index: Ignored) -> Tensor:
    """(B, ...) bool: which pixels count. Raises ValueError for shapes that do not fit."""
    if logits.ndim < 2 or target.shape != logits.shape[:1] + logits.shape[2:]:
        shapes = f"logits {tuple(logits.shape)} and target {tuple(target.shape)}"
        raise ValueError(f"{shapes} must be (B, K, ...) and (B, ...)")
    num_classes = logits.shape[1]
    if weight is not None and weight.shape != (num_classes,):
        raise ValueError(f"weight has shape {tuple(weight.shape)}; must be ({num_classes},), one for each class")
    return counted_pixels(target, num_classes, ignore_index)


def counted_pixels(target: Tensor, num_classes: int, ignore_index: Ignored) -> Tensor:
    """Bool, target's shape: all but ignore_index. Raises ValueError for a value that is no class."""
    if target.dtype != torch.int64:
        raise ValueError(f"target is {target.dtype}; must be torch.int64")
    counted = torch.ones_like(target, dtype=torch.bool) if ignore_index is None else target != ignore_index
    wrong = target[counted & ((target < 0) | (target >= num_classes))]
    if len(wrong):
        hint = "" if ignore_index is not None else "; give a value to leave out as ignore_index"
        raise ValueError(f"target has the value {int(wrong[0])}; must be a class, 0 to {num_classes - 1}{hint}")
    return counted
