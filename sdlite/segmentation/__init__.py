"""Finds the class of each pixel: the original UNet, the FCN that it improved on, losses and metrics. Stands alone.

    $ sdlite data nuclei -o nuclei  # or your own images and masks: layout in sdlite/training/datasets/pairs.py
    $ sdlite train segmentation --data nuclei -o run --samples 1200 --decay cosine  # --arch fcn: the other network
    $ sdlite segment image.png -m run/export -o mask.png  # --overlay: coloured classes; --cutout: transparent PNG
    $ sdlite segment photos/ -m run/export -o masks/  # every image of a folder

`sdlite segment` also reads TIFF with 16 bits, takes images up to 128 megapixels and labels large ones in tiles. In
Python, `Segmenter.load("run/export")(image)` returns a mask. notebooks/05_segmentation.ipynb compares the networks and
losses.
"""

from sdlite.segmentation.losses import (
    combined as combined,
    cross_entropy as cross_entropy,
    dice_loss as dice_loss,
    iou_loss as iou_loss,
    tversky_loss as tversky_loss,
)
from sdlite.segmentation.metrics import (
    boundary_counts as boundary_counts,
    boundary_f1 as boundary_f1,
    confusion as confusion,
    dice as dice,
    iou as iou,
    mean_iou as mean_iou,
    pixel_accuracy as pixel_accuracy,
)
from sdlite.segmentation.models import FCN as FCN, SegmentationUNet as SegmentationUNet, resized as resized
from sdlite.segmentation.pixels import cutout as cutout, overlay as overlay
from sdlite.segmentation.segmenter import Segmenter as Segmenter
