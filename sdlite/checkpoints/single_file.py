"""One file with all parts in the original layout (CompVis, Stability AI), read and written.

A file of others has no config. The shapes of its weights distinguish Stable Diffusion 1 from 2, and inpainting models
from others. They do not show epsilon or v, the number of heads or the activations. So epsilon or v is found by other
marks, and any other size needs a config: the one that sdlite wrote into the file, or the argument `config`.
"""

import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor, nn

from sdlite.checkpoints import sd_names
from sdlite.checkpoints.parts import UNTRAINED, ModelParts, check_same, empty_parts, finished, shapes_of
from sdlite.checkpoints.pickles import open_pickle
from sdlite.checkpoints.places import CheckpointError
from sdlite.checkpoints.sd_names import CODEC, OPEN_CLIP, UNET, Part
from sdlite.checkpoints.tokenizer import load_tokenizer
from sdlite.checkpoints.weights import Weights, from_files, open_safetensors, read_json, write_safetensors
from sdlite.config import UNTRAINED_NOTE, LoadOptions, ModelConfig, Prediction, sd15, sd21
from sdlite.files import atomic_file, parse_json
from sdlite.models.codec import LatentCodec

CONFIG_KEY = "sdlite.config"  # in the metadata of the files that sdlite writes
TITLE_KEY = "modelspec.title"
PREDICTION_KEY = "modelspec.prediction_type"  # github.com/Stability-AI/ModelSpec
SAID: dict[str | None, Prediction] = {"epsilon": "epsilon", "v": "v", "sample": "sample"}
SAID |= {"eps": "epsilon", "v_prediction": "v", "x0": "sample"}
SD2_V_SPREAD = 0.09  # of the norm below, in SD2's v models and not in its epsilon ones (ComfyUI supported_models.SD20)
SD2_V_KEY = f"{UNET}output_blocks.11.1.transformer_blocks.0.norm1.bias"
MAX_SIDECAR_BYTES = 2**20
SCHEDULE_TOLERANCE = 2e-3  # what half precision does to alphas_cumprod

# First match wins: (a key, what has it).
FOREIGN = (
    (r"control_model\..*|input_hint_block\..*|controlnet_.*", "is a ControlNet, not a text-to-image model"),
    (r"conditioner\.embedders\.1\..*", "is Stable Diffusion XL"),
    (r"(model\.diffusion_model\.)?label_emb\..*", "is Stable Diffusion XL, unCLIP or another class-conditional model"),
    (r"(model\.diffusion_model\.)?double_blocks\..*", "is Flux"),
    (r"(model\.diffusion_model\.)?joint_blocks\..*", "is Stable Diffusion 3"),
    (r".*\.time_stack\..*|.*\.motion_modules\..*", "is a video model"),
)
# What a file is that has no UNet; beside one, tools that merge models leave such keys behind.
ALONE = (
    (r"lora_(unet|te)\w*_.*|.*\.lora_(up|down|A|B)\.weight", "is a LoRA, a change to a model and not a model"),
    (r"(emb_params|string_to_param|clip_[lg])(\..*)?", "is a textual inversion embedding, not a model"),
    (r"(down_blocks|up_blocks)\.\d+\.(resnets|attentions)\..*", "is the UNet of a folder; give the whole folder"),
    (
        r"(text_model\.)?encoder\.layers\.\d+\.(self_attn|mlp|layer_norm\d)\..*",
        "is a text encoder alone; give a whole model",
    ),
    (
        r"(encoder|decoder)\.(conv_in|mid|mid_block|layers)\..*|first_stage_model\..*",
        "is a VAE alone; give a whole model, and this as vae",
    ),
)


def read_single_file(
    path: Path,
    options: LoadOptions,
    *,
    config: ModelConfig | None = None,
    ema: bool = False,
    codec: LatentCodec | None = None,
    trust_pickle: bool = False,
) -> ModelParts:
    """The model of a file. config: for sizes that are not Stable Diffusion's. codec: used instead of its VAE.

    ema: use the moving average of the UNet from a file that has both. Raises CheckpointError.
    """
    weights = open_pickle(path) if trust_pickle and path.suffix != ".safetensors" else open_safetensors(path)
    keys = {sd_names.canonical(key): key for key in weights.shapes}
    if len(keys) < len(weights.shapes):
        raise CheckpointError(f"{path} has some weights twice, under two spellings of their names")
    keys |= {marker: marker for marker in sd_names.MARKERS if marker in weights.unread}
    found, is_stated, notes = find_config(path, weights, keys, config)
    if codec is None and not any(key.startswith(CODEC) for key in keys):
        raise CheckpointError(f"{path} has no VAE; give one with --vae: a file, a folder, or tiny")
    guess, reasons = find_prediction(path, weights, keys, found, is_stated)
    prediction = options.prediction or guess
    is_sd2 = not is_stated and found.denoiser.context_dim == sd21().denoiser.context_dim
    found = found.replace(
        denoiser=found.denoiser.replace(prediction=prediction),
        schedule=found.schedule.replace(zero_terminal_snr=found.schedule.zero_terminal_snr or "ztsnr" in keys),
        codec=codec.config if codec else found.codec,
        sample_size=sd21(prediction=prediction).sample_size if is_sd2 else found.sample_size,
    )
    parts = from_files(path, empty_parts, found, from_files(path, load_tokenizer), path.stem, codec)
    modules = {part: module for part, module in parts.modules.items() if part != "codec" or codec is None}
    sd_names.check_layout(found, codec is None, f"{path}: ", "use")
    notes += fill_original(path, weights, keys, modules, found, ema)
    if weights.metadata.get(TITLE_KEY) == UNTRAINED:
        notes.append(UNTRAINED_NOTE)
    return finished(parts, notes + ([] if options.prediction else reasons))


def save_single_file(parts: ModelParts, path: str | Path, *, dtype: torch.dtype | None = None) -> None:
    """Writes a .safetensors file in the original layout, with the config in its metadata for sdlite.

    Raises CheckpointError for what the layout has no place for, FileExistsError, DiskFull.
    """
    sd_names.check_layout(parts.config, True, "", "save")
    if parts.text.tokenizer.get_vocab() != load_tokenizer().get_vocab():
        raise CheckpointError("the original layout has no place for a tokenizer that is not CLIP's; save a folder")
    states = {part: module.state_dict() for part, module in parts.modules.items()}
    ours = {f"{part}.{name}": tensor for part, state in states.items() for name, tensor in state.items()}
    open_clip = parts.config.text.hidden_act == "gelu"  # which of the two the original code's text encoders have
    names = sd_names.original_names(states, parts.config.denoiser, open_clip)
    tensors = {key: sd_names.join(key, [ours[name] for name in sources]) for key, sources in names.items()}
    one_each = getattr(parts.config.denoiser, "transformer_depth", (1,)) == (1,)  # version 0.1 does not know the field
    config = parts.config.model_dump_json(exclude={"denoiser": {"transformer_depth"}} if one_each else None)
    metadata = {CONFIG_KEY: config, PREDICTION_KEY: parts.config.denoiser.prediction}
    if parts.is_untrained:
        metadata[TITLE_KEY] = UNTRAINED
    with atomic_file(Path(path)) as temporary:
        write_safetensors(temporary, tensors, dtype, **metadata)


def fill_original(
    path: Path,
    weights: Weights,
    keys: Mapping[str, str],
    modules: Mapping[Part, nn.Module],
    config: ModelConfig | None = None,
    ema: bool = False,
) -> list[str]:
    """Gives modules the weights of a file in the original layout. Returns a note on weights that are not used.

    keys: canonical key -> key in the file. modules: the parts to fill. config, ema: of a whole model; without config
    only the codec is filled.
    """
    states = {part: shapes_of(module) for part, module in modules.items()}
    ours = {f"{part}.{name}": shape for part, state in states.items() for name, shape in state.items()}
    denoiser, layers = (config.denoiser, config.text.num_hidden_layers) if config else (None, None)
    names = sd_names.original_names(states, denoiser, f"{OPEN_CLIP}ln_final.weight" in keys)
    expected = {key: sd_names.original_shape(key, [ours[name] for name in sources]) for key, sources in names.items()}
    source = {
        key: raw
        for key, raw in keys.items()
        if not sd_names.is_unused(key, layers) and ("codec" in modules if key.startswith(CODEC) else config is not None)
    }
    if ema:
        source = _averaged(path, keys, source, names)
    found = {key: sd_names.with_kernel(key, weights.shapes[raw]) for key, raw in source.items()}
    unread = {sd_names.canonical(key): dtype for key, dtype in weights.unread.items()}
    notes = check_same(expected, found, str(path), unread)
    read = weights.read(source[key] for key in names)
    tensors: dict[str, Tensor] = {}
    for key, sources in names.items():
        pieces = sd_names.split(read[source[key]], [ours[name] for name in sources])
        tensors |= zip(sources, pieces, strict=True)
    for part, module in modules.items():
        module.load_state_dict({name: tensors[f"{part}.{name}"] for name in states[part]}, assign=True)
    return notes


def _averaged(
    path: Path, keys: Mapping[str, str], source: Mapping[str, str], names: Mapping[str, object]
) -> dict[str, str]:
    """The source of each weight, with the moving average in place of the UNet. names: the keys of the model."""
    if sum(key.startswith(sd_names.EMA) for key in keys) < sd_names.MIN_EMA_KEYS:
        raise CheckpointError(f"{path} has no moving average of its weights (model_ema.*); load it without ema")
    average = {key: keys.get(sd_names.ema_key(key)) for key in names if key.startswith(UNET)}
    others = {key: raw for key, raw in source.items() if not key.startswith(UNET)}
    return others | {key: raw for key, raw in average.items() if raw is not None}


def find_config(
    path: Path, weights: Weights, keys: Mapping[str, str], config: ModelConfig | None
) -> tuple[ModelConfig, bool, list[str]]:
    """The config of a file, whether it was stated rather than inferred, and notes. keys: canonical key -> file's key.

    Raises CheckpointError for another kind of model, which it names if it can.
    """
    has_unet = f"{UNET}input_blocks.0.0.weight" in keys
    known, other = (FOREIGN, None) if has_unet else ((*FOREIGN, *ALONE), "has no UNet that sdlite knows")
    foreign = next((what for pattern, what in known if any(re.fullmatch(pattern, key) for key in keys.values())), other)
    if foreign is not None:
        raise CheckpointError(f"{path} {foreign}; sdlite loads Stable Diffusion 1.x and 2.x")
    if config is not None:
        return config, True, []
    if (stated := stated_config(path, weights)) is not None:
        return stated, True, []
    width, channels = (*weights.shapes[keys[f"{UNET}input_blocks.0.0.weight"]], 0, 0)[:2]
    projection = keys.get(f"{UNET}input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight")
    context = (0, *weights.shapes[projection])[-1] if projection else 0
    sizes = {768: sd15, 1024: sd21}
    if width != 320 or context not in sizes or channels not in (4, 9):
        found = f"has a UNet of width {width} for {channels} channels and text features of {context}"
        sizes_known = "Stable Diffusion 1.x or 2.x (320; 4 or 9; 768 or 1024)"
        raise CheckpointError(f"{path} {found}, which is not {sizes_known}; load it in Python with its config")
    return sizes[context](channels, "epsilon"), False, _schedule_notes(path, weights, keys)


def stated_config(path: Path, weights: Weights) -> ModelConfig | None:
    """The config that sdlite wrote into a file, None without one."""
    if CONFIG_KEY not in weights.metadata:
        return None
    try:
        return ModelConfig(**parse_json(weights.metadata[CONFIG_KEY]))
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{path}: metadata {CONFIG_KEY}: {' '.join(str(error).split()):.300}") from None


def _schedule_notes(path: Path, weights: Weights, keys: Mapping[str, str]) -> list[str]:
    """Compares the file's noise schedule, where it has one, with Stable Diffusion's."""
    if "alphas_cumprod" not in keys:
        return []
    sd1 = sd15().schedule
    betas = torch.linspace(sd1.beta_start**0.5, sd1.beta_end**0.5, sd1.num_train_steps, dtype=torch.float64) ** 2
    expected = (1 - betas).cumprod(0)
    with suppress(CheckpointError):  # it is damaged
        (found,) = weights.read([keys["alphas_cumprod"]]).values()
        if found.shape == expected.shape and torch.allclose(found.double(), expected, atol=SCHEDULE_TOLERANCE, rtol=0):
            return []
    return [f"{path.name}: its alphas_cumprod is not Stable Diffusion's noise schedule; sdlite uses Stable Diffusion's"]


def find_prediction(
    path: Path, weights: Weights, keys: Mapping[str, str], config: ModelConfig, is_stated: bool
) -> tuple[Prediction, list[str]]:
    """What the UNet predicts, and a note on what says so unless the config does.

    In this order: the config if it is stated, a .yaml or .json next to the file, metadata, marker tensors, a heuristic.
    """
    if is_stated:
        return config.denoiser.prediction, []
    for said, by in ((_sidecar(path), "file next to the model"), (weights.metadata.get(PREDICTION_KEY), "metadata")):
        if said in SAID:
            return SAID[said], [f"prediction {SAID[said]}: the {by} says so"]
    if "v_pred" in keys:
        return "v", ["prediction v: the file has the marker tensor v_pred"]
    guess: Prediction = "epsilon"
    other, by = "v", "what Stable Diffusion 1 and inpainting models predict"
    if config.denoiser.context_dim == sd21().denoiser.context_dim and config.denoiser.in_channels == 4:
        by = "nothing in the file, since the norm that tells them apart is not there"
        if SD2_V_KEY in keys:
            (bias,) = weights.read([keys[SD2_V_KEY]]).values()
            spread = bias.std(correction=0).item() if bias.numel() else 0.0
            guess, other = ("v", "epsilon") if spread > SD2_V_SPREAD else ("epsilon", "v")
            by = f"a norm in its last block has a spread of {spread:.3f}; in v models of SD2 it is above {SD2_V_SPREAD}"
    advice = f"if images are noise or blotches, give --prediction {other}"
    return guess, [f"prediction {guess} is a guess, by {by}; {advice}"]


def _sidecar(path: Path) -> str | None:
    """The prediction that a file of the same name with .yaml or .json states, None without one."""
    yaml = path.with_suffix(".yaml")
    if yaml.is_file() and yaml.stat().st_size <= MAX_SIDECAR_BYTES:
        text = yaml.read_text(encoding="utf-8", errors="replace")
        if found := re.search(r"^\s*parameterization\s*:\s*[\"']?(\w+)", text, re.MULTILINE):
            return found[1]
        if re.search(r"^model\s*:", text, re.MULTILINE):
            return "epsilon"  # CompVis's default
    with suppress(CheckpointError):  # often another program's notes on the model
        stated = read_json(path.with_suffix(".json"))
        return next((str(stated[k]) for k in ("prediction_type", "parameterization") if k in stated), None)
    return None
