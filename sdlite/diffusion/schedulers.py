"""Solvers of diffusers: its schedulers behind the contract of ours."""

import copy
import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sdlite.config import Prediction, ScheduleConfig
from sdlite.contracts import Noise
from sdlite.diffusion.schedule import Schedule
from sdlite.request import LCM_STEPS, SOLVERS, Request

KARRAS_RHO = 7  # Karras et al. 2022, section 3: the steps get shorter towards the clean end
KARRAS_MAX = 14.6146  # sigma of Stable Diffusion's last timestep, where its Karras schedules begin
STEEP = 1000  # sigmas from which float32 loses what an ancestral step takes the difference of
PURE_NOISE = 4096.0  # the sigma by which diffusers stands for infinity (abar 2**-24)


def scheduler_solver(
    request: Request, schedule: Schedule, prediction: Prediction, generators: Sequence[torch.Generator], start: int
) -> "DiffusersSolver":
    """A solver of diffusers; see `solver_for`. Raises ValueError for steps that lead past the schedule."""
    scheduler = diffusers_scheduler(request.solver, schedule.config, prediction)
    karras = SOLVERS[request.solver].karras and schedule.config.zero_terminal_snr
    sigmas = zero_snr_karras(schedule, request.steps) if karras else None
    solver = DiffusersSolver(scheduler, request.steps, generators, start, sigmas)
    if request.solver == "pndm" and solver.timesteps[0] >= schedule.config.num_train_steps:
        raise ValueError(f"steps={request.steps} leads solver='pndm' past this schedule's last timestep; use 'ddim'")
    if request.solver == "euler_a" and solver.scheduler.sigmas[0] > STEEP:
        solver.scheduler.sigmas = solver.scheduler.sigmas.double()  # float32 can give a step a variance below zero
    return solver


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
    """Drops timestep -1 after 0: rounding adds it to some grids (61 of 1000), and solvers divide by its length, 0."""
    if len(scheduler.timesteps) > 1 and scheduler.timesteps[-1] < 0 and scheduler.timesteps[-2] == 0:
        scheduler.timesteps = scheduler.timesteps[:-1]
        if hasattr(scheduler, "sigmas"):
            scheduler.sigmas = torch.cat([scheduler.sigmas[:-2], scheduler.sigmas[-1:]])


def zero_snr_karras(schedule: Schedule, steps: int) -> tuple[Tensor, Tensor]:
    """Noise levels and timesteps of a run that starts at pure noise, (steps,) each, descending.

    Karras et al. 2022, eq. 5, from KARRAS_MAX down, after one step from pure noise. Their formula alone would take
    that noise's sigma, 4096 in diffusers, for its upper end, and spend most steps where nothing can be seen yet.
    """
    levels = schedule.sigmas  # (T,), the last is infinite
    ramp = torch.linspace(0, 1, max(steps - 1, 1), dtype=torch.float64)[: steps - 1]
    ends = [min(KARRAS_MAX, levels[-2].item()) ** (1 / KARRAS_RHO), levels[0].item() ** (1 / KARRAS_RHO)]
    sigmas = (ends[0] + ramp * (ends[1] - ends[0])) ** KARRAS_RHO  # (steps - 1,)
    nearest = (sigmas.log()[:, None] - levels[:-1].log()).abs().argmin(1)  # (steps - 1,)
    last = len(levels) - 1
    return torch.cat([sigmas.new_tensor([PURE_NOISE]), sigmas]), torch.cat([nearest.new_tensor([last]), nearest])


def diffusers_scheduler(solver: str, config: ScheduleConfig, prediction: Prediction) -> Any:
    """diffusers' scheduler of that name on our schedule, with its own defaults for what the schedule leaves open."""
    import diffusers

    entry = SOLVERS[solver]
    scheduler = getattr(diffusers, str(entry.make))
    fields = {
        "num_train_timesteps": config.num_train_steps,
        "beta_start": config.beta_start,
        "beta_end": config.beta_end,
        "beta_schedule": "squaredcos_cap_v2" if config.beta_schedule == "cosine" else config.beta_schedule,
        "steps_offset": config.steps_offset,
        "set_alpha_to_one": config.final_abar_one,
        "prediction_type": "v_prediction" if prediction == "v" else prediction,
        "rescale_betas_zero_snr": config.zero_terminal_snr,
        "timestep_spacing": config.spacing,
        "original_inference_steps": min(LCM_STEPS, config.num_train_steps),
    }
    known = inspect.signature(scheduler).parameters
    given = {key: value for key, value in fields.items() if key in known and value is not None}
    return scheduler(**given, **entry.options)
