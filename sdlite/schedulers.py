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


def solver_for(
    request: Request, schedule: Schedule, prediction: Prediction, generators: Sequence[torch.Generator], start: int
) -> Solver:
    """The request's solver over its steps. generators: one per image. start: index of the first step that is run."""
    if request.solver == "ddim":
        return DDIM(schedule, request.steps, request.eta, prediction)
    if request.solver == "ddpm":
        return DDPM(schedule, request.steps, prediction)
    scheduler = diffusers_scheduler(request.solver, schedule.config, prediction)
    return DiffusersSolver(scheduler, request.steps, generators, start)


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
