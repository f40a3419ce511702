"""sdlite: Stable Diffusion, small enough to read in an evening and exact against diffusers.

    import sdlite
    pipe = sdlite.Pipeline.load("path/or/hub-id")
    pipe("a red apple", seed=7)[0].save("apple.png")

Importing this module loads nothing heavy; each public name, and each module such as `sdlite.batch`, is fetched on first
use.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from sdlite.package import __version__ as __version__, fetching, homes_of

if TYPE_CHECKING:
    from sdlite import (
        batch as batch,
        images as images,
        inspect as inspect,
        segmentation as segmentation,
        training as training,
    )
    from sdlite.checkpoints.load import load_model as load_model
    from sdlite.checkpoints.places import CheckpointError as CheckpointError
    from sdlite.config import (
        DiTConfig as DiTConfig,
        UNetConfig as UNetConfig,
        sd15 as sd15,
        sd21 as sd21,
        tiny as tiny,
        tiny_dit as tiny_dit,
    )
    from sdlite.contracts import Conditioning as Conditioning
    from sdlite.diffusion.sampling import denoise as denoise
    from sdlite.diffusion.schedule import Schedule as Schedule
    from sdlite.diffusion.schedulers import DiffusersSolver as DiffusersSolver
    from sdlite.diffusion.solvers import DDIM as DDIM, DDPM as DDPM
    from sdlite.models.codec import LatentCodec as LatentCodec
    from sdlite.models.dit import DiT as DiT
    from sdlite.models.text import TextEncoder as TextEncoder
    from sdlite.models.unet import UNet as UNet
    from sdlite.pipeline import Pipeline as Pipeline
    from sdlite.request import Request as Request

_HOMES = homes_of(
    {  # the same names as above, which only type checkers read
        "sdlite.checkpoints.load": "load_model",
        "sdlite.checkpoints.places": "CheckpointError",
        "sdlite.config": "DiTConfig UNetConfig sd15 sd21 tiny tiny_dit",
        "sdlite.contracts": "Conditioning",
        "sdlite.diffusion.sampling": "denoise",
        "sdlite.diffusion.schedule": "Schedule",
        "sdlite.diffusion.schedulers": "DiffusersSolver",
        "sdlite.diffusion.solvers": "DDIM DDPM",
        "sdlite.models.codec": "LatentCodec",
        "sdlite.models.dit": "DiT",
        "sdlite.models.text": "TextEncoder",
        "sdlite.models.unet": "UNet",
        "sdlite.pipeline": "Pipeline",
        "sdlite.request": "Request",
    }
)
_fetched, _ = fetching(__name__, _HOMES)
__all__ = sorted([*_HOMES, "batch", "images", "inspect", "segmentation", "training"])


def __getattr__(name: str) -> object:
    moved = {"train": "sdlite.training", "widgets": "sdlite.inspect.widgets"}  # names of version 0.1
    return import_module(moved[name]) if name in moved else _fetched(name)


def __dir__() -> list[str]:
    return __all__
