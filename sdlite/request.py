"""What to draw: one record for command-line flags, rows of a batch file and PNG metadata."""

from collections.abc import Callable
from typing import Annotated, Any, Literal, Self

from pydantic import Field, WrapValidator, model_validator

from sdlite.config import Fraction, Record, Size
from sdlite.diffusion.solver_names import MAX_STEPS, SOLVERS

SolverName = Literal["ddim", "ddpm", "euler", "euler_a", "dpmpp_2m", "dpmpp_2m_karras", "unipc", "pndm", "lcm"]
"""The names in SOLVERS, for type checkers and flags."""


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

    prompt: str = Field(max_length=20_000)
    negative_prompt: str = Field("", max_length=20_000)
    seed: int = Field(0, ge=0, lt=2**64)
    height: Size | None = None
    width: Size | None = None
    steps: int = Field(20, ge=1, le=MAX_STEPS)
    guidance_scale: float = Field(5.0, ge=0, le=100)
    guidance_rescale: Fraction = 0.0
    solver: Annotated[SolverName, WrapValidator(_solver)] = "ddim"
    eta: Fraction = 0.0
    clip_skip: int = Field(0, ge=0, le=47)
    image: str | None = None
    mask: str | None = None
    strength: float = Field(0.8, gt=0, le=1)
    paste: bool = True
    mask_blur: float = Field(4.0, ge=0, le=64)

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


def reason(error: Exception) -> str:
    """Why a request failed, in one line; an error that nobody foresaw is named by its class."""
    text = " ".join(str(error).split())
    foreseen = text and isinstance(error, ValueError | OSError | FloatingPointError)
    return text if foreseen else f"{type(error).__name__}: {text}" if text else type(error).__name__
