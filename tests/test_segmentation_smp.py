"""Losses, metrics and shapes against segmentation_models_pytorch; runs where that is installed.

It needs a torchvision built for the torch that is there, and PyPI has none for torch's CPU-only builds: hence OWN.
"""

import pytest
import torch

from sdlite.segmentation import SegmentationUNet, dice_loss, iou_loss

OWN = "python -m venv smp && smp/bin/pip install segmentation-models-pytorch pytest . && smp/bin/python -m pytest "
smp = pytest.importorskip(
    "segmentation_models_pytorch",
    reason=f"needs segmentation_models_pytorch in an environment of its own: {OWN}{__file__}",
    exc_type=ImportError,
)


@pytest.mark.parametrize(("ours", "name"), [(dice_loss, "DiceLoss"), (iou_loss, "JaccardLoss")])
@pytest.mark.parametrize("num_classes", [2, 4])
def test_overlap_losses_and_their_gradients_are_smps(ours, name, num_classes):
    generator = torch.Generator().manual_seed(0)
    target = torch.randint(num_classes, (2, 16, 12), generator=generator)
    results = []
    for loss in (ours, getattr(smp.losses, name)("multiclass")):
        logits = torch.randn(2, num_classes, 16, 12, generator=torch.Generator().manual_seed(1)).requires_grad_()
        value = loss(logits, target)
        value.backward()
        results.append((value.detach(), logits.grad))
    for a, b in zip(*results, strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-7)


def test_dice_loss_with_ignored_pixels_is_smps():
    generator = torch.Generator().manual_seed(0)
    logits, target = (
        torch.randn(2, 3, 16, 12, generator=generator),
        torch.randint(3, (2, 16, 12), generator=generator),
    )
    target[:, :3] = 255
    theirs = smp.losses.DiceLoss("multiclass", ignore_index=255)(logits, target)
    assert torch.allclose(dice_loss(logits, target, ignore_index=255), theirs)


@pytest.mark.parametrize("size", [64, 96])
def test_same_padding_gives_the_shapes_of_smps_unet(size):
    theirs = smp.Unet("resnet18", encoder_weights=None, in_channels=3, classes=4).eval()
    images = torch.zeros(1, 3, size, size)
    with torch.no_grad():
        assert SegmentationUNet(3, 4, base_width=4, padding="same")(images).shape == theirs(images).shape


def test_metrics_are_smps():
    from sdlite.segmentation import confusion, iou, pixel_accuracy

    generator = torch.Generator().manual_seed(0)
    guess, target = (torch.randint(3, (2, 16, 12), generator=generator) for _ in range(2))
    # smp counts per picture; one row of all pixels is the whole batch
    stats = smp.metrics.get_stats(guess.view(1, -1), target.view(1, -1), mode="multiclass", num_classes=3)
    counts = confusion(guess, target, 3)
    assert torch.allclose(iou(counts).float(), smp.metrics.iou_score(*stats)[0].float())
    tp, _, fn, _ = (x.sum() for x in stats)
    assert pixel_accuracy(counts).item() == pytest.approx((tp / (tp + fn)).item())
