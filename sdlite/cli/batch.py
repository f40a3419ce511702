"""`sdlite batch`: draws a file of requests into a folder; it may be interrupted at any time."""

import shutil
import sys
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from sdlite.checkpoints.places import SHIPPED
from sdlite.cli.app import (
    INTERRUPTED,
    WRONG_INPUT,
    AllowLinks,
    AsJson,
    Device,
    DType,
    Model,
    Override,
    Quiet,
    Threads,
    Vae,
    Variant,
    app,
    check_there,
    checked,
    examples,
)
from sdlite.cli.output import Interrupts, Report, shown
from sdlite.cli.threads import use_threads
from sdlite.request import Request, SolverName

if TYPE_CHECKING:
    from sdlite.batch import Batch, BatchReport, Event

SOME_FAILED, DISK_FULL = 1, 3  # exit codes
Form = Literal["folder", "webdataset"]
DEFAULT = Request(prompt="")


def _check_requests(name: str) -> None:
    if name != "-":
        check_there(Path(name))


@app.command(
    epilog=examples(
        "sdlite batch prompts.txt -o out --steps 30",
        "sdlite batch grid.json -o grid --contact-sheet grid.png",
    )
)
def batch(
    requests: Annotated[
        str | None,
        typer.Argument(
            callback=checked(_check_requests),
            help=".txt, .jsonl, .csv, .tsv, .parquet, a grid in .json, or - for stdin.",
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="DIR", help="Folder for the images. An existing batch is continued."),
    ] = None,
    model: Model = None,
    batch_size: Annotated[int, typer.Option("--batch-size", "-b", help="Images drawn at the same time.")] = 4,
    workers: Annotated[
        int, typer.Option(help="Number of processes or Ray actors; they share the cores, or each gets a GPU.")
    ] = 1,
    exact: Annotated[
        bool,
        typer.Option("--exact", help="Same bytes for every --batch-size and --workers, on one kind of CPU."),
    ] = False,
    seed: Annotated[
        int, typer.Option("--seed", "-s", help="Rows without a seed get different seeds, derived from this one.")
    ] = 0,
    same_seed: Annotated[
        bool, typer.Option("--same-seed", help="Give all rows without a seed the seed --seed.")
    ] = False,
    negative_prompt: Annotated[
        str | None, typer.Option("--negative-prompt", "-n", help="What to keep out, for rows without this column.")
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(
            help="Denoising steps, for rows without this column; more is slower.", show_default=f"{DEFAULT.steps}"
        ),
    ] = None,
    solver: Annotated[
        SolverName | None,
        typer.Option(
            help="How to step from noise to image, for rows without this column.", show_default=DEFAULT.solver
        ),
    ] = None,
    guidance_scale: Annotated[
        float | None,
        typer.Option(
            "--guidance-scale",
            "--cfg-scale",
            help="How closely to follow the prompt, for rows without this column; 1 turns guidance off.",
            show_default=f"{DEFAULT.guidance_scale}",
        ),
    ] = None,
    num_images: Annotated[
        int | None, typer.Option(help="Number of images, for rows without this column.", show_default="1")
    ] = None,
    strength: Annotated[
        float | None,
        typer.Option(
            help="How much to change the start image, 0 to 1, for rows that have a start image but not this column.",
            show_default=f"{DEFAULT.strength}",
        ),
    ] = None,
    width: Annotated[
        int | None,
        typer.Option(
            "--width", "-W", help="Width in pixels, for rows without this column.", show_default="the model's"
        ),
    ] = None,
    height: Annotated[
        int | None,
        typer.Option(
            "--height", "-H", help="Height in pixels, for rows without this column.", show_default="the model's"
        ),
    ] = None,
    keep_going: Annotated[bool, typer.Option("--keep-going", help="Continue after a row that fails.")] = False,
    shards: Annotated[
        str | None,
        typer.Option(
            metavar="I/N",
            help="Draw only part I of N, for many machines on one folder. In a SLURM array of 1-N: "
            "$SLURM_ARRAY_TASK_ID/N. In a shell that accelerate launch starts: $((RANK+1))/$WORLD_SIZE.",
        ),
    ] = None,
    name: Annotated[
        str | None,
        typer.Option(
            metavar="TEMPLATE", help="File names, e.g. '{index:06}-{prompt}.png'.", show_default="index and key"
        ),
    ] = None,
    form: Annotated[
        Form, typer.Option("--format", help="folder: PNG files. webdataset: shards DIR/00000.tar, ...")
    ] = "folder",
    ray: Annotated[
        bool, typer.Option("--ray", help="Make the workers actors of a Ray cluster on this machine.")
    ] = False,
    ray_address: Annotated[
        str | None,
        typer.Option(
            metavar="ADDR", help="Address of a running Ray cluster; all its machines must see DIR and the model."
        ),
    ] = None,
    contact_sheet: Annotated[Path | None, typer.Option(help="Also write all images into this one PNG.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Draw nothing; estimate the time and the disk space.")
    ] = False,
    verify: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            callback=checked(check_there),
            help="Draw nothing; check every image of a batch's folder.",
        ),
    ] = None,
    device: Device = "auto",
    dtype: DType = "auto",
    threads: Threads = None,
    prediction: Override = None,
    vae: Vae = None,
    variant: Variant = None,
    allow_links: AllowLinks = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Draw all requests of a file into a folder. Run the same command again to draw only the missing images.

    Prints the path of each PNG or shard. Every field of a request is a column (prompt, seed, steps, ...). num_images
    repeats a row; other columns go into the metadata. The options of this command apply to rows without that column. A
    .json file is a grid: every value of one list is combined with every value of the others. Ctrl-C or SIGTERM finishes
    the current batch; a second one stops at once. Exit codes: 0 all done, 1 some failed (see DIR/errors.jsonl), 2 wrong
    input, 3 disk full, 130 interrupted.

    --verify renames a damaged image to NAME.corrupt; the same batch command then draws it again. It exits with 1 if
    anything is damaged or missing.
    """
    report = Report(quiet, as_json)
    if verify is not None:
        raise typer.Exit(_verify(verify, report))
    if requests is None or output is None:
        raise ValueError("give a file of requests and a folder, e.g. sdlite batch prompts.txt -o out")
    options: dict[str, Any] = {"model": model, "device": device, "dtype": dtype, "prediction": prediction}
    options |= {"vae": vae, "variant": variant, "allow_links": tuple(map(str, allow_links or ()))}
    options |= {"batch_size": batch_size, "workers": workers, "exact": exact, "seed": seed, "keep_going": keep_going}
    fields = {"negative_prompt": negative_prompt, "steps": steps, "solver": solver, "guidance_scale": guidance_scale}
    fields |= {"num_images": num_images, "strength": strength, "width": width, "height": height}
    options |= {"same_seed": same_seed, "defaults": {k: value for k, value in fields.items() if value is not None}}
    options |= {"shard": shards, "name": name, "format": form, "ray": ray, "ray_address": ray_address}
    if contact_sheet is not None and form != "folder":
        raise ValueError(f"--contact-sheet is drawn from a folder of pictures; leave out --format {form}")
    try:
        with report.busy(f"loading {SHIPPED if model is None else model}, reading {requests}"):
            from sdlite.batch import DiskFull, prepare

            use_threads(threads)
            prepared = prepare(requests, output, **options)
        if contact_sheet is not None:
            from sdlite.batch.sheet import check_place, write_sheet

            check_place(contact_sheet, prepared.plan, output)
    except ValueError as error:
        for line in str(error).splitlines():
            print(f"sdlite: error: {shown(line)}", file=sys.stderr)
        raise typer.Exit(WRONG_INPUT) from None
    for note in prepared.notes:
        report.note(note)
    if dry_run:
        _plan(prepared, report)
        return
    try:
        code = _run(prepared, report)
        if contact_sheet is not None:
            with report.busy(f"writing {contact_sheet}"):
                write_sheet(prepared.plan, output, contact_sheet)
            report.path(contact_sheet, "contact_sheet")
    except DiskFull as error:
        report.event("disk_full", message=error.strerror)
        print(f"sdlite: error: {shown(str(error.strerror))}", file=sys.stderr)
        code = DISK_FULL
    raise typer.Exit(code)


def _run(prepared: "Batch", report: Report) -> int:
    """Draws what is missing, with a bar or the paths. Returns the exit code."""
    from sdlite.batch.shards import shard_of

    missing, start = len(prepared.missing()), perf_counter()
    pipe, folder, packed = prepared.pipe, prepared.store.folder, prepared.store.shards
    report.event("start", model=pipe.name, model_hash=pipe.model_hash, images=len(prepared.items), missing=missing)
    bar = report.bar()
    task = bar.add_task(f"0/{missing} images", total=missing)
    prints = not packed and (bar.disable or not sys.stdout.isatty())  # paths would push the bar down the terminal

    def progress(event: "Event") -> None:
        rate = event.done / (perf_counter() - start) * 60
        bar.update(task, completed=event.done, description=f"{event.done}/{event.total} images, {rate:.0f}/min")
        path = packed.path_of(shard_of(event.index)) if packed else folder / event.file_name
        if event.error is not None:
            report.event("failed", index=event.index, path=str(path), error=event.error)
            report.note(f"picture {event.index} failed: {event.error}")
        elif report.as_json:
            fields = {"sha256": event.sha256, "seconds": event.seconds}
            report.event("image", index=event.index, path=str(path), **fields)
        elif prints and event.sha256 is not None:
            typer.echo(path)

    with Interrupts("batch") as interrupts, bar:
        done = prepared.run(progress, lambda: interrupts.asked)
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


def _plan(prepared: "Batch", report: Report) -> None:
    """Prints what a run would do; one batch is drawn to measure its time and space."""
    with report.busy("drawing one batch to measure it"):
        estimate = prepared.estimate()
    root = prepared.store.root.absolute()
    free = shutil.disk_usage(next(place for place in (root, *root.parents) if place.exists())).free
    if report.as_json:
        fields = {"missing": estimate.images, "seconds": round(estimate.seconds, 1), "bytes": estimate.size}
        report.event("plan", images=len(prepared.items), **fields, free=free)
        return
    print(f"images   {len(prepared.items)}, of which {len(prepared.items) - estimate.images} are there")
    print(f"batches  of {prepared.size}, {prepared.options.workers} at a time on {prepared.threads} threads each")
    print(f"time     about {_time(estimate.seconds)}")
    print(f"disk     about {estimate.size / 1e6:.1f} MB of {free / 1e6:.0f} MB free")


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
