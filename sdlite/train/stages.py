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
SIZE = 256  # pixels of the pictures that the denoiser is trained on
OBJECTIVE = ("prediction", "timesteps", "min_snr_gamma", "zero_terminal_snr")  # fields of the denoiser's Objective
VIEWS = 4  # of each picture that the denoiser is trained on, encoded once: half of them composed
DEFAULTS: dict[str, dict[str, Any]] = {
    "codec": {"batch_size": 12, "lr": 2e-3, "warmup": 1_200, "half_life": 6_000},
    "text": {"batch_size": 32, "lr": 5e-4, "warmup": 3_200, "half_life": 10_000},
    "denoiser": {"batch_size": 32, "lr": 3e-3, "optimizer": "muon", "warmup": 1_600, "half_life": 20_000},
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
    decoder further, under the same latents; "teacher", for text a sentence encoder, for the codec one of pictures of
    half the size; "start", a model whose denoiser is trained on, with its own codec and text encoder unless those are
    given. options: fields of TrainConfig; those left out or None are the stage's; arch, "unet" or "dit", size, pixels
    of the pictures, and the fields of Objective are the denoiser's, and where it has one, the start's. Raises
    ValueError or FileNotFoundError with what is missing.
    """
    folders = folders or {}
    given = {name: value for name, value in options.items() if value is not None}
    own = {name: given.pop(name) for name in ("size", *OBJECTIVE) if name in given}
    if (own.keys() - {"size"} or folders.get("start")) and stage != "denoiser":
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in ("start", *OBJECTIVE))
        raise ValueError(f"{flags} are the denoiser's; leave them out")
    if "size" in own and stage not in ("codec", "denoiser"):
        raise ValueError("--size is the codec's and the denoiser's; leave it out")
    if given.pop("adversarial", False):
        if stage != "codec":
            raise ValueError("--adversarial is the codec's; leave it out")
        own["adversarial"] = True
    arch = given.pop("arch", None)
    if arch and arch not in ARCHITECTURES.get(stage, ()):
        known = ", ".join(ARCHITECTURES.get(stage, ARCHITECTURES["denoiser"]))
        raise ValueError(f"arch={arch!r} must be one of {known}, and is the denoiser's or segmentation's")
    config = TrainConfig(**DEFAULTS[stage] | given)
    fit(_task(stage, data, out, folders, arch, config.seed, own), config, out)


def _task(
    stage: Stage,
    data: Path,
    out: Path,
    folders: Mapping[str, Path | None],
    arch: str | None,
    seed: int,
    own: dict[str, Any],
) -> Task:
    if stage == "codec":
        from sdlite.config import AutoencoderKLConfig
        from sdlite.train.codec import CodecTask, emoji_codec, load_codec

        size, start = own.pop("size", SIZE), folders.get("codec")
        codec = load_codec(start).config if start else emoji_codec(size)
        assert isinstance(codec, AutoencoderKLConfig), "load_codec reads no other"
        return CodecTask(data, codec, size=size, seed=seed, start=start, teacher=folders.get("teacher"), **own)
    if stage == "segmentation":
        from sdlite.train.segmentation import SegmentationTask, plan_for

        return SegmentationTask(data, plan_for(data, arch or "unet"), seed=seed)
    if stage == "text":
        from sdlite.train.text import TextTask, emoji_text, small_vocabulary

        cache = out / "teacher.safetensors"
        return TextTask(data, emoji_text(), small_vocabulary(), teacher=folders.get("teacher"), cache=cache, seed=seed)
    return _denoiser(data, out, folders, arch, seed, own)


def _denoiser(
    data: Path, out: Path, folders: Mapping[str, Path | None], arch: str | None, seed: int, own: dict[str, Any]
) -> Task:
    from sdlite.checkpoints.load import load_model
    from sdlite.config import DenoiserConfig, DiTConfig
    from sdlite.train.codec import load_codec
    from sdlite.train.denoiser import DenoiserTask, Objective, emoji_dit, emoji_unet
    from sdlite.train.text import load_text

    start = load_model(folder) if (folder := folders.get("start")) else None
    codec, text = (start.codec, start.text) if start else (None, None)
    if path := folders.get("codec"):
        codec = load_codec(path)
    if path := folders.get("text"):
        text = load_text(path)
    if codec is None or text is None:
        name = "codec" if codec is None else "text"
        raise ValueError(
            f"the denoiser needs --{name}: the folder OUT/export that `sdlite train {name}` wrote; or --start: a model "
            "that has all"
        )
    size = own.pop("size", codec.factor * start.config.sample_size if start else SIZE)
    if size % (4 * codec.factor) or not 0 < size <= 512:
        raise ValueError(f"size={size} must be a multiple of {4 * codec.factor} pixels, up to 512")
    if own.get("min_snr_gamma") == 0:
        own["min_snr_gamma"] = None
    widths = codec.config.latent_channels, text.config.hidden_size
    network: DenoiserConfig
    if start:
        network = start.denoiser.config
        if arch and (arch == "dit") != isinstance(network, DiTConfig):
            raise ValueError(f"--arch {arch} is not what {folder} holds; leave it out")
        own = {"prediction": network.prediction, "zero_terminal_snr": start.config.schedule.zero_terminal_snr} | own
    elif arch == "dit":
        network = emoji_dit(*widths, sample_size=size // codec.factor)
    else:
        network = emoji_unet(*widths)
    cache = out / "cache.safetensors"
    task = DenoiserTask(
        data, (codec, text), network, size=size, views=VIEWS, cache=cache, seed=seed, objective=Objective(**own)
    )
    if start:
        task.start_from(start)
    return task
