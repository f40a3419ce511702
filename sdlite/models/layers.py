"""The UNet's blocks without attention: time embedding, residual block, resampling.

Attribute names are those of diffusers' checkpoints; renaming one breaks every file.
Letters: B batch, G prompts per image, C channels, E time width, H W height and width in latent cells.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

RESNET_EPS = 1e-5  # GroupNorm eps of the residual blocks (CompVis util.py `normalization`)
MAX_PERIOD = 10_000  # slowest wavelength of the sinusoids, in timesteps (Vaswani et al. 2017, section 3.5)


def timestep_embedding(t: Tensor, width: int) -> Tensor:
    """Sinusoids of the timestep, cosines first (Ho et al. 2020, appendix B).

    t: (B,) timesteps, whole or fractional. Returns (B, width) float32 for any type of t; width must be even.
    """
    half = width // 2
    frequencies = torch.exp(-math.log(MAX_PERIOD) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
    angles = t[:, None].float() * frequencies  # (B, width/2)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)  # (B, width)


def repeat_rows(x: Tensor, rows: int) -> Tensor:
    """Repeats the whole batch for each of rows / B prompts: (B, ...) to (rows, ...). Unchanged if rows is B.

    Prompts of one image make no difference before the first cross-attention: that part is computed once, then repeated.
    """
    return x if len(x) == rows else x.repeat(rows // len(x), *[1] * (x.ndim - 1))


class TimeEmbedding(nn.Module):
    """Two linear layers from the sinusoids to the vector that every residual block receives."""

    def __init__(self, width: int, time_width: int) -> None:
        super().__init__()
        self.width = width
        self.linear_1 = nn.Linear(width, time_width)
        self.linear_2 = nn.Linear(time_width, time_width)

    def forward(self, t: Tensor) -> Tensor:
        waves = timestep_embedding(t, self.width)  # (B, width), float32 also for half-precision weights
        return self.linear_2(F.silu(self.linear_1(waves.to(self.linear_1.weight.dtype))))  # (B, E)


class ResnetBlock(nn.Module):
    """Two 3x3 convolutions with GroupNorm and SiLU, the time vector added between them, and a residual path."""

    def __init__(self, in_channels: int, out_channels: int, time_width: int, num_groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(num_groups, in_channels, eps=RESNET_EPS)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.time_emb_proj = nn.Linear(time_width, out_channels)
        self.norm2 = nn.GroupNorm(num_groups, out_channels, eps=RESNET_EPS)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        same = in_channels == out_channels
        self.conv_shortcut = nn.Identity() if same else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """x: (B, C, H, W). time: (B or B/G, E) from TimeEmbedding, before its SiLU. Returns (B, C_out, H, W)."""
        h = self.conv1(F.silu(self.norm1(x)))  # (B, C_out, H, W)
        h = h + repeat_rows(self.time_emb_proj(F.silu(time)), len(h))[:, :, None, None]
        h = self.conv2(F.silu(self.norm2(h)))
        return self.conv_shortcut(x) + h


class Downsample(nn.Module):
    """Halves height and width, rounding up, with a stride-2 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)  # (B, C, ceil(H/2), ceil(W/2))


class Upsample(nn.Module):
    """Nearest-neighbour enlargement to a given size, then a convolution.

    `size` is that of the next skip: twice the input's, or one less where Downsample rounded up. So every size works.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        return self.conv(F.interpolate(x, size=size, mode="nearest"))  # (B, C, *size)
