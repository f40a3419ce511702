"""What to draw: one record for command-line flags, rows of a batch file and PNG metadata.

`SOLVERS` is the one table of solvers, which requests, flags, metadata, README, help and errors read; it imports nothing
heavy. `sdlite.diffusion.solvers.solver_for` builds a solver of the table. To add one, write a class with the methods of
`sdlite.contracts.Solver`. Inside the package, name it in `OWN` of diffusion/solvers.py, add a line here with that name
as `make`, and add the line's key to `SolverName`, which the command line offers. From outside the package,
`SOLVERS["name"] = SolverEntry(...)` with a function as `make` is enough for calls from Python.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, Self

from pydantic import Field, WrapValidator, model_validator

from sdlite.config import Fraction, Record, Size

MAX_STEPS = 1000  # the training timesteps of every Stable Diffusion
LCM_STEPS = 50  # diffusers' original_inference_steps: LCM visits a part of that grid


@dataclass(frozen=True, slots=True)
class SolverEntry:
    """A solver, its names elsewhere and its limits.

    source: paper. sampler, schedule_type: as Automatic1111 1.10 calls them. make: a function of (schedule, steps,
    prediction), and of eta=... if takes_eta, that returns a Solver; or the name of one in diffusion/solvers.py's `OWN`
    or of a scheduler of diffusers. options: of diffusers' scheduler.
    max_steps: at most, and never more than the training timesteps. last_step: whether it can take all of these.
    zero_snr: whether it can start at pure noise. predictions: of the denoiser, that it can follow. takes_eta: whether
    `eta` has an effect. karras: whether its steps get shorter towards the clean end (Karras et al. 2022).
    """

    source: str
    sampler: str
    schedule_type: str | None
    make: str | Callable[..., Any]
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)
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
        "Lu et al. 2022", "DPM++ 2M", "Karras", "DPMSolverMultistepScheduler", {"use_karras_sigmas": True}, karras=True
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

SolverName = Literal["ddim", "ddpm", "euler", "euler_a", "dpmpp_2m", "dpmpp_2m_karras", "unipc", "pndm", "lcm"]
"""The names in SOLVERS, for type checkers and flags."""

Steps = Annotated[int, Field(ge=1, le=MAX_STEPS, description="Denoising steps; more is slower.")]
GuidanceScale = Annotated[
    float, Field(ge=0, le=100, description="How closely to follow the prompt; 1 turns guidance off.")
]


def _solver(value: Any, check: Callable[[Any], Any]) -> Any:
    """Also takes a solver that was added to SOLVERS from outside the package."""
    return value if isinstance(value, str) and value in SOLVERS else check(value)


class Request(Record):
    """One image to draw. CLI flags, rows of a batch file and PNG metadata are all this record.

    guidance_scale: Stable Diffusion's convention, uncond + scale * (cond - uncond); up to 1 means no guidance, and then
    the negative prompt has no effect. guidance_rescale: Lin et al. 2023, section 3.4. solver: see `SOLVERS`. eta: 0 is
    DDIM, 1 is DDPM's noise (solver "ddim" only). clip_skip: text layers left out at the end (Automatic1111's "Clip
    skip" is this plus 1). height, width: pixels; None is the model's own size. image, mask: what img2img or inpainting
    starts from, a file name or, in metadata, "sha256:..."; strength: the part of the noise schedule that is run on it.
    paste: put the untouched image back outside the mask, with an edge that is mask_blur pixels soft (Automatic1111's
    "Mask blur"); False is what diffusers draws.
    """

    prompt: str = Field(
        max_length=20_000,
        description="What to draw. (word:1.3) and [word] change a word's weight, BREAK starts a new chunk.",
    )
    negative_prompt: str = Field("", max_length=20_000, description="What the image should not show.")
    seed: int = Field(0, ge=0, lt=2**64)
    height: Size | None = Field(None, description="Height in pixels.")
    width: Size | None = Field(None, description="Width in pixels.")
    steps: Steps = 20
    guidance_scale: GuidanceScale = 5.0
    guidance_rescale: Fraction = Field(0.0, description="Reduce the contrast that strong guidance adds.")
    solver: Annotated[SolverName, WrapValidator(_solver)] = Field(
        "ddim", description="How to step from noise to image."
    )
    eta: Fraction = Field(0.0, description="How much noise ddim adds at each step.")
    clip_skip: int = Field(0, ge=0, le=47, description="Number of last text layers to skip.")
    image: str | None = Field(None, description="Image to start from.")
    mask: str | None = Field(None, description="Black-and-white image; white parts of --image are redrawn.")
    strength: float = Field(0.8, gt=0, le=1, description="How much to change --image.")
    paste: bool = Field(
        True, description="Keep the rest of --image; --no-paste lets the model change it, as diffusers does."
    )
    mask_blur: float = Field(
        4.0, ge=0, le=64, description="Width in pixels of the soft edge around the white parts of --mask."
    )

    @model_validator(mode="after")
    def _fields_fit(self) -> Self:
        if self.mask is not None and self.image is None:
            raise ValueError("mask needs an image to inpaint; give image as well")
        if self.eta > 0 and not SOLVERS[self.solver].takes_eta:
            raise ValueError(f"eta={self.eta:g} has no effect with solver={self.solver!r}; use solver 'ddim' or eta 0")
        return self

    def deciding(self) -> dict[str, Any]:
        """The fields that decide the image, for keys and records.

        paste and mask_blur are left out where nothing is pasted, so that keys from before these fields stay valid.
        """
        fields = {name: getattr(self, name) for name in type(self).model_fields}
        if self.mask is None or not self.paste:
            del fields["paste"], fields["mask_blur"]
        return fields


def is_out_of_memory(error: Exception) -> bool:
    """Whether the computer or a GPU had no memory left; PyTorch says so in a RuntimeError."""
    said = re.search("out of memory|allocate memory", str(error))
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and said is not None)


def reason(error: Exception) -> str:
    """Why a request failed, in one line; an error that nobody foresaw is named by its class."""
    text = " ".join(str(error).split())
    foreseen = text and isinstance(error, ValueError | OSError | FloatingPointError)
    return text if foreseen else f"{type(error).__name__}: {text}" if text else type(error).__name__
