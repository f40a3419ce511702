"""The stages of a model by name, with the settings of the one that ships.

codec --OUT/export--+
text  --OUT/export--+--> denoiser --> OUT/export is a model folder

segmentation stands alone; its OUT/export is what `sdlite.segmentation.Segmenter` loads.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from sdlite.train.loop import Task, TrainConfig, fit

Stage = Literal["codec", "text", "denoiser", "segmentation"]
ARCHITECTURES = {"denoiser": ("unet", "dit"), "segmentation": ("unet", "fcn")}
SIZE = 128  # pixels of the pictures that the denoiser is trained on
OBJECTIVE = ("prediction", "timesteps", "min_snr_gamma", "zero_terminal_snr")  # fields of the denoiser's Objective
VIEWS = 8  # of each picture that the denoiser is trained on, encoded once
DEFAULTS: dict[str, dict[str, Any]] = {
    "codec": {"batch_size": 12, "lr": 2e-3, "warmup": 1_200, "half_life": 6_000},
    "text": {"batch_size": 32, "lr": 5e-4, "warmup": 3_200, "half_life": 10_000},
    "denoiser": {"batch_size": 32, "lr": 4e-4, "warmup": 1_600, "half_life": 6_000},
    "segmentation": {"batch_size": 8, "lr": 2e-3, "warmup": 160, "half_life": 400, "report_every": 400},
}


def train(
    stage: Stage,
    data: Path,
    out: Path,
    *,
    folders: Mapping[str, Path | None] | None = None,
    options: Mapping[str, Any],
) -> None:
    """Trains a stage into `out`, from where it was left if `out` holds a run.

    folders: "codec" and "text", the exports of those stages, for the denoiser; "codec", for the codec: train its
    decoder further, under the same latents; "teacher", of a sentence encoder, for text; "start", of a model whose
    denoiser is trained on. options: fields of TrainConfig; those left out or None are the stage's; arch, "unet" or
    "dit", size, pixels of the pictures, and the fields of Objective are the denoiser's. Raises ValueError or
    FileNotFoundError with what is missing.
    """
    folders = folders or {}
    given = {name: value for name, value in options.items() if value is not None}
    arch = given.pop("arch", "unet")
    if arch not in ARCHITECTURES.get(stage, ("unet",)):
        known = ", ".join(ARCHITECTURES.get(stage, ARCHITECTURES["denoiser"]))
        raise ValueError(f"arch={arch!r} must be one of {known}, and is the denoiser's or segmentation's")
    size = given.pop("size", SIZE)
    objective = {name: given.pop(name) for name in OBJECTIVE if name in given}
    if (size != SIZE or folders.get("start") or objective) and stage != "denoiser":
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in ("size", "start", *OBJECTIVE))
        raise ValueError(f"{flags} are the denoiser's; leave them out")
    config = TrainConfig(**DEFAULTS[stage] | given)
    task = _task(stage, data, out, folders, objective, seed=config.seed, arch=arch, size=size)
    fit(task, config, out)


def _task(
    stage: Stage,
    data: Path,
    out: Path,
    folders: Mapping[str, Path | None],
    objective: dict[str, Any],
    *,
    seed: int,
    arch: str,
    size: int,
) -> Task:
    if stage == "codec":
        from sdlite.train.codec import CodecTask, emoji_codec

        return CodecTask(data, emoji_codec(), seed=seed, start=folders.get("codec"))
    if stage == "segmentation":
        from sdlite.train.segmentation import SegmentationTask, plan_for

        return SegmentationTask(data, plan_for(data, arch), seed=seed)
    if stage == "text":
        from sdlite.train.text import TextTask, emoji_text, small_vocabulary

        cache = out / "teacher.safetensors"
        return TextTask(data, emoji_text(), small_vocabulary(), teacher=folders.get("teacher"), cache=cache, seed=seed)
    from sdlite.train.codec import load_codec
    from sdlite.train.denoiser import DenoiserTask, Objective, emoji_dit, emoji_unet
    from sdlite.train.text import load_text

    for name in ("codec", "text"):
        if folders.get(name) is None:
            raise ValueError(f"the denoiser needs --{name}: the folder OUT/export that `sdlite train {name}` wrote")
    parts = load_codec(folders.get("codec") or out), load_text(folders.get("text") or out)
    widths = parts[0].config.latent_channels, parts[1].config.hidden_size
    network = emoji_unet(*widths) if arch == "unet" else emoji_dit(*widths, sample_size=size // parts[0].factor)
    cache = out / "cache.safetensors"
    if size % (4 * parts[0].factor) or not 0 < size <= 512:
        raise ValueError(f"size={size} must be a multiple of {4 * parts[0].factor} pixels, up to 512")
    if objective.get("min_snr_gamma") == 0:
        objective["min_snr_gamma"] = None
    task = DenoiserTask(
        data, parts, network, size=size, views=VIEWS, cache=cache, seed=seed,
        objective=Objective(**objective),
    )  # fmt: skip
    if start := folders.get("start"):
        task.start_from(start)
    return task
