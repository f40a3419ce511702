"""The `sdlite` command: flags to a Request, a Request to pictures, pictures to files.

The only module that reads flags and the environment. Whatever the user got wrong is one line on stderr and exit code
2; an interrupted run exits with 130. stdout holds the paths of the pictures, or with --json one event per line; notes
and the progress bar go to stderr. Heavy modules are imported inside the commands, so that `--help` is immediate.
"""

import json
import os
import re
import sys
from collections.abc import Sequence
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from sdlite import __version__
from sdlite.config import Prediction, Request, SolverName
from sdlite.output import Interrupts, Names, Report, check_free, shown

if TYPE_CHECKING:
    from PIL.Image import Image

    from sdlite.images import Recipe
    from sdlite.pipeline import Pipeline

WRONG_INPUT, INTERRUPTED = 2, 130  # exit codes; the second is a shell's 128 + SIGINT
MAX_IMAGES = 10_000  # of one command; beyond that a batch file is the better record
PICTURES = (".png", ".jpg", ".jpeg", ".webp")
NOT_WRITTEN = (".ckpt", ".pt", ".pth", ".bin", ".gguf", ".onnx", ".safetensor")  # model files of other kinds
DEFAULT = Request(prompt="")

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


@app.callback(invoke_without_command=True)
def _options(
    context: typer.Context, version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False
) -> None:
    if version:
        print(f"sdlite {__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        print(context.get_help())


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="What to draw. (word:1.3) and [word] weigh, BREAK splits.")],
    output: Output = None,
    model: Model = None,
    negative_prompt: Annotated[str, typer.Option("--negative-prompt", "-n", help="What to keep out.")] = "",
    seed: Annotated[
        int, typer.Option("--seed", "-s", help="Of the first picture; the others count up.")
    ] = DEFAULT.seed,
    num_images: Annotated[int, typer.Option(min=1, max=MAX_IMAGES, help="How many pictures.")] = 1,
    batch_size: Annotated[int, typer.Option("--batch-size", "-b", min=1, max=64, help="Drawn at the same time.")] = 1,
    steps: Annotated[int, typer.Option(help="Of the solver.")] = DEFAULT.steps,
    guidance_scale: Annotated[
        float, typer.Option("--guidance-scale", "--cfg-scale", help="Up to 1: none.")
    ] = DEFAULT.guidance_scale,
    guidance_rescale: Annotated[float, typer.Option(help="0 to 1, against washed-out colours.")] = 0.0,
    solver: Annotated[SolverName, typer.Option(help="How to step from noise to image.")] = DEFAULT.solver,
    eta: Annotated[float, typer.Option(help="Noise added per step by ddim, 0 to 1.")] = DEFAULT.eta,
    width: Annotated[int | None, typer.Option("--width", "-W", show_default="the model's")] = None,
    height: Annotated[int | None, typer.Option("--height", "-H", show_default="the model's")] = None,
    image: Annotated[Path | None, typer.Option("--image", "-i", help="Picture to start from.")] = None,
    mask: Annotated[Path | None, typer.Option(help="Of --image, repaint what is white here.")] = None,
    strength: Annotated[float, typer.Option(help="How far to leave --image, 0 to 1.")] = DEFAULT.strength,
    clip_skip: Annotated[int, typer.Option(help="Text layers left out at the end.")] = DEFAULT.clip_skip,
    device: Device = "auto",
    dtype: DType = "auto",
    prediction: Override = None,
    contact_sheet: Annotated[Path | None, typer.Option(help="Also write all pictures into this one PNG.")] = None,
    no_metadata: NoMetadata = False,
    force: Force = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Draw pictures from a prompt.

    Prints the path of each PNG. Without -o they are named 000000-SEED.png, 000001-SEED.png, ... in this folder; with
    -o FOLDER in that folder; with -o NAME.png and --num-images above 1, NAME-1.png, NAME-2.png, ... No file is ever
    replaced without --force. Ctrl-C finishes the picture in hand; a second one stops at once.
    """
    fields = {name: value for name, value in locals().items() if name in Request.model_fields}
    request = Request(**fields | {name: fields[name] and str(fields[name]) for name in ("image", "mask")})
    requests = [request.replace(seed=seed + i) for i in range(num_images)]
    names = Names(output, num_images, force)
    if contact_sheet is not None:
        _check_sheet(contact_sheet, names, force)
    sources = {name: _open(path) for name, path in (("image", image), ("mask", mask)) if path is not None}
    report = Report(quiet, as_json)
    pipe = _load(model, device, dtype, prediction, report)
    pictures, interrupted = _draw(pipe, requests, sources, names, report, batch_size, not no_metadata)
    if contact_sheet is not None and pictures:
        from sdlite.images import contact_sheet as sheet_of, save_png

        labels = [f"seed {request.seed}" for request in requests]
        contact_sheet.parent.mkdir(parents=True, exist_ok=True)
        save_png(sheet_of(pictures, labels), contact_sheet, force=force)
        report.path(contact_sheet, "contact_sheet")
    report.event("done", images=len(pictures), interrupted=interrupted)
    raise typer.Exit(INTERRUPTED if interrupted else 0)


@app.command()
def regen(
    picture: Annotated[Path, typer.Argument(metavar="IMAGE", help="A PNG that sdlite drew.")],
    changes: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Draw with this instead, e.g. steps=50.")
    ] = None,
    output: Output = None,
    model: Model = None,
    device: Device = "auto",
    dtype: DType = "auto",
    prediction: Override = None,
    anyway: Annotated[
        bool, typer.Option("--anyway", help="Draw although the model or a source picture is not the recorded one.")
    ] = False,
    no_metadata: NoMetadata = False,
    force: Force = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Draw a picture again from its metadata.

    --set takes any field of the request (`sdlite info IMAGE` lists them); "none" clears width, height, image or mask.
    A picture that was started from another needs that one again: --set image=FILE, checked by its pixels.
    """
    from sdlite.images import largest_difference, open_image, read_metadata

    recipe = read_metadata(picture)
    changed = dict(_pair(change) for change in changes or ())
    sources = {
        name: _open(Path(path)) for name, path in changed.items() if name in ("image", "mask") and path is not None
    }
    request = _regenerated(picture, recipe, changed, sources, anyway)
    names, report = Names(output, 1, force), Report(quiet, as_json)
    pipe = _load(model, device, dtype, prediction or recipe.prediction, report)
    if pipe.model_hash != recipe.model_hash and not anyway:
        raise ValueError(
            f"{picture} was drawn by model {shown(recipe.model)!r} ({recipe.model_hash[:10]}), not by {pipe.name!r} "
            f"({pipe.model_hash[:10]}); give the first with --model, or add --anyway"
        )
    pictures, interrupted = _draw(pipe, [request], sources, names, report, 1, not no_metadata)
    if not set(changed) - {"image", "mask"}:
        difference = largest_difference(pictures[0], open_image(picture))
        report.event("compared", largest_difference=difference)
        hint = "from another device, --dtype, --prediction or version" if difference > 1 else "which is rounding"
        differs = f"differs from {picture} by up to {difference} of 255, {hint}; `sdlite info {picture}` says more"
        report.note(differs if difference else f"same as {picture}")
    report.event("done", images=1, interrupted=interrupted)
    raise typer.Exit(INTERRUPTED if interrupted else 0)


@app.command()
def info(
    subject: Annotated[str, typer.Argument(metavar="IMAGE|MODEL", help="A picture, or what --model takes.")],
    as_json: AsJson = False,
) -> None:
    """Show how a picture was drawn, or what a model consists of."""
    facts = _picture_facts(subject) if Path(subject).suffix.lower() in PICTURES else _model_facts(subject)
    if as_json:
        print(json.dumps(facts))
        return
    rows = {key: value for group in facts.values() for key, value in group.items() if value not in (None, "")}
    margin = max(map(len, rows), default=0) + 2
    for key, value in rows.items():
        print(f"{shown(key):{margin}}" + shown(str(value)).replace("\n", "\n" + " " * margin))


@app.command()
def convert(
    source: Annotated[str, typer.Argument(metavar="SRC", help="What --model takes, or an old .ckpt.")],
    target: Annotated[Path, typer.Argument(metavar="DST", help="NAME.safetensors for one file, else a new folder.")],
    trust_pickle: Annotated[
        bool, typer.Option("--trust-pickle", help="Read a .ckpt, whose maker you trust: a pickle can carry code.")
    ] = False,
    prediction: Override = None,
    ema: Annotated[bool, typer.Option("--ema", help="The averaged UNet of a single file that has both.")] = False,
    dtype: Annotated[DTypeName | None, typer.Option(show_default="as in SRC")] = None,
    quiet: Quiet = False,
) -> None:
    """Write a model in the other form: a folder as diffusers has it, or one file in the original layout.

    Prints DST. Nothing is replaced: DST must not exist, or be an empty folder.
    """
    check_free([target], force=True)
    if target.suffix.lower() in NOT_WRITTEN:
        raise ValueError(f"{target}: only .safetensors files are written; use {target.with_suffix('.safetensors')}")
    import torch

    from sdlite.checkpoints.save import convert

    kind = None if dtype is None else getattr(torch, dtype)
    parts = convert(source, target, trust_pickle=trust_pickle, prediction=prediction, ema=ema, dtype=kind)
    for note in parts.notes:
        Report(quiet, False).note(note)
    print(target)


@app.command()
def bench(
    prompt: Annotated[str, typer.Argument(help="What to draw; a running number is added.")] = "a red apple",
    model: Model = None,
    vs: Annotated[Literal["diffusers"] | None, typer.Option(help="Measure it on the same weights too.")] = None,
    runs: Annotated[int, typer.Option(min=1, max=1000, help="Timings of each side, in turn.")] = 5,
    steps: Annotated[int, typer.Option(help="Of the whole image.")] = 10,
    width: Annotated[int | None, typer.Option("--width", "-W", show_default="the model's")] = None,
    height: Annotated[int | None, typer.Option("--height", "-H", show_default="the model's")] = None,
    device: Device = "auto",
    dtype: DType = "auto",
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write every timing to this file.")] = None,
    force: Force = False,
) -> None:
    """Measure one UNet evaluation, one image, peak memory and cold start.

    Prints a Markdown table, as ratios with --vs, that says so when the machine was too busy for them to be quoted.
    """
    request = Request(prompt=prompt, steps=steps, width=width, height=height)
    if json_file is not None:
        if json_file.is_dir():
            raise ValueError(f"--json={json_file} must be a file, e.g. {json_file / 'bench.json'}")
        check_free([json_file], force)
    from sdlite.bench import machine_load, measure, table

    load = machine_load()
    pipe = _load(model, device, dtype, None, Report(False, False))
    result = measure(pipe, request, load=load, versus=vs, runs=runs)
    print(table(result))
    if json_file is not None:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        json_file.write_text(json.dumps(result, indent=1) + "\n")


def _check_sheet(sheet: Path, names: Names, force: bool) -> None:
    if Names(str(sheet), 1, force).paths != [sheet]:
        raise ValueError(f"--contact-sheet={sheet} must be a file, e.g. {sheet / 'sheet.png'}")
    if sheet.absolute() in [path.absolute() for path in names.paths]:
        raise ValueError(f"--contact-sheet={sheet} is where a picture goes; give it another name")


@app.command()
def data(
    kind: Annotated[Literal["emoji"], typer.Argument(help="What the model that ships is trained on.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="New folder.")],
    sources: Annotated[Path | None, typer.Option(help="Folder with the packages, to fetch nothing.")] = None,
    size: Annotated[int, typer.Option(help="Pixels, 64 to 512.")] = 128,
    style: Annotated[list[str] | None, typer.Option(help="Only this one; may be repeated.")] = None,
) -> None:
    """Make a data folder out of open packages, from npm, PyPI and Debian."""
    from sdlite.train.emoji import make

    counts = make(output, sources=sources, size=size, styles=style or ())
    print(", ".join(f"{split} {count}" for split, count in counts.items()))


@app.command()
def train(
    stage: Annotated[Literal["codec", "text", "denoiser"], typer.Argument(help="In this order.")],
    folder: Annotated[Path, typer.Option("--data", help="What `sdlite data` made, or pictures with metadata.jsonl.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Of the run; one that is there is resumed.")],
    minutes: Annotated[float | None, typer.Option(help="Budget of this call.")] = None,
    samples: Annotated[int | None, typer.Option(help="Length of the whole run.")] = None,
    codec: Annotated[Path | None, typer.Option(help="For the denoiser: export folder of that stage.")] = None,
    text: Annotated[Path | None, typer.Option(help="For the denoiser: export folder of that stage.")] = None,
    teacher: Annotated[Path | None, typer.Option(help="For text: folder of a sentence encoder.")] = None,
    style: Annotated[list[str] | None, typer.Option(help="For the denoiser: only this one; may be repeated.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Per process.")] = None,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate.")] = None,
    decay: Annotated[Literal["constant", "cosine"] | None, typer.Option(help="cosine needs --samples.")] = None,
    precision: Annotated[Literal["no", "bf16", "fp16"] | None, typer.Option(help="Of autocast.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of weights, order and noise.")] = None,
) -> None:
    """Train one stage of a model until its time or samples are over; OUTPUT/export is what it made."""
    from sdlite.train.stages import train as run

    _limit_threads()
    options = {
        name: value
        for name, value in locals().items()
        if name in ("minutes", "samples", "batch_size", "lr", "decay", "precision", "seed")
    }
    run(stage, folder, output, codec=codec, text=text, teacher=teacher, styles=style or (), options=options)


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(help="What --model takes elsewhere.")],
    folder: Annotated[Path, typer.Option("--data", help="Data folder that the model was trained on.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the report and its judge.")],
    pictures: Annotated[int, typer.Option(min=8, max=10_000, help="Held-out pairs to draw.")] = 100,
    minutes: Annotated[float, typer.Option(help="To train the judge, where OUTPUT has none.")] = 10.0,
    steps: Annotated[int, typer.Option(help="Of the solver.")] = 20,
    guidance_scale: Annotated[float, typer.Option(help="Up to 1: none.")] = 3.0,
) -> None:
    """Measure what a model draws against held-out pictures, with a judge that has never seen it draw."""
    from sdlite.train.evaluate import evaluate as run

    _limit_threads()
    fields = {"steps": steps, "guidance_scale": guidance_scale}
    print(run(model, folder, output, pictures=pictures, minutes=minutes, fields=fields))


def _load(model: str | None, device: str, dtype: str, prediction: Prediction | None, report: Report) -> "Pipeline":
    from sdlite.pipeline import Pipeline

    _limit_threads()
    pipe = Pipeline.load(model, device=device, dtype=dtype, prediction=prediction)
    for note in pipe.notes:
        report.note(note)
    return pipe


def _limit_threads(share: Path = Path("/sys/fs/cgroup/cpu.max")) -> None:
    """PyTorch counts cores, not a container's share of them; threads beyond that share only wait for each other."""
    import torch

    quota, period = share.read_text().split() if share.is_file() else ("max", "")
    if quota != "max" and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, min(torch.get_num_threads(), ceil(int(quota) / int(period)))))


def _open(path: Path) -> "Image":
    from sdlite.images import open_image

    return open_image(path)


def _draw(
    pipe: "Pipeline",
    requests: Sequence[Request],
    sources: dict[str, "Image"],
    names: Names,
    report: Report,
    batch_size: int,
    with_metadata: bool,
) -> tuple[list["Image"], bool]:
    """Draws and saves, batch by batch; the pictures, and whether Ctrl-C ended it."""
    from sdlite.images import digest

    digests = {name: digest(source) for name, source in sources.items()}
    requests = [pipe.resolve(request.replace(**digests), sources.get("image")) for request in requests]
    report.event(
        "start", model=pipe.name, model_hash=pipe.model_hash, images=len(requests), request=requests[0].model_dump()
    )
    pictures: list[Image] = []
    evaluations = pipe.num_evaluations(requests[0])
    bar = report.bar()
    task = bar.add_task("", total=evaluations * -(-len(requests) // batch_size))
    with Interrupts() as interrupts:
        for first in range(0, len(requests), batch_size):
            batch = requests[first : first + batch_size]
            bar.update(task, description=f"picture {first + 1}/{len(requests)}")
            given = {f"{name}s": [source] * len(batch) for name, source in sources.items()}
            with bar:  # gone while a path is printed
                for i, x_t in enumerate(pipe.sample_latents(batch, **given)):
                    latents = x_t
                    bar.advance(task)
                    report.event("step", image=first, step=i + 1, of=evaluations)
                drawn = pipe.decode(latents, batch)
            for picture, request in zip(drawn, batch, strict=True):
                path = names.save(picture, len(pictures), request.seed, with_metadata)
                pictures.append(picture)
                report.path(path, seed=request.seed)
            if interrupts.asked:
                break
    return pictures, interrupts.asked


def _pair(change: str) -> tuple[str, str | None]:
    """key=value; "none" clears a field that may be empty."""
    key, equals, value = change.partition("=")
    if not equals:
        raise ValueError(f"--set {change} must be KEY=VALUE, e.g. --set steps=50")
    clears = value == "none" and key in ("width", "height", "image", "mask")
    return key.strip().replace("-", "_"), None if clears else value


def _regenerated(
    picture: Path, recipe: "Recipe", changed: dict[str, str | None], sources: dict[str, "Image"], anyway: bool
) -> Request:
    """The recorded request with the changes, its source pictures held against their digests."""
    from sdlite.images import digest

    for name in ("image", "mask"):
        recorded = getattr(recipe.request, name)
        if recorded is not None and name not in changed:
            raise ValueError(
                f"{picture} was drawn from another {name} ({recorded[:17]}); give it with --set {name}=FILE"
            )
        if recorded is not None and name in sources and digest(sources[name]) != recorded and not anyway:
            raise ValueError(f"--set {name}={changed[name]}: not the recorded one ({recorded[:17]}); or add --anyway")
    return recipe.request.replace(**changed)


def _picture_facts(path: str) -> dict[str, dict[str, Any]]:
    from sdlite.images import read_metadata, read_texts

    texts = read_texts(path)
    if "sdlite" not in texts and "parameters" in texts:
        return {"picture": {"parameters": texts["parameters"]}}
    recipe = read_metadata(path)
    return {
        "model": {"model": recipe.model, "model_hash": recipe.model_hash, "prediction": recipe.prediction},
        "request": recipe.request.model_dump(),
        "versions": {str(name): found for name, found in recipe.versions.items()},
    }


def _model_facts(name: str) -> dict[str, dict[str, Any]]:
    pipe = _load(name, "cpu", "float32", None, Report(False, False))
    parts: dict[str, Any] = {"text encoder": pipe.text, "denoiser": pipe.denoiser, "codec": pipe.codec}
    counts = {f"parameters of {part}": sum(p.numel() for p in parts[part].parameters()) for part in parts}
    width, height = pipe.default_size
    kind = type(pipe.denoiser).__name__
    return {
        "model": {"model": pipe.name, "model_hash": pipe.model_hash, "draws": f"{width}x{height}", "denoiser": kind},
        "parts": {"prediction": pipe.denoiser.prediction} | counts,
        "schedule": pipe.schedule.config.model_dump(),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line and exits with its code; whatever the user got wrong is one line on stderr."""
    for name in ("TRANSFORMERS_VERBOSITY", "DIFFUSERS_VERBOSITY"):
        os.environ.setdefault(name, "error")
    sys.exit(_run(arguments))


def _run(arguments: Sequence[str] | None) -> int:
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
        return f"{error.format_message()} (see --help)"
    if isinstance(error, OSError) and error.strerror is not None:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    if isinstance(error, MemoryError) or re.search("out of memory|can't allocate memory", str(error)):
        return "out of memory; try a smaller --width and --height, or --batch-size 1"
    return str(error) if isinstance(error, (ValueError, OSError, FloatingPointError)) else None
