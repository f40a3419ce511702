"""A Transformer in the UNet's place: DiT (Peebles and Xie 2023) with cross-attention to the prompt (PixArt-alpha).

    x_t (B, C, H, W)                                                       eps (B, C_out, H, W)
      patches of P x P cells, one token each                                 tokens back to patches
      + positions                                                            norm, modulation by t
        block 1 ... block `depth`  self-attention, cross-attention, feed-forward, all at one resolution

The timestep enters through modulation: one linear layer, shared by all blocks, turns it into six vectors (adaLN-single;
Chen et al. 2023, section 2.3): shift, scale and gate for the self-attention and for the feed-forward. Every block adds
its own table to them. Cross-attention has neither norm nor modulation.
Attribute names are those of diffusers' PixArtTransformer2DModel: renaming an attribute breaks every file
(tests/test_dit.py compares the keys).
Letters: B batch, G prompts per image, C channels, H W latent cells, P patch side, L tokens, D width, T text tokens.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sdlite.config import DiTConfig, Prediction
from sdlite.contracts import Conditioning
from sdlite.models.attention import KV, Attention, FeedForward, checked_context
from sdlite.models.layers import MAX_PERIOD, TimeEmbedding, repeat_rows

NORM_EPS = 1e-6  # of every LayerNorm (DiT models.py)
TIME_WAVES = 256  # sinusoids of the timestep (DiT models.py `frequency_embedding_size`)


def axis_positions(length: int, span: int, shrink: int, width: int) -> Tensor:
    """Sinusoids of `length` places spread evenly over [0, span / shrink): (length, width) float64, sines first."""
    places = torch.arange(length, dtype=torch.float32) / (length / span) / shrink  # rounded as diffusers does
    frequencies = MAX_PERIOD ** -(torch.arange(width // 2, dtype=torch.float64) / (width / 2))
    angles = torch.outer(places, frequencies)  # (length, width/2)
    return torch.cat([angles.sin(), angles.cos()], dim=1)


class PatchEmbedding(nn.Module):
    """Latents to tokens: a linear projection of every patch plus its position."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.config = config
        self.proj = nn.Conv2d(config.in_channels, config.width, config.patch_size, stride=config.patch_size)

    def forward(self, x: Tensor) -> Tensor:
        z = self.proj(x)  # (B, D, H/P, W/P)
        return (z + self.positions(*z.shape[-2:]).to(z)).flatten(2).transpose(1, 2)  # (B, L, D)

    def positions(self, rows: int, columns: int) -> Tensor:
        """(D, rows, columns) float32: half of the channels encode the column, the other half the row.

        Any number of rows or columns is spread over the range that `sample_size` has in training.
        """
        config = self.config
        span, shrink, half = config.sample_size // config.patch_size, config.position_shrink, config.width // 2
        across = axis_positions(columns, span, shrink, half).float().T[:, None, :]  # (D/2, 1, columns)
        down = axis_positions(rows, span, shrink, half).float().T[:, :, None]  # (D/2, rows, 1)
        return torch.cat([across.expand(-1, rows, -1), down.expand(-1, -1, columns)])  # (D, rows, columns)


class TimeModulation(nn.Module):
    """The timestep as one vector, and as the six vectors of adaLN-single."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.emb = nn.ModuleDict({"timestep_embedder": TimeEmbedding(TIME_WAVES, width)})
        self.linear = nn.Linear(width, 6 * width)

    def forward(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """t: (B,). Returns (B, 6, D) for the blocks and (B, 1, D) for the output."""
        time = self.emb["timestep_embedder"](t)  # (B, D)
        return self.linear(F.silu(time)).view(len(t), 6, -1), time[:, None]


class PromptProjection(nn.Module):
    """Two linear layers from text features to the width of the tokens."""

    def __init__(self, context_dim: int, width: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(context_dim, width)
        self.linear_2 = nn.Linear(width, width)

    def forward(self, context: Tensor) -> Tensor:
        return self.linear_2(F.gelu(self.linear_1(context), approximate="tanh"))  # (B, T, D)


class GELU(nn.Module):
    """Linear layer, then the tanh approximation of the GELU."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, hidden)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.proj(x), approximate="tanh")  # (B, L, hidden)


class Block(nn.Module):
    """Self-attention, cross-attention to the prompt, feed-forward, each added to its input."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.scale_shift_table = nn.Parameter(torch.randn(6, width) / width**0.5)
        self.attn1 = Attention(width, width, num_heads, bias=True)
        self.attn2 = Attention(width, width, num_heads, bias=True)
        self.ff = FeedForward(width, GELU)

    def forward(self, x: Tensor, time: Tensor, prompt: KV) -> Tensor:
        """x: (B, L, D). time: (B or B/G, 6, D). prompt: `attn2.project_kv` of G B prompts. Returns (G B, L, D)."""
        table = self.scale_shift_table + repeat_rows(time, len(prompt[0]))  # (G B, 6, D)
        shift, scale, gate = table[: len(x), :3].chunk(3, dim=1)  # (B, 1, D) each, of self-attention
        z = modulate(x, shift, scale)
        x = x + gate * self.attn1(z, self.attn1.project_kv(z))
        x = repeat_rows(x, len(table))  # (G B, L, D); up to here it is the same for all prompts of an image
        x = x + self.attn2(x, prompt)
        shift, scale, gate = table[:, 3:].chunk(3, dim=1)  # (G B, 1, D) each, of the feed-forward part
        return x + gate * self.ff(modulate(x, shift, scale))


class DiT(nn.Module):
    """Predicts noise (or v) in x_t from the timestep and the prompt. Implements `Denoiser`."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.config = config
        self.prediction: Prediction = config.prediction
        self.in_channels, self.patch_size = config.in_channels, config.patch_size
        self.pos_embed = PatchEmbedding(config)
        self.adaln_single = TimeModulation(config.width)
        self.caption_projection = PromptProjection(config.context_dim, config.width)
        self.transformer_blocks = nn.ModuleList(Block(config.width, config.num_heads) for _ in range(config.depth))
        self.scale_shift_table = nn.Parameter(torch.randn(2, config.width) / config.width**0.5)
        self.proj_out = nn.Linear(config.width, config.patch_size**2 * config.out_channels)

    def prepare(self, conditioning: Conditioning) -> tuple[KV, ...]:
        """Projects the context (R, T, config.context_dim) to K and V for every block. ValueError for another width."""
        context = checked_context(conditioning, self.config.context_dim, "DiT")
        prompt = self.caption_projection(context.to(self.proj_out.weight.dtype))  # (B, T, D)
        return tuple(block.attn2.project_kv(prompt) for block in self.transformer_blocks if isinstance(block, Block))

    def forward(self, x: Tensor, t: Tensor, memory: tuple[KV, ...]) -> Tensor:
        """x: (B, C_in, H, W) noisy latents. t: (B,) timesteps. memory: from `prepare`, for G B prompts.

        Returns (G B, C_out, H, W): noise, v or x_0, as `prediction` says, in x's dtype. Computes in the weights' dtype.
        Raises ValueError unless the patch divides H and W.
        """
        height, width, patch = *x.shape[-2:], self.patch_size
        if height % patch or width % patch:
            raise ValueError(f"latents of {height}x{width} cells must be a multiple of this DiT's patch_size={patch}")
        z = self.pos_embed(x.to(self.proj_out.weight.dtype))  # (B, L, D)
        time, last = self.adaln_single(t)  # (B, 6, D), (B, 1, D)
        for block, prompt in zip(self.transformer_blocks, memory, strict=True):
            z = block(z, time, prompt)  # (G B, L, D)
        shift, scale = (self.scale_shift_table + repeat_rows(last, len(z))).chunk(2, dim=1)  # (G B, 1, D) each
        z = self.proj_out(modulate(z, shift, scale))  # (G B, L, P * P * C_out)
        return patches_to_latents(z, (height // patch, width // patch), patch).to(x.dtype)  # (G B, C_out, H, W)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Normalises each token to zero mean and unit variance, then scales and shifts it: (B, L, D)."""
    return F.layer_norm(x, x.shape[-1:], eps=NORM_EPS) * (1 + scale) + shift


def patches_to_latents(z: Tensor, grid: tuple[int, int], patch: int) -> Tensor:
    """(B, rows * columns, P * P * C), channels last within a patch, to (B, C, rows * P, columns * P)."""
    z = z.view(len(z), *grid, patch, patch, -1)  # (B, rows, columns, P, P, C)
    return z.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)
