"""Inpainting: repaint the masked part of an image and keep the rest.

For any denoiser, `keep_known` puts the known part back after every step (Lugmayr et al. 2022, section 3.2, without
their resampling). An inpainting model instead gets mask and masked image as further channels (`WithChannels`; Rombach
et al. 2022, appendix D.5).
"""

import torch
from torch import Tensor

from sdlite.contracts import Denoiser, Memory, Solver, Wrapper
from sdlite.diffusion.sampling import Constrain


def keep_known(solver: Solver, x_0: Tensor, noise: Tensor, mask: Tensor) -> Constrain:
    """A `constrain` for `denoise`: outside the mask, latents are x_0 noised to the timestep reached.

    x_0, noise: (B, C, H, W), the image's latents and the noise that is added to them at every step. mask: (B, 1, H, W),
    1 where to repaint.
    """
    return lambda x, i: (1 - mask) * solver.noised(x_0, noise, i) + mask * x


class WithChannels(Wrapper):
    """Wraps an inpainting denoiser of 9 channels as one of 4: appends the same 5 channels in every call."""

    def __init__(self, denoiser: Denoiser, channels: Tensor) -> None:
        super().__init__(denoiser)
        self.channels = channels  # (B, 5, H, W)

    @property
    def in_channels(self) -> int:
        return self.denoiser.in_channels - self.channels.shape[1]

    def __call__(self, x: Tensor, t: Tensor, memory: Memory) -> Tensor:
        """x: (B, 4, H, W). Returns (G B, 4, H, W), for a memory of G B prompts."""
        return self.denoiser(torch.cat([x, self.channels], dim=1), t, memory)  # (B, 9, H, W) -> (G B, 4, H, W)
