"""The sampling loop: the solver and the denoiser take turns until the latents are clean."""

from collections.abc import Callable, Iterator
from typing import TypeAlias

from torch import Tensor

from sdlite.contracts import Denoiser, Memory, Noise, Solver

Constrain: TypeAlias = Callable[[Tensor, int], Tensor]
"""Changes the latents after a step; the second argument is the index of the timestep that they have reached."""


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
    constrain: changes the latents after every step; inpainting puts the known part of the image back.
    """
    timesteps = solver.timesteps.to(x.device)
    for i in range(start, len(timesteps)):
        t = timesteps[i].expand(len(x))  # (B,)
        output = denoiser(solver.scale_input(x, i), t, memory)  # (B, C, H, W)
        x = solver.step(i, x, output, noise)
        x = x if constrain is None else constrain(x, i + 1)
        yield x
