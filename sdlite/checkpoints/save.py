"""Writes a model as a folder in diffusers' layout or as one file in the original layout, whole or not at all.

`convert` reads any form and writes either. Only `convert` with trust_pickle reads a pickle, and only tensors and plain
containers from it (weights_only).
"""

import json
import re
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from sdlite.checkpoints import compvis, configs
from sdlite.checkpoints.folder import SAFE, WEIGHT_STEMS, Reader, open_part, variants
from sdlite.checkpoints.load import UNTRAINED, ModelParts, load_model
from sdlite.checkpoints.single_file import CONFIG_KEY, PREDICTION_KEY, TITLE_KEY
from sdlite.checkpoints.tokenizer import load_tokenizer, save_tokenizer
from sdlite.checkpoints.weights import MAX_TENSORS, NAME, CheckpointError, Weights, finite, open_safetensors
from sdlite.config import UNTRAINED_NOTE, AutoencoderKLConfig, DiTConfig, ModelConfig, ScheduleConfig, Sides
from sdlite.files import atomic_file, atomic_folder, check_file, check_folder
from sdlite.models.codec import LatentCodec
from sdlite.models.networks import Network
from sdlite.models.text import TextEncoder, saved_text_state_dict

MAX_NESTING = 4  # of "state_dict" in pickles; training frameworks make 1


def gathered(
    text: object, denoiser: object, codec: object, schedule: ScheduleConfig, sample_size: Sides, notes: tuple[str, ...]
) -> ModelParts:
    """The parts of a pipeline as `save_folder` takes them. Raises ValueError for a part that is no network of ours."""
    if not isinstance(denoiser, Network):
        raise ValueError("a wrapped denoiser cannot be saved; save the pipeline that it was made from")
    if not isinstance(text, TextEncoder) or not isinstance(codec, LatentCodec):
        other = codec if isinstance(text, TextEncoder) else text
        raise ValueError(f"a {type(other).__name__} cannot be saved; save the pipeline whose parts sdlite loaded")
    config = ModelConfig(
        denoiser=denoiser.config, schedule=schedule, text=text.config, codec=codec.config, sample_size=sample_size
    )
    return ModelParts(text, denoiser, codec, config, "", "", notes)


def save_folder(
    parts: ModelParts, folder: str | Path, *, dtype: torch.dtype | None = None, max_shard_size: int | None = None
) -> None:
    """Writes a folder that `load_model` and diffusers' StableDiffusionPipeline.from_pretrained load.

    diffusers has no pipeline for a DiT with CLIP; it loads the parts of such a folder one by one.
    dtype: None keeps that of each part. max_shard_size: a weight file with more bytes is split.
    Raises CheckpointError for what diffusers' layout cannot hold, FileExistsError for a folder that is not empty,
    DiskFull.
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
    dtype: torch.dtype | None = None,
    **options: Any,
) -> ModelParts:
    """Loads a model and saves it: as one file if target ends in .safetensors, else as a folder.

    trust_pickle: read pickles if there are no safetensors: a .ckpt file, or a folder of .bin files. options: those of
    `load_model`. dtype: as for `save_folder`. Returns the parts; their notes say what was guessed. Raises the errors of
    `load_model`, `save_folder` and `save_single_file`.
    """
    goal = Path(target)
    as_file = goal.suffix == ".safetensors"
    check_file(goal, force=False) if as_file else check_folder(goal, force=False)  # before minutes of reading
    reader = Reader(_open_trusted, _open_trusted_part) if trust_pickle else SAFE
    parts = load_model(source, reader=reader, **options)
    if as_file:
        save_single_file(parts, goal, dtype=dtype)
    else:
        save_folder(parts, goal, dtype=dtype)
    return parts


def _open_trusted(path: Path) -> Weights:
    return open_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(path)


def _open_trusted_part(folder: Path, stem: str, variant: str | None) -> Weights:
    """A part's safetensors, or else its pickles, whole or in shards, as diffusers and transformers name them."""
    if variants(folder, stem):
        return open_part(folder, stem, variant)
    name = "pytorch_model" if stem == "model" else stem
    files = sorted(folder.glob(f"{name}*.bin"))
    plain = [file for file in files if re.fullmatch(rf"{name}(-\d+-of-\d+)?\.bin", file.name)]
    chosen = [file for file in files if variant is not None and file.name.startswith(f"{name}.{variant}")] or plain
    if not chosen:
        return open_part(folder, stem, variant)
    parts = [_read_pickle(file) for file in chosen]
    places = {name: part for part in parts for name in part.shapes}

    def read(names: Iterable[str]) -> dict[str, Tensor]:
        return {name: tensor for key in names for name, tensor in places[key].read([key]).items()}

    return Weights({name: part.shapes[name] for name, part in places.items()}, {}, read)


def _read_pickle(path: Path) -> Weights:
    """The tensors of a trusted pickle, taken out of "state_dict"s around them.

    Tensors with more numbers than the file has bytes for are refused: views that repeat numbers, and packed archives.
    """
    if _is_packed(path):
        raise CheckpointError(f"{path} is a packed archive, which PyTorch does not write")
    try:
        content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the unpickler raises whatever the file makes it raise
        cause = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"{path} cannot be read as weights alone: {cause:.200}") from None
    for _ in range(MAX_NESTING):
        if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
            content = content["state_dict"]
    if not isinstance(content, dict) or len(content) > MAX_TENSORS:
        raise CheckpointError(f"{path} holds no state dict of up to {MAX_TENSORS} tensors")
    tensors: dict[str, Tensor] = {
        name: value for name, value in content.items() if isinstance(value, Tensor) and value.is_floating_point()
    }
    for name, tensor in tensors.items():
        if not isinstance(name, str) or not NAME.fullmatch(name):
            raise CheckpointError(f"{path} has a tensor named {name!r:.80}")
        if not _is_plain(tensor):
            raise CheckpointError(f"{path}: {name} of shape {tuple(tensor.shape)} is more than the file holds")
    return Weights(
        {name: tuple(tensor.shape) for name, tensor in tensors.items()},
        {},
        lambda names: {name: finite(tensors[name], f"{path}: {name}") for name in names},
    )


def _is_packed(path: Path) -> bool:
    """Whether a file is an archive whose contents are more than its own bytes."""
    try:
        with zipfile.ZipFile(path) as archive:
            return sum(entry.file_size for entry in archive.infolist()) > path.stat().st_size
    except (zipfile.BadZipFile, ValueError, OSError):
        return False  # an older pickle, or none: torch.load will tell


def _is_plain(tensor: Tensor) -> bool:
    """Whether a tensor is dense, in memory, and has a number of its own for every element."""
    if tensor.layout is not torch.strided or tensor.device.type != "cpu":
        return False
    return tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()


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
