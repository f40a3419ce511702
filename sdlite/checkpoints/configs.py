"""Translates the config.json files of a diffusers folder into our records and back.

A config is untrusted: every key either maps to a field, or must have a value that sdlite implements, or is known not to
matter. Any other key is an error unless its value says that the model does not use it (null, false). Names of code are
never followed. A missing key has the default of the class in diffusers or transformers, which often differs from Stable
Diffusion's.
"""

import math
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any, Literal, TypeVar

from sdlite.checkpoints.known_keys import (
    CODEC_HARMLESS,
    COMMON,
    DIT_FIXED,
    DIT_HARMLESS,
    DIT_MAPPED,
    DIT_PIPELINES,
    KL_FIXED,
    KL_MAPPED,
    MODEL_INDEX,
    MODEL_INDEX_HARMLESS,
    PIPELINES,
    SCHEDULE_FIXED,
    SCHEDULE_HARMLESS,
    SCHEDULE_MAPPED,
    SCHEDULERS,
    TEXT_FIXED,
    TEXT_HARMLESS,
    TEXT_MAPPED,
    TINY_FIXED,
    TINY_MAPPED,
    UNET_FIXED,
    UNET_HARMLESS,
    UNET_MAPPED,
)
from sdlite.checkpoints.weights import CheckpointError
from sdlite.config import (
    AutoencoderKLConfig,
    AutoencoderTinyConfig,
    CodecConfig,
    DenoiserConfig,
    DiTConfig,
    ModelConfig,
    Prediction,
    Record,
    ScheduleConfig,
    Sides,
    TextConfig,
    UNetConfig,
)

Config = Mapping[str, Any]
R = TypeVar("R", bound=Record)
MAX_HEADS = 8192  # and head width of a Transformer; the width that they make has a limit of its own
CONDITIONED_SIZE = 128  # at which diffusers takes resolution and aspect ratio as conditions unless told otherwise
MAX_TINY_BLOCKS = 64  # per stage of AutoencoderTiny; TAESD has 3

PREDICTIONS: dict[str, Prediction] = {"epsilon": "epsilon", "v_prediction": "v", "sample": "sample"}
BETAS: dict[str, Literal["scaled_linear", "linear", "cosine"]] = {
    "scaled_linear": "scaled_linear",
    "linear": "linear",
    "squaredcos_cap_v2": "cosine",
}


def check_model_index(config: Config, where: str) -> None:
    """Raises CheckpointError unless model_index.json describes Stable Diffusion 1.x or 2.x, or sdlite's DiT."""
    refuse_hooks(config, where)
    pipelines = DIT_PIPELINES if "transformer" in config else PIPELINES
    if (found := config.get("_class_name", pipelines[0])) not in pipelines:
        raise _unsupported(where, "_class_name", found, pipelines)
    if "transformer" in config and "unet" in config:
        raise CheckpointError(f"{where}: a model has either a unet or a transformer, not both")
    for name, entry in config.items():
        if name in MODEL_INDEX_HARMLESS or name.startswith("_") or _is_off(entry):
            continue
        if name not in MODEL_INDEX:
            raise CheckpointError(f"{where}: unknown part {name!r:.80}; known: {', '.join(MODEL_INDEX)}")
        library = entry[0] if isinstance(entry, list) and len(entry) == 2 else None
        if library not in ("diffusers", "transformers") or entry[1] not in MODEL_INDEX[name]:
            raise _unsupported(where, name, entry, MODEL_INDEX[name])


def denoiser_config(part: str, config: Config, prediction: Prediction, where: str) -> tuple[DenoiserConfig, Sides]:
    """The denoiser of a folder, "unet" or "transformer", and the model's sample size."""
    if part == "transformer":
        dit = dit_config(config, prediction, where)
        return dit, dit.sample_size
    return unet_config(config, prediction, where), sample_size(config, where)


def unet_config(config: Config, prediction: Prediction, where: str) -> UNetConfig:
    found = _checked(config, "UNet2DConditionModel", UNET_MAPPED, UNET_FIXED, UNET_HARMLESS | COMMON, where)
    down, up = found["down_block_types"], found["up_block_types"]
    kinds = {"CrossAttnDownBlock2D": True, "DownBlock2D": False}
    if not isinstance(down, list) or not all(isinstance(kind, str) and kind in kinds for kind in down):
        raise _unsupported(where, "down_block_types", down, tuple(kinds))
    attention = tuple(kinds[kind] for kind in down)
    mirrored = ["CrossAttnUpBlock2D" if has else "UpBlock2D" for has in reversed(attention)]
    if up != mirrored:
        raise _unsupported(where, "up_block_types", up, (mirrored,))
    heads = found["attention_head_dim"] if found["num_attention_heads"] is None else found["num_attention_heads"]
    depths = found["transformer_layers_per_block"]
    depths = depths if isinstance(depths, list) else [depths]
    fields = {name: found[name] for name in ("in_channels", "out_channels", "block_out_channels")} | {
        "layers_per_block": _same_everywhere(found, "layers_per_block", where),
        "context_dim": _same_everywhere(found, "cross_attention_dim", where),
        "attention_stages": attention,
        "num_heads": heads if isinstance(heads, list) else [heads] * len(attention),
        "num_groups": found["norm_num_groups"],
        "use_linear_projection": found["use_linear_projection"],
        "transformer_depth": depths[:1] if all(depth == depths[0] for depth in depths) else depths,
        "prediction": prediction,
    }
    return _record(UNetConfig, fields, where)


def dit_config(config: Config, prediction: Prediction, where: str) -> DiTConfig:
    found = _checked(config, "PixArtTransformer2DModel", DIT_MAPPED, DIT_FIXED, DIT_HARMLESS | COMMON, where)
    fields = {name: found[name] for name in ("in_channels", "out_channels", "patch_size", "sample_size")}
    numbers = {name: found[name] for name in ("num_attention_heads", "attention_head_dim")}
    for name, number in numbers.items():
        if type(number) is not int or not 1 <= number <= MAX_HEADS:
            raise _unsupported(where, name, number, (f"1 to {MAX_HEADS}",))
    width = math.prod(numbers.values())
    dit = _record(
        DiTConfig,
        {
            **fields,
            "out_channels": found["in_channels"] if found["out_channels"] is None else found["out_channels"],
            "width": width,
            "depth": found["num_layers"],
            "num_heads": found["num_attention_heads"],
            "context_dim": found["caption_channels"],
            "prediction": prediction,
        },
        where,
    )
    side = dit.sample_size
    for key, allowed in {
        "cross_attention_dim": (width,),
        "interpolation_scale": (None, dit.position_shrink),
        "use_additional_conditions": (False,) if side == CONDITIONED_SIZE else (False, None),
    }.items():
        _check_fixed({key: found[key]}, {key: allowed}, where)
    return dit


def sample_size(config: Config, where: str) -> Sides:
    """Latent cells that the UNet's config names, 64 if it names none: the side, or (height, width)."""
    size = config.get("sample_size")
    if size is None:
        return 64
    sides = size if isinstance(size, list) and len(size) == 2 else [size]
    if not all(type(side) is int and 1 <= side <= 1024 for side in sides):
        raise _unsupported(where, "sample_size", size, ("1 to 1024",))
    return sides[0] if sides[0] == sides[-1] else (sides[0], sides[1])


def codec_config(config: Config, where: str) -> CodecConfig:
    if config.get("_class_name") == "AutoencoderTiny":
        harmless = CODEC_HARMLESS | COMMON | {"block_out_channels"}
        found = _checked(config, "AutoencoderTiny", TINY_MAPPED, TINY_FIXED, harmless, where)
        record = _record(AutoencoderTinyConfig, found, where)
        if max(*record.num_encoder_blocks, *record.num_decoder_blocks) > MAX_TINY_BLOCKS:
            raise CheckpointError(f"{where}: num_encoder_blocks and num_decoder_blocks must be up to {MAX_TINY_BLOCKS}")
        return record
    found = _checked(config, "AutoencoderKL", KL_MAPPED, KL_FIXED, CODEC_HARMLESS | COMMON, where)
    return _record(AutoencoderKLConfig, found, where)


def text_config(config: Config, ids: Mapping[str, int], where: str) -> TextConfig:
    """ids: bos_token_id, eos_token_id, pad_token_id of the tokenizer; those in configs are often placeholders."""
    found = _checked(config, "CLIPTextModel", TEXT_MAPPED, TEXT_FIXED, TEXT_HARMLESS | COMMON, where)
    return _record(TextConfig, {**found, **ids}, where)


def schedule_config(config: Config, where: str) -> tuple[ScheduleConfig, Prediction | None, list[str]]:
    """The schedule, the prediction type if it is stated, and keys that were not understood.

    Unknown keys are common here: diffusers copies them from one scheduler's config to the next one's.
    """
    refuse_hooks(config, where)
    name = config.get("_class_name", "DDIMScheduler")
    if not isinstance(name, str) or name not in SCHEDULERS:
        raise _unsupported(where, "_class_name", name, tuple(SCHEDULERS))
    found: dict[str, Any] = (
        SCHEDULE_MAPPED | SCHEDULERS[name] | {key: config[key] for key in SCHEDULE_MAPPED if key in config}
    )
    _check_fixed(config, SCHEDULE_FIXED, where)
    for key, known in (("beta_schedule", BETAS), ("prediction_type", PREDICTIONS)):
        if not isinstance(found[key], str) or found[key] not in known:
            raise _unsupported(where, key, found[key], tuple(known))
    fields = {
        "num_train_steps": found["num_train_timesteps"],
        "beta_start": found["beta_start"],
        "beta_end": found["beta_end"],
        "beta_schedule": BETAS[found["beta_schedule"]],
        "final_abar_one": found["set_alpha_to_one"],
        "spacing": found["timestep_spacing"],
        "zero_terminal_snr": found["rescale_betas_zero_snr"],
    }
    stated = PREDICTIONS[found["prediction_type"]] if "prediction_type" in config else None
    unknown = sorted(set(config) - set(SCHEDULE_MAPPED) - set(SCHEDULE_FIXED) - SCHEDULE_HARMLESS - COMMON)
    return _record(ScheduleConfig, fields, where), stated, unknown


def to_diffusers(config: ModelConfig) -> dict[str, dict[str, Any]]:
    """The JSON files of a folder: model_index.json and part/config.json; diffusers fills in missing keys."""
    schedule, text, codec = config.schedule, config.text, config.codec
    if schedule.steps_offset != 1:
        raise CheckpointError(f"steps_offset={schedule.steps_offset} cannot be saved: diffusers' pipeline takes 1")
    codec_class = "AutoencoderKL" if isinstance(codec, AutoencoderKLConfig) else "AutoencoderTiny"
    stages = len(codec.block_out_channels) if isinstance(codec, AutoencoderKLConfig) else 0
    kl_types = {"down_block_types": ["DownEncoderBlock2D"] * stages, "up_block_types": ["UpDecoderBlock2D"] * stages}
    scheduler = {
        "_class_name": "DDIMScheduler",
        "num_train_timesteps": schedule.num_train_steps,
        "beta_start": schedule.beta_start,
        "beta_end": schedule.beta_end,
        "beta_schedule": _key_of(BETAS, schedule.beta_schedule),
        "set_alpha_to_one": schedule.final_abar_one,
        "steps_offset": schedule.steps_offset,
        "clip_sample": False,
        "prediction_type": _key_of(PREDICTIONS, config.denoiser.prediction),
        "rescale_betas_zero_snr": schedule.zero_terminal_snr,
    }
    part, denoiser = denoiser_part(config.denoiser), _denoiser_file(config.denoiser, config.sample_size)
    checker = {"safety_checker": [None, None], "feature_extractor": [None, None], "requires_safety_checker": False}
    files = {
        "model_index.json": {
            "_class_name": (PIPELINES if part == "unet" else DIT_PIPELINES)[0],
            part: ["diffusers", denoiser["_class_name"]],
            "vae": ["diffusers", codec_class],
            "text_encoder": ["transformers", "CLIPTextModel"],
            "tokenizer": ["transformers", "CLIPTokenizer"],
            "scheduler": ["diffusers", "DDIMScheduler"],
            **(checker if part == "unet" else {}),
        },
        f"{part}/config.json": denoiser,
        "vae/config.json": {"_class_name": codec_class, **codec.model_dump(), **(kl_types if stages else {})},
        "text_encoder/config.json": {
            "architectures": ["CLIPTextModel"],
            "model_type": "clip_text_model",
            **text.model_dump(),
            "projection_dim": text.hidden_size,
            "dtype": "float32",  # else transformers 5 computes in that of the file, and diffusers in float32
        },
        "scheduler/scheduler_config.json": scheduler
        | ({} if schedule.spacing is None else {"timestep_spacing": schedule.spacing}),
    }
    return files


def denoiser_part(config: DenoiserConfig) -> str:
    """Folder of the denoiser in diffusers' layout."""
    return "transformer" if isinstance(config, DiTConfig) else "unet"


def _denoiser_file(config: DenoiserConfig, size: Sides) -> dict[str, Any]:
    """config.json of the denoiser. size: in latent cells, of the model's images."""
    if isinstance(config, DiTConfig):
        return {
            "_class_name": "PixArtTransformer2DModel",
            **config.model_dump(include={"in_channels", "out_channels", "patch_size", "sample_size"}),
            "num_layers": config.depth,
            "num_attention_heads": config.num_heads,
            "attention_head_dim": config.width // config.num_heads,
            "cross_attention_dim": config.width,
            "caption_channels": config.context_dim,
            "use_additional_conditions": False,
        }
    depths = config.transformer_depth
    return {
        "_class_name": "UNet2DConditionModel",
        **config.model_dump(include={"in_channels", "out_channels", "block_out_channels", "layers_per_block"}),
        "down_block_types": ["CrossAttnDownBlock2D" if has else "DownBlock2D" for has in config.attention_stages],
        "up_block_types": ["CrossAttnUpBlock2D" if has else "UpBlock2D" for has in reversed(config.attention_stages)],
        "cross_attention_dim": config.context_dim,
        "attention_head_dim": config.num_heads,
        "norm_num_groups": config.num_groups,
        "use_linear_projection": config.use_linear_projection,
        **({} if depths == (1,) else {"transformer_layers_per_block": depths if len(depths) > 1 else depths[0]}),
        "sample_size": size,
    }


def _checked(
    config: Config, kind: str, mapped: Config, fixed: Mapping[str, tuple[Any, ...]], harmless: set[str], where: str
) -> dict[str, Any]:
    """The mapped keys with defaults filled in. Raises CheckpointError for what is not allowed."""
    refuse_hooks(config, where)
    if (found := config.get("_class_name", kind)) != kind:
        raise _unsupported(where, "_class_name", found, (kind,))
    known = {*mapped, *fixed, *harmless}
    for key in config:
        if key not in known and not _is_inert_hook(key, config[key]) and not _is_off(config[key]):
            near = get_close_matches(key[:80], known, 1)
            raise CheckpointError(
                f"{where}: unknown key {key!r:.80}={config[key]!r:.80}"
                + (f"; did you mean {near[0]!r}?" if near else f"; sdlite has no such option of {kind}")
            )
    _check_fixed(config, fixed, where)
    return {key: config.get(key, default) for key, default in mapped.items()}


def _is_off(value: Any) -> bool:
    """Whether an option that sdlite does not know is one that the model does not use."""
    return value is None or value is False or value in ([], {}, "", [None, None])


def _check_fixed(config: Config, fixed: Mapping[str, tuple[Any, ...]], where: str) -> None:
    for key, allowed in fixed.items():
        if key not in config:
            continue
        values = config[key] if isinstance(config[key], list) else [config[key]]
        if any(not any((type(v) is not bool and v == a) or v is a for a in allowed) for v in values):
            raise _unsupported(where, key, config[key], allowed)


def refuse_hooks(config: Config, where: str) -> None:
    """Raises CheckpointError if a config asks for code. We would not run it, but it is no file to trust."""
    for key, value in config.items():
        hook = key in ("auto_map", "trust_remote_code", "custom_pipelines") or "attn_implementation" in key
        if hook and not _is_inert_hook(key, value):
            raise CheckpointError(
                f"{where}: {key}={value!r:.80} asks for code of its own, which sdlite never runs; "
                "remove the key if you trust the rest of the model"
            )


def _is_inert_hook(key: str, value: Any) -> bool:
    """Whether a key that can ask for code does not: transformers itself writes some of them."""
    plain = value is None or isinstance(value, bool) or value in ("eager", "sdpa")
    return plain and ("attn_implementation" in key or (key == "trust_remote_code" and not value))


def _same_everywhere(found: Config, key: str, where: str) -> Any:
    """The value of a key that may have one entry per stage."""
    value = found[key]
    if not isinstance(value, list):
        return value
    if not value or any(entry != value[0] for entry in value):
        raise _unsupported(where, key, value, ("the same at every stage",))
    return value[0]


def _record(record: type[R], fields: Config, where: str) -> R:
    try:
        return record(**fields)
    except ValueError as error:
        raise CheckpointError(f"{where}: {error}") from None


def _key_of(table: Mapping[str, str], value: str) -> str:
    return next(key for key, known in table.items() if known == value)


def _unsupported(where: str, key: str, value: Any, allowed: tuple[Any, ...]) -> CheckpointError:
    return CheckpointError(
        f"{where}: {key}={value!r:.200} is not supported; sdlite implements {', '.join(map(str, allowed))}"
    )
