"""The networks: the original UNet, and the FCN that it improved on.

    UNet  image -> conv conv ------------- crop, join ----> conv conv -> 1x1 conv -> logits
                       | pool                                   ^ up
                   conv conv ------------- crop, join ----> conv conv       at every stage features cross over
                       | pool                                   ^ up
                       +--------------> conv conv --------------+

    FCN   image -> stages 1, 2, 3 -> stage 4 -> stage 5 -> conv conv -> score
                          | score       | score                          x2
                          |             +------------------------------> +       only scores of the classes do
                          |                                              x2
                          +--------------------------------------------> + x8 -> logits

Both take images (B, C, H, W) and return logits (B, K, H', W'), a score for each class at each pixel; the loss applies
the softmax. H' is H except with valid padding.
Letters: B batch, C channels, K classes, W0 base width, h w size at a stage.
"""

from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

FCN_STAGES = (1, 2, 4, 8, 8)  # width of each stage over the first one's, as in VGG16 (Simonyan and Zisserman 2015)
FCN_HEAD = 16  # the same for the layers that were fully connected: as wide as the UNet's bottom (64 in VGG16)
LIMITS = {"in_channels": 8192, "num_classes": 8192, "depth": 8, "base_width": 1024}


def resized(logits: Tensor, size: tuple[int, int]) -> Tensor:
    """(B, K, h, w) stretched bilinearly to (B, K, *size).

    With valid padding the logits are those of the middle of the image, so stretching them over all of it is wrong
    towards the borders. `Segmenter` continues the image by its mirror image instead.
    """
    return F.interpolate(logits, size=size, mode="bilinear", align_corners=False)


def _two_convs(in_channels: int, out_channels: int, padding: int, batch_norm: bool) -> nn.Sequential:
    """(3x3 convolution, batch norm if wanted, ReLU) twice, with He's initial weights for ReLU."""
    layers: list[nn.Module] = []
    for inputs in (in_channels, out_channels):
        conv = nn.Conv2d(inputs, out_channels, 3, padding=padding, bias=not batch_norm)
        nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")  # deviation sqrt(2 / N), the paper's section 3
        if conv.bias is not None:
            nn.init.zeros_(conv.bias)
        layers += [conv, *([nn.BatchNorm2d(out_channels)] if batch_norm else []), nn.ReLU()]
    return nn.Sequential(*layers)


def _padded(images: Tensor, multiple: int) -> Tensor:
    """Border pixels repeated to the right and below, up to the next multiple."""
    height, width = images.shape[-2:]
    return F.pad(images, (0, -width % multiple, 0, -height % multiple), mode="replicate")


def _check_images(images: Tensor, in_channels: int) -> None:
    if images.ndim != 4 or images.shape[1] != in_channels or 0 in images.shape:
        raise ValueError(f"images have shape {tuple(images.shape)}; must be (B, {in_channels}, H, W), none of it 0")


def _check_counts(**counts: int) -> None:
    for name, value in counts.items():
        if not 1 <= value <= LIMITS[name]:
            raise ValueError(f"{name}={value} must be from 1 to {LIMITS[name]}")


class Up(nn.Module):
    """Twice the size, half the channels: a 2x2 transposed convolution, or bilinear interpolation and a 1x1 one.

    Transposed is the paper's "up-convolution"; interpolation has fewer weights and cannot draw a checkerboard.
    """

    def __init__(self, channels: int, mode: Literal["transposed", "interpolate"]) -> None:
        super().__init__()
        self.stretch = mode == "interpolate"
        convolution = nn.Conv2d(channels, channels // 2, 1)
        self.conv = convolution if self.stretch else nn.ConvTranspose2d(channels, channels // 2, 2, stride=2)

    def forward(self, h: Tensor) -> Tensor:
        h = self.conv(h)  # (B, C/2, h, w), or (B, C/2, 2h, 2w)
        return F.interpolate(h, scale_factor=2.0, mode="bilinear", align_corners=False) if self.stretch else h


class SegmentationUNet(nn.Module):
    """The UNet: halves the size and doubles the width `depth` times, then goes back up and joins the skips.

    in_channels: C. num_classes: K, background included. base_width: W0; stage i has W0 2^i channels.
    padding: "valid" as in the paper: an output pixel depends on real pixels only, and H' = H - margin (572 -> 388 at
    depth 4); "same": H' = H for any size. batch_norm: not in the paper; small batches train without it.
    Raises ValueError for an argument out of range. It has no dropout at the bottom, which the paper mentions but
    does not specify. Source: Ronneberger et al. 2015, figure 1 and section 2; the defaults are that network.
    """

    def __init__(
        self,
        in_channels: int = 1,
        num_classes: int = 2,
        depth: int = 4,
        base_width: int = 64,
        padding: Literal["valid", "same"] = "valid",
        upsample: Literal["transposed", "interpolate"] = "transposed",
        batch_norm: bool = False,
    ) -> None:
        super().__init__()
        _check_counts(in_channels=in_channels, num_classes=num_classes, depth=depth, base_width=base_width)
        if padding not in ("valid", "same"):
            raise ValueError(f"padding={padding!r} must be 'valid' or 'same'")
        if upsample not in ("transposed", "interpolate"):
            raise ValueError(f"upsample={upsample!r} must be 'transposed' or 'interpolate'")
        self.in_channels, self.depth, self.valid = in_channels, depth, padding == "valid"
        border = 0 if self.valid else 1
        widths = [base_width * 2**i for i in range(depth + 1)]
        self.down = nn.ModuleList(_two_convs(a, b, border, batch_norm) for a, b in pairwise([in_channels, *widths]))
        self.up = nn.ModuleList(Up(width, upsample) for width in reversed(widths[1:]))
        self.merge = nn.ModuleList(_two_convs(2 * w, w, border, batch_norm) for w in reversed(widths[:-1]))
        self.score = nn.Conv2d(base_width, num_classes, 1)

    @property
    def margin(self) -> int:
        """Pixels that valid padding takes off a side's length: 4 * 2^i for each pair of convolutions at stage i."""
        return 4 * (3 * 2**self.depth - 2) if self.valid else 0

    def input_side(self, at_least: int) -> int:
        """Shortest side, not under at_least, that the network takes: with valid padding every pooled map is even."""
        if not self.valid:
            return at_least
        step = 2**self.depth
        lost = 4 * (step - 1)  # before the bottom; the rest must be a multiple of step
        bottom = max(-(-(at_least - lost) // step), (self.margin - lost) // step + 1)  # at least one pixel of logits
        return lost + step * bottom

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, K, H', W') of images (B, C, H, W). Raises ValueError for a size that valid padding cannot take."""
        _check_images(images, self.in_channels)
        height, width = images.shape[-2:]
        for side in (height, width):
            if side != (fit := self.input_side(side)):
                raise ValueError(f"side {side} does not fit {self.depth} valid poolings; the next that does is {fit}")
        h = images if self.valid else _padded(images, 2**self.depth)
        skips = []
        for i, stage in enumerate(self.down):
            h = stage(h if i == 0 else F.max_pool2d(h, 2))  # (B, W0 2^i, h, w), h half that of stage i - 1
            skips.append(h)
        skips.pop()  # the bottom itself
        for up, merge in zip(self.up, self.merge, strict=True):
            h = up(h)  # (B, W0 2^i, 2h, 2w)
            skip = skips.pop()  # (B, W0 2^i, 2h + 2 cut, 2w + 2 cut)
            cut = (skip.shape[-1] - h.shape[-1]) // 2  # 0 with same padding
            skip = skip[:, :, cut : cut + h.shape[-2], cut : cut + h.shape[-1]]  # its middle, as large as h
            h = merge(torch.cat([skip, h], dim=1))  # (B, 2 W0 2^i, 2h, 2w) to (B, W0 2^i, ...)
        logits = self.score(h)  # (B, K, h, w)
        return logits if self.valid else logits[:, :, :height, :width]  # (B, K, H', W')


def bilinear_upsampling(channels: int, factor: int) -> nn.ConvTranspose2d:
    """A learnable transposed convolution that begins as bilinear interpolation of each channel by an even factor.

    (B, K, h, w) to (B, K, factor h, factor w). Inside equal to F.interpolate(align_corners=False); at the border, where
    that repeats the last pixel, zeros come in. Source: Long et al. 2015, section 3.3.
    """
    conv = nn.ConvTranspose2d(channels, channels, 2 * factor, stride=factor, padding=factor // 2, bias=False)
    position = (torch.arange(2 * factor) + 0.5) / factor - 1  # of each tap from the middle, in coarse pixels
    tent = 1 - position.abs()
    with torch.no_grad():
        conv.weight.copy_(torch.eye(channels)[:, :, None, None] * torch.outer(tent, tent))
    return conv


class FCN(nn.Module):
    """The fully convolutional network: classifies coarse cells, adds the scores of finer ones, interpolates the rest.

    stride: pixels per cell of the finest scores: 32, 16 or 8, the paper's FCN-32s, -16s and -8s. The encoder is VGG's
    plan with two convolutions per stage, `base_width` channels in the first; the head is as wide as the bottom of a
    UNet of the same base width, not VGG's 4096. Any H and W. Raises ValueError for an argument out of range.
    Source: Long et al. 2015, sections 3.3 and 4.2, figure 3.
    """

    valid = False  # all its padding is "same"

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        stride: Literal[8, 16, 32] = 8,
        base_width: int = 64,
        batch_norm: bool = False,
    ) -> None:
        super().__init__()
        _check_counts(in_channels=in_channels, num_classes=num_classes, base_width=base_width)
        if stride not in (8, 16, 32):
            raise ValueError(f"stride={stride} must be 8, 16 or 32")
        self.in_channels = in_channels
        widths = [base_width * factor for factor in FCN_STAGES]
        head = base_width * FCN_HEAD
        self.stages = nn.ModuleList(_two_convs(a, b, 1, batch_norm) for a, b in pairwise([in_channels, *widths]))
        self.head = _two_convs(widths[-1], head, 1, batch_norm)
        self.score = nn.Conv2d(head, num_classes, 1)
        finer = {32: [], 16: widths[3:4], 8: [widths[3], widths[2]]}[stride]
        self.finer_scores = nn.ModuleList(nn.Conv2d(width, num_classes, 1) for width in finer)
        for parameter in self.finer_scores.parameters():
            nn.init.zeros_(parameter)  # so that the finer net begins as the coarser (section 4.2)
        self.ups = nn.ModuleList(bilinear_upsampling(num_classes, 2) for _ in finer)
        self.last_up = bilinear_upsampling(num_classes, stride)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, K, H, W) of images (B, C, H, W)."""
        _check_images(images, self.in_channels)
        h = _padded(images, 2 ** len(self.stages))  # (B, C, 32 h, 32 w)
        pooled = []
        for stage in self.stages:
            h = F.max_pool2d(stage(h), 2)  # (B, W0 factor, half, half)
            pooled.append(h)
        scores = self.score(self.head(h))  # (B, K, h, w)
        for i, (up, score) in enumerate(zip(self.ups, self.finer_scores, strict=True)):
            scores = up(scores) + score(pooled[-2 - i])  # (B, K, 2h, 2w), then (B, K, 4h, 4w)
        return self.last_up(scores)[:, :, : images.shape[-2], : images.shape[-1]]  # (B, K, H, W)
