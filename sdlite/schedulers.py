"""A solver by its name: our DDIM and DDPM, and the schedulers of diffusers for the others."""

import inspect
from collections.abc import Sequence
from typing import Any

import torch

from sdlite.config import Prediction, Request, ScheduleConfig
from sdlite.diffusion.schedule import Schedule
from sdlite.diffusion.solvers import DDIM, DDPM, DiffusersSolver, Solver

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


def solver_for(
    request: Request, schedule: Schedule, prediction: Prediction, generators: Sequence[torch.Generator], start: int
) -> Solver:
    """The request's solver over its steps. generators: one per image. start: index of the first step that is run.

    Raises ValueError for steps, or a schedule, that the solver cannot do.
    """
    _check(request, schedule)
    if request.solver == "ddim":
        return DDIM(schedule, request.steps, request.eta, prediction)
    if request.solver == "ddpm":
        return DDPM(schedule, request.steps, prediction)
    scheduler = diffusers_scheduler(request.solver, schedule.config, prediction)
    return DiffusersSolver(scheduler, request.steps, generators, start)


def _check(request: Request, schedule: Schedule) -> None:
    """Says in our words what diffusers' schedulers would fail at, some of them only after the last step."""
    steps, train_steps = request.steps, schedule.config.num_train_steps
    most = {"lcm": LCM_STEPS, "pndm": train_steps - 1, "dpmpp_2m": train_steps - 1, "unipc": train_steps - 1}
    limit = most.get(request.solver, train_steps)
    if steps > limit:
        raise ValueError(f"steps={steps} must be up to {limit} with solver={request.solver!r}")
    if schedule.config.zero_terminal_snr and request.solver in NO_ZERO_SNR:
        raise ValueError(f"solver={request.solver!r} knows no zero terminal SNR, which this model has; use 'ddim'")


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
    }
    known = inspect.signature(scheduler).parameters
    return scheduler(**{key: value for key, value in fields.items() if key in known and value is not None}, **options)
