"""The app, and how a command starts and ends: it loads the model, and every error becomes one line and an exit code."""

import os
import re
import shlex
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from io import TextIOWrapper
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sdlite import __version__
from sdlite.checkpoints.places import SHIPPED
from sdlite.cli.flags import options
from sdlite.cli.output import Report, shown
from sdlite.cli.threads import spin_briefly, use_threads
from sdlite.config import ELSEWHERE, LoadOptions
from sdlite.files import FULL
from sdlite.request import is_out_of_memory

if TYPE_CHECKING:
    from sdlite.pipeline import Pipeline

# sysexits.h calls 70 an internal software error, and a shell's 128 + SIGINT is 130.
SOME_FAILED, WRONG_INPUT, DISK_FULL, UNFORESEEN, INTERRUPTED = 1, 2, 3, 70, 130
MAX_SHOWN_COMMAND = 200
SMALLER = {"width": "a smaller --width and --height", "batch_size": "a smaller --batch-size"}
NAMES_HERE = {  # of flags of other programs
    **ELSEWHERE,
    **dict.fromkeys(("ckpt", "model_path"), "model"),
    **dict.fromkeys(("init_image", "init_img"), "image"),
    **dict.fromkeys(("out", "outdir", "output_dir"), "output"),
    "batch_count": "num_images",
    "scale": "guidance_scale",
}
Threads = Annotated[
    int | None,
    typer.Option(min=1, max=512, metavar="N", help="Number of CPU threads.", show_default="one for each core allowed"),
]
Force = Annotated[bool, typer.Option("--force", help="Replace existing files.")]

app = typer.Typer(
    name="sdlite",
    help="Stable Diffusion, small enough to read in an evening and exact against diffusers.",
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback(invoke_without_command=True)
def _options(
    context: typer.Context, version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False
) -> None:
    if version:
        print(f"sdlite {__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        print(context.get_help())


def command(*examples: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Adds a command to the app. Its records become flags (see flags.py); its help ends with the examples."""
    epilog = "\n".join(["\b", "Examples:", *(f"  {example}" for example in examples)])
    return lambda function: app.command(epilog=epilog)(options(function))


def load(options: LoadOptions, report: Report, threads: int | None = None) -> "Pipeline":
    """Loads the model and reports its notes."""
    with report.busy(f"loading {SHIPPED if options.model is None else options.model}"):
        from sdlite.pipeline import Pipeline

        use_threads(threads)
        pipe = Pipeline.load(options.model, **options.keywords())
    report.note(*pipe.notes)
    return pipe


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line and exits with its code; None takes the arguments of the process."""
    spin_briefly()
    for name in ("TRANSFORMERS_VERBOSITY", "DIFFUSERS_VERBOSITY"):
        os.environ.setdefault(name, "error")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a name that the terminal's encoding lacks is no error
    given = sys.argv[1:] if arguments is None else list(arguments)
    try:
        with _stopped_in_order():
            code = typer.main.get_command(app).main(given, prog_name="sdlite", standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    except Exception as error:
        if os.environ.get("SDLITE_DEBUG"):
            traceback.print_exc()
        code, message = _explained(error, given)
        print(f"sdlite: error: {shown(' '.join(message.split()))}", file=sys.stderr)
    sys.exit(code if isinstance(code, int) else 0)


@contextmanager
def _stopped_in_order() -> Iterator[None]:
    """Lets SIGTERM and a closed terminal end the command as Ctrl-C does, so that no half-made file stays behind."""
    may_set = threading.current_thread() is threading.main_thread()
    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if may_set and hasattr(signal, name)]
    default = [number for number in numbers if signal.getsignal(number) is signal.SIG_DFL]  # nohup ignores SIGHUP
    for number in default:
        signal.signal(number, signal.default_int_handler)
    try:
        yield
    finally:
        for number in default:
            signal.signal(number, signal.SIG_DFL)


def _explained(error: Exception, arguments: Sequence[str]) -> tuple[int, str]:
    """Exit code and message for an error."""
    if hasattr(error, "format_message"):  # a wrong flag: typer brings its own click or takes the installed one
        message = str(error.format_message()).replace("Value error, ", "")
        return WRONG_INPUT, _hint(error, message) or f"{message} (see --help)"
    if isinstance(error, OSError) and error.strerror is not None:
        message = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
        return DISK_FULL if error.errno in FULL else WRONG_INPUT, message
    if is_out_of_memory(error):
        return WRONG_INPUT, f"out of memory; {_smaller(arguments)}"
    if isinstance(error, (ValueError, OSError, FloatingPointError)):
        return WRONG_INPUT, str(error)
    command = shlex.join(["sdlite", *arguments])[:MAX_SHOWN_COMMAND]
    cause = f"{type(error).__name__}: {error}"[:MAX_SHOWN_COMMAND]
    return UNFORESEEN, f"{command}: {cause}; this is a fault of sdlite, and SDLITE_DEBUG=1 shows where it happened"


def _smaller(arguments: Sequence[str]) -> str:
    """How to need less memory, by flags that the command has."""
    commands: Any = typer.main.get_command(app)
    command = commands.commands.get(next(iter(arguments), ""))
    flags = {parameter.name for parameter in command.params} if command else set()
    advice = [text for name, text in SMALLER.items() if name in flags]
    return f"try {', or '.join(advice)}" if advice else "close other programs, or use a machine with more"


def _hint(error: Any, message: str) -> str | None:
    """What to type instead: an option's name here, or quotes around a prompt that the shell has taken apart."""
    context = getattr(error, "ctx", None)
    if context is None:
        return None
    given = getattr(error, "option_name", None) or ""
    plain, draws = given.lstrip("-").replace("-", "_"), context.info_name == "generate"
    if plain == "prompt" and draws:
        return f'{given} is not needed: the prompt comes first, sdlite generate "a red apple"'
    name = NAMES_HERE.get(plain, "").replace("_", "-")
    if name and any(f"--{name}" in parameter.opts for parameter in context.command.params):
        return f"{given} is called --{name} here"
    extra = re.search(r"unexpected extra argument\S* \((.*)\)", message, re.S)
    if extra is None or not draws:
        return None
    words = f"{context.params.get('prompt', '')} {extra[1]}".strip()
    return f'put quotes around the prompt: sdlite generate "{words}"'
