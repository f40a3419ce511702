"""Which class each pixel is of: the original UNet and its predecessor FCN, losses, metrics. Stands alone."""

from sdlite.segmentation.losses import combined, cross_entropy, dice_loss, iou_loss, tversky_loss
from sdlite.segmentation.metrics import (
    boundary_counts,
    boundary_f1,
    confusion,
    dice,
    iou,
    mean_iou,
    pixel_accuracy,
)
from sdlite.segmentation.models import FCN, SegmentationUNet, resized
from sdlite.segmentation.segmenter import Segmenter, cutout, overlay

__all__ = [
    "FCN",
    "SegmentationUNet",
    "Segmenter",
    "boundary_counts",
    "boundary_f1",
    "combined",
    "confusion",
    "cross_entropy",
    "cutout",
    "dice",
    "dice_loss",
    "iou",
    "iou_loss",
    "mean_iou",
    "overlay",
    "pixel_accuracy",
    "resized",
    "tversky_loss",
]
