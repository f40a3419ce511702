"""`sdlite data`, `sdlite train` and `sdlite evaluate`: the commands that make a model."""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from sdlite.checkpoints.places import check_model
from sdlite.cli.app import Threads, command
from sdlite.cli.flags import Flags, check_there, checked
from sdlite.cli.output import Report
from sdlite.cli.threads import use_threads
from sdlite.config import LoadOptions
from sdlite.files import sweep
from sdlite.training.options import INTERNAL, OPTIONS, EvaluationOptions, Stage

DataKind = Literal["emoji", "nuclei", "foreground"]
DATA = "Folder of images with captions: .txt files beside them, metadata.jsonl or metadata.csv."
VARIED = "For foreground: number of images per drawing, with more kinds of backgrounds; 0: plain."


@command("sdlite data emoji -o emoji", "sdlite data foreground --emoji emoji --varied 2 -o foreground")
def data(
    kind: Annotated[DataKind, typer.Argument(help="What to make; nuclei and foreground come with masks.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="New folder. Downloads stay in OUTPUT-sources.")],
    sources: Annotated[
        Path | None, typer.Option(help="Folder that already has the packages; then nothing is downloaded.")
    ] = None,
    size: Annotated[int, typer.Option(help="Side of an emoji in pixels, 64 to 512.")] = 256,
    style: Annotated[list[str] | None, typer.Option(help="Use only this style; may be repeated.")] = None,
    concepts: Annotated[
        Path | None, typer.Option(help="Text file with the names of the concepts to use, one per line.")
    ] = None,
    emoji: Annotated[Path | None, typer.Option(help="For foreground: folder that `data emoji` made.")] = None,
    varied: Annotated[int, typer.Option(min=0, help=VARIED)] = 0,
) -> None:
    """Download open packages from npm and PyPI and make a data folder of them."""
    from sdlite.training.datasets.emoji import make
    from sdlite.training.datasets.masks import make_foreground, make_nuclei

    if (kind == "foreground") != (emoji is not None):
        raise ValueError("--emoji FOLDER, made by `sdlite data emoji`, is what `sdlite data foreground` needs")
    names = "" if concepts is None else concepts.read_text(encoding="utf-8")
    chosen = {name.strip() for name in names.split("\n")} - {""}
    sweep(output.absolute().parent)
    if kind == "nuclei":
        counts = make_nuclei(output, sources=sources)
    elif emoji is not None:
        counts = make_foreground(output, emoji, sources=sources, varied=varied)
    else:
        counts = make(output, sources=sources, size=size, styles=style or (), concepts=chosen)
    print(", ".join(f"{split} {count}" for split, count in counts.items()))


WORDS = {
    "start": typer.Option("--from", "--start", metavar="MODEL", callback=checked(check_model)),
    **{name: typer.Option(callback=checked(check_there)) for name in ("codec", "text", "teacher")},
    "size": typer.Option(show_default="256, or the model's"),
    "seed": typer.Option(),  # without -s
    "class_weights": typer.Option(metavar="W,W,...", parser=str, show_default="all 1"),
}


@command(
    "sdlite train denoiser --data images --from emoji-128 -o mine --batch-size 8 --lr 2e-4 --minutes 10",
    "sdlite train segmentation --data nuclei -o run --samples 1200 --decay cosine",
)
def train(
    stage: Annotated[
        Stage, typer.Argument(help="What to train; a model needs codec, text and denoiser, in this order.")
    ],
    folder: Annotated[Path, typer.Option("--data", help=DATA)],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the run; an existing run is resumed.")],
    fields: Annotated[dict[str, Any], Flags(records=OPTIONS, without=INTERNAL, words=WORDS)],
    threads: Threads = None,
) -> None:
    """Train one stage of a model until --minutes or --samples are over. The result is in OUTPUT/export.

    Ctrl-C saves and exports the run; the same command resumes it.
    """
    from sdlite.training.datasets.folder import MASKED, read_records

    typer.echo(f"sdlite: reading {folder}", err=True)
    read_records(folder, fields=MASKED if stage == "segmentation" else ("file_name", "text"))  # faults at once
    from sdlite.training.loop import train as run

    use_threads(threads)
    if "class_weights" in fields:
        fields["class_weights"] = ",".join(fields["class_weights"])
    run(stage, folder, output, **fields)


@command(
    "sdlite evaluate run/export --data emoji -o report",
    "sdlite evaluate emoji-128 --data emoji -o report --images 20 --minutes 1",
)
def evaluate(
    model: Annotated[str, typer.Argument(callback=checked(check_model), help="Folder, .safetensors file or hub id.")],
    folder: Annotated[
        Path, typer.Option("--data", callback=checked(check_there), help="Data folder that the model was trained on.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the report and the judge.")],
    options: EvaluationOptions,
    links: Annotated[LoadOptions, Flags(only=("allow_links",))],
    former_images: Annotated[int | None, typer.Option("--pictures", hidden=True)] = None,
    threads: Threads = None,
) -> None:
    """Compare a model's images with real held-out images.

    The judge, a classifier, is trained only on the real images of --data.
    """
    if former_images is not None:
        options = options.replace(images=former_images)
    typer.echo(f"sdlite: loading {model}", err=True)
    from sdlite.training.evaluation.report import evaluate as run

    use_threads(threads)
    bar = Report().bar()
    rows: dict[str, Any] = {}

    def progress(what: str, done: int, total: int) -> None:
        bar.start()
        if what not in rows:
            typer.echo(f"sdlite: drawing {total} {what}", err=True)
            rows[what] = bar.add_task(what, total=total)
        bar.update(rows[what], completed=done)

    try:
        print(run(model, folder, output, options, allow_links=links.allow_links, progress=progress))
    finally:
        bar.stop()
