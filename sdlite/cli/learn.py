"""`sdlite data`, `sdlite train` and `sdlite evaluate`: the commands that make a model."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from sdlite.cli.app import app, examples, limit_threads


@app.command(
    epilog=examples("sdlite data emoji -o emoji", "sdlite data foreground --emoji emoji --varied 2 -o foreground")
)
def data(
    kind: Annotated[Literal["emoji", "nuclei", "foreground"], typer.Argument(help="The latter two: with masks.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="New folder.")],
    sources: Annotated[Path | None, typer.Option(help="Folder with the packages, to fetch nothing.")] = None,
    size: Annotated[int, typer.Option(help="Side of an emoji in pixels, 64 to 512.")] = 256,
    style: Annotated[list[str] | None, typer.Option(help="Only this one; may be repeated.")] = None,
    concepts: Annotated[Path | None, typer.Option(help="Text file: only these, a name a line.")] = None,
    emoji: Annotated[Path | None, typer.Option(help="For foreground: folder that `data emoji` made.")] = None,
    varied: Annotated[
        int, typer.Option(min=0, help="For foreground: pictures of each drawing, with more kinds of backgrounds.")
    ] = 0,
) -> None:
    """Make a data folder out of open packages, from npm, PyPI and Debian."""
    from sdlite.train.emoji import make
    from sdlite.train.masks import make_foreground, make_nuclei

    if (kind == "foreground") != (emoji is not None):
        raise ValueError("--emoji FOLDER, made by `sdlite data emoji`, is what `sdlite data foreground` needs")
    names = [] if concepts is None else concepts.read_text(encoding="utf-8").split("\n")
    chosen = {name.strip() for name in names} - {""}
    if kind == "nuclei":
        counts = make_nuclei(output, sources=sources)
    elif emoji is not None:
        counts = make_foreground(output, emoji, sources=sources, varied=varied)
    else:
        counts = make(output, sources=sources, size=size, styles=style or (), concepts=chosen)
    print(", ".join(f"{split} {count}" for split, count in counts.items()))


@app.command(
    epilog=examples(
        "sdlite train denoiser --data pictures --start emoji-128 -o mine --batch-size 8 --lr 2e-4 --minutes 10",
        "sdlite train segmentation --data nuclei -o run --samples 1200 --decay cosine",
    )
)
def train(
    stage: Annotated[
        Literal["codec", "text", "denoiser", "segmentation"], typer.Argument(help="The first three in this order.")
    ],
    folder: Annotated[Path, typer.Option("--data", help="What `sdlite data` made, or pictures with metadata.jsonl.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Of the run; one that is there is resumed.")],
    minutes: Annotated[float | None, typer.Option(help="Budget of this call.")] = None,
    samples: Annotated[int | None, typer.Option(help="Length of the whole run.")] = None,
    codec: Annotated[
        Path | None,
        typer.Option(help="Export folder of that stage: for the denoiser; for codec, to train its decoder on."),
    ] = None,
    text: Annotated[Path | None, typer.Option(help="For the denoiser: export folder of that stage.")] = None,
    teacher: Annotated[Path | None, typer.Option(help="For text: folder of a sentence encoder.")] = None,
    arch: Annotated[
        Literal["unet", "dit", "fcn"] | None,
        typer.Option(help="For the denoiser: unet, dit; for segmentation: unet, fcn.", show_default="unet"),
    ] = None,
    start: Annotated[
        Path | None, typer.Option(help="For the denoiser: model to train on, emoji-128 or a folder.")
    ] = None,
    size: Annotated[int | None, typer.Option(help="For the denoiser: of the pictures.", show_default="256")] = None,
    prediction: Annotated[
        Literal["epsilon", "v"] | None, typer.Option(help="For the denoiser.", show_default="v")
    ] = None,
    timesteps: Annotated[
        Literal["uniform", "logit_normal"] | None, typer.Option(help="For the denoiser.", show_default="logit_normal")
    ] = None,
    min_snr_gamma: Annotated[
        float | None, typer.Option(help="For the denoiser; 0 weighs all timesteps alike.", show_default="5")
    ] = None,
    zero_terminal_snr: Annotated[
        bool | None,
        typer.Option("--zero-terminal-snr/--no-zero-terminal-snr", help="For the denoiser.", show_default="on"),
    ] = None,
    batch_size: Annotated[int | None, typer.Option(help="Per process.")] = None,
    adversarial: Annotated[
        bool | None, typer.Option("--adversarial", help="For the codec, with --codec: sharpen its decoder's edges.")
    ] = None,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate.")] = None,
    optimizer: Annotated[Literal["adamw", "muon"] | None, typer.Option(help="Muon learns more per sample.")] = None,
    decay: Annotated[Literal["constant", "cosine"] | None, typer.Option(help="cosine needs --samples.")] = None,
    precision: Annotated[Literal["no", "bf16", "fp16"] | None, typer.Option(help="Of autocast.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of weights, order and noise.")] = None,
    plot: Annotated[bool, typer.Option("--plot", help="Draw OUTPUT/curves.png.")] = False,
) -> None:
    """Train one stage of a model until its time or samples are over; OUTPUT/export is what it made."""
    from sdlite.train.stages import train as run

    limit_threads()
    apart = ("stage", "folder", "output", "codec", "text", "teacher", "start", "run", "apart")
    options = {name: value for name, value in locals().items() if name not in apart}
    parts = {"codec": codec, "text": text, "teacher": teacher, "start": start}
    run(stage, folder, output, folders=parts, options=options)


@app.command(
    epilog=examples(
        "sdlite evaluate run/export --data emoji -o report",
        "sdlite evaluate emoji-128 --data emoji -o report --pictures 20 --minutes 1",
    )
)
def evaluate(
    model: Annotated[str, typer.Argument(help="What --model takes elsewhere.")],
    folder: Annotated[Path, typer.Option("--data", help="Data folder that the model was trained on.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the report and its judge.")],
    pictures: Annotated[int, typer.Option(min=8, max=10_000, help="Held-out pairs to draw.")] = 100,
    minutes: Annotated[float, typer.Option(help="To train the judge, where OUTPUT has none.")] = 10.0,
    steps: Annotated[int, typer.Option(help="Of the solver.")] = 20,
    guidance_scale: Annotated[float, typer.Option(help="Up to 1: none.")] = 5.0,
) -> None:
    """Measure what a model draws against held-out pictures, with a judge that has never seen it draw."""
    from sdlite.train.evaluate import evaluate as run

    limit_threads()
    fields = {"steps": steps, "guidance_scale": guidance_scale}
    print(run(model, folder, output, pictures=pictures, minutes=minutes, fields=fields))
