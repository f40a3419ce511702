"""Classifier-free guidance (Ho and Salimans 2022) as a wrapper of a denoiser."""

import torch
from torch import Tensor

from sdlite.contracts import Conditioning, Denoiser, Memory, Wrapper


def guide(uncond: Tensor, cond: Tensor, scale: float | Tensor) -> Tensor:
    """uncond + scale * (cond - uncond), Stable Diffusion's convention: scale 1 turns guidance off.

    uncond, cond: (B, C, H, W) outputs of the denoiser. scale: a number or (B, 1, 1, 1).
    """
    return uncond + scale * (cond - uncond)


def rescale_guidance(guided: Tensor, cond: Tensor, rescale: float | Tensor) -> Tensor:
    """Takes guided outputs part of the way back to the spread of cond (Lin et al. 2023, section 3.4, eq. 15 and 16).

    guided, cond: (B, C, H, W). rescale: 0 changes nothing, 1 gives guided the standard deviation of cond. Lin et al.
    use 0.7 with a zero terminal SNR.
    """
    tiny = torch.finfo(guided.dtype).tiny  # constant outputs, as of an untrained network, have no spread to divide by
    spread = cond.flatten(1).std(1) / guided.flatten(1).std(1).clamp(min=tiny)  # (B,)
    return guided * (1 + rescale * (spread[:, None, None, None] - 1))


class Guided(Wrapper):
    """Runs another denoiser with two prompts per image, the unconditional one first, and combines the outputs."""

    def __init__(self, denoiser: Denoiser, scale: float | Tensor, rescale: float | Tensor = 0.0) -> None:
        super().__init__(denoiser)
        self.scale = scale
        self.rescale = rescale

    def prepare(self, conditioning: Conditioning) -> Memory:
        """conditioning: 2B rows, the B unconditional (negative) prompts first."""
        return self.denoiser.prepare(conditioning)

    def __call__(self, x: Tensor, t: Tensor, memory: Memory) -> Tensor:
        """x: (B, C, H, W). t: (B,). Returns the guided output (B, C, H, W)."""
        uncond, cond = self.denoiser(x, t, memory).chunk(2)  # (B, C, H, W) each
        return rescale_guidance(guide(uncond, cond, self.scale), cond, self.rescale)
