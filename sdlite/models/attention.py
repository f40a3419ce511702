"""Attention: how the prompt reaches the image.

    image tokens z (B, L, C) --to_q--> Q (B, N, L, K)
    context        (B, T, D) --to_k--> K (B, N, T, K)     softmax(Q K^T / sqrt(K)) V --to_out--> (B, L, C)
                             --to_v--> V (B, N, T, K)

In self-attention the image tokens are their own context. In cross-attention the context is the prompt. It does not
change between steps, so its K and V are projected once (`project_kv`) and passed to every call.
Letters: B batch, G prompts per image (2 under guidance, else 1), L image tokens H*W, C channels, T text tokens, D text
width, N heads, K head width.
Attribute names are those of diffusers' checkpoints; renaming one breaks every file.
"""

from collections.abc import Callable, Iterator
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sdlite.config import UNetConfig
from sdlite.contracts import Conditioning
from sdlite.models.layers import repeat_rows

KV: TypeAlias = tuple[Tensor, Tensor]
"""Keys and values, each (B, N, T, K)."""

SPATIAL_EPS = 1e-6  # GroupNorm eps before the tokens (CompVis attention.py `Normalize`), not the residual blocks' 1e-5
FEED_FORWARD_FACTOR = 4  # hidden width of the feed-forward part (Vaswani et al. 2017, section 3.3)


def checked_context(conditioning: Conditioning, width: int, network: str) -> Tensor:
    """The context, (R, T, width). network: its name in the error. Raises ValueError for another width."""
    context = conditioning.context
    if context.ndim != 3 or context.shape[-1] != width:
        raise ValueError(
            f"context has shape {tuple(context.shape)}, but this {network} needs (B, T, {width}); "
            "use the text encoder that belongs to it"
        )
    return context


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(Q K^T / sqrt(K)) V (Vaswani et al. 2017, eq. 1). q: (B, N, L, K); k, v: (B, N, T, K). Returns q's shape.

    With a gradient on a CPU it computes the formula itself, because PyTorch's fused kernel is slow backwards there.
    """
    if q.device.type != "cpu" or not torch.is_grad_enabled():
        return F.scaled_dot_product_attention(q, k, v)
    with torch.autocast("cpu", enabled=False):  # autocast would convert the softmax to float32 and back
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)  # (B, N, L, T)
        return scores.softmax(-1) @ v


class Attention(nn.Module):
    """Multi-head attention whose keys and values are an argument.

    bias: add a bias to Q, K and V (the UNet's attention has none).
    """

    def __init__(self, channels: int, context_dim: int, num_heads: int, *, bias: bool = False) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.to_q = nn.Linear(channels, channels, bias=bias)
        self.to_k = nn.Linear(context_dim, channels, bias=bias)
        self.to_v = nn.Linear(context_dim, channels, bias=bias)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def project_kv(self, context: Tensor) -> KV:
        """context: (B, T, D). Returns K and V, each (B, N, T, K)."""
        return self._split(self.to_k(context)), self._split(self.to_v(context))

    def forward(self, x: Tensor, kv: KV) -> Tensor:
        """x: (B, L, C) image tokens. kv: from `project_kv`. Returns (B, L, C)."""
        q = self._split(self.to_q(x))  # (B, N, L, K)
        h = attend(q, *kv)  # (B, N, L, K)
        return self.to_out[0](h.transpose(1, 2).flatten(2))  # (B, L, C)

    def _split(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], self.num_heads, -1).transpose(1, 2)  # (B, L, N*K) -> (B, N, L, K)


class GEGLU(nn.Module):
    """Linear layer gated by the exact GELU of its second half (Shazeer 2020)."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.proj = nn.Linear(channels, 2 * hidden)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)  # (B, L, hidden) each
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    """To the hidden width, through a nonlinear layer(channels, hidden), and back.

    Index 1 of `net` is the dropout of the original, which has no weights.
    """

    def __init__(self, channels: int, layer: Callable[[int, int], nn.Module] = GEGLU) -> None:
        super().__init__()
        hidden = FEED_FORWARD_FACTOR * channels
        self.net = nn.Sequential(layer(channels, hidden), nn.Identity(), nn.Linear(hidden, channels))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)  # (B, L, C)


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention to the prompt, feed-forward; each with a norm before and a residual path."""

    def __init__(self, channels: int, context_dim: int, num_heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(channels)
        self.attn1 = Attention(channels, channels, num_heads)
        self.norm2 = nn.LayerNorm(channels)
        self.attn2 = Attention(channels, context_dim, num_heads)
        self.norm3 = nn.LayerNorm(channels)
        self.ff = FeedForward(channels)

    def forward(self, x: Tensor, prompt: KV) -> Tensor:
        """x: (B, L, C) image tokens. prompt: `attn2.project_kv(context)` of G B prompts. Returns (G B, L, C)."""
        z = self.norm1(x)
        x = x + self.attn1(z, self.attn1.project_kv(z))
        x = repeat_rows(x, len(prompt[0]))  # (G B, L, C); up to here it is the same for all prompts of an image
        x = x + self.attn2(self.norm2(x), prompt)
        return x + self.ff(self.norm3(x))


class PointwiseConv(nn.Conv2d):
    """A linear layer on tokens, stored as the (C, C, 1, 1) kernel of a 1x1 convolution, as in SD1's checkpoints."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, 1)

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight[:, :, 0, 0], self.bias)  # (B, L, C)


class SpatialTransformer(nn.Module):
    """Transformer blocks over the cells of a feature map (Rombach et al. 2022, appendix E.2.1).

    Of depth 0 it has its norm and projections only, as in diffusers.
    """

    def __init__(self, config: UNetConfig, stage: int) -> None:
        super().__init__()
        channels, heads, depth = config.block_out_channels[stage], config.num_heads[stage], config.depth(stage)
        linear = config.use_linear_projection
        self.norm = nn.GroupNorm(config.num_groups, channels, eps=SPATIAL_EPS)
        self.proj_in = nn.Linear(channels, channels) if linear else PointwiseConv(channels)
        blocks = (TransformerBlock(channels, config.context_dim, heads) for _ in range(depth))
        self.transformer_blocks = nn.ModuleList(blocks)
        self.proj_out = nn.Linear(channels, channels) if linear else PointwiseConv(channels)

    def forward(self, x: Tensor, prompt: Iterator[KV]) -> Tensor:
        """x: (B, C, H, W). prompt: each block takes its K and V from it. Returns (G B, C, H, W)."""
        z = self.proj_in(self.norm(x).flatten(2).transpose(1, 2))  # (B, H*W, C)
        for block in self.transformer_blocks:
            z = block(z, next(prompt))  # (G B, H*W, C)
        z = self.proj_out(z)
        x = repeat_rows(x, len(z))  # (G B, C, H, W); the residual is from before the norm
        return x + z.transpose(1, 2).reshape(x.shape)
