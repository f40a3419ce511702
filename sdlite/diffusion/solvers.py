"""From noise to image, one step at a time.

`ddim_step` and `ddpm_step` are the papers' formulas. `DDIM` and `DDPM` fix all pairs (t, t_prev) of a run beforehand
and apply them. `solver_for` builds any solver of the table in request.py. Noise is always an argument: `noise()`
draws it and is called only by steps that need it.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from sdlite.config import Prediction
from sdlite.contracts import Noise, Solver
from sdlite.diffusion.schedule import Schedule, add_noise, split_output
from sdlite.request import SOLVERS, Request, SolverEntry

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


def _ddim(schedule: Schedule, steps: int, prediction: Prediction, eta: float) -> DDIM:
    return DDIM(schedule, steps, eta, prediction)


OWN: dict[str, Callable[..., Solver]] = {"DDIM": _ddim, "DDPM": DDPM}
"""Our solvers, by the names that `make` has in the table; see `SolverEntry` for their arguments."""


def solver_for(
    request: Request, schedule: Schedule, prediction: Prediction, generators: Sequence[torch.Generator], start: int
) -> Solver:
    """The request's solver over its steps. generators: one per image. start: index of the first step that is run.

    Raises ValueError for steps, a schedule or a prediction that the solver cannot do.
    """
    entry = SOLVERS[request.solver]
    _check(request, entry, schedule, prediction)
    make = OWN.get(entry.make) if isinstance(entry.make, str) else entry.make
    if make is None:
        from sdlite.diffusion.schedulers import scheduler_solver

        return scheduler_solver(request, schedule, prediction, generators, start)
    return make(schedule, request.steps, prediction, **({"eta": request.eta} if entry.takes_eta else {}))


def _check(request: Request, entry: SolverEntry, schedule: Schedule, prediction: Prediction) -> None:
    """Says in our words what diffusers' schedulers would fail at, some of them only after the last step."""
    solver, train_steps, zero_snr = request.solver, schedule.config.num_train_steps, schedule.config.zero_terminal_snr
    limit = min(entry.max_steps, train_steps if entry.last_step else train_steps - 1)
    if request.steps > limit:
        raise ValueError(f"steps={request.steps} must be up to {limit} with solver={solver!r}")
    if zero_snr and not entry.zero_snr:
        raise ValueError(f"solver={solver!r} knows no zero terminal SNR, which this model has; use 'ddim'")
    if prediction not in entry.predictions:
        raise ValueError(f"solver={solver!r} knows no model that predicts {prediction!r}, as this one does; use 'ddim'")
    if zero_snr and solver == "lcm" and prediction == "epsilon":
        raise ValueError("solver='lcm' starts from pure noise here, where epsilon says nothing; predict v")
    reached = schedule.abars[:-1] if zero_snr else schedule.abars
    if entry.make not in OWN and not reached.min() >= MIN_ABAR:
        raise ValueError(
            f"solver={solver!r} cannot follow this model's schedule, pure noise before its last timestep; use 'ddim'"
        )
