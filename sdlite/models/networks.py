"""The networks that a model folder may hold, and how to build one from its config."""

from typing import TypeAlias

from sdlite.config import DenoiserConfig, DiTConfig
from sdlite.models.dit import DiT
from sdlite.models.unet import UNet

Network: TypeAlias = UNet | DiT


def network(config: DenoiserConfig) -> Network:
    """Builds the denoiser of a config, with PyTorch's initial weights."""
    return DiT(config) if isinstance(config, DiTConfig) else UNet(config)
