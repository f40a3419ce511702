"""Loads a model: a diffusers folder, an original single file or a hub id, to modules on the CPU in float32.

    path --> configs --> modules without memory (meta) --> names and shapes equal? --> weights, finite? --> ModelParts

Nothing is allocated before the file is known to hold what the config asks for; no file can run code (see weights.py).
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from sdlite.checkpoints import compvis, configs
from sdlite.checkpoints.folder import WEIGHT_STEMS, check_folder, open_part
from sdlite.checkpoints.hub import download, is_hub_id
from sdlite.checkpoints.single_file import TITLE_KEY, find_config, find_prediction
from sdlite.checkpoints.weights import (
    CheckpointError as CheckpointError,
    Weights,
    check_same,
    open_safetensors,
    read_json,
    shapes_of,
    weights_hash,
)
from sdlite.config import AutoencoderKLConfig, DiTConfig, ModelConfig, Prediction, sd15, sd21, tiny, tiny_dit
from sdlite.models.codec import LatentCodec
from sdlite.models.networks import Network, network
from sdlite.models.text import TextEncoder, load_tokenizer, text_state_dict

T = TypeVar("T")
UNTRAINED = "untrained (random weights)"
UNTRAINED_NOTE = "this model is untrained: its weights are random, and so are its images"
OLD_CODEC_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}  # diffusers before 0.15

SHIPPED = "emoji-128"
PRESETS: dict[str, Callable[..., ModelConfig]] = {"tiny": tiny, "tiny-dit": tiny_dit, "sd15": sd15, "sd21": sd21}


@dataclass(frozen=True)
class ModelParts:
    """A loaded model. hash: sha256 of all weights, whatever files they came from. notes: what was guessed, by what."""

    text: TextEncoder
    denoiser: Network
    codec: LatentCodec
    config: ModelConfig
    name: str
    hash: str
    notes: tuple[str, ...] = ()


def shipped_folder() -> Path:
    """Where the model that ships lies: inside an installed package, beside it in a clone."""
    package = Path(__file__).parents[1]
    places = [folder / "weights" / SHIPPED for folder in (package, package.parent)]
    return next((place for place in places if place.is_dir()), places[-1])


def load_model(
    path: str | Path, *, prediction: Prediction | None = None, config: ModelConfig | None = None, ema: bool = False
) -> ModelParts:
    """The model of a diffusers folder, an original .safetensors file or a hub id, in float32 on the CPU.

    "emoji-128" is the model that ships; "tiny", "tiny-dit", "sd15" and "sd21" are untrained models of those sizes.
    prediction: overrides what the files say. config: of a single file whose size is not Stable Diffusion's. ema: the
    moving average of the UNet of a single file that has both. Raises CheckpointError with one line.
    """
    if str(path) in PRESETS:
        preset = PRESETS[str(path)]
        return random_model(preset() if prediction is None else preset(prediction=prediction), seed=0)
    location = shipped_folder() if str(path) == SHIPPED and not Path(path).exists() else Path(path)
    if location.is_file():
        return load_single_file(location, open_safetensors(location), prediction=prediction, config=config, ema=ema)
    if config is not None or ema:
        raise CheckpointError(f"{path}: config and ema are for single files, and this is none")
    if location.is_dir():
        return load_folder(location, prediction=prediction)
    if is_hub_id(str(path)):
        return load_folder(download(str(path)), prediction=prediction, name=str(path))
    raise CheckpointError(f"{path} does not exist; give a model folder, a .safetensors file or a hub id (org/name)")


def load_folder(folder: Path, *, prediction: Prediction | None = None, name: str | None = None) -> ModelParts:
    """A model in diffusers' folder layout."""
    check_folder(folder)
    index = read_json(folder / "model_index.json")
    network_part = "transformer" if "transformer" in index else "unet"
    files = {part: folder / part / "config.json" for part in (network_part, "vae", "text_encoder")}
    schedule_file = folder / "scheduler" / "scheduler_config.json"
    schedule, stated, unknown = configs.schedule_config(read_json(schedule_file), str(schedule_file))
    notes = [f"{schedule_file.name}: ignored {', '.join(unknown):.200}"] if unknown else []
    if prediction is None and stated is None:
        notes.append("prediction epsilon is a guess: the scheduler's config does not say it")
    if index.get("_name_or_path") == UNTRAINED:
        notes.append(UNTRAINED_NOTE)
    tokenizer = _from_files(folder / "tokenizer", load_tokenizer, folder / "tokenizer")
    ids = {key: getattr(tokenizer, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    denoiser_config, size = configs.denoiser_config(
        network_part, read_json(files[network_part]), prediction or stated or "epsilon", str(files[network_part])
    )
    config = ModelConfig(
        denoiser=denoiser_config,
        schedule=schedule,
        text=configs.text_config(read_json(files["text_encoder"]), ids, str(files["text_encoder"])),
        codec=configs.codec_config(read_json(files["vae"]), str(files["vae"])),
        sample_size=size,
    )
    text, denoiser, codec = empty_modules(config, tokenizer, folder)
    opened = {part: open_part(folder / part, WEIGHT_STEMS[part]) for part in files}
    _fill(denoiser, opened[network_part], f"{folder.name}/{network_part}")
    _fill(codec.model, opened["vae"], f"{folder.name}/vae", _modern_codec_names)
    _fill(text.model, opened["text_encoder"], f"{folder.name}/text_encoder", text_state_dict)
    return assembled(text, denoiser, codec, config, name or folder.resolve().name, notes)


def load_single_file(
    path: Path,
    weights: Weights,
    *,
    prediction: Prediction | None = None,
    config: ModelConfig | None = None,
    ema: bool = False,
) -> ModelParts:
    """A model in the original layout. weights: the file's, however they were read."""
    keys = {compvis.canonical(key): key for key in weights.shapes}
    if len(keys) < len(weights.shapes):
        raise CheckpointError(f"{path} has some weights twice, under two spellings of their names")
    found, is_stated, notes = find_config(path, weights, keys, config)
    guess, reasons = find_prediction(path, weights, keys, found, is_stated)
    if not is_stated and found.denoiser.context_dim == sd21().denoiser.context_dim:
        found = found.replace(sample_size=sd21(prediction=prediction or guess).sample_size)
    found = found.replace(
        denoiser=found.denoiser.replace(prediction=prediction or guess),
        schedule=found.schedule.replace(zero_terminal_snr=found.schedule.zero_terminal_snr or "ztsnr" in keys),
    )
    text, denoiser, codec = empty_modules(found, _from_files(path, load_tokenizer, None), path)
    modules: dict[compvis.Part, nn.Module] = {"text": text.model, "denoiser": denoiser, "codec": codec.model}
    tensors = _original_tensors(path, weights, keys, found, modules, ema)
    for part, module in modules.items():
        module.load_state_dict(tensors[part], assign=True)
    if weights.metadata.get(TITLE_KEY) == UNTRAINED:
        notes.append(UNTRAINED_NOTE)
    return assembled(text, denoiser, codec, found, path.stem, notes + ([] if prediction else reasons))


def random_model(config: ModelConfig, seed: int) -> ModelParts:
    """An untrained model with weights drawn from the seed: it runs like a trained one and draws nothing of use."""
    text, denoiser, codec = empty_modules(config, load_tokenizer(), Path("random_model"))
    generator = torch.Generator().manual_seed(seed)
    for module in (text.model, denoiser, codec.model):
        drawn = {name: _random(name, tensor, generator) for name, tensor in module.state_dict().items()}
        module.load_state_dict(drawn, assign=True)
    return assembled(text, denoiser, codec, config, UNTRAINED, [UNTRAINED_NOTE])


def _random(name: str, like: Tensor, generator: torch.Generator) -> Tensor:
    """Uniform weights of variance 1 / (3 fan_in), PyTorch's own; small biases; norms near 1, so that none is unused."""
    drawn = torch.empty(like.shape).uniform_(-1, 1, generator=generator)
    if like.ndim > 1:
        return drawn / math.sqrt(like[0].numel())
    return drawn / 10 + (0 if name.endswith("bias") else 1)


def empty_modules(config: ModelConfig, tokenizer: Any, where: Path) -> tuple[TextEncoder, Network, LatentCodec]:
    """The three modules without memory for their weights. Raises CheckpointError if the config fits no module."""
    with torch.device("meta"):
        return _from_files(
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


def _fill(
    module: nn.Module,
    weights: Weights,
    what: str,
    renamed: Callable[[Mapping[str, Any]], dict[str, Any]] = dict,
) -> None:
    """Gives a module its weights. renamed: maps the file's names to the module's; values it hands on or leaves out."""
    keys = _from_files(what, renamed, {name: name for name in weights.shapes})
    check_same(shapes_of(module), {name: weights.shapes[key] for name, key in keys.items()}, what)
    tensors = weights.read(keys.values())
    module.load_state_dict({name: tensors[key] for name, key in keys.items()}, assign=True)


def _modern_codec_names(weights: Mapping[str, Any]) -> dict[str, Any]:
    """Names of the codec's attention since diffusers 0.15."""
    renamed = {}
    for name, value in weights.items():
        where, _, rest = name.rpartition(".attentions.0.")
        module, _, leaf = rest.rpartition(".")
        renamed[f"{where}.attentions.0.{OLD_CODEC_NAMES[module]}.{leaf}" if module in OLD_CODEC_NAMES else name] = value
    return renamed


def _original_tensors(
    path: Path,
    weights: Weights,
    keys: Mapping[str, str],
    config: ModelConfig,
    modules: Mapping[compvis.Part, nn.Module],
    ema: bool,
) -> dict[str, dict[str, Tensor]]:
    """Tensors of an original file, per part and under our names. keys: canonical key -> key in the file."""
    if not isinstance(config.codec, AutoencoderKLConfig):
        raise CheckpointError(f"{path}: the original layout has no place for an AutoencoderTiny; use a folder")
    if isinstance(config.denoiser, DiTConfig):
        raise CheckpointError(f"{path}: the original layout has no place for a DiT; use a folder")
    if ema and sum(key.startswith(compvis.EMA) for key in keys) < compvis.MIN_EMA_KEYS:
        raise CheckpointError(f"{path} has no moving average of its weights (model_ema.*); load it without ema")
    shapes = {f"{part}.{name}": shape for part, module in modules.items() for name, shape in shapes_of(module).items()}
    open_clip = f"{compvis.OPEN_CLIP}ln_final.weight" in keys
    names = compvis.original_names(
        {part: list(shapes_of(module)) for part, module in modules.items()}, config, open_clip
    )
    expected = {key: compvis.original_shape(key, [shapes[name] for name in ours]) for key, ours in names.items()}
    source = {key: keys[key] for key in keys if not compvis.is_unused(key, config.text)}
    if ema:
        source = {key: raw for key, raw in source.items() if not key.startswith(compvis.UNET)} | {
            key: keys[compvis.ema_key(key)]
            for key in names
            if key.startswith(compvis.UNET) and compvis.ema_key(key) in keys
        }
    found = {key: compvis.with_kernel(key, weights.shapes[raw]) for key, raw in source.items()}
    check_same(expected, found, str(path))
    tensors: dict[str, dict[str, Tensor]] = {part: {} for part in modules}
    read = weights.read(source.values())
    for key, ours in names.items():
        for name, tensor in zip(ours, compvis.split(read[source[key]], [shapes[n] for n in ours]), strict=True):
            part, _, rest = name.partition(".")
            tensors[part][rest] = tensor
    return tensors


def _from_files(where: Path | str, make: Callable[..., T], *arguments: Any) -> T:
    """make(*arguments), with the ValueErrors of files that do not fit as CheckpointErrors."""
    try:
        return make(*arguments)
    except (ValueError, FileNotFoundError) as error:
        text = " ".join(str(error).split())
        raise CheckpointError(text if str(where) in text else f"{where}: {text}") from None
