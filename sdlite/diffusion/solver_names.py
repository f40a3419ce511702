"""A solver by its name: our DDIM and DDPM, and the schedulers of diffusers for the others."""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sdlite.config import Prediction, ScheduleConfig
from sdlite.contracts import Solver
from sdlite.diffusion.schedule import Schedule
from sdlite.diffusion.solvers import DDIM, DDPM, MIN_ABAR, DiffusersSolver
from sdlite.request import Request

SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_a": ("EulerAncestralDiscreteScheduler", {}),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", {}),
    "dpmpp_2m_karras": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    "unipc": ("UniPCMultistepScheduler", {}),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}),
    "lcm": ("LCMScheduler", {}),
}
LCM_STEPS = 50  # diffusers' original_inference_steps: LCM visits a part of that grid
NO_ZERO_SNR = ("pndm",)  # has no rescale_betas_zero_snr
NO_SAMPLE = ("euler_a", "pndm")  # know models that predict epsilon or v only
KARRAS_RHO = 7  # Karras et al. 2022, section 3: the steps get shorter towards the clean end
KARRAS_MAX = 14.6146  # sigma of Stable Diffusion's last timestep, where its Karras schedules begin
STEEP = 1000  # sigmas from which float32 loses what an ancestral step takes the difference of
PURE_NOISE = 4096.0  # the sigma by which diffusers stands for infinity (abar 2**-24)


def solver_for(
    request: Request, schedule: Schedule, prediction: Prediction, generators: Sequence[torch.Generator], start: int
) -> Solver:
    """The request's solver over its steps. generators: one per image. start: index of the first step that is run.

    Raises ValueError for steps, a schedule or a prediction that the solver cannot do.
    """
    _check(request, schedule, prediction)
    if request.solver == "ddim":
        return DDIM(schedule, request.steps, request.eta, prediction)
    if request.solver == "ddpm":
        return DDPM(schedule, request.steps, prediction)
    scheduler = diffusers_scheduler(request.solver, schedule.config, prediction)
    karras = request.solver == "dpmpp_2m_karras" and schedule.config.zero_terminal_snr
    sigmas = zero_snr_karras(schedule, request.steps) if karras else None
    solver = DiffusersSolver(scheduler, request.steps, generators, start, sigmas)
    if request.solver == "pndm" and solver.timesteps[0] >= schedule.config.num_train_steps:
        raise ValueError(f"steps={request.steps} leads solver='pndm' past this schedule's last timestep; use 'ddim'")
    if request.solver == "euler_a" and solver.scheduler.sigmas[0] > STEEP:
        solver.scheduler.sigmas = solver.scheduler.sigmas.double()  # float32 can give a step a variance below zero
    return solver


def _check(request: Request, schedule: Schedule, prediction: Prediction) -> None:
    """Says in our words what diffusers' schedulers would fail at, some of them only after the last step."""
    solver, steps, train_steps = request.solver, request.steps, schedule.config.num_train_steps
    most = {"lcm": LCM_STEPS, "pndm": train_steps - 1, "dpmpp_2m": train_steps - 1, "unipc": train_steps - 1}
    limit = min(most.get(solver, train_steps), train_steps)
    if steps > limit:
        raise ValueError(f"steps={steps} must be up to {limit} with solver={solver!r}")
    if schedule.config.zero_terminal_snr and solver in NO_ZERO_SNR:
        raise ValueError(f"solver={solver!r} knows no zero terminal SNR, which this model has; use 'ddim'")
    if prediction == "sample" and solver in NO_SAMPLE:
        raise ValueError(f"solver={solver!r} knows no model that predicts 'sample', as this one does; use 'ddim'")
    if schedule.config.zero_terminal_snr and solver == "lcm" and prediction == "epsilon":
        raise ValueError("solver='lcm' starts from pure noise here, where epsilon says nothing; predict v")
    reached = schedule.abars[:-1] if schedule.config.zero_terminal_snr else schedule.abars
    if solver not in ("ddim", "ddpm") and not reached.min() >= MIN_ABAR:
        raise ValueError(
            f"solver={solver!r} cannot follow this model's schedule, pure noise before its last timestep; use 'ddim'"
        )


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

    name, options = SCHEDULERS[solver]
    scheduler = getattr(diffusers, name)
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
    return scheduler(**{key: value for key, value in fields.items() if key in known and value is not None}, **options)
