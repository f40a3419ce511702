"""`sdlite bench`: how fast the model is here, alone or against diffusers, and what a batch costs."""

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from sdlite.cli.app import Force, Threads, command, load
from sdlite.cli.flags import Flags
from sdlite.cli.output import Report, check_free
from sdlite.config import LoadOptions
from sdlite.files import write_file
from sdlite.request import Request


@command("sdlite bench --vs diffusers --runs 9", "sdlite bench --batch -m tiny -o timings.json")
def bench(
    request: Annotated[Request, Flags(only=("prompt", "steps", "width", "height"))] = Request(
        prompt="a red apple", steps=10
    ),
    *,
    vs: Annotated[
        Literal["diffusers"] | None, typer.Option(help="Also measure diffusers, on the same weights.")
    ] = None,
    runs: Annotated[
        int, typer.Option(min=1, max=1000, help="Number of timings of each side; the sides take turns.")
    ] = 5,
    batch: Annotated[
        bool, typer.Option("--batch", help="Measure the overhead of `sdlite batch` and the cost of --exact instead.")
    ] = False,
    folder: Annotated[Path, typer.Option("--dir", help="With --batch: folder to write into.")] = Path(),
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="Also write every timing to this JSON file.")
    ] = None,
    force: Force = False,
    load_options: Annotated[LoadOptions, Flags(without=("prediction",))],
    threads: Threads = None,
    report: Annotated[Report, Flags(only=("as_json",))],
) -> None:
    """Measure one UNet evaluation, one image, peak memory and cold start.

    With --batch it measures instead the time that `sdlite batch` adds to an image, and how much slower --exact is.
    Prints a Markdown table, with ratios for --vs. The table says if the machine was too busy for reliable figures.
    Each run appends a number to the prompt.
    """
    if report.as_json and request.prompt.endswith(".json"):
        raise ValueError(f"--json prints to stdout and takes no file; to write one, use -o {request.prompt}")
    if output is not None:
        check_free([output], force)
    if batch and (vs is not None or not folder.is_dir()):
        raise ValueError("--batch cannot be used with --vs" if vs else f"--dir={folder} must be an existing folder")
    with report.busy("measuring how busy the machine is"):
        from sdlite.bench import machine_load, measure, measure_batch, measure_exact, table

        busy = machine_load()
    pipe = load(load_options, report, threads)
    report.note("measuring; this takes from some seconds to some minutes")
    if batch:
        from sdlite.batch import run
        from sdlite.batch.drawer import EXACT_BATCH

        result = {
            "machinery": measure_batch(pipe, request, run, folder, load=busy, runs=runs),
            "exact": measure_exact(pipe, request, run, EXACT_BATCH, load=busy, runs=runs),
        }
        text = "\n\n".join(map(table, result.values()))
    else:
        result = measure(pipe, request, load=busy, versus=vs, runs=runs)
        text = table(result)
    print(json.dumps(result) if report.as_json else text)
    if output is not None:
        write_file(output, (json.dumps(result, indent=1) + "\n").encode(), force=force)
