"""The solvers by name: one table, which requests, flags, metadata, README, help and errors read.

It imports nothing heavy. `sdlite.diffusion.solvers.solver_for` builds a solver of the table. To add one, write a class
with the methods of `sdlite.contracts.Solver` and add a line here; a solver from outside the package is added by
`SOLVERS["name"] = SolverEntry(...)` with a function as `make`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

MAX_STEPS = 1000  # the training timesteps of every Stable Diffusion
LCM_STEPS = 50  # diffusers' original_inference_steps: LCM visits a part of that grid


@dataclass(frozen=True, slots=True)
class SolverEntry:
    """A solver, its names elsewhere and its limits.

    source: paper. sampler, schedule_type: as Automatic1111 1.10 calls them. make: name of our class, name of diffusers'
    scheduler, or a function of (schedule, steps, prediction) that returns a Solver. options: of diffusers' scheduler.
    max_steps: at most, and never more than the training timesteps. last_step: whether it can take all of these.
    zero_snr: whether it can start at pure noise. predictions: of the denoiser, that it can follow. takes_eta: whether
    `eta` has an effect. karras: whether its steps get shorter towards the clean end (Karras et al. 2022).
    """

    source: str
    sampler: str
    schedule_type: str | None
    make: str | Callable[..., Any]
    options: Mapping[str, Any] = field(default_factory=dict)
    max_steps: int = MAX_STEPS
    last_step: bool = True
    zero_snr: bool = True
    predictions: tuple[str, ...] = ("epsilon", "v", "sample")
    takes_eta: bool = False
    karras: bool = False

    @property
    def full_sampler(self) -> str:
        """The sampler's name in Automatic1111 before 1.9, when the schedule type was part of it."""
        return f"{self.sampler} Karras" if self.karras else self.sampler


NO_X_0 = ("epsilon", "v")
SOLVERS: dict[str, SolverEntry] = {
    "ddim": SolverEntry("Song et al. 2021", "DDIM", None, "DDIM", takes_eta=True),
    "ddpm": SolverEntry("Ho et al. 2020", "DDPM", None, "DDPM"),
    "euler": SolverEntry("Karras et al. 2022", "Euler", "Uniform", "EulerDiscreteScheduler"),
    "euler_a": SolverEntry(
        "Karras et al. 2022", "Euler a", "Uniform", "EulerAncestralDiscreteScheduler", predictions=NO_X_0
    ),
    "dpmpp_2m": SolverEntry("Lu et al. 2022", "DPM++ 2M", "Uniform", "DPMSolverMultistepScheduler", last_step=False),
    "dpmpp_2m_karras": SolverEntry(
        "Lu et al. 2022",
        "DPM++ 2M",
        "Karras",
        "DPMSolverMultistepScheduler",
        {"use_karras_sigmas": True},
        karras=True,
    ),
    "unipc": SolverEntry("Zhao et al. 2023", "UniPC", None, "UniPCMultistepScheduler", last_step=False),
    "pndm": SolverEntry(
        "Liu et al. 2022",
        "PLMS",
        None,
        "PNDMScheduler",
        {"skip_prk_steps": True},
        last_step=False,
        zero_snr=False,  # has no rescale_betas_zero_snr
        predictions=NO_X_0,
    ),
    "lcm": SolverEntry("Luo et al. 2023", "LCM", None, "LCMScheduler", max_steps=LCM_STEPS),
}
