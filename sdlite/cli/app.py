"""What the commands share: the app, their common flags, and how a run ends.

Whatever the user got wrong is one line on stderr and exit code 2; an interrupted run exits with 130.
"""

import os
import re
import sys
from collections.abc import Sequence
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from sdlite import __version__
from sdlite.cli.hints import usage
from sdlite.cli.output import Report, shown
from sdlite.config import Prediction

if TYPE_CHECKING:
    from sdlite.pipeline import Pipeline

WRONG_INPUT, INTERRUPTED = 2, 130  # exit codes; the second is a shell's 128 + SIGINT

app = typer.Typer(
    name="sdlite",
    help="Stable Diffusion, small enough to read in an evening and exact against diffusers.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        help="Folder, .safetensors file or hub id; 'tiny' is an untrained toy.",
        show_default="the model that ships",
    ),
]
Output = Annotated[
    str | None,
    typer.Option("--output", "-o", help="FILE.png or a folder.", show_default="000000-SEED.png here, counting up"),
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")]
DType = Annotated[Literal["auto", "float32", "float16", "bfloat16"], typer.Option(help="Of text encoder and UNet.")]
DTypeName = Literal["float32", "float16", "bfloat16"]
Override = Annotated[Prediction | None, typer.Option(help="What the model predicts, if its files do not say so.")]
Force = Annotated[bool, typer.Option("--force", help="Replace files that exist.")]
NoMetadata = Annotated[bool, typer.Option("--no-metadata", help="Leave prompt and settings out of the PNG.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No notes and no progress bar.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


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


def load(model: str | None, device: str, dtype: str, prediction: Prediction | None, report: Report) -> "Pipeline":
    from sdlite.pipeline import Pipeline

    limit_threads()
    pipe = Pipeline.load(model, device=device, dtype=dtype, prediction=prediction)
    for note in pipe.notes:
        report.note(note)
    return pipe


def limit_threads(share: Path = Path("/sys/fs/cgroup/cpu.max")) -> None:
    """PyTorch counts cores, not a container's share of them; threads beyond that share only wait for each other."""
    import torch

    quota, period = share.read_text().split() if share.is_file() else ("max", "")
    if quota != "max" and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, min(torch.get_num_threads(), ceil(int(quota) / int(period)))))


def run(arguments: Sequence[str] | None) -> int:
    try:
        code = typer.main.get_command(app).main(arguments, prog_name="sdlite", standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        return INTERRUPTED
    except Exception as error:
        message = _message(error)
        if message is None or os.environ.get("SDLITE_DEBUG"):
            raise
        print(f"sdlite: error: {shown(' '.join(message.split()))}", file=sys.stderr)
        return WRONG_INPUT
    return code if isinstance(code, int) else 0


def _message(error: Exception) -> str | None:
    """What to tell the user of an error, None for one that is a fault of the program."""
    if hasattr(error, "format_message"):  # a wrong flag: typer brings its own click or takes the installed one
        return usage(error)
    if isinstance(error, OSError) and error.strerror is not None:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    if isinstance(error, MemoryError) or re.search("out of memory|can't allocate memory", str(error)):
        return "out of memory; try a smaller --width and --height, or --batch-size 1"
    return str(error) if isinstance(error, (ValueError, OSError, FloatingPointError)) else None
