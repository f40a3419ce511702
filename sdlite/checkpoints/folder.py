"""A model folder in diffusers' layout: one folder for each part, with its config and weights.

    model_index.json | unet (or transformer), vae, text_encoder, tokenizer, scheduler | sha256sums.txt, if it has one

Links and checksums are checked before anything is read. A folder is written whole or not at all.
"""

import glob
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sdlite.checkpoints import configs
from sdlite.checkpoints.hub import PARTS, STEMS, cache_folder
from sdlite.checkpoints.parts import UNTRAINED, ModelParts, Renaming, empty_parts, fill, finished
from sdlite.checkpoints.pickles import open_pickles
from sdlite.checkpoints.places import CheckpointError
from sdlite.checkpoints.sd_names import modern_names
from sdlite.checkpoints.tokenizer import load_tokenizer, save_tokenizer
from sdlite.checkpoints.weights import WAY_OUT, Weights, from_files, open_weights, read_json, write_json, write_shards
from sdlite.config import UNTRAINED_NOTE, CodecConfig, LoadOptions, ModelConfig
from sdlite.files import atomic_folder, checksum, read_text
from sdlite.models.codec import LatentCodec
from sdlite.models.text import saved_text_state_dict, text_state_dict

MAX_SUMS_BYTES = 2**20


def read_folder(
    folder: Path, name: str, options: LoadOptions, *, codec: LatentCodec | None = None, trust_pickle: bool = False
) -> ModelParts:
    """The model of a folder. codec: used instead of its VAE. Raises CheckpointError."""
    check_folder(folder, options.allow_links)
    config, tokenizer, notes = _read_config(folder, options, codec.config if codec else None)
    parts = from_files(folder, empty_parts, config, tokenizer, name, codec)
    modules: dict[str, tuple[nn.Module, Renaming]] = {
        configs.denoiser_part(config.denoiser): (parts.denoiser, dict),
        "text_encoder": (parts.text.model, text_state_dict),
    } | ({} if codec else {"vae": (parts.codec.model, modern_names)})
    if options.variant is not None and not trust_pickle:
        _check_variant(folder, modules, options.variant)
    opened = {part: open_part(folder / part, options.variant, trust_pickle=trust_pickle) for part in modules}
    for part, (module, renamed) in modules.items():
        notes += fill(module, opened[part], f"{folder.name}/{part}", renamed)
    return finished(parts, notes)


def _read_config(folder: Path, options: LoadOptions, codec: CodecConfig | None) -> tuple[ModelConfig, Any, list[str]]:
    """The config of a folder, its tokenizer, and notes on what was guessed. codec: used instead of the VAE's config."""
    index = read_json(folder / "model_index.json")
    part = "transformer" if "transformer" in index else "unet"
    path = folder / "scheduler" / "scheduler_config.json"
    schedule, stated, unknown = configs.schedule_config(read_json(path), str(path))
    notes = [f"{path.name}: ignored {', '.join(unknown):.200}"] if unknown else []
    if options.prediction is None and stated is None:
        notes.append("prediction epsilon is a guess: the scheduler's config does not say it")
    if index.get("_name_or_path") == UNTRAINED:
        notes.append(UNTRAINED_NOTE)
    tokenizer = from_files(folder / "tokenizer", load_tokenizer, folder / "tokenizer")
    ids = {key: getattr(tokenizer, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    path = folder / part / "config.json"
    prediction = options.prediction or stated or "epsilon"
    denoiser, size = configs.denoiser_config(part, read_json(path), prediction, str(path))
    path = folder / "text_encoder" / "config.json"
    text = configs.text_config(read_json(path), ids, str(path))
    vae = codec or read_codec_config(folder / "vae")
    config = ModelConfig(denoiser=denoiser, schedule=schedule, text=text, codec=vae, sample_size=size)
    return config, tokenizer, notes


def read_codec_config(folder: Path) -> CodecConfig:
    return configs.codec_config(read_json(folder / "config.json"), str(folder / "config.json"))


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
    if parts.is_untrained:
        files["model_index.json"]["_name_or_path"] = UNTRAINED
    weights = {
        configs.denoiser_part(parts.config.denoiser): parts.denoiser.state_dict(),
        "vae": parts.codec.model.state_dict(),
        "text_encoder": saved_text_state_dict(parts.text.model.state_dict()),
    }
    with atomic_folder(Path(folder)) as temporary:
        for name, content in files.items():
            (temporary / name).parent.mkdir(exist_ok=True)
            write_json(temporary / name, content)
        save_tokenizer(parts.text.tokenizer, temporary / "tokenizer")
        for part, tensors in weights.items():
            write_shards(temporary / part, STEMS[part], tensors, dtype, max_shard_size)


def check_folder(folder: Path, allow_links: Sequence[str] = ()) -> None:
    """Raises CheckpointError unless a folder holds one model, its links are allowed and its checksums are right."""
    index, sums = folder / "model_index.json", folder / "sha256sums.txt"
    if not index.is_file():
        raise CheckpointError(f"{folder} is not a model folder: model_index.json is missing{_advice(folder)}")
    inside = [file for part in PARTS for file in (folder / part, *folder.glob(f"{part}/*"))]
    check_links(folder, [index, sums, *inside], allow_links)
    if sums.is_file():
        _check_sums(folder, sums)
    configs.check_model_index(read_json(index), str(index))


def _advice(folder: Path) -> str:
    """What the user may have meant, if that can be seen from the folder and its neighbours."""
    if (folder.parent / "model_index.json").is_file() and folder.name in PARTS:
        return f"; it is a part of {folder.parent}, give that"
    snapshots = sorted(folder.glob("snapshots/*/model_index.json"), key=lambda path: path.stat().st_mtime)
    if snapshots:
        return f"; did you mean {snapshots[-1].parent}?"
    inside = [file for file in sorted(folder.glob("*.safetensors")) if not file.name.startswith(tuple(STEMS.values()))]
    return f"; did you mean {inside[0]}?" if inside else ""


def check_links(folder: Path, paths: Iterable[Path], allowed: Sequence[str]) -> None:
    """Raises CheckpointError for a path that leads out of the folder, the hub's cache and the allowed folders."""
    try:
        roots = [folder.resolve(), cache_folder(), *(Path(root).resolve() for root in allowed)]
        if roots[0].parent.name == "snapshots" and roots[0].parent.parent.name.startswith("models--"):
            roots.append(roots[0].parent.parent)  # of a cache elsewhere; its files are links to ../../blobs
        for path in paths:
            target = path.resolve()
            if not any(target.is_relative_to(root) for root in roots):
                way_out = f"--allow-links {target if target.is_dir() else target.parent} follows it"
                raise CheckpointError(f"{path} is a link to {target}, outside of the model folder; {way_out}")
    except (RuntimeError, OSError) as error:  # Python 3.13 calls it an OSError
        raise CheckpointError(f"{folder} has a link in it that leads in a circle or nowhere: {error}") from None


def _check_sums(folder: Path, sums: Path) -> None:
    """Raises CheckpointError unless every file listed as `sha256sum` does is there and as listed."""
    for line in from_files(sums, read_text, sums, MAX_SUMS_BYTES).splitlines():
        stated, _, name = line.partition(" ")
        file = folder / name[1:]  # a space for text or a star for binary
        if len(stated) != 64 or "\0" in name or not file.resolve().is_relative_to(folder.resolve()):
            raise CheckpointError(f"{sums}: {line!r:.120} is not a sum of a file in this folder")
        if not file.is_file():
            raise CheckpointError(f"{file} is missing; {sums.name} lists it")
        if checksum(file) != stated.lower():
            raise CheckpointError(f"{file} is not the file that {sums.name} lists; download it again")


def open_part(folder: Path, variant: str | None = None, *, stem: str = "", trust_pickle: bool = False) -> Weights:
    """Weights of one part, whole or in shards: the variant, or the plain ones, or those in half precision.

    A part that has no such variant gives its plain weights, as in diffusers: often the UNet alone has one. stem: how
    its files are named, if the folder's name does not say it. Raises CheckpointError.
    """
    stem = stem or STEMS[folder.name]
    found = variants(folder, stem)
    for name in (variant, "", "fp16"):
        if name in found:
            return open_weights(found[name])
    if found:
        raise CheckpointError(f"{folder} has its weights only as {', '.join(sorted(found))}; --variant picks one")
    if trust_pickle and (trusted := open_pickles(folder, stem, variant)) is not None:
        return trusted
    if pickles := sorted(file.name for file in folder.glob("*.bin")):
        fault = f"has its weights as a pickle ({pickles[0]}), which could run code when it is read"
        raise CheckpointError(f"{folder} {fault}; {WAY_OUT}")
    raise CheckpointError(f"{folder}: {stem}.safetensors is missing")


def variants(folder: Path, stem: str) -> dict[str, Path]:
    """Maps each variant of a part to its weight file or index of shards; "" is the plain variant."""
    name = re.compile(rf"{re.escape(stem)}(?:\.([\w-]+))?\.safetensors(\.index(?:\.([\w-]+))?\.json)?")
    found: dict[str, Path] = {}
    for file in sorted(folder.glob(f"{glob.escape(stem)}*")):  # an index comes after a file of the same variant
        if match := name.fullmatch(file.name):
            found[match[1] or match[3] or ""] = file
    return found


def _check_variant(folder: Path, parts: Iterable[str], variant: str) -> None:
    """Raises CheckpointError unless at least one of the parts has that variant."""
    found = {name for part in parts for name in variants(folder / part, STEMS[part])}
    if variant not in found:
        known = ", ".join(sorted(found - {""})) or "none"
        raise CheckpointError(f"{folder} has no weights of variant {variant!r:.80}; it has: {known}")
