"""From noise to image, one step at a time.

`ddim_step` and `ddpm_step` are the papers' formulas. `DDIM` and `DDPM` fix all pairs (t, t_prev) of a run beforehand
and apply them. `DiffusersSolver` gives diffusers' schedulers the same interface. Noise is always an argument: `noise()`
draws it and is called only by steps that need it.
"""

import copy
import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sdlite.config import Prediction
from sdlite.contracts import Noise
from sdlite.diffusion.parameterization import add_noise, split_output
from sdlite.diffusion.schedule import Schedule

MIN_ABAR = 1e-12  # below it the image in x_t is beyond float32's digits


def ddim_step(
    x_0: Tensor, eps: Tensor, abar_t: Tensor, abar_prev: Tensor, *, eta: float = 0.0, noise: Tensor | None = None
) -> Tensor:
    """One DDIM update to x_prev (Song et al. 2021, eq. 12; sigma from eq. 16).

    x_0, eps: (B, C, H, W), the clean latents and the noise that the network predicts in x_t. abar_t, abar_prev: ()
    float64. eta: 0 is deterministic, 1 has DDPM's noise. noise: (B, C, H, W), required if eta > 0.
    """
    variance = eta**2 * (1 - abar_prev) / (1 - abar_t) * (1 - abar_t / abar_prev)
    mean = abar_prev.sqrt() * x_0 + (1 - abar_prev - variance).clamp(min=0).sqrt() * eps
    if eta == 0:
        return mean
    if noise is None:
        raise ValueError(f"eta={eta} needs noise: give standard normal noise of the latents' shape, or eta=0")
    return mean + variance.sqrt() * noise


def ddpm_step(x_t: Tensor, x_0: Tensor, abar_t: Tensor, abar_prev: Tensor, *, noise: Tensor) -> Tensor:
    """One DDPM update: a sample of the posterior q(x_prev | x_t, x_0) (Ho et al. 2020, eq. 6 and 7).

    x_t, x_0, noise: (B, C, H, W). abar_t, abar_prev: () float64; timesteps may have been skipped between them.
    """
    alpha = abar_t / abar_prev
    mean = (abar_prev.sqrt() * (1 - alpha) * x_0 + alpha.sqrt() * (1 - abar_prev) * x_t) / (1 - abar_t)
    variance = (1 - abar_prev) / (1 - abar_t) * (1 - alpha)
    return mean + variance.sqrt() * noise


class _OwnSolver:
    """The shared part of DDIM and DDPM: the trajectory, fixed beforehand, and unit-variance latents."""

    initial_scale = 1.0

    def __init__(self, schedule: Schedule, steps: int, final_abar: Tensor, prediction: Prediction) -> None:
        self.timesteps = schedule.timesteps(steps)
        self.abar_t = schedule.abar(self.timesteps)  # (S,) float64
        self.abar_prev = torch.cat([self.abar_t[1:], final_abar[None]])  # (S,) float64
        self.prediction: Prediction = prediction
        if prediction == "epsilon" and not self.abar_t[0] >= MIN_ABAR:
            raise ValueError("this schedule starts from pure noise (abar 0), where epsilon says nothing; predict v")

    def scale_input(self, x: Tensor, i: int) -> Tensor:
        return x

    def noised(self, x_0: Tensor, noise: Tensor, i: int) -> Tensor:
        return add_noise(x_0, noise, self.abar_t[i]) if i < len(self.timesteps) else x_0


class DDIM(_OwnSolver):
    """Denoising diffusion implicit models (Song et al. 2021). eta: 0 is deterministic, 1 has DDPM's noise."""

    def __init__(self, schedule: Schedule, steps: int, eta: float = 0.0, prediction: Prediction = "epsilon") -> None:
        super().__init__(schedule, steps, schedule.final_abar, prediction)
        self.eta = eta

    def step(self, i: int, x: Tensor, output: Tensor, noise: Noise) -> Tensor:
        x_0, eps = split_output(output, x, self.abar_t[i], self.prediction)
        drawn = noise() if self.eta > 0 else None
        return ddim_step(x_0, eps, self.abar_t[i], self.abar_prev[i], eta=self.eta, noise=drawn)


class DDPM(_OwnSolver):
    """Ancestral sampling (Ho et al. 2020, algorithm 2), with the smaller of its two variances; ends at abar 1."""

    def __init__(self, schedule: Schedule, steps: int, prediction: Prediction = "epsilon") -> None:
        super().__init__(schedule, steps, torch.ones_like(schedule.final_abar), prediction)

    def step(self, i: int, x: Tensor, output: Tensor, noise: Noise) -> Tensor:
        x_0, _ = split_output(output, x, self.abar_t[i], self.prediction)
        return ddpm_step(x, x_0, self.abar_t[i], self.abar_prev[i], noise=noise())


class DiffusersSolver:
    """A scheduler of diffusers as a Solver.

    It copies the scheduler, because a scheduler holds the state of one run. generators: one per image; the scheduler
    draws the noise that it adds from them. start: the step at which the run begins (image to image). levels: (sigmas,
    timesteps), (S,) each, descending, to use instead of the scheduler's own.
    """

    def __init__(
        self,
        scheduler: Any,
        steps: int,
        generators: Sequence[torch.Generator] = (),
        start: int = 0,
        levels: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        self.scheduler = copy.deepcopy(scheduler)
        self.scheduler.set_timesteps(steps)
        if levels is not None:
            self.scheduler.sigmas = torch.cat([levels[0], levels[0].new_zeros(1)]).float()
            self.scheduler.timesteps = levels[1]
        if hasattr(self.scheduler, "set_begin_index"):
            self.scheduler.set_begin_index(start)  # else it looks for the first timestep, and some stand twice
        _drop_double_end(self.scheduler)
        self.timesteps: Tensor = self.scheduler.timesteps.clamp(min=0)
        self.initial_scale = float(self.scheduler.init_noise_sigma)
        takes_generator = "generator" in inspect.signature(self.scheduler.step).parameters
        self._extra = {"generator": list(generators)} if takes_generator and generators else {}

    def scale_input(self, x: Tensor, i: int) -> Tensor:
        return self.scheduler.scale_model_input(x, self.timesteps[i])

    def step(self, i: int, x: Tensor, output: Tensor, noise: Noise) -> Tensor:
        return self.scheduler.step(output, self.timesteps[i], x, **self._extra).prev_sample

    def noised(self, x_0: Tensor, noise: Tensor, i: int) -> Tensor:
        return self.scheduler.add_noise(x_0, noise, self.timesteps[i : i + 1]) if i < len(self.timesteps) else x_0


def _drop_double_end(scheduler: Any) -> None:
    """Rounding gives some trailing grids (61 steps of 1000) a timestep more, -1, which has the noise level of 0.

    After a timestep 0 it would be a step of length 0, which some solvers divide by.
    """
    if len(scheduler.timesteps) > 1 and scheduler.timesteps[-1] < 0 and scheduler.timesteps[-2] == 0:
        scheduler.timesteps = scheduler.timesteps[:-1]
        if hasattr(scheduler, "sigmas"):
            scheduler.sigmas = torch.cat([scheduler.sigmas[:-2], scheduler.sigmas[-1:]])
