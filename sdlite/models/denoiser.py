"""The one contract between networks and diffusion mathematics.

Everything that predicts noise implements it: UNet, DiT, and every wrapper that makes one of them faster. `prepare`
runs once per batch of images and may keep whatever does not change between steps (here the prompt's K and V);
`__call__` runs once per step.
"""

from typing import Any, Protocol, TypeAlias

from torch import Tensor

from sdlite.config import Prediction

Memory: TypeAlias = Any
"""What `prepare` made of a context. Opaque to everyone but the denoiser that made it."""


class Denoiser(Protocol):
    """Predicts noise (or v, or x_0) from a noisy latent."""

    @property
    def prediction(self) -> Prediction:
        """What `__call__` returns: "epsilon", "v" or "sample" (x_0 itself)."""

    def prepare(self, context: Tensor) -> Memory:
        """context: (B, T, D) text features. Once per batch of images."""

    def __call__(self, x: Tensor, t: Tensor, memory: Memory) -> Tensor:
        """x: (B, C, H, W) noisy latents. t: (B,) training timesteps. memory: of G B prompts, G a whole number.

        Returns (G B, C, H, W): all images with the first B prompts, then with the next, as guidance needs it.
        """
