"""The sampling loop and what it is called with: noise of each image, a denoiser with guidance, a mask.

The solver and the denoiser take turns until the latents are clean. Guidance and the channels of an inpainting model are
wrappers of the denoiser. For every other denoiser `keep_known` puts the known part of an image back after each step.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from sdlite.contracts import Denoiser, Memory, Noise, Solver, Wrapper

Constrain: TypeAlias = Callable[[Tensor, int], Tensor]
"""Changes the latents after a step; the second argument is the index of the timestep that they have reached."""


class ImageNoise:
    """Standard normal noise for a batch, each image from its own seed, so that it does not depend on its batch.

    Drawn on the CPU in float32, as diffusers does with a list of CPU generators: the same seed gives the same image.
    seeds: one per image, 0 <= seed < 2**64. shape: (C, H, W) of one image's latents.
    """

    def __init__(self, seeds: Sequence[int], shape: tuple[int, int, int], device: torch.device | str = "cpu") -> None:
        self.generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
        self.shape = shape
        self.device = device

    def draw(self) -> Tensor:
        """The next (B, C, H, W) of every image's stream."""
        return torch.stack([torch.randn(self.shape, generator=g) for g in self.generators]).to(self.device)


def denoise(
    denoiser: Denoiser,
    solver: Solver,
    x: Tensor,
    memory: Memory,
    noise: Noise,
    *,
    start: int = 0,
    constrain: Constrain | None = None,
) -> Iterator[Tensor]:
    """Yields the latents after every step; the last ones are x_0. To stop early, leave the loop.

    x: (B, C, H, W), noise of the solver's initial_scale, or an image noised to timesteps[start].
    memory: `denoiser.prepare(conditioning)`. noise: draws the noise that stochastic solvers add.
    """
    timesteps = solver.timesteps.to(x.device)
    for i in range(start, len(timesteps)):
        t = timesteps[i].expand(len(x))  # (B,)
        output = denoiser(solver.scale_input(x, i), t, memory)  # (B, C, H, W)
        x = solver.step(i, x, output, noise)
        x = x if constrain is None else constrain(x, i + 1)
        yield x


def guide(uncond: Tensor, cond: Tensor, scale: float | Tensor) -> Tensor:
    """uncond + scale * (cond - uncond) (Ho and Salimans 2022), in Stable Diffusion's convention: 1 turns guidance off.

    uncond, cond: (B, C, H, W) outputs of the denoiser. scale: a number or (B, 1, 1, 1).
    """
    return uncond + scale * (cond - uncond)


def rescale_guidance(guided: Tensor, cond: Tensor, rescale: float | Tensor) -> Tensor:
    """Takes guided outputs part of the way back to the spread of cond (Lin et al. 2023, section 3.4, eq. 15 and 16).

    guided, cond: (B, C, H, W). rescale: 0 changes nothing, 1 gives the standard deviation of cond; the paper uses 0.7.
    """
    tiny = torch.finfo(guided.dtype).tiny  # constant outputs, as of an untrained network, have no spread to divide by
    spread = cond.flatten(1).std(1) / guided.flatten(1).std(1).clamp(min=tiny)  # (B,)
    return guided * (1 + rescale * (spread[:, None, None, None] - 1))


class Guided(Wrapper):
    """Runs another denoiser with 2B prompts, the B unconditional (negative) ones first, and combines the outputs."""

    def __init__(self, denoiser: Denoiser, scale: float | Tensor, rescale: float | Tensor = 0.0) -> None:
        super().__init__(denoiser)
        self.scale = scale
        self.rescale = rescale

    def __call__(self, x: Tensor, t: Tensor, memory: Memory) -> Tensor:
        """x: (B, C, H, W). t: (B,). Returns the guided output (B, C, H, W)."""
        uncond, cond = self.denoiser(x, t, memory).chunk(2)  # (B, C, H, W) each
        return rescale_guidance(guide(uncond, cond, self.scale), cond, self.rescale)


def keep_known(solver: Solver, x_0: Tensor, noise: Tensor, mask: Tensor) -> Constrain:
    """A `constrain` for `denoise`: outside the mask, latents are x_0 noised to the timestep reached.

    x_0, noise: (B, C, H, W), the image's latents and the noise that is added to them at every step. mask: (B, 1, H, W),
    1 where to repaint. Source: Lugmayr et al. 2022, section 3.2, without their resampling.
    """
    return lambda x, i: (1 - mask) * solver.noised(x_0, noise, i) + mask * x


class WithChannels(Wrapper):
    """Wraps an inpainting denoiser of 9 channels (Rombach et al. 2022, appendix D.5) as one of 4.

    channels: (B, 5, H, W), mask and masked image, which are appended in every call.
    """

    def __init__(self, denoiser: Denoiser, channels: Tensor) -> None:
        super().__init__(denoiser)
        self.channels = channels

    @property
    def in_channels(self) -> int:
        return self.denoiser.in_channels - self.channels.shape[1]

    def __call__(self, x: Tensor, t: Tensor, memory: Memory) -> Tensor:
        """x: (B, 4, H, W). Returns (G B, 4, H, W), for a memory of G B prompts."""
        return self.denoiser(torch.cat([x, self.channels], dim=1), t, memory)  # (B, 9, H, W) -> (G B, 4, H, W)
