"""`sdlite info`, `sdlite convert` and `sdlite bench`: facts on an image or model, other file layouts, speed."""

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from sdlite.checkpoints.concepts import FILE, nearest, read_names
from sdlite.checkpoints.places import SHIPPED, SHIPPED_STYLES, check_model, shipped_folder
from sdlite.cli.app import (
    AsJson,
    DTypeName,
    Force,
    Quiet,
    Threads,
    app,
    examples,
    load,
)
from sdlite.cli.flags import Flags, options
from sdlite.cli.output import Report, check_free, check_writable, shown
from sdlite.cli.words import check_there, checked
from sdlite.config import LoadOptions
from sdlite.files import exported, sweep, write_file
from sdlite.request import Request

DEFAULT, ON_CPU = LoadOptions(), LoadOptions(device="cpu", dtype="float32")
FILES = ("vae", "variant", "allow_links")
MEASURED = Request(prompt="a red apple", steps=10)
PICTURES = (".png", ".jpg", ".jpeg", ".webp")
SHOWN_NAMES = 10  # of a search
NOT_WRITTEN = (".ckpt", ".pt", ".pth", ".bin", ".gguf", ".onnx", ".safetensor")  # model files of other kinds


@app.command(epilog=examples("sdlite info star.png", "sdlite info emoji-128 --search clock"))
@options
def info(
    subject: Annotated[
        str, typer.Argument(metavar="IMAGE|MODEL", help="An image, or a model: folder, .safetensors file or hub id.")
    ],
    load_options: Annotated[LoadOptions, Flags(only=FILES)] = ON_CPU,
    search: Annotated[
        str | None,
        typer.Option("--search", metavar="WORD", help="Only list the names whose spelling is nearest to WORD."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show how an image was drawn, or what a model consists of.

    For the model that ships it also lists the styles and the things that the model was trained to draw.
    """
    if search is not None:
        found = nearest(search, _names(subject), SHOWN_NAMES)
        print(json.dumps({"names": found}) if as_json else shown("\n".join(found)))
        return
    if Path(subject).suffix.lower() in PICTURES:
        check_there(Path(subject))
        facts = _picture_facts(subject)
    else:
        check_model(subject)
        facts = _model_facts(load_options.replace(model=subject))
    if as_json:
        print(json.dumps(facts))
        return
    rows = {key: value for group in facts.values() for key, value in group.items() if value not in (None, "")}
    margin = max(map(len, rows), default=0) + 2
    for key, value in rows.items():
        text = ", ".join(value) if isinstance(value, list) else str(value)
        print(f"{shown(key):{margin}}" + shown(text).replace("\n", "\n" + " " * margin))


@app.command(
    epilog=examples("sdlite convert v1-5.safetensors folder/", "sdlite convert --trust-pickle old.ckpt old.safetensors")
)
@options
def convert(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SRC",
            callback=checked(check_model),
            help="Folder, .safetensors file or hub id; with --trust-pickle also a .ckpt or a folder of .bin files.",
        ),
    ],
    target: Annotated[
        Path, typer.Argument(metavar="DST", help="NAME.safetensors writes one file, any other name a folder.")
    ],
    trust_pickle: Annotated[
        bool,
        typer.Option(
            "--trust-pickle",
            help="Read .ckpt and .bin files. Use it only if you trust their maker: a pickle can hold code.",
        ),
    ] = False,
    load_options: Annotated[LoadOptions, Flags(only=("prediction", *FILES))] = ON_CPU,
    ema: Annotated[
        bool, typer.Option("--ema", help="Take the averaged weights of the UNet from a single file that has both.")
    ] = False,
    dtype: Annotated[
        DTypeName | None, typer.Option(help="Number type of the weights in DST.", show_default="as in SRC")
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Write a model as a diffusers folder or as one file in the original layout.

    Prints DST. Nothing is replaced: DST must not exist, or must be an empty folder.
    """
    check_writable(target.absolute().parent)
    if target.suffix.lower() in NOT_WRITTEN:
        raise ValueError(f"{target}: only .safetensors files are written; use {target.with_suffix('.safetensors')}")
    report = Report(quiet, False)
    sweep(target.parent)
    with report.busy(f"converting {source}"):
        import torch

        from sdlite.checkpoints.save import convert

        kind = None if dtype is None else getattr(torch, dtype)
        files = load_options.file_keywords()
        parts = convert(source, target, trust_pickle=trust_pickle, ema=ema, dtype=kind, **files)
    for note in parts.notes:
        report.note(note)
    print(target)


@app.command(
    epilog=examples("sdlite bench --vs diffusers --runs 9", "sdlite bench --batch -m tiny --json timings.json")
)
@options
def bench(
    request: Annotated[Request, Flags(only=("prompt", "steps", "width", "height"))] = MEASURED,
    load_options: Annotated[LoadOptions, Flags(without=("prediction",))] = DEFAULT,
    vs: Annotated[
        Literal["diffusers"] | None, typer.Option(help="Also measure diffusers, on the same weights.")
    ] = None,
    runs: Annotated[
        int, typer.Option(min=1, max=1000, help="Number of timings of each side; the sides take turns.")
    ] = 5,
    threads: Threads = None,
    batch: Annotated[
        bool, typer.Option("--batch", help="Measure the overhead of `sdlite batch` and the cost of --exact instead.")
    ] = False,
    folder: Annotated[Path, typer.Option("--dir", help="With --batch: folder to write into.")] = Path(),
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write every timing to this file.")] = None,
    force: Force = False,
) -> None:
    """Measure one UNet evaluation, one image, peak memory and cold start.

    With --batch it measures instead the time that `sdlite batch` adds to an image, and how much slower --exact is.
    Prints a Markdown table, with ratios for --vs. The table says if the machine was too busy for reliable figures.
    """
    if json_file is not None:
        if json_file.is_dir():
            raise ValueError(f"--json={json_file} must be a file, e.g. {json_file / 'bench.json'}")
        check_free([json_file], force)
    if batch and (vs or not folder.is_dir()):
        raise ValueError(f"--batch goes without --vs and with a folder that is there, not --dir={folder}")
    report = Report(False, False)
    with report.busy("measuring how busy the machine is"):
        from sdlite.bench import machine_load, measure, measure_batch, measure_exact, table

        busy = machine_load()
    pipe = load(load_options, report, threads)
    report.note("measuring; this takes from some seconds to some minutes")
    if batch:
        machinery = measure_batch(pipe, request, folder, load=busy, runs=runs)
        exact = measure_exact(pipe, request, load=busy, runs=runs)
        print(table(machinery), table(exact), sep="\n\n")
        result = {"machinery": machinery, "exact": exact}
    else:
        result = measure(pipe, request, load=busy, versus=vs, runs=runs)
        print(table(result))
    if json_file is not None:
        write_file(json_file, (json.dumps(result, indent=1) + "\n").encode(), force=force)


def _picture_facts(path: str) -> dict[str, dict[str, Any]]:
    from sdlite.images.files import read_metadata, read_texts

    texts = read_texts(path)
    if "sdlite" not in texts and "parameters" in texts:
        return {"picture": {"parameters": texts["parameters"]}}
    recipe = read_metadata(path)
    return {
        "model": {"model": recipe.model, "model_hash": recipe.model_hash, "prediction": recipe.prediction},
        "request": recipe.request.deciding(),
        "versions": {str(name): found for name, found in recipe.versions.items()},
    }


def _names(model: str) -> list[str]:
    """The names that a model lists. Raises ValueError for one that has no list."""
    check_model(model)
    folder = shipped_folder() if model == SHIPPED and not Path(model).exists() else exported(Path(model), FILE)
    names = read_names(folder)
    if not names:
        raise ValueError(f"{model} has no {FILE}, the list of names to search in; {SHIPPED} has one")
    return names


def _model_facts(options: LoadOptions) -> dict[str, dict[str, Any]]:
    pipe = load(options, Report(False, False))
    parts: dict[str, Any] = {"text encoder": pipe.text, "denoiser": pipe.denoiser, "codec": pipe.codec}
    counts = {f"parameters of {part}": sum(p.numel() for p in parts[part].parameters()) for part in parts}
    width, height = pipe.default_size
    kind = type(pipe.denoiser).__name__
    trained = (
        {"styles": list(SHIPPED_STYLES), "names": read_names(shipped_folder())} if options.model == SHIPPED else {}
    )
    return {
        "model": {"model": pipe.name, "model_hash": pipe.model_hash, "draws": f"{width}x{height}", "denoiser": kind},
        "parts": {"prediction": pipe.denoiser.prediction} | counts,
        "schedule": pipe.schedule.config.model_dump(),
        "trained on": trained,
    }
