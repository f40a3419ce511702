"""The shared part of the commands: the app, common flags, loading a model, and how a run ends.

SDLITE_DEBUG=1 in the environment shows the traceback of an error.
"""

import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from sdlite import __version__
from sdlite.checkpoints.places import SHIPPED
from sdlite.cli.errors import (
    DISK_FULL as DISK_FULL,
    INTERRUPTED as INTERRUPTED,
    SOME_FAILED as SOME_FAILED,
    WRONG_INPUT as WRONG_INPUT,
    explained,
)
from sdlite.cli.output import Report, shown
from sdlite.cli.threads import use_threads
from sdlite.cli.words import WORDS, check_there as check_there, checked as checked
from sdlite.config import LoadOptions, Prediction

if TYPE_CHECKING:
    from sdlite.pipeline import Pipeline

app = typer.Typer(
    name="sdlite",
    help="Stable Diffusion, small enough to read in an evening and exact against diffusers.",
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


Threads = Annotated[
    int | None,
    typer.Option(
        "--threads",
        metavar="N",
        min=1,
        max=512,
        help="Number of CPU threads.",
        show_default="one for each core allowed",
    ),
]
# Until every command takes records.
Model = Annotated[str | None, WORDS["model"]]
Device = Annotated[str, WORDS["device"]]
DType = Annotated[Literal["auto", "float32", "float16", "bfloat16"], WORDS["dtype"]]
Override = Annotated[Prediction | None, WORDS["prediction"]]
Vae = Annotated[str | None, WORDS["vae"]]
Variant = Annotated[str | None, WORDS["variant"]]
AllowLinks = Annotated[list[Path] | None, WORDS["allow_links"]]
Force = Annotated[bool, typer.Option("--force", help="Replace existing files.")]
Quiet = Annotated[bool, WORDS["quiet"]]
AsJson = Annotated[bool, WORDS["as_json"]]


def examples(*commands: str) -> str:
    """The end of a command's help, one command a line."""
    return "\n".join(["\b", "Examples:", *(f"  {command}" for command in commands)])


@app.callback(invoke_without_command=True)
def _options(
    context: typer.Context, version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False
) -> None:
    if version:
        print(f"sdlite {__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        print(context.get_help())


def load(options: LoadOptions, report: Report, threads: int | None = None) -> "Pipeline":
    """Loads the model and reports its notes."""
    with report.busy(f"loading {SHIPPED if options.model is None else options.model}"):
        from sdlite.pipeline import Pipeline

        use_threads(threads)
        pipe = Pipeline.load(options.model, **options.keywords())
    for note in pipe.notes:
        report.note(note)
    return pipe


def run(arguments: Sequence[str] | None) -> int:
    """Runs the command line and returns its exit code; None takes the arguments of the process."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    try:
        with _stopped_in_order():
            code = typer.main.get_command(app).main(given, prog_name="sdlite", standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        return INTERRUPTED
    except Exception as error:
        if os.environ.get("SDLITE_DEBUG"):
            traceback.print_exc()
        code, message = explained(error, given)
        print(f"sdlite: error: {shown(' '.join(message.split()))}", file=sys.stderr)
    return code if isinstance(code, int) else 0


@contextmanager
def _stopped_in_order() -> Iterator[None]:
    """Lets SIGTERM and a closed terminal end the command as Ctrl-C does, so that no half-made file stays behind."""
    main = threading.current_thread() is threading.main_thread()  # no other may set handlers
    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if main and hasattr(signal, name)]
    default = [number for number in numbers if signal.getsignal(number) is signal.SIG_DFL]  # nohup ignores SIGHUP
    for number in default:
        signal.signal(number, signal.default_int_handler)
    try:
        yield
    finally:
        for number in default:
            signal.signal(number, signal.SIG_DFL)
