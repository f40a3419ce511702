"""Networks: text encoder, denoisers, codec. They know no sampling and no files.

UNet: Ronneberger et al. 2015 (arXiv 1505.04597); with cross-attention, and the codec: Rombach et al. 2022 (2112.10752).
CLIP: Radford et al. 2021 (2103.00020).
"""

from typing import TypeAlias

from sdlite.config import DenoiserConfig, DiTConfig
from sdlite.models.dit import DiT
from sdlite.models.unet import UNet

Network: TypeAlias = UNet | DiT


def network(config: DenoiserConfig) -> Network:
    """Builds the denoiser of a config, with PyTorch's initial weights."""
    return DiT(config) if isinstance(config, DiTConfig) else UNet(config)
