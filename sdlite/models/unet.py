"""The noise predictor of Stable Diffusion: a conditional UNet (Ronneberger et al. 2015, Rombach et al. 2022).

    x_t (B, 4, H, W)                                                  eps (B, 4, H, W)
      conv_in                                                           conv_out
        down 0  resnet+attention x2 ------------ skips ------------ up 3  resnet+attention x3
          down 1  resnet+attention x2 ---------- skips ---------- up 2  resnet+attention x3
            down 2  resnet+attention x2 -------- skips -------- up 1  resnet+attention x3
              down 3  resnet x2 ---------------- skips ------ up 0  resnet x3
                                mid  resnet, attention, resnet

`UNetEncoder` is the way down and the middle, `UNet` adds the way up. Every resnet receives the time vector. Every
attention receives the prompt's K and V, which `prepare` projects once per prompt. `UNetConfig` sets the number of
stages, their widths and their depth; the drawing shows SD1's.
Attribute names are those of diffusers' UNet2DConditionModel, so its checkpoints load without renaming: renaming an
attribute breaks every file (tests/test_unet.py compares the keys).
Letters: B batch (images; after the first cross-attention images times prompts), G prompts per image, R rows of the
conditioning (G B), C channels, E time width, H W latent cells, T text tokens, D text width.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sdlite.config import Prediction, UNetConfig
from sdlite.contracts import Conditioning
from sdlite.models.attention import KV, SpatialTransformer, TransformerBlock, checked_context
from sdlite.models.layers import RESNET_EPS, Downsample, ResnetBlock, TimeEmbedding, Upsample, repeat_rows

TIME_FACTOR = 4  # width of the time vector over that of the first stage (CompVis openaimodel.py)


class UNetMemory(NamedTuple):
    """What does not change between steps.

    kv: K and V for every transformer block, in order of use. vector: (1, E), is added to the time vector.
    """

    kv: tuple[KV, ...]
    vector: Tensor


class Features(NamedTuple):
    """Where the way down ends. h: (B, C, h, w), after the middle. skips: what the way up takes, last first.

    time: (B, E), the sum of time vector and `UNetMemory.vector`.
    """

    h: Tensor
    skips: list[Tensor]
    time: Tensor


class NoVector(nn.Module):
    """For a UNet whose time vector depends on the timestep alone."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, conditioning: Conditioning) -> Tensor:
        return conditioning.context.new_zeros(1, self.width)  # (1, E)


class Stage(nn.Module):
    """Residual blocks of one resolution, each followed by attention to the prompt where the stage has it."""

    def __init__(self, config: UNetConfig, stage: int, in_channels: list[int], num_attentions: int) -> None:
        super().__init__()
        out = config.block_out_channels[stage]
        time_width = TIME_FACTOR * config.block_out_channels[0]
        self.resnets = nn.ModuleList(ResnetBlock(c, out, time_width, config.num_groups) for c in in_channels)
        self.attentions = nn.ModuleList(SpatialTransformer(config, stage) for _ in range(num_attentions))

    def layer(self, i: int, h: Tensor, time: Tensor, prompt: Iterator[KV]) -> Tensor:
        """Layer i on h: (B, C, H, W) -> (B, C_out, H, W). Its attention takes K and V from prompt."""
        h = self.resnets[i](h, time)
        return self.attentions[i](h, prompt) if self.attentions else h


class DownStage(Stage):
    """`layers_per_block` layers, then Downsample, except in the coarsest stage."""

    def __init__(self, config: UNetConfig, stage: int) -> None:
        out, before = config.block_out_channels[stage], config.block_out_channels[max(stage - 1, 0)]
        in_channels = [before] + [out] * (config.layers_per_block - 1)
        super().__init__(config, stage, in_channels, config.attention_stages[stage] * len(in_channels))
        last = stage == len(config.block_out_channels) - 1
        self.downsamplers = nn.ModuleList([] if last else [Downsample(out)])

    def forward(self, h: Tensor, time: Tensor, prompt: Iterator[KV]) -> list[Tensor]:
        """Returns the skips: the output of every layer and of the downsampler. The last is the next stage's input."""
        skips = []
        for i in range(len(self.resnets)):
            h = self.layer(i, h, time, prompt)  # (B, C_out, H, W)
            skips.append(h)
        for downsample in self.downsamplers:
            skips.append(downsample(h))  # (B, C_out, ceil(H/2), ceil(W/2))
        return skips


class MiddleStage(Stage):
    """Resnet, attention, resnet at the coarsest resolution; has attention even if the coarsest stage has none."""

    def __init__(self, config: UNetConfig) -> None:
        stage = len(config.block_out_channels) - 1
        super().__init__(config, stage, [config.block_out_channels[-1]] * 2, num_attentions=1)

    def forward(self, h: Tensor, time: Tensor, prompt: Iterator[KV]) -> Tensor:
        h = self.resnets[0](h, time)  # (B, C, H, W), also below
        h = self.attentions[0](h, prompt)
        return self.resnets[1](h, time)


class UpStage(Stage):
    """One layer more than the way down, each on its input and a skip, then Upsample, except in the finest stage."""

    def __init__(self, config: UNetConfig, stage: int) -> None:
        channels = config.block_out_channels
        out, below, above = channels[stage], channels[min(stage + 1, len(channels) - 1)], channels[max(stage - 1, 0)]
        skips = [out] * config.layers_per_block + [above]  # as the way down left them, last first
        inputs = [below] + [out] * config.layers_per_block
        in_channels = [h + skip for h, skip in zip(inputs, skips, strict=True)]
        super().__init__(config, stage, in_channels, config.attention_stages[stage] * len(in_channels))
        self.upsamplers = nn.ModuleList([] if stage == 0 else [Upsample(out)])

    def forward(self, h: Tensor, time: Tensor, prompt: Iterator[KV], skips: list[Tensor]) -> Tensor:
        """Takes its skips off the end of the list."""
        for i in range(len(self.resnets)):
            h = torch.cat([h, repeat_rows(skips.pop(), len(h))], dim=1)  # (B, C + C_skip, H, W)
            h = self.layer(i, h, time, prompt)  # (B, C_out, H, W)
        for upsample in self.upsamplers:
            h = upsample(h, skips[-1].shape[-2:])  # (B, C_out, 2H or 2H-1, 2W or 2W-1)
        return h


class UNetEncoder(nn.Module):
    """The way down and the middle."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        self.prediction: Prediction = config.prediction
        self.in_channels, self.patch_size = config.in_channels, 1
        channels, time_width = config.block_out_channels, TIME_FACTOR * config.block_out_channels[0]
        self.conv_in = nn.Conv2d(config.in_channels, channels[0], 3, padding=1)
        self.time_embedding = TimeEmbedding(channels[0], time_width)
        self.add_embedding = NoVector(time_width)
        self.down_blocks = nn.ModuleList(DownStage(config, stage) for stage in range(len(channels)))
        self.mid_block = MiddleStage(config)

    def prepare(self, conditioning: Conditioning) -> UNetMemory:
        """Projects the context (R, T, config.context_dim) to K and V in order of use. ValueError for other widths."""
        context = checked_context(conditioning, self.config.context_dim, "UNet").to(self.conv_in.weight.dtype)
        # Modules come in the order in which they were registered: down, middle, up, and so in order of use.
        blocks = [module for module in self.modules() if isinstance(module, TransformerBlock)]
        kv = tuple(block.attn2.project_kv(context) for block in blocks)
        return UNetMemory(kv, self.add_embedding(conditioning))

    def down(self, h: Tensor, t: Tensor, memory: UNetMemory, prompt: Iterator[KV]) -> Features:
        """h: (B, C0, H, W), the output of conv_in. t: (B,). prompt: an iterator over memory.kv; `up` takes the rest."""
        time = self.time_embedding(t)  # (B, E)
        time = time + memory.vector.to(time.dtype)  # (B, E); autocast may have made time half precision
        skips = [h]
        for down in self.down_blocks:
            skips += down(skips[-1], time, prompt)  # (B, C_stage, H/2^s, W/2^s) each
        return Features(self.mid_block(skips[-1], time, prompt), skips, time)  # h: (B, C_last, H/2^s, W/2^s)


class UNet(UNetEncoder):
    """Predicts noise (or v) in x_t from the timestep and the prompt. Implements `Denoiser`."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__(config)
        channels = config.block_out_channels
        self.up_blocks = nn.ModuleList(UpStage(config, stage) for stage in reversed(range(len(channels))))
        self.conv_norm_out = nn.GroupNorm(config.num_groups, channels[0], eps=RESNET_EPS)
        self.conv_out = nn.Conv2d(channels[0], config.out_channels, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor, memory: UNetMemory) -> Tensor:
        """x: (B, C_in, H, W) noisy latents, any H and W. t: (B,) timesteps. memory: from `prepare`, for G B prompts.

        Returns (G B, C_out, H, W): noise, v or x_0, as `prediction` says, in x's dtype. Computes in the weights' dtype.
        """
        prompt = iter(memory.kv)
        h = self.conv_in(x.to(self.conv_in.weight.dtype))  # (B, C0, H, W)
        return self.up(self.down(h, t, memory, prompt), prompt).to(x.dtype)  # (G B, C_out, H, W)

    def up(self, features: Features, prompt: Iterator[KV]) -> Tensor:
        """Returns (G B, C_out, H, W). Takes the skips off their list, which frees them."""
        h, skips, time = features
        for up in self.up_blocks:
            h = up(h, time, prompt, skips)  # (G B, C_stage, H/2^(s-1), W/2^(s-1))
        return self.conv_out(F.silu(self.conv_norm_out(h)))  # (G B, C_out, H, W)
