"""Translates the config.json files of a diffusers folder into our records and back, by the tables of known_keys.py.

A config is untrusted: every key either maps to a field, or must have a value that sdlite implements, or is known not to
matter. Any other key is an error unless its value says that the model does not use it (null, false). Names of code are
never followed. A missing key has the default of the class in diffusers or transformers, which often differs from Stable
Diffusion's.
"""

import math
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from sdlite.checkpoints import known_keys
from sdlite.checkpoints.known_keys import Keys
from sdlite.checkpoints.places import CheckpointError
from sdlite.checkpoints.weights import from_files
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
MAX_HEADS = 8192  # and head width of a Transformer; the width that they make has a limit of its own
CONDITIONED_SIZE = 128  # the sample_size at which diffusers' default is to condition on resolution and aspect ratio

PREDICTIONS: dict[str, Prediction] = {"epsilon": "epsilon", "v_prediction": "v", "sample": "sample"}
PREDICTION_NAMES = {ours: theirs for theirs, ours in PREDICTIONS.items()}
BETAS = {"scaled_linear": "scaled_linear", "linear": "linear", "squaredcos_cap_v2": "cosine"}
BETA_NAMES = {ours: theirs for theirs, ours in BETAS.items()}


def check_model_index(config: Config, where: str) -> None:
    """Raises CheckpointError unless model_index.json describes Stable Diffusion 1.x or 2.x, or sdlite's DiT."""
    refuse_hooks(config, where)
    pipelines = known_keys.DIT_PIPELINES if "transformer" in config else known_keys.PIPELINES
    if (found := config.get("_class_name", pipelines[0])) not in pipelines:
        raise _unsupported(where, "_class_name", found, pipelines)
    if "transformer" in config and "unet" in config:
        raise CheckpointError(f"{where}: a model has either a unet or a transformer, not both")
    for name, entry in config.items():
        if name in known_keys.MODEL_INDEX_HARMLESS or name.startswith("_") or _is_off(entry):
            continue
        if name not in known_keys.MODEL_INDEX:
            raise CheckpointError(f"{where}: unknown part {name!r:.80}; known: {', '.join(known_keys.MODEL_INDEX)}")
        library = entry[0] if isinstance(entry, list) and len(entry) == 2 else None
        if library not in ("diffusers", "transformers") or entry[1] not in known_keys.MODEL_INDEX[name]:
            raise _unsupported(where, name, entry, known_keys.MODEL_INDEX[name])


def denoiser_config(part: str, config: Config, prediction: Prediction, where: str) -> tuple[DenoiserConfig, Sides]:
    """The denoiser of a folder, "unet" or "transformer", and the model's sample size."""
    if part == "unet":
        return unet_config(config, prediction, where), sample_size(config, where)
    dit = dit_config(config, prediction, where)
    return dit, dit.sample_size


def unet_config(config: Config, prediction: Prediction, where: str) -> UNetConfig:
    found, fields = _read(known_keys.UNET, config, where)
    down, up, kinds = found["down_block_types"], found["up_block_types"], ("CrossAttnDownBlock2D", "DownBlock2D")
    if not isinstance(down, list) or any(kind not in kinds for kind in down):
        raise _unsupported(where, "down_block_types", down, kinds)
    attention = tuple(kind == kinds[0] for kind in down)
    if up != (mirrored := _up_blocks(attention)):
        raise _unsupported(where, "up_block_types", up, (mirrored,))
    heads = found["attention_head_dim"] if found["num_attention_heads"] is None else found["num_attention_heads"]
    depths = found["transformer_layers_per_block"]
    depths = depths if isinstance(depths, list) else [depths]
    fields |= {
        "transformer_depth": depths[:1] if all(depth == depths[0] for depth in depths) else depths,
        "layers_per_block": _same_everywhere(found, "layers_per_block", where),
        "context_dim": _same_everywhere(found, "cross_attention_dim", where),
        "attention_stages": attention,
        "num_heads": heads if isinstance(heads, list) else [heads] * len(attention),
        "prediction": prediction,
    }
    return from_files(where, UNetConfig, **fields)


def _up_blocks(attention: tuple[bool, ...]) -> list[str]:
    return ["CrossAttnUpBlock2D" if has else "UpBlock2D" for has in reversed(attention)]


def dit_config(config: Config, prediction: Prediction, where: str) -> DiTConfig:
    found, fields = _read(known_keys.DIT, config, where)
    numbers = {name: found[name] for name in ("num_attention_heads", "attention_head_dim")}
    for name, number in numbers.items():
        if type(number) is not int or not 1 <= number <= MAX_HEADS:
            raise _unsupported(where, name, number, (f"1 to {MAX_HEADS}",))
    width = math.prod(numbers.values())
    if found["out_channels"] is None:
        fields["out_channels"] = found["in_channels"]
    dit = from_files(where, DiTConfig, **fields, width=width, prediction=prediction)
    at_size = {
        "cross_attention_dim": (width,),
        "interpolation_scale": (None, dit.position_shrink),
        "use_additional_conditions": (False,) if dit.sample_size == CONDITIONED_SIZE else (False, None),
    }
    _check_fixed({key: found[key] for key in at_size}, at_size, where)
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
        return from_files(where, AutoencoderTinyConfig, **_read(known_keys.TINY, config, where)[1])
    return from_files(where, AutoencoderKLConfig, **_read(known_keys.KL, config, where)[1])


def text_config(config: Config, ids: Mapping[str, int], where: str) -> TextConfig:
    """ids: bos_token_id, eos_token_id, pad_token_id of the tokenizer; those in configs are often placeholders."""
    return from_files(where, TextConfig, **_read(known_keys.TEXT, config, where)[1] | dict(ids))


def schedule_config(config: Config, where: str) -> tuple[ScheduleConfig, Prediction | None, list[str]]:
    """The schedule, the prediction type if it is stated, and keys that were not understood.

    Unknown keys are common here: diffusers copies them from one scheduler's config to the next one's.
    """
    refuse_hooks(config, where)
    name = config.get("_class_name", "DDIMScheduler")
    if not isinstance(name, str) or name not in known_keys.SCHEDULERS:
        raise _unsupported(where, "_class_name", name, tuple(known_keys.SCHEDULERS))
    understood = {key: config[key] for key in known_keys.SCHEDULE.known & set(config)}
    found, fields = _read(known_keys.SCHEDULE, known_keys.SCHEDULERS[name] | understood, where, name)
    for key, values in (("beta_schedule", BETAS), ("prediction_type", PREDICTIONS)):
        if not isinstance(found[key], str) or found[key] not in values:
            raise _unsupported(where, key, found[key], tuple(values))
    fields["beta_schedule"] = BETAS[found["beta_schedule"]]
    stated = PREDICTIONS[found["prediction_type"]] if "prediction_type" in config else None
    return from_files(where, ScheduleConfig, **fields), stated, sorted(set(config) - known_keys.SCHEDULE.known)


def to_diffusers(config: ModelConfig) -> dict[str, dict[str, Any]]:
    """The JSON files of a folder: model_index.json and part/config.json; diffusers fills in missing keys."""
    part, denoiser = denoiser_part(config.denoiser), _denoiser_file(config.denoiser, config.sample_size)
    codec = _codec_file(config.codec)
    pipeline, checker = known_keys.DIT_PIPELINES[0], {}
    if part == "unet":
        checker = {"safety_checker": [None, None], "feature_extractor": [None, None], "requires_safety_checker": False}
        pipeline = known_keys.PIPELINES[0]
    return {
        "model_index.json": {
            "_class_name": pipeline,
            part: ["diffusers", denoiser["_class_name"]],
            "vae": ["diffusers", codec["_class_name"]],
            "text_encoder": ["transformers", known_keys.TEXT.kind],
            "tokenizer": ["transformers", "CLIPTokenizer"],
            "scheduler": ["diffusers", known_keys.SCHEDULE.kind],
            **checker,
        },
        f"{part}/config.json": denoiser,
        "vae/config.json": codec,
        "text_encoder/config.json": {
            "architectures": [known_keys.TEXT.kind],
            "model_type": "clip_text_model",
            **config.text.model_dump(),
            "projection_dim": config.text.hidden_size,
            "dtype": "float32",  # else transformers 5 computes in that of the file, and diffusers in float32
        },
        "scheduler/scheduler_config.json": _schedule_file(config.schedule, config.denoiser.prediction),
    }


def denoiser_part(config: DenoiserConfig) -> str:
    """Folder of the denoiser in diffusers' layout."""
    return "transformer" if isinstance(config, DiTConfig) else "unet"


def _denoiser_file(config: DenoiserConfig, size: Sides) -> dict[str, Any]:
    """config.json of the denoiser. size: in latent cells, of the model's images."""
    if isinstance(config, DiTConfig):
        width = {"attention_head_dim": config.width // config.num_heads, "cross_attention_dim": config.width}
        return _written(known_keys.DIT, config, **width, use_additional_conditions=False)
    down = ["CrossAttnDownBlock2D" if has else "DownBlock2D" for has in config.attention_stages]
    blocks: dict[str, Any] = {"down_block_types": down, "up_block_types": _up_blocks(config.attention_stages)}
    if (depths := config.transformer_depth) != (1,):
        blocks["transformer_layers_per_block"] = depths if len(depths) > 1 else depths[0]
    return _written(known_keys.UNET, config, **blocks, sample_size=size)


def _codec_file(config: CodecConfig) -> dict[str, Any]:
    if isinstance(config, AutoencoderTinyConfig):
        return _written(known_keys.TINY, config)
    stages = len(config.block_out_channels)
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * stages, "up_block_types": ["UpDecoderBlock2D"] * stages}
    return _written(known_keys.KL, config, **blocks)


def _schedule_file(config: ScheduleConfig, prediction: Prediction) -> dict[str, Any]:
    if config.steps_offset != 1:
        raise CheckpointError(f"steps_offset={config.steps_offset} cannot be saved: diffusers' pipeline takes 1")
    names = {"beta_schedule": BETA_NAMES[config.beta_schedule], "prediction_type": PREDICTION_NAMES[prediction]}
    content = _written(known_keys.SCHEDULE, config, **names, steps_offset=1, clip_sample=False)
    return {key: value for key, value in content.items() if value is not None}


def _written(keys: Keys, record: Record, **others: Any) -> dict[str, Any]:
    """A record in the keys of a class. others: values of keys that have no field."""
    values = others | {key: getattr(record, field) for key, (field, _) in keys.fields.items() if field}
    return {"_class_name": keys.kind} | {key: values[key] for key in keys.fields if key in values}


def _read(keys: Keys, config: Config, where: str, kind: str | None = None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Values by their keys, with defaults filled in, and those of them that have a field, by its name.

    kind: the class, if it is another one with the same keys. Raises CheckpointError for what is not allowed.
    """
    refuse_hooks(config, where)
    kind = kind or keys.kind
    if (found := config.get("_class_name", kind)) != kind:
        raise _unsupported(where, "_class_name", found, (kind,))
    known = keys.known
    for key in config:
        if key not in known and not _is_inert_hook(key, config[key]) and not _is_off(config[key]):
            near = get_close_matches(key[:80], known, 1)
            advice = f"did you mean {near[0]!r}?" if near else f"sdlite has no such option of {kind}"
            raise CheckpointError(f"{where}: unknown key {key!r:.80}={config[key]!r:.80}; {advice}")
    _check_fixed(config, keys.fixed, where)
    values = {key: config.get(key, default) for key, (_, default) in keys.fields.items()}
    return values, {field: values[key] for key, (field, _) in keys.fields.items() if field}


def _is_off(value: Any) -> bool:
    """Whether an option that sdlite does not know is one that the model does not use."""
    return value is None or value is False or value in ([], {}, "", [None, None])


def _check_fixed(config: Config, fixed: Mapping[str, Sequence[Any]], where: str) -> None:
    for key, allowed in fixed.items():
        value = config.get(key, allowed[0])
        values = value if isinstance(value, list) else [value]
        if any(not any((type(v) is not bool and v == a) or v is a for a in allowed) for v in values):
            raise _unsupported(where, key, value, allowed)


def refuse_hooks(config: Config, where: str) -> None:
    """Raises CheckpointError if a config asks for code. sdlite would not run it, but does not trust such a file."""
    for key, value in config.items():
        hook = key in ("auto_map", "trust_remote_code", "custom_pipelines") or "attn_implementation" in key
        if hook and not _is_inert_hook(key, value):
            way_out = "which sdlite never runs; remove the key if you trust the rest of the model"
            raise CheckpointError(f"{where}: {key}={value!r:.80} asks for code of its own, {way_out}")


def _is_inert_hook(key: str, value: Any) -> bool:
    """Whether a key that can ask for code does not: transformers itself writes some of them."""
    plain = value is None or isinstance(value, bool) or value in ("eager", "sdpa")
    return plain and ("attn_implementation" in key or (key == "trust_remote_code" and not value))


def _same_everywhere(found: Config, key: str, where: str) -> Any:
    """The value of a key that may have one entry per stage."""
    values = found[key] if isinstance(found[key], list) else [found[key]]
    if not values or any(entry != values[0] for entry in values):
        raise _unsupported(where, key, values, ("the same at every stage",))
    return values[0]


def _unsupported(where: str, key: str, value: Any, allowed: Sequence[Any]) -> CheckpointError:
    known = ", ".join(map(str, allowed))
    return CheckpointError(f"{where}: {key}={value!r:.200} is not supported; sdlite implements {known}")
