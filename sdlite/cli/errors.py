"""One line for every error, which says what to type instead, and the exit code of a command.

0 is success, 1 some of several images failed, 2 wrong input, 3 a full disk, 70 a fault of the program, 130 interrupted.
"""

import re
import shlex
from collections.abc import Sequence
from typing import Any

from sdlite.config import ELSEWHERE
from sdlite.files import FULL

# sysexits.h calls 70 an internal software error, and a shell's 128 + SIGINT is 130.
SOME_FAILED, WRONG_INPUT, DISK_FULL, UNFORESEEN, INTERRUPTED = 1, 2, 3, 70, 130
MAX_SHOWN_COMMAND = 200
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


def explained(error: Exception, arguments: Sequence[str]) -> tuple[int, str]:
    """Exit code and message for an error."""
    if hasattr(error, "format_message"):  # a wrong flag: typer brings its own click or takes the installed one
        return WRONG_INPUT, _usage(error)
    if isinstance(error, OSError) and error.strerror is not None:
        message = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
        return DISK_FULL if error.errno in FULL else WRONG_INPUT, message
    if isinstance(error, MemoryError) or re.search("out of memory|can't allocate memory", str(error)):
        return WRONG_INPUT, "out of memory; try a smaller --width and --height, or --batch-size 1"
    if isinstance(error, (ValueError, OSError, FloatingPointError)):
        return WRONG_INPUT, str(error)
    command = shlex.join(["sdlite", *arguments])[:MAX_SHOWN_COMMAND]
    cause = f"{type(error).__name__}: {error}"[:MAX_SHOWN_COMMAND]
    return UNFORESEEN, f"{command}: {cause}; this is a fault of sdlite, and SDLITE_DEBUG=1 shows where it happened"


def _usage(error: Any) -> str:
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
