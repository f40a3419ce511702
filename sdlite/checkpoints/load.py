"""Loads a diffusers folder, an original single file or a hub id into modules on the CPU, in float32.

    path --> configs --> modules without memory (meta) --> names and shapes equal? --> weights, finite? --> ModelParts

Memory is allocated only after names and shapes are checked. No file can run code (see weights.py).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sdlite.checkpoints import compvis, configs
from sdlite.checkpoints.folder import SAFE, WEIGHT_STEMS, Reader, check_folder, check_variant
from sdlite.checkpoints.hub import download, download_variant
from sdlite.checkpoints.places import PRESETS, SHIPPED, CheckpointError as CheckpointError, check_model, shipped_folder
from sdlite.checkpoints.single_file import TITLE_KEY, find_config, find_prediction
from sdlite.checkpoints.tokenizer import load_tokenizer
from sdlite.checkpoints.vae import load_vae, modern_names
from sdlite.checkpoints.weights import (
    Weights,
    check_same,
    fill,
    from_files,
    read_json,
    shapes_of,
    weights_hash,
)
from sdlite.config import (
    UNTRAINED_NOTE,
    AutoencoderKLConfig,
    DiTConfig,
    ModelConfig,
    Prediction,
    sd21,
)
from sdlite.files import exported
from sdlite.models.codec import LatentCodec
from sdlite.models.networks import Network, network
from sdlite.models.text import TextEncoder, text_state_dict

Codec = tuple[LatentCodec, list[str]]  # as `load_vae` gives it: with notes
UNTRAINED = "untrained (random weights)"


@dataclass(frozen=True)
class ModelParts:
    """A loaded model. hash: sha256 of all weights, the same for every file layout. notes: what was guessed, and why."""

    text: TextEncoder
    denoiser: Network
    codec: LatentCodec
    config: ModelConfig
    name: str
    hash: str
    notes: tuple[str, ...] = ()


def load_model(
    path: str | Path,
    *,
    prediction: Prediction | None = None,
    config: ModelConfig | None = None,
    ema: bool = False,
    variant: str | None = None,
    vae: str | Path | None = None,
    allow_links: Sequence[str | Path] = (),
    reader: Reader = SAFE,
) -> ModelParts:
    """Loads a diffusers folder, an original .safetensors file or a hub id, in float32 on the CPU.

    "emoji-128" is the model that ships; "tiny", "tiny-dit", "sd15" and "sd21" are untrained models of those sizes. If a
    file or folder has such a name, it is loaded instead.
    prediction: overrides what the files say. config: for a single file whose size is not Stable Diffusion's. ema: use
    the moving average of the UNet from a single file that has both. variant: which weights of a folder, such as "fp16"
    or "non_ema". vae: used instead of the model's VAE (see `load_vae`). allow_links: links in a model's folder may lead
    into these folders. reader: how to read weights. Raises CheckpointError with one line.
    """
    check_model(str(path))
    location = Path(path)
    is_there = location.exists()
    if str(path) == SHIPPED and not is_there:
        location, is_there = shipped_folder(), True
    if (config is not None or ema) and not location.is_file():
        raise CheckpointError(f"{path}: config and ema are for single files, and this is none")
    if variant is not None and (location.is_file() or (str(path) in PRESETS and not is_there)):
        raise CheckpointError(f"{path} has no variants: variant={variant!r:.80} is for folders and hub ids")
    links = [Path(root) for root in allow_links]
    codec = None if vae is None else load_vae(vae, variant=variant, allow_links=links)
    if location.is_file():
        weights = reader.file(location)
        return load_single_file(location, weights, prediction=prediction, config=config, ema=ema, codec=codec)
    if str(path) in PRESETS and not is_there:
        preset = PRESETS[str(path)]
        return random_model(preset() if prediction is None else preset(prediction=prediction), seed=0, codec=codec)
    folder = _folder_of(path, location, variant)
    name = location.resolve().name if is_there else str(path)
    return load_folder(
        folder, prediction=prediction, name=name, variant=variant, codec=codec, allow_links=links, reader=reader
    )


def _folder_of(path: str | Path, location: Path, variant: str | None) -> Path:
    """The folder of a model on this machine, fetched from the hub if it is none."""
    if location.is_dir():
        return exported(location, "model_index.json")
    return download(str(path)) if variant is None else download_variant(str(path), variant)


def load_folder(
    folder: Path,
    *,
    prediction: Prediction | None = None,
    name: str | None = None,
    variant: str | None = None,
    codec: Codec | None = None,
    allow_links: Sequence[Path] = (),
    reader: Reader = SAFE,
) -> ModelParts:
    """A model in diffusers' folder layout. codec: in place of its VAE. The rest is as for `load_model`."""
    check_folder(folder, allow_links)
    index = read_json(folder / "model_index.json")
    part = "transformer" if "transformer" in index else "unet"
    files = {name: folder / name / "config.json" for name in (part, "vae", "text_encoder")}
    schedule_file = folder / "scheduler" / "scheduler_config.json"
    schedule, stated, unknown = configs.schedule_config(read_json(schedule_file), str(schedule_file))
    notes = [f"{schedule_file.name}: ignored {', '.join(unknown):.200}"] if unknown else []
    if prediction is None and stated is None:
        notes.append("prediction epsilon is a guess: the scheduler's config does not say it")
    if index.get("_name_or_path") == UNTRAINED:
        notes.append(UNTRAINED_NOTE)
    tokenizer = from_files(folder / "tokenizer", load_tokenizer, folder / "tokenizer")
    ids = {key: getattr(tokenizer, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    denoiser_config, size = configs.denoiser_config(
        part, read_json(files[part]), prediction or stated or "epsilon", str(files[part])
    )
    config = ModelConfig(
        denoiser=denoiser_config,
        schedule=schedule,
        text=configs.text_config(read_json(files["text_encoder"]), ids, str(files["text_encoder"])),
        codec=codec[0].config if codec else configs.codec_config(read_json(files["vae"]), str(files["vae"])),
        sample_size=size,
    )
    text, denoiser, own = empty_modules(config, tokenizer, folder)
    modules: dict[str, tuple[nn.Module, Callable[..., dict[str, Any]]]] = {
        part: (denoiser, dict),
        "text_encoder": (text.model, text_state_dict),
    } | ({} if codec else {"vae": (own.model, modern_names)})
    if reader is SAFE:
        check_variant(folder, modules, variant)
    opened = {name: reader.part(folder / name, WEIGHT_STEMS[name], variant) for name in modules}
    for name_, (module, renamed) in modules.items():
        notes += fill(module, opened[name_], f"{folder.name}/{name_}", renamed)
    vae, unused = codec or (own, [])
    return assembled(text, denoiser, vae, config, name or folder.resolve().name, notes + unused)


def load_single_file(
    path: Path,
    weights: Weights,
    *,
    prediction: Prediction | None = None,
    config: ModelConfig | None = None,
    ema: bool = False,
    codec: Codec | None = None,
) -> ModelParts:
    """A model in the original layout. weights: the file's, however they were read. codec: in place of its VAE."""
    keys = {compvis.canonical(key): key for key in weights.shapes}
    if len(keys) < len(weights.shapes):
        raise CheckpointError(f"{path} has some weights twice, under two spellings of their names")
    keys |= {marker: marker for marker in compvis.MARKERS if marker in weights.unread}
    found, is_stated, notes = find_config(path, weights, keys, config)
    if codec is None and not any(key.startswith(compvis.CODEC) for key in keys):
        raise CheckpointError(f"{path} has no VAE; give one with --vae: a file, a folder, or tiny")
    guess, reasons = find_prediction(path, weights, keys, found, is_stated)
    if not is_stated and found.denoiser.context_dim == sd21().denoiser.context_dim:
        found = found.replace(sample_size=sd21(prediction=prediction or guess).sample_size)
    found = found.replace(
        denoiser=found.denoiser.replace(prediction=prediction or guess),
        schedule=found.schedule.replace(zero_terminal_snr=found.schedule.zero_terminal_snr or "ztsnr" in keys),
        codec=codec[0].config if codec else found.codec,
    )
    text, denoiser, own = empty_modules(found, from_files(path, load_tokenizer, None), path)
    modules: dict[compvis.Part, nn.Module] = {"text": text.model, "denoiser": denoiser}
    if codec is None:
        modules["codec"] = own.model
    tensors, unused = _original_tensors(path, weights, keys, found, modules, ema)
    for part, module in modules.items():
        module.load_state_dict(tensors[part], assign=True)
    if weights.metadata.get(TITLE_KEY) == UNTRAINED:
        notes.append(UNTRAINED_NOTE)
    notes += unused + ([] if prediction else reasons)
    vae, more = codec or (own, [])
    return assembled(text, denoiser, vae, found, path.stem, notes + more)


def random_model(config: ModelConfig, seed: int, codec: Codec | None = None) -> ModelParts:
    """An untrained model with random weights that depend on the seed. It runs, but its images are noise.

    codec: used instead of a random one.
    """
    config = config if codec is None else config.replace(codec=codec[0].config)
    text, denoiser, own = empty_modules(config, load_tokenizer(), Path("random_model"))
    generator = torch.Generator().manual_seed(seed)
    for module in (text.model, denoiser, *([own.model] if codec is None else [])):
        drawn = {name: _random(name, tensor, generator) for name, tensor in module.state_dict().items()}
        module.load_state_dict(drawn, assign=True)
    vae, notes = codec or (own, [])
    return assembled(text, denoiser, vae, config, UNTRAINED, [UNTRAINED_NOTE, *notes])


def _random(name: str, like: Tensor, generator: torch.Generator) -> Tensor:
    """Uniform weights of variance 1 / (3 fan_in), PyTorch's own; small biases; norms near 1, so that none is unused."""
    drawn = torch.empty(like.shape).uniform_(-1, 1, generator=generator)
    if like.ndim > 1:
        return drawn / math.sqrt(like[0].numel())
    return drawn / 10 + (0 if name.endswith("bias") else 1)


def empty_modules(config: ModelConfig, tokenizer: Any, where: Path) -> tuple[TextEncoder, Network, LatentCodec]:
    """The three modules without memory for their weights. Raises CheckpointError if the config fits no module."""
    with torch.device("meta"):
        return from_files(
            where, lambda: (TextEncoder(config.text, tokenizer), network(config.denoiser), LatentCodec(config.codec))
        )


def assembled(
    text: TextEncoder, denoiser: Network, codec: LatentCodec, config: ModelConfig, name: str, notes: list[str]
) -> ModelParts:
    """The parts as a checked and hashed whole. Raises CheckpointError if they do not fit each other."""
    kind = type(denoiser).__name__
    if config.text.hidden_size != config.denoiser.context_dim:
        raise CheckpointError(
            f"{name}: the text encoder gives {config.text.hidden_size} features, but the {kind} takes "
            f"{config.denoiser.context_dim}; they belong to different models"
        )
    latents = config.codec.latent_channels
    if config.denoiser.in_channels not in (latents, 2 * latents + 1) or config.denoiser.out_channels != latents:
        raise CheckpointError(
            f"{name}: a {kind} from {config.denoiser.in_channels} to {config.denoiser.out_channels} channels does not "
            f"fit a codec of {latents}; sdlite runs {latents} to {latents} and, for inpainting, {2 * latents + 1} to "
            f"{latents}"
        )
    digest = weights_hash({"text": text.model, "denoiser": denoiser, "codec": codec.model})
    return ModelParts(text.eval(), denoiser.eval(), codec.eval(), config, name, digest, tuple(notes))


def _original_tensors(
    path: Path,
    weights: Weights,
    keys: Mapping[str, str],
    config: ModelConfig,
    modules: Mapping[compvis.Part, nn.Module],
    ema: bool,
) -> tuple[dict[str, dict[str, Tensor]], list[str]]:
    """Tensors of an original file, per part and under our names, and a note on those that are not used.

    keys: canonical key -> key in the file. modules: the parts to fill.
    """
    if "codec" in modules and not isinstance(config.codec, AutoencoderKLConfig):
        raise CheckpointError(f"{path}: the original layout has no place for an AutoencoderTiny; use a folder")
    if isinstance(config.denoiser, DiTConfig):
        raise CheckpointError(f"{path}: the original layout has no place for a DiT; use a folder")
    if ema and sum(key.startswith(compvis.EMA) for key in keys) < compvis.MIN_EMA_KEYS:
        raise CheckpointError(f"{path} has no moving average of its weights (model_ema.*); load it without ema")
    shapes = {f"{part}.{name}": shape for part, module in modules.items() for name, shape in shapes_of(module).items()}
    open_clip = f"{compvis.OPEN_CLIP}ln_final.weight" in keys
    none: dict[compvis.Part, list[str]] = {"denoiser": [], "codec": [], "text": []}
    names = compvis.original_names(
        none | {part: list(shapes_of(module)) for part, module in modules.items()}, config, open_clip
    )
    expected = {key: compvis.original_shape(key, [shapes[name] for name in ours]) for key, ours in names.items()}
    source = {key: keys[key] for key in keys if not compvis.is_unused(key, config.text)}
    if "codec" not in modules:
        source = {key: raw for key, raw in source.items() if not key.startswith(compvis.CODEC)}
    if ema:
        source = {key: raw for key, raw in source.items() if not key.startswith(compvis.UNET)} | {
            key: keys[compvis.ema_key(key)]
            for key in names
            if key.startswith(compvis.UNET) and compvis.ema_key(key) in keys
        }
    found = {key: compvis.with_kernel(key, weights.shapes[raw]) for key, raw in source.items()}
    unread = {compvis.canonical(key): dtype for key, dtype in weights.unread.items()}
    notes = check_same(expected, found, str(path), unread)
    tensors: dict[str, dict[str, Tensor]] = {part: {} for part in modules}
    read = weights.read(source[key] for key in names)
    for key, ours in names.items():
        for name, tensor in zip(ours, compvis.split(read[source[key]], [shapes[n] for n in ours]), strict=True):
            part, _, rest = name.partition(".")
            tensors[part][rest] = tensor
    return tensors, notes
