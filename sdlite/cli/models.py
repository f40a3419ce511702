"""`sdlite info` and `sdlite convert`: facts about an image or model, and other file layouts."""

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from sdlite.checkpoints.concepts import FILE, nearest, read_names
from sdlite.checkpoints.places import SHIPPED, SHIPPED_STYLES, check_model, shipped_folder
from sdlite.cli.app import command, load
from sdlite.cli.flags import Flags, check_there, checked
from sdlite.cli.output import Report, check_writable, shown
from sdlite.config import LoadOptions
from sdlite.files import exported, sweep
from sdlite.images.recipe import SUFFIXES

ON_CPU = LoadOptions(device="cpu", dtype="float32")
FILES = ("vae", "variant", "allow_links")
TRUST = "Read .ckpt and .bin files. Use it only if you trust their maker: a pickle can hold code."
Facts = dict[str, dict[str, Any]]
SHOWN_NAMES = 10  # of a search
NOT_WRITTEN = (".ckpt", ".pt", ".pth", ".bin", ".gguf", ".onnx", ".safetensor")  # model files of other kinds


@command("sdlite info star.png", "sdlite info emoji-128 --search clock")
def info(
    subject: Annotated[
        str, typer.Argument(metavar="IMAGE|MODEL", help="An image, or a model: folder, .safetensors file or hub id.")
    ],
    load_options: Annotated[LoadOptions, Flags(only=FILES)] = ON_CPU,
    *,
    search: Annotated[
        str | None,
        typer.Option("--search", metavar="WORD", help="Only list the names whose spelling is nearest to WORD."),
    ] = None,
    report: Annotated[Report, Flags(only=("as_json",))],
) -> None:
    """Show how an image was drawn, or what a model consists of.

    For the model that ships it also lists the styles and the things that the model was trained to draw.
    """
    is_image = Path(subject).suffix.lower() in SUFFIXES and search is None
    (check_there if is_image else check_model)(subject)
    if search is not None:
        found = nearest(search, _names(subject), SHOWN_NAMES)
        print(json.dumps({"names": found}) if report.as_json else shown("\n".join(found)))
        return
    facts = _image_facts(subject) if is_image else _model_facts(load_options.replace(model=subject))
    print(json.dumps(facts) if report.as_json else _two_columns(facts))


@command("sdlite convert v1-5.safetensors folder/", "sdlite convert --trust-pickle old.ckpt old.safetensors")
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
    *,
    trust_pickle: Annotated[bool, typer.Option("--trust-pickle", help=TRUST)] = False,
    load_options: Annotated[LoadOptions, Flags(only=("prediction", *FILES))] = ON_CPU,
    ema: Annotated[
        bool, typer.Option("--ema", help="Take the averaged weights of the UNet from a single file that has both.")
    ] = False,
    dtype: Annotated[
        Literal["float32", "float16", "bfloat16"] | None,
        typer.Option(help="Number type of the weights in DST.", show_default="as in SRC"),
    ] = None,
    report: Annotated[Report, Flags(only=("quiet",))],
) -> None:
    """Write a model as a diffusers folder or as one file in the original layout.

    Prints DST. Nothing is replaced: DST must not exist, or must be an empty folder.
    """
    check_writable(target.absolute().parent)
    if target.suffix.lower() in NOT_WRITTEN:
        raise ValueError(f"{target}: only .safetensors files are written; use {target.with_suffix('.safetensors')}")
    sweep(target.parent)
    with report.busy(f"converting {source}"):
        import torch

        from sdlite.checkpoints.load import convert

        kind, files = dtype and getattr(torch, dtype), load_options.file_keywords()
        parts = convert(source, target, trust_pickle=trust_pickle, ema=ema, dtype=kind, **files)
    report.note(*parts.notes)
    print(target)


def _two_columns(facts: Facts) -> str:
    """A line for each fact, without the names of their groups."""
    rows = {key: value for group in facts.values() for key, value in group.items() if value not in (None, "")}
    margin = max(map(len, rows), default=0) + 2
    texts = {key: ", ".join(value) if isinstance(value, list) else str(value) for key, value in rows.items()}
    return "\n".join(
        f"{shown(key):{margin}}" + shown(text).replace("\n", "\n" + " " * margin) for key, text in texts.items()
    )


def _image_facts(path: str) -> Facts:
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
    folder = shipped_folder() if model == SHIPPED and not Path(model).exists() else exported(Path(model), FILE)
    names = read_names(folder)
    if not names:
        raise ValueError(f"{model} has no {FILE}, the list of names to search in; {SHIPPED} has one")
    return names


def _model_facts(options: LoadOptions) -> Facts:
    pipe = load(options, Report())
    from sdlite.pipeline.about import num_weights

    parts = {"text encoder": pipe.text, "denoiser": pipe.denoiser, "codec": pipe.codec}
    counts = {f"parameters of {name}": num_weights(part) for name, part in parts.items()}
    model = {"model": pipe.name, "model_hash": pipe.model_hash, "draws": "{}x{}".format(*pipe.default_size)}
    known = {"styles": list(SHIPPED_STYLES), "names": read_names(shipped_folder())}
    return {
        "model": model | {"denoiser": type(pipe.denoiser).__name__},
        "parts": {"prediction": pipe.denoiser.prediction} | counts,
        "schedule": pipe.schedule.config.model_dump(),
        "trained on": known if options.model == SHIPPED else {},
    }
