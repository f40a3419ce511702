"""The denoisers that training makes, and the weights that they start with."""

from collections.abc import Callable

import torch
from torch import nn

from sdlite.config import DiTConfig, UNetConfig
from sdlite.models import Network
from sdlite.models.dit import DiT

ZERO = {  # layers that start at zero, so that the network starts as one that predicts nothing
    "UNet": ("conv2", "proj_out", "to_out.0", "ff.net.2", "conv_out"),  # Dhariwal and Nichol 2021
    "DiT": ("adaln_single.linear", "attn2.to_out.0", "proj_out"),  # Peebles and Xie 2023: the gates, not what they gate
}


EDGES = {  # what Muon leaves to AdamW: the first and the last layer, tables that are no matrices
    "UNet": ("conv_in", "conv_out"),
    "DiT": ("pos_embed", "scale_shift_table", "denoiser.proj_out"),
}


def emoji_unet(latent_channels: int = 8, context_dim: int = 256) -> UNetConfig:
    """The default UNet of training, with attention to the prompt at all three resolutions."""
    return UNetConfig(
        in_channels=latent_channels,
        out_channels=latent_channels,
        block_out_channels=(128, 160, 192),
        layers_per_block=1,
        attention_stages=(True, True, True),
        num_heads=(4, 5, 6),
        context_dim=context_dim,
        use_linear_projection=True,
        prediction="v",
    )


def emoji_dit(latent_channels: int = 8, context_dim: int = 256, sample_size: int = 16) -> DiTConfig:
    """The default DiT of training: as many parameters as `emoji_unet` within 0.2 %."""
    return DiTConfig(
        in_channels=latent_channels,
        out_channels=latent_channels,
        patch_size=2,
        width=320,
        depth=9,
        num_heads=5,
        context_dim=context_dim,
        sample_size=sample_size,
        prediction="v",
    )


@torch.no_grad()
def draw_weights(module: nn.Module, seed: int, deviation: Callable[[str, int], float]) -> None:
    """New matrices and kernels, of a deviation that follows from name and fan-in. Biases are 0, other vectors stay."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in module.named_parameters():
        if weight.ndim > 1:
            weight.normal_(0, deviation(name, weight[0].numel()), generator=generator)
        elif name.endswith("bias"):
            weight.zero_()


def initialize(denoiser: Network, generator: torch.Generator) -> None:
    """Variance-keeping weights; every residual branch and the output start at zero."""
    zero = ZERO["DiT" if isinstance(denoiser, DiT) else "UNet"]
    with torch.no_grad():
        for name, layer in denoiser.named_modules():
            if isinstance(layer, nn.Conv2d | nn.Linear):
                fan_in = layer.weight[0].numel()
                layer.weight.normal_(0, 0 if name.endswith(zero) else fan_in**-0.5, generator=generator)
                if layer.bias is not None:
                    layer.bias.zero_()
        for name, table in denoiser.named_parameters():
            if name.endswith("scale_shift_table"):  # with the zeros of adaln_single.linear: gates of zero at every t
                table.zero_()
