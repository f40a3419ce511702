"""Error lines for wrong flags or arguments, which say what to type instead."""

import re
from typing import Any

from sdlite.config import ELSEWHERE

FLAGS = {  # of other programs -> here, besides the names of fields
    "batch_count": "num_images",
    "ckpt": "model",
    "init_image": "image",
    "init_img": "image",
    "model_path": "model",
    "out": "output",
    "outdir": "output",
    "output_dir": "output",
    "scale": "guidance_scale",
}


def usage(error: Any) -> str:
    """The line for an error of typer or click."""
    message = str(error.format_message()).replace("Value error, ", "")
    context = getattr(error, "ctx", None)
    if context is not None:
        hint = _renamed(error, context) or _unquoted(message, context)
        if hint is not None:
            return hint
    return f"{message} (see --help)"


def _renamed(error: Any, context: Any) -> str | None:
    """For an option that has another name here."""
    given = getattr(error, "option_name", None) or ""
    plain = given.lstrip("-").replace("-", "_")
    if plain == "prompt" and context.info_name == "generate":
        return f'{given} is not needed: the prompt comes first, sdlite generate "a red apple"'
    name = {**ELSEWHERE, **FLAGS}.get(plain, "").replace("_", "-")
    known = {option for parameter in context.command.params for option in parameter.opts}
    return f"{given} is called --{name} here" if name and f"--{name}" in known else None


def _unquoted(message: str, context: Any) -> str | None:
    """For a prompt of several words that the shell has taken apart."""
    extra = re.search(r"unexpected extra argument\S* \((.*)\)", message, re.S)
    if extra is None or context.info_name != "generate":
        return None
    words = f"{context.params.get('prompt', '')} {extra[1]}".strip()
    return f'put quotes around the prompt: sdlite generate "{words}"'
