"""Networks, losses and metrics of segmentation, against the paper's sizes, the lecture's loops and torchmetrics."""

import math

import numpy as np
import pytest
import torch
import torchmetrics.functional as tm
import torchmetrics.functional.segmentation as tms
from torch.nn import functional as F

from sdlite.segmentation import (
    FCN,
    SegmentationUNet,
    boundary_counts,
    boundary_f1,
    combined,
    confusion,
    cross_entropy,
    dice,
    dice_loss,
    iou,
    iou_loss,
    mean_iou,
    pixel_accuracy,
    resized,
    tversky_loss,
)
from sdlite.segmentation.models import bilinear_upsampling

LOSSES = (cross_entropy, dice_loss, iou_loss)


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def classes(*shape, num_classes=3, seed=1):
    return torch.randint(num_classes, shape, generator=torch.Generator().manual_seed(seed))


# Networks


def test_sizes_are_those_of_the_papers_figure_1():
    unet = SegmentationUNet()
    sizes = []
    for module in unet.modules():
        if isinstance(module, torch.nn.Conv2d | torch.nn.ConvTranspose2d):
            module.register_forward_hook(lambda _, inputs, output: sizes.append((output.shape[1], output.shape[-1])))
    with torch.device("meta"):
        unet.to_empty(device="meta")
        unet(torch.empty(1, 1, 572, 572))
    assert sizes == [
        *[(64, 570), (64, 568), (128, 282), (128, 280), (256, 138), (256, 136), (512, 66), (512, 64)],
        *[(1024, 30), (1024, 28), (512, 56), (512, 54), (512, 52), (256, 104), (256, 102), (256, 100)],
        *[(128, 200), (128, 198), (128, 196), (64, 392), (64, 390), (64, 388), (2, 388)],
    ]
    assert sum(p.numel() for p in unet.parameters()) == 31_030_658  # counted by hand from the figure, with biases


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("upsample", ["transposed", "interpolate"])
def test_valid_padding_takes_the_margin_off_and_names_the_next_size(depth, upsample):
    unet = SegmentationUNet(depth=depth, base_width=2, upsample=upsample)
    side = unet.input_side(70)
    assert side >= 70
    assert unet(random(1, 1, side, unet.input_side(side + 1))).shape[2] == side - unet.margin
    smallest = unet.input_side(1)
    assert unet(random(1, 1, smallest, smallest)).shape[2] == smallest - unet.margin > 0
    with pytest.raises(ValueError, match=f"the next that does is {smallest}$"):
        unet(random(1, 1, smallest, smallest - 1))


def test_valid_output_is_the_middle_of_same_paddings():
    # At depth 1; deeper, what lies before the first cell of a pooling grid is no multiple of it, and the grids differ.
    valid, same = (SegmentationUNet(depth=1, base_width=4, padding=padding) for padding in ("valid", "same"))
    same.load_state_dict(valid.state_dict())
    side = valid.input_side(100)
    images = random(1, 1, side, side)
    cut = valid.margin // 2
    inner = same(images)[:, :, cut:-cut, cut:-cut]
    assert torch.allclose(valid(images), inner, atol=1e-5)


@pytest.mark.parametrize("size", [(1, 1), (16, 16), (17, 31), (33, 64)])
@pytest.mark.parametrize("batch_norm", [False, True])
def test_same_padding_and_fcn_take_any_size(size, batch_norm):
    images = random(2, 3, *size)
    unet = SegmentationUNet(3, 4, depth=3, base_width=2, padding="same", batch_norm=batch_norm)
    assert unet(images).shape == (2, 4, *size)
    for stride in (8, 16, 32):
        assert FCN(3, 4, stride, base_width=2, batch_norm=batch_norm)(images).shape == (2, 4, *size)


def test_resized_gives_valid_output_the_size_of_the_input():
    assert resized(random(1, 2, 4, 4), (188, 190)).shape == (1, 2, 188, 190)


@pytest.mark.parametrize("factor", [2, 8, 16, 32])
def test_transposed_convolution_starts_as_bilinear_interpolation(factor):
    scores = random(2, 3, 5, 6)
    ours = bilinear_upsampling(3, factor)(scores)
    theirs = F.interpolate(scores, scale_factor=factor, mode="bilinear", align_corners=False)
    edge = factor  # interpolate repeats the border pixel where the convolution sees zeros
    assert ours.shape == theirs.shape
    assert torch.allclose(ours[..., edge:-edge, edge:-edge], theirs[..., edge:-edge, edge:-edge], atol=1e-5)
    assert bilinear_upsampling(3, factor).weight.requires_grad


def test_finer_scores_of_the_fcn_begin_at_zero_and_learn():
    fcn = FCN(1, 3, 8, base_width=2)
    assert all((p == 0).all() for p in fcn.finer_scores.parameters())
    cross_entropy(fcn(random(1, 1, 64, 64)), classes(1, 64, 64)).backward()
    assert all(p.grad.abs().sum() > 0 for p in fcn.parameters())


def test_wrong_arguments_are_named():
    for wrong in ({"depth": 0}, {"base_width": 0}, {"num_classes": 0}, {"padding": "full"}, {"upsample": "nearest"}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))}="):
            SegmentationUNet(**wrong)
    with pytest.raises(ValueError, match="stride=4 must be 8, 16 or 32"):
        FCN(1, 2, 4)
    for net in (SegmentationUNet(3, base_width=2), FCN(3, 2, base_width=2)):
        for shape in ((1, 1, 64, 64), (3, 64, 64), (1, 3, 0, 64)):
            with pytest.raises(ValueError, match=r"must be \(B, 3, H, W\)"):
                net(torch.zeros(shape))


# Losses


def lecture_cross_entropy(logits, target):
    """Per-pixel cross-entropy as three loops over samples, rows and columns."""
    total = 0.0
    samples, _, height, width = logits.shape
    for n in range(samples):
        for i in range(height):
            for j in range(width):
                e = np.exp(logits[n, :, i, j] - logits[n, :, i, j].max())
                total -= np.log(e[target[n, i, j]] / e.sum())
    return total / (samples * height * width)


def test_cross_entropy_is_the_lectures_triple_loop():
    logits, target = random(2, 3, 5, 7, dtype=torch.float64), classes(2, 5, 7)
    assert cross_entropy(logits, target).item() == pytest.approx(lecture_cross_entropy(logits.numpy(), target.numpy()))


@pytest.mark.parametrize("shape", [(6,), (2, 4, 5), (2, 2, 3, 4)])
@pytest.mark.parametrize("weighted", [False, True])
def test_cross_entropy_is_pytorchs_in_any_dimension(shape, weighted):
    logits, target = random(shape[0], 3, *shape[1:]), classes(*shape)
    target.view(-1)[0] = 255
    weight = torch.tensor([0.5, 2.0, 0.0]) if weighted else None
    ours = cross_entropy(logits, target, weight=weight, ignore_index=255)
    assert torch.allclose(ours, F.cross_entropy(logits, target, weight=weight, ignore_index=255))


def test_overlap_losses_by_hand():
    # Probability of class 1 at four pixels: .9 .6 .2 .1; the first two and the last are class 1.
    p = torch.tensor([0.9, 0.6, 0.2, 0.1], dtype=torch.float64)
    logits = torch.stack([torch.zeros_like(p), (p / (1 - p)).log()])[None]  # (1, 2, 4)
    target = torch.tensor([[1, 1, 0, 1]])
    hits, wrong, missed = 0.9 + 0.6 + 0.1, 0.2, 0.1 + 0.4 + 0.9  # of class 1
    hits_0, wrong_0, missed_0 = 0.8, missed, wrong
    iou_1, iou_0 = hits / (hits + wrong + missed), hits_0 / (hits_0 + wrong_0 + missed_0)
    dice_1, dice_0 = (2 * h / (2 * h + wrong + missed) for h in (hits, hits_0))
    assert iou_loss(logits, target).item() == pytest.approx(1 - (iou_0 + iou_1) / 2)
    assert dice_loss(logits, target).item() == pytest.approx(1 - (dice_0 + dice_1) / 2)
    only_1 = torch.tensor([0.0, 3.0])
    assert dice_loss(logits, target, weight=only_1).item() == pytest.approx(1 - dice_1)
    lopsided = hits / (hits + 0.3 * wrong + 0.7 * missed)
    tversky = tversky_loss(logits, target, alpha=0.3, beta=0.7, weight=only_1)
    assert tversky.item() == pytest.approx(1 - lopsided)
    both = combined(logits, target, terms={"cross_entropy": 1, "dice": 0.5})
    assert both.item() == pytest.approx((cross_entropy(logits, target) + 0.5 * dice_loss(logits, target)).item())


def test_certain_predictions_cost_one_minus_torchmetrics_scores():
    target, guess = classes(2, 9, 9), classes(2, 9, 9, seed=2)
    logits = 1e4 * F.one_hot(guess, 3).movedim(-1, 1).float()
    flat = {"num_classes": 3, "input_format": "index", "include_background": True}
    # torchmetrics scores each picture by itself; one tall picture is the whole batch
    tall = [x.reshape(1, -1, 9) for x in (guess, target)]
    theirs = tms.dice_score(*tall, average="macro", **flat)
    assert dice_loss(logits, target).item() == pytest.approx(1 - theirs.item(), abs=1e-5)
    theirs = tm.jaccard_index(guess, target, task="multiclass", num_classes=3, average="macro")
    assert iou_loss(logits, target).item() == pytest.approx(1 - theirs.item(), abs=1e-5)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("options", [{}, {"weight": torch.tensor([1.0, 0.3, 2.0])}, {"ignore_index": 2}])
def test_gradients_are_right(loss, options):
    logits = random(2, 3, 3, 4, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: loss(x, classes(2, 3, 4), **options), logits)


def test_gradient_of_the_tversky_loss_is_right():
    logits = random(2, 3, 4, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: tversky_loss(x, classes(2, 4), alpha=0.2, beta=0.9), logits)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_survives_extreme_logits_and_large_pictures(loss, dtype):
    largest = torch.finfo(torch.float16).max
    logits = (random(1, 2, 300, 300).sign() * largest).to(dtype).requires_grad_()  # 90,000 pixels: fp16 sums overflow
    value = loss(logits, classes(1, 300, 300, num_classes=2))
    value.backward()
    assert value.dtype == torch.float32
    assert value.isfinite()
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("loss", LOSSES)
def test_ignored_pixels_change_nothing(loss):
    logits, target = random(1, 3, 4, 6), classes(1, 4, 6)
    target[..., 4:] = -1
    padded = loss(logits, target, ignore_index=-1)
    assert torch.allclose(padded, loss(logits[..., :4], target[..., :4]))
    logits.requires_grad_()
    nothing = loss(logits, torch.full_like(target, -1), ignore_index=-1)
    nothing.backward()
    assert nothing.item() == 0
    assert logits.grad.abs().sum() == 0


@pytest.mark.parametrize("loss", LOSSES)
def test_one_class_costs_nothing(loss):
    assert loss(random(2, 1, 4, 4), torch.zeros(2, 4, 4, dtype=torch.int64)).item() == pytest.approx(0, abs=1e-6)


def test_empty_mask_counts_only_the_background():
    logits, target = random(1, 2, 4, 4), torch.zeros(1, 4, 4, dtype=torch.int64)
    p = logits.softmax(1)[:, 0]
    assert dice_loss(logits, target).item() == pytest.approx(1 - (2 * p.sum() / (p.sum() + 16)).item(), abs=1e-6)
    assert iou_loss(logits, target).item() == pytest.approx(1 - p.mean().item(), abs=1e-6)


@pytest.mark.parametrize("loss", LOSSES)
def test_bad_targets_are_one_line_errors(loss):
    logits = random(1, 2, 2, 2)
    for value in (2, -1, 255):
        with pytest.raises(ValueError, match=f"target has the value {value}; must be a class, 0 to 1; [^\n]*$"):
            loss(logits, torch.full((1, 2, 2), value))
    with pytest.raises(ValueError, match=r"must be torch\.int64"):
        loss(logits, torch.zeros(1, 2, 2))
    with pytest.raises(ValueError, match=r"must be \(B, K, ...\) and \(B, ...\)"):
        loss(logits, torch.zeros(1, 2, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"must be \(2,\)"):
        loss(logits, torch.zeros(1, 2, 2, dtype=torch.int64), weight=torch.ones(3))


def test_unknown_terms_are_named():
    for terms in ({}, {"focal": 1.0}):
        with pytest.raises(ValueError, match="cross_entropy, dice, iou"):
            combined(random(1, 2, 2), classes(1, 2, num_classes=2), terms=terms)


# Metrics


def test_metrics_by_hand():
    counts = confusion(torch.tensor([[0, 1, 1, 0]]), torch.tensor([[0, 1, 0, 9]]), 3, ignore_index=9)
    assert counts.tolist() == [[1, 1, 0], [0, 1, 0], [0, 0, 0]]
    assert iou(counts)[:2].tolist() == [0.5, 0.5]
    assert dice(counts)[:2].tolist() == pytest.approx([2 / 3, 2 / 3])
    assert iou(counts)[2].isnan()
    assert dice(counts)[2].isnan()
    assert mean_iou(counts).item() == 0.5
    assert pixel_accuracy(counts).item() == pytest.approx(2 / 3)


def test_counts_add_up_over_batches_and_agree_with_torchmetrics():
    guess, target = random(6, 3, 8, 9), classes(6, 8, 9)
    whole = confusion(guess, target, 3)
    parts = sum(confusion(a, b, 3) for a, b in zip(guess.split(4), target.split(4), strict=True))
    assert torch.equal(whole, parts)
    assert torch.equal(whole, tm.confusion_matrix(guess, target, task="multiclass", num_classes=3))
    scores = tm.jaccard_index(guess, target, task="multiclass", num_classes=3, average="none")
    assert torch.allclose(iou(whole).float(), scores)
    scores = tm.f1_score(guess, target, task="multiclass", num_classes=3, average="none")
    assert torch.allclose(dice(whole).float(), scores)
    accuracy = tm.accuracy(guess, target, task="multiclass", num_classes=3, average="micro")
    assert pixel_accuracy(whole).item() == pytest.approx(accuracy.item())
    edges = [boundary_counts(a, b, 3) for a, b in zip(guess.split(4), target.split(4), strict=True)]
    assert torch.equal(boundary_counts(guess, target, 3), sum(edges))


def squares(shift):
    mask = torch.zeros(1, 20, 20, dtype=torch.int64)
    mask[:, 5 + shift : 15 + shift, 5:15] = 1
    return mask


@pytest.mark.parametrize(("tolerance", "expected"), [(0, 18 / 36), (1, 1.0), (2, 1.0)])
def test_boundary_f1_of_a_square_moved_by_a_pixel(tolerance, expected):
    # The outline of 10 x 10 pixels has 36; moved down by one it shares the two sides' rows 6 to 14, 9 pixels each.
    counts = boundary_counts(squares(1), squares(0), 2, tolerance=tolerance)
    assert counts[1].tolist() == [36, round(36 * expected), 36, round(36 * expected)]
    assert boundary_f1(counts)[1].item() == pytest.approx(expected)


def test_boundary_f1_without_boundaries_and_with_ignored_pixels():
    empty = torch.zeros(1, 20, 20, dtype=torch.int64)
    assert boundary_f1(boundary_counts(empty, empty, 2)).isnan().all()  # the picture's edge is no boundary
    assert boundary_f1(boundary_counts(empty, squares(0), 2)).tolist() == [0, 0]
    target = squares(0)
    target[:, 8:] = 255
    counts = boundary_counts(squares(0), target, 2, ignore_index=255)
    assert boundary_f1(counts).tolist() == [1, 1]
    assert counts[1].tolist() == [12, 12, 12, 12]  # rows 5 and 6; row 7 touches ignored pixels


def test_metrics_name_what_does_not_fit():
    with pytest.raises(ValueError, match="must have one shape"):
        confusion(classes(1, 4, 4), classes(1, 4, 5), 3)
    with pytest.raises(ValueError, match="num_classes must be the network's"):
        confusion(classes(1, 9, 9), classes(1, 9, 9, num_classes=2), 2)
    with pytest.raises(ValueError, match="target has the value"):
        confusion(classes(1, 9, 9, num_classes=2), classes(1, 9, 9), 2)
    with pytest.raises(ValueError, match="tolerance=-1"):
        boundary_counts(squares(0), squares(0), 2, tolerance=-1)
    assert math.isnan(mean_iou(torch.zeros(2, 2)).item())
