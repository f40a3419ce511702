"""The stages of training by name, with their default settings.

codec --OUT/export--+
text  --OUT/export--+--> denoiser --> OUT/export is a model folder

segmentation stands alone; its OUT/export is what `sdlite.segmentation.Segmenter` loads.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from sdlite.config import DenoiserConfig, DiTConfig
from sdlite.training.loop import Task, TrainConfig, fit

Stage = Literal["codec", "text", "denoiser", "segmentation"]
ARCHITECTURES = {"denoiser": ("unet", "dit"), "segmentation": ("unet", "fcn")}
SIZE = 256  # pixels of the pictures that the denoiser is trained on
OBJECTIVE = ("prediction", "timesteps", "min_snr_gamma", "zero_terminal_snr")  # fields of the denoiser's Objective
VIEWS = 4  # of each picture that the denoiser is trained on, encoded once: half of them composed
DEFAULTS: dict[str, dict[str, Any]] = {
    "codec": {"batch_size": 12, "lr": 2e-3, "warmup": 1_200, "half_life": 6_000},
    "text": {"batch_size": 32, "lr": 5e-4, "warmup": 3_200, "half_life": 10_000},
    "denoiser": {
        "batch_size": 32,
        "lr": 3e-3,
        "optimizer": "muon",
        "warmup": 1_600,
        "half_life": 20_000,
        "show_samples": 50_000,
    },
    "segmentation": {"batch_size": 8, "lr": 2e-3, "warmup": 160, "half_life": 400, "report_every": 400},
}


OWN = ("allow_links", "size", "fit", "class_weights", "adversarial", *OBJECTIVE)  # of the tasks, not of TrainConfig
ONLY = {  # options and folders that are not for every stage
    **dict.fromkeys(("text", "start", "allow_links", *OBJECTIVE), ("denoiser",)),
    "size": ("codec", "denoiser"),
    "fit": ("codec", "text", "denoiser"),
    "codec": ("codec", "denoiser"),
    "teacher": ("codec", "text"),
    "adversarial": ("codec",),
    "class_weights": ("segmentation",),
}


def train(
    stage: Stage,
    data: Path,
    out: Path,
    *,
    folders: Mapping[str, Path | None] | None = None,
    options: Mapping[str, Any],
) -> None:
    """Trains a stage into `out`; continues the run if `out` holds one.

    folders, for the denoiser: "codec" and "text", the exports of those stages; "start", a model whose denoiser is
    trained further, with its own codec and text encoder unless those are given. For the codec: "codec", an export whose
    decoder is trained further, with the same latents; "teacher", a codec for pictures of half the size. For text:
    "teacher", a sentence encoder.
    options: fields of TrainConfig; those left out or None have the stage's default. Also arch ("unet" or "dit"; for
    segmentation "unet" or "fcn"); for the denoiser the fields of Objective; for denoiser and codec size, in pixels; fit
    ("crop", "pad" or "bucket") for pictures that are not square; class_weights for segmentation; adversarial for the
    codec; allow_links, as for Pipeline.load, is for "start", whose size, prediction and zero_terminal_snr are the
    defaults.
    Raises ValueError or FileNotFoundError that says what is missing.
    """
    parts = {name: folder for name, folder in (folders or {}).items() if folder is not None}
    given = {name: value for name, value in options.items() if value is not None}
    if misplaced := [name for name in {**given, **parts} if stage not in ONLY.get(name, (stage,))]:
        flags = ", ".join(_flag(name) for name in misplaced)
        raise ValueError(f"{flags} is for {' and '.join(ONLY[misplaced[0]])}; leave it out")
    if "allow_links" in given and "start" not in parts:
        raise ValueError("--allow-links is for --from; leave it out")
    own = {name: given.pop(name) for name in OWN if name in given}
    arch = given.pop("arch", None)
    if arch and arch not in ARCHITECTURES.get(stage, ()):
        known = ", ".join(ARCHITECTURES.get(stage, ARCHITECTURES["denoiser"]))
        raise ValueError(f"arch={arch!r} must be one of {known}, and is the denoiser's or segmentation's")
    config = TrainConfig(**DEFAULTS[stage] | given)
    makers = {"codec": _codec, "text": _text, "denoiser": _denoiser, "segmentation": _segmentation}
    fit(makers[stage](data, out, parts, own | {"seed": config.seed}, arch), config, out)


def _flag(name: str) -> str:
    return "--from" if name == "start" else f"--{name.replace('_', '-')}"


Folders = Mapping[str, Path]
Options = dict[str, Any]


def _codec(data: Path, out: Path, folders: Folders, options: Options, arch: str | None) -> Task:
    from sdlite.config import AutoencoderKLConfig
    from sdlite.training.codec import CodecTask, emoji_codec, load_codec

    size, start = options.pop("size", SIZE), folders.get("codec")
    codec = load_codec(start).config if start else emoji_codec(size)
    assert isinstance(codec, AutoencoderKLConfig), "load_codec reads no other"
    return CodecTask(data, codec, size=size, start=start, teacher=folders.get("teacher"), **options)


def _segmentation(data: Path, out: Path, folders: Folders, options: Options, arch: str | None) -> Task:
    from sdlite.training.segmentation import SegmentationTask, plan_for

    return SegmentationTask(data, plan_for(data, arch or "unet"), **options)


def _text(data: Path, out: Path, folders: Folders, options: Options, arch: str | None) -> Task:
    from sdlite.training.text import TextTask, emoji_text, small_vocabulary

    cache = out / "teacher.safetensors"
    teacher = folders.get("teacher")
    return TextTask(data, emoji_text(), small_vocabulary(), teacher=teacher, cache=cache, **options)


def _denoiser(data: Path, out: Path, folders: Folders, options: Options, arch: str | None) -> Task:
    from sdlite.checkpoints.load import load_model
    from sdlite.training.codec import load_codec
    from sdlite.training.denoiser import DenoiserTask, Objective, emoji_dit, emoji_unet
    from sdlite.training.text import load_text

    links = options.pop("allow_links", ())
    start = load_model(folder, allow_links=links) if (folder := folders.get("start")) else None
    codec, text = (start.codec, start.text) if start else (None, None)
    if path := folders.get("codec"):
        codec = load_codec(path)
    if path := folders.get("text"):
        text = load_text(path)
    if codec is None or text is None:
        name = "codec" if codec is None else "text"
        raise ValueError(
            f"the denoiser needs --{name}: the folder OUT/export that `sdlite train {name}` wrote; or --from: a model "
            "that has all"
        )
    cells = start.config.sample_size if start else SIZE // codec.factor
    size = options.pop("size", codec.factor * (cells if isinstance(cells, int) else min(cells)))  # squares are trained
    if size % (4 * codec.factor) or not 0 < size <= 512:
        raise ValueError(f"size={size} must be a multiple of {4 * codec.factor} pixels, up to 512")
    goal = {name: options.pop(name) for name in OBJECTIVE if name in options}
    if goal.get("min_snr_gamma") == 0:
        goal["min_snr_gamma"] = None
    widths = codec.latent_channels, text.config.hidden_size
    network: DenoiserConfig
    if start:
        network = start.denoiser.config
        if arch and (arch == "dit") != isinstance(network, DiTConfig):
            raise ValueError(f"--arch {arch} is not what {folder} holds; leave it out")
        _check_start(str(folder), network, *widths)
        goal = {"prediction": network.prediction, "zero_terminal_snr": start.config.schedule.zero_terminal_snr} | goal
    elif arch == "dit":
        network = emoji_dit(*widths, sample_size=size // codec.factor)
    else:
        network = emoji_unet(*widths)
    options |= {"size": size, "views": VIEWS, "cache": out / "cache.safetensors", "objective": Objective(**goal)}
    task = DenoiserTask(data, (codec, text), network, **options)
    if start:
        task.start_from(start)
    return task


def _check_start(name: str, network: DenoiserConfig, channels: int, width: int) -> None:
    """Raises ValueError if a model's denoiser cannot be trained further with this codec and text encoder."""
    if network.in_channels != network.out_channels:
        raise ValueError(
            f"{name} is an inpainting model, whose denoiser also reads a mask ({network.in_channels} channels); "
            "training goes on from models that draw from text alone"
        )
    if network.in_channels != channels:
        raise ValueError(f"{name} has latents of {network.in_channels} channels and --codec has {channels}")
    if network.context_dim != width:
        raise ValueError(f"{name} reads text of width {network.context_dim} and --text gives {width}")
