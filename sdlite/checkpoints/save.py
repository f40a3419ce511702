"""Writes models: a folder in diffusers' layout, or one file in the original layout; both appear whole or not at all.

`convert` goes from any form to either. With trust_pickle it is the one place that reads a pickle, and then lets it
make tensors and plain containers only (weights_only).
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from sdlite.checkpoints import compvis, configs
from sdlite.checkpoints.folder import WEIGHT_STEMS
from sdlite.checkpoints.load import UNTRAINED, UNTRAINED_NOTE, ModelParts, load_model, load_single_file
from sdlite.checkpoints.single_file import CONFIG_KEY, PREDICTION_KEY, TITLE_KEY
from sdlite.checkpoints.weights import MAX_TENSORS, NAME, CheckpointError, Weights, finite
from sdlite.config import AutoencoderKLConfig, DiTConfig, ModelConfig, Prediction
from sdlite.files import atomic_file, atomic_folder, check_file, check_folder
from sdlite.models.text import load_tokenizer, save_tokenizer, saved_text_state_dict

MAX_NESTING = 4  # of "state_dict" in pickles; training frameworks make 1


def save_folder(
    parts: ModelParts, folder: str | Path, *, dtype: torch.dtype | None = None, max_shard_size: int | None = None
) -> None:
    """Writes a folder that `load_model` and diffusers' StableDiffusionPipeline.from_pretrained load.

    diffusers has no pipeline for a DiT with CLIP; it loads the parts of such a folder one by one.
    dtype: None keeps that of each part. max_shard_size: bytes of a weight file, beyond which it is split.
    Raises CheckpointError for what diffusers' layout has no place for, FileExistsError if the folder is there and not
    empty, DiskFull.
    """
    files = configs.to_diffusers(parts.config)
    if UNTRAINED_NOTE in parts.notes:
        files["model_index.json"]["_name_or_path"] = UNTRAINED
    weights = {
        configs.denoiser_part(parts.config.denoiser): parts.denoiser.state_dict(),
        "vae": parts.codec.model.state_dict(),
        "text_encoder": saved_text_state_dict(parts.text.model.state_dict()),
    }

    with atomic_folder(Path(folder)) as temporary:
        for name, content in files.items():
            (temporary / name).parent.mkdir(exist_ok=True)
            _write_json(temporary / name, content)
        save_tokenizer(parts.text.tokenizer, temporary / "tokenizer")
        for part, tensors in weights.items():
            _write_shards(temporary / part, WEIGHT_STEMS[part], _plain(tensors, dtype), max_shard_size)


def save_single_file(
    parts: ModelParts, path: str | Path, *, dtype: torch.dtype | None = None, force: bool = False
) -> None:
    """Writes a .safetensors file in the original layout, with the config in its metadata for sdlite.

    Raises CheckpointError for what the layout has no place for, FileExistsError if the file is there and not `force`,
    DiskFull.
    """
    if not isinstance(parts.config.codec, AutoencoderKLConfig):
        raise CheckpointError("the original layout has no place for an AutoencoderTiny; save a folder")
    if isinstance(parts.config.denoiser, DiTConfig):
        raise CheckpointError("the original layout has no place for a DiT; save a folder")
    if parts.text.tokenizer.get_vocab() != load_tokenizer().get_vocab():
        raise CheckpointError("the original layout has no place for a tokenizer that is not CLIP's; save a folder")
    modules: dict[compvis.Part, nn.Module] = {
        "text": parts.text.model,
        "denoiser": parts.denoiser,
        "codec": parts.codec.model,
    }
    ours = {f"{part}.{name}": t for part, module in modules.items() for name, t in module.state_dict().items()}
    open_clip = parts.config.text.hidden_act == "gelu"  # which of the two the original code's text encoders have
    names = compvis.original_names({part: list(m.state_dict()) for part, m in modules.items()}, parts.config, open_clip)
    tensors = {key: compvis.join(key, [ours[name] for name in sources]) for key, sources in names.items()}
    metadata = {
        "format": "pt",
        CONFIG_KEY: parts.config.model_dump_json(),
        PREDICTION_KEY: parts.config.denoiser.prediction,
    }
    if UNTRAINED_NOTE in parts.notes:
        metadata[TITLE_KEY] = UNTRAINED
    with atomic_file(Path(path), force=force) as temporary:
        save_file(_plain(tensors, dtype), temporary, metadata)


def convert(
    source: str | Path,
    target: str | Path,
    *,
    trust_pickle: bool = False,
    prediction: Prediction | None = None,
    config: ModelConfig | None = None,
    ema: bool = False,
    dtype: torch.dtype | None = None,
) -> ModelParts:
    """Loads a model and saves it in the other form: as one file if target ends in .safetensors, else as a folder.

    trust_pickle: read source as a pickle (.ckpt) if it is no safetensors file. The other options are those of
    `load_model` and `save_folder`. Returns the parts, whose notes say what was guessed. Raises as these do.
    """
    origin, goal = Path(source), Path(target)
    as_file = goal.suffix == ".safetensors"
    check_file(goal, force=False) if as_file else check_folder(goal, force=False)  # before minutes of reading
    if trust_pickle and origin.is_file() and origin.suffix != ".safetensors":
        weights = _read_pickle(origin)
        parts = load_single_file(origin, weights, prediction=prediction, config=config, ema=ema)
    else:
        parts = load_model(source, prediction=prediction, config=config, ema=ema)
    if as_file:
        save_single_file(parts, goal, dtype=dtype)
    else:
        save_folder(parts, goal, dtype=dtype)
    return parts


def _read_pickle(path: Path) -> Weights:
    """Tensors of a pickle that its owner trusts, out of the "state_dict"s around them."""
    try:
        content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the unpickler raises whatever the file makes it raise
        raise CheckpointError(f"{path} cannot be read as weights alone: {str(error).splitlines()[0]:.200}") from None
    for _ in range(MAX_NESTING):
        if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
            content = content["state_dict"]
    if not isinstance(content, dict) or len(content) > MAX_TENSORS:
        raise CheckpointError(f"{path} holds no state dict of up to {MAX_TENSORS} tensors")
    tensors: dict[str, Tensor] = {
        name: value for name, value in content.items() if isinstance(value, Tensor) and value.is_floating_point()
    }
    if bad := [name for name in tensors if not isinstance(name, str) or not NAME.fullmatch(name)]:
        raise CheckpointError(f"{path} has a tensor named {bad[0]!r:.80}")
    return Weights(
        {name: tuple(tensor.shape) for name, tensor in tensors.items()},
        {},
        lambda names: {name: finite(tensors[name], f"{path}: {name}") for name in names},
    )


def _plain(tensors: Mapping[str, Tensor], dtype: torch.dtype | None) -> dict[str, Tensor]:
    """Tensors as safetensors wants them: dense, on the CPU, sharing no memory."""
    return {
        name: t.detach().to("cpu", dtype or t.dtype).clone(memory_format=torch.contiguous_format)
        for name, t in tensors.items()
    }


def _write_shards(folder: Path, stem: str, tensors: dict[str, Tensor], max_size: int | None) -> None:
    """One file, or several with an index, as diffusers and transformers name them."""
    shards: list[dict[str, Tensor]] = [{}]
    for name, tensor in tensors.items():
        if max_size is not None and shards[-1] and _size(shards[-1]) + tensor.nbytes > max_size:
            shards.append({})
        shards[-1][name] = tensor
    if len(shards) == 1:
        save_file(tensors, folder / f"{stem}.safetensors", {"format": "pt"})
        return
    places: dict[str, str] = {}
    for i, shard in enumerate(shards, 1):
        file = f"{stem}-{i:05}-of-{len(shards):05}.safetensors"
        save_file(shard, folder / file, {"format": "pt"})
        places |= dict.fromkeys(shard, file)
    index = {"metadata": {"total_size": _size(tensors)}, "weight_map": places}
    _write_json(folder / f"{stem}.safetensors.index.json", index)


def _size(tensors: Mapping[str, Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
