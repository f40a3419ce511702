"""Finds the class of each pixel: the original UNet, the FCN that it improved on, losses and metrics. Stands alone.

    $ sdlite data nuclei -o nuclei  # or your own images and masks: layout in sdlite/training/datasets/pairs.py
    $ sdlite train segmentation --data nuclei -o run --samples 1200 --decay cosine  # --arch fcn: the other network
    $ sdlite segment image.png -m run/export -o mask.png  # --overlay: coloured classes; --cutout: transparent PNG
    $ sdlite segment photos/ -m run/export -o masks/  # every image of a folder

`sdlite segment` also reads TIFF with 16 bits, takes images up to 128 megapixels and labels large ones in tiles. In
Python, `Segmenter.load("run/export")(image)` returns a mask. notebooks/05_segmentation.ipynb compares the networks and
losses.
"""

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
