"""Labels the class of each pixel: the original UNet and its predecessor FCN, losses, metrics. Stands alone."""

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
