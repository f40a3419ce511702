"""The one contract between networks and diffusion mathematics.

UNet, DiT and every wrapper of them implement it. `prepare` runs once per batch of images and may keep whatever does not
change between steps (for UNet and DiT the prompt's K and V). `__call__` runs once per step.
"""

from typing import Any, Protocol, TypeAlias

from torch import Tensor

from sdlite.config import Prediction

Memory: TypeAlias = Any
"""The result of `prepare`. Only the denoiser that made it looks inside."""


class Denoiser(Protocol):
    """Predicts noise (or v, or x_0) from a noisy latent."""

    @property
    def prediction(self) -> Prediction:
        """What `__call__` returns: "epsilon", "v" or "sample" (x_0 itself)."""

    def prepare(self, context: Tensor) -> Memory:
        """context: (B, T, D) text features. Once per batch of images."""

    def __call__(self, x: Tensor, t: Tensor, memory: Memory) -> Tensor:
        """x: (B, C, H, W) noisy latents. t: (B,) training timesteps. memory: from `prepare` of G B prompts, G whole.

        Returns (G B, C, H, W): all images with the first B prompts, then all images with the next B (for guidance).
        """
