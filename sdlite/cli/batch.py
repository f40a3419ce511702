"""`sdlite batch`: draws a file of requests into a folder; it may be interrupted at any time."""

import shutil
import sys
from copy import copy
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sdlite.batch.plan import Options
from sdlite.batch.rows import Repeated
from sdlite.checkpoints.places import SHIPPED
from sdlite.cli.app import DISK_FULL, INTERRUPTED, SOME_FAILED, WRONG_INPUT, Threads, command
from sdlite.cli.flags import WORDS, Flags, check_there, checked
from sdlite.cli.output import Report, shown
from sdlite.cli.threads import use_threads
from sdlite.config import LoadOptions
from sdlite.training.stop import Stop

if TYPE_CHECKING:
    from sdlite.batch import Batch, BatchReport, Event

OWN = [name for name in Options.model_fields if name not in LoadOptions.model_fields and name != "defaults"]
OPTION_WORDS = {
    "batch_size": typer.Option("--batch-size", "-b"),
    "part": typer.Option(metavar="I/N"),
    "name": typer.Option(metavar="TEMPLATE", show_default="index and key"),
    "ray_address": typer.Option(metavar="ADDR"),
}
ROW_HELP = {"num_images": "Number of images.", "strength": "How much to change the start image."}
COLUMNS = ("negative_prompt", "steps", "solver", "guidance_scale", "num_images", "strength", "width", "height")


def _for_rows(name: str) -> Any:
    """The words of a flag that stands for a column."""
    words, text = copy(WORDS.get(name) or typer.Option()), ROW_HELP.get(name) or Repeated.model_fields[name].description
    assert text is not None, name
    words.help = f"For rows without this column: {text[0].lower()}{text[1:]}"
    return words


@command("sdlite batch prompts.txt -o out --steps 30", "sdlite batch grid.json -o grid --contact-sheet grid.png")
def batch(
    *,
    requests: Annotated[
        str | None,
        typer.Argument(
            callback=checked(lambda name: None if name == "-" else check_there(name)),
            help=".txt, .jsonl, .csv, .tsv, .parquet, a grid in .json, or - for stdin.",
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="DIR", help="Folder for the images. An existing batch is continued."),
    ] = None,
    settings: Annotated[Options, Flags(only=(*OWN, *LoadOptions.model_fields), words=OPTION_WORDS)],
    defaults: Annotated[
        dict[str, Any], Flags(only=COLUMNS, records={"": Repeated}, words={name: _for_rows(name) for name in COLUMNS})
    ],
    contact_sheet: Annotated[Path | None, typer.Option(help="Also write all images into this one PNG.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Draw nothing; estimate the time and the disk space.")
    ] = False,
    verify: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", callback=checked(check_there), help="Draw nothing; check every image of a batch's folder."
        ),
    ] = None,
    former_part: Annotated[str | None, typer.Option("--shards", "--shard", hidden=True)] = None,
    threads: Threads = None,
    report: Report,
) -> None:
    """Draw all requests of a file into a folder. Run the same command again to draw only the missing images.

    Prints the path of each PNG or shard. Every field of a request is a column (prompt, seed, steps, ...). num_images
    repeats a row; other columns go into the metadata. A .json file is a grid: every value of one list is combined with
    every value of the others. Ctrl-C or SIGTERM finishes the current batch; a second one stops at once. Exit codes: 0
    all done, 1 some failed (see DIR/errors.jsonl), 2 wrong input, 3 disk full, 130 interrupted.

    --verify renames a damaged image to NAME.corrupt; the same batch command then draws it again. It exits with 1 if
    anything is damaged or missing.
    """
    if verify is not None:
        raise typer.Exit(_verify(verify, report))
    if requests is None or output is None:
        raise ValueError("give a file of requests and a folder, e.g. sdlite batch prompts.txt -o out")
    if contact_sheet is not None and settings.format != "folder":
        raise ValueError(f"--contact-sheet is drawn from a folder of images; leave out --format {settings.format}")
    settings = settings.replace(defaults=defaults, part=settings.part if former_part is None else former_part)
    try:
        prepared = _prepared(requests, output, settings, contact_sheet, threads, report)
    except ValueError as error:
        for line in str(error).splitlines():
            print(f"sdlite: error: {shown(line)}", file=sys.stderr)
        raise typer.Exit(WRONG_INPUT) from None
    report.note(*prepared.notes)
    raise typer.Exit(_plan(prepared, report) if dry_run else _run(prepared, contact_sheet, report))


def _prepared(
    requests: str, output: Path, settings: Options, contact_sheet: Path | None, threads: int | None, report: Report
) -> "Batch":
    """Loads the model and checks everything. Raises ValueError with one line per fault."""
    with report.busy(f"loading {SHIPPED if settings.model is None else settings.model}, reading {requests}"):
        from sdlite.batch import prepare

        use_threads(threads)
        prepared = prepare(requests, output, **dict(settings))
    if contact_sheet is not None:
        from sdlite.batch.sheet import check_place

        check_place(contact_sheet, prepared.plan, output)
    return prepared


def _run(prepared: "Batch", contact_sheet: Path | None, report: Report) -> int:
    """Draws what is missing, and then the contact sheet. Returns the exit code."""
    from sdlite.batch import DiskFull

    try:
        code = _draw(prepared, report)
        if contact_sheet is not None:
            from sdlite.batch.sheet import write_sheet

            with report.busy(f"writing {contact_sheet}"):
                write_sheet(prepared.plan, prepared.store.root, contact_sheet)
            report.path(contact_sheet, "contact_sheet")
        return code
    except DiskFull as error:
        report.event("disk_full", message=error.strerror)
        print(f"sdlite: error: {shown(str(error.strerror))}", file=sys.stderr)
        return DISK_FULL


def _draw(prepared: "Batch", report: Report) -> int:
    """Shows a bar, or prints the paths. Returns the exit code."""
    missing, start = len(prepared.missing()), perf_counter()
    pipe, folder, packed = prepared.pipe, prepared.store.folder, prepared.store.shards
    report.event("start", model=pipe.name, model_hash=pipe.model_hash, images=len(prepared.items), missing=missing)
    bar = report.bar()
    task = bar.add_task(f"0/{missing} images", total=missing)
    prints = not packed and (bar.disable or not sys.stdout.isatty())  # paths would push the bar down the terminal

    def progress(event: "Event") -> None:
        rate = event.done / (perf_counter() - start) * 60
        bar.update(task, completed=event.done, description=f"{event.done}/{event.total} images, {rate:.0f}/min")
        path = packed.path_of(event.index) if packed else folder / event.file_name
        if event.error is not None:
            report.event("failed", index=event.index, path=str(path), error=event.error)
            report.note(f"image {event.index} failed: {event.error}")
        elif report.as_json:
            report.event("image", index=event.index, path=str(path), sha256=event.sha256, seconds=event.seconds)
        elif prints and event.sha256 is not None:
            typer.echo(path)

    with Stop("sdlite: finishing the current batch") as stop, bar:
        done = prepared.run(progress, lambda: stop.asked)
    for shard in packed.paths() if packed else ():
        report.path(shard, "shard")
    return _end(done, report)


def _end(done: "BatchReport", report: Report) -> int:
    counts = {"drawn": done.done, "skipped": done.skipped, "failed": len(done.failed)}
    report.event("done", **counts, seconds=round(done.seconds, 3), interrupted=done.interrupted)
    report.note(", ".join(f"{count} {name}" for name, count in counts.items()) + f" in {_time(done.seconds)}")
    if done.interrupted:
        return INTERRUPTED
    return SOME_FAILED if done.failed else 0


def _plan(prepared: "Batch", report: Report) -> int:
    """Prints what a run would do; draws one batch to measure time and space. Returns the exit code."""
    with report.busy("drawing one batch to measure it"):
        estimate = prepared.estimate()
    root = prepared.store.root.absolute()
    free = shutil.disk_usage(next(place for place in (root, *root.parents) if place.exists())).free
    if report.as_json:
        fields = {"missing": estimate.images, "seconds": round(estimate.seconds, 3), "bytes": estimate.size}
        report.event("plan", images=len(prepared.items), **fields, free=free)
        return 0
    print(f"images   {len(prepared.items)}, of which {len(prepared.items) - estimate.images} are done")
    print(f"batches  of {prepared.size}, {estimate.processes} at a time on {prepared.threads} threads each")
    print(f"time     about {_time(estimate.seconds)}")
    print(f"disk     about {estimate.size / 1e6:.1f} MB of {free / 1e6:.0f} MB free")
    return 0


def _verify(folder: Path, report: Report) -> int:
    with report.busy(f"checking {folder}"):
        from sdlite.batch import verify

        check = verify(folder)
    report.event("verified", **{name: len(names) for name, names in check._asdict().items()})
    for kind in ("missing", "corrupt", "extra"):
        for name in getattr(check, kind):
            report.event(kind, path=str(folder / name))
            if not report.as_json:
                print(f"{kind}\t{shown(str(folder / name))}")
    report.note(", ".join(f"{len(names)} {kind}" for kind, names in check._asdict().items()))
    return SOME_FAILED if check.missing or check.corrupt else 0


def _time(seconds: float) -> str:
    minutes, hours = seconds / 60, seconds / 3600
    return f"{seconds:.0f} s" if minutes < 2 else f"{minutes:.0f} min" if hours < 2 else f"{hours:.1f} h"
