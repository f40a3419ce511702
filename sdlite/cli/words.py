"""The words of the flags: what the command line adds to the fields of records (see flags.py).

The table is by the name of a field, which means the same thing in every record and every command.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import typer
from typer.models import ParameterInfo

from sdlite.checkpoints.places import check_model, check_vae
from sdlite.config import check_device


def checked(check: Callable[[Any], None]) -> Callable[[Any], Any]:
    """A callback for an option: it runs the check before the command and so before PyTorch is loaded."""

    def callback(value: Any) -> Any:
        for each in value if isinstance(value, list) else [value]:
            if each is not None:
                check(each)
        return value

    return callback


def check_there(path: str | Path) -> None:
    """Raises FileNotFoundError if the path does not exist."""
    if not Path(path).exists():
        raise FileNotFoundError(f"{path} does not exist")


WORDS: Mapping[str, ParameterInfo] = {
    # Request
    "prompt": typer.Argument(
        help="What to draw. (word:1.3) and [word] change a word's weight, BREAK starts a new part."
    ),
    "negative_prompt": typer.Option("--negative-prompt", "-n", help="What the image should not show."),
    "seed": typer.Option("--seed", "-s"),
    "height": typer.Option("--height", "-H", help="Height in pixels.", show_default="the model's"),
    "width": typer.Option("--width", "-W", help="Width in pixels.", show_default="the model's"),
    "steps": typer.Option(help="Denoising steps; more is slower."),
    "guidance_scale": typer.Option(
        "--guidance-scale", "--cfg-scale", help="How closely to follow the prompt; 1 turns guidance off."
    ),
    "guidance_rescale": typer.Option(help="Reduce too strong contrast of guidance."),
    "solver": typer.Option(help="How to step from noise to image."),
    "eta": typer.Option(help="How much noise ddim adds at each step."),
    "clip_skip": typer.Option(help="Number of last text layers to skip."),
    "image": typer.Option("--image", "-i", metavar="FILE", callback=checked(check_there), help="Image to start from."),
    "mask": typer.Option(
        metavar="FILE",
        callback=checked(check_there),
        help="Black-and-white image; white parts of --image are redrawn.",
    ),
    "strength": typer.Option(help="How much to change --image."),
    "paste": typer.Option(help="Keep the rest of --image; --no-paste lets the model change it, as diffusers does."),
    "mask_blur": typer.Option(help="Width in pixels of the soft edge around the white parts of --mask."),
    # LoadOptions
    "model": typer.Option(
        "--model",
        "-m",
        callback=checked(check_model),
        help="Folder, .safetensors file or hub id; 'tiny' is an untrained model for trials.",
        show_default="the model that ships",
    ),
    "device": typer.Option(callback=checked(check_device), help="Where to compute: auto, cpu, cuda, cuda:1, mps."),
    "dtype": typer.Option(help="Number type of text encoder and denoiser."),
    "prediction": typer.Option(help="What the model predicts; overrides what its files say."),
    "vae": typer.Option(
        metavar="FILE|FOLDER|tiny",
        callback=checked(check_vae),
        help="Use this VAE instead of the model's; tiny is TAESD from the hub.",
        show_default="the model's",
    ),
    "variant": typer.Option(
        help="Which weights of a folder to use: fp16, non_ema, ...", show_default="plain, else fp16"
    ),
    "allow_links": typer.Option(metavar="ROOT", help="Allow links in a model's folder to lead into ROOT."),
    # SaveOptions and Report
    "output": typer.Option(
        "--output", "-o", help="FILE.png or a folder.", show_default="000000-SEED.png here, counting up"
    ),
    "force": typer.Option(help="Replace existing files."),
    "metadata": typer.Option(help="Write prompt and settings into the image file."),
    "quiet": typer.Option("--quiet", "-q", help="Show no progress bar and no notes, except that a model is untrained."),
    "as_json": typer.Option("--json", help="Print JSON on stdout instead of text: one object per line."),
}
