"""Loads a VAE: a file or folder in diffusers' or the original layout, or the VAE of a whole model.

A VAE's file has no config. sdlite takes config.json beside it, or the config that sdlite wrote into the file, or else
Stable Diffusion's. The names of the tensors distinguish the full autoencoder from the tiny one.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sdlite.checkpoints import compvis, configs
from sdlite.checkpoints.folder import WEIGHT_STEMS, check_links, open_part
from sdlite.checkpoints.hub import VAE_WANTED, download
from sdlite.checkpoints.places import CheckpointError, check_vae
from sdlite.checkpoints.single_file import stated_config
from sdlite.checkpoints.weights import (
    Weights,
    check_same,
    fill,
    from_files,
    open_safetensors,
    read_json,
    shapes_of,
)
from sdlite.config import AutoencoderKLConfig, AutoencoderTinyConfig, CodecConfig, sd15
from sdlite.models.codec import LatentCodec

TINY = "madebyollin/taesd"  # hub id of TAESD, which --vae tiny means
TINY_LAYERS = ("encoder.layers.", "decoder.layers.")
KL_BLOCKS = ("encoder.down_blocks.", "encoder.mid_block.", "decoder.up_blocks.", "decoder.mid_block.")


def load_vae(
    place: str | Path, *, variant: str | None = None, allow_links: Sequence[Path] = ()
) -> tuple[LatentCodec, list[str]]:
    """The codec of a file, a folder, a hub id or "tiny" (TAESD, from the hub), with notes on what was not used.

    Raises CheckpointError with one line.
    """
    check_vae(str(place))
    location = Path(place)
    if location.is_file():
        return _from_file(location)
    if not location.is_dir():
        name = TINY if str(place) == "tiny" else str(place)
        location = download(name, VAE_WANTED)
    folder = location / "vae" if (location / "vae").is_dir() else location
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder} is no VAE: config.json is missing")
    check_links(location, [folder, *folder.glob("*")], allow_links)
    codec = _empty(configs.codec_config(read_json(folder / "config.json"), str(folder / "config.json")), folder)
    weights = open_part(folder, WEIGHT_STEMS["vae"], variant)
    return codec, fill(codec.model, weights, str(folder), modern_names)


def modern_names(weights: Mapping[str, Any]) -> dict[str, Any]:
    """Names of the codec's attention since diffusers 0.15."""
    renamed = {}
    for name, value in weights.items():
        where, _, rest = name.rpartition(".attentions.0.")
        module, _, leaf = rest.rpartition(".")
        new = compvis.OLD_CODEC_ATTENTION.get(module)
        renamed[name if new is None else f"{where}.attentions.0.{new}.{leaf}"] = value
    return renamed


def _empty(config: CodecConfig, where: Path) -> LatentCodec:
    with torch.device("meta"):
        return from_files(where, LatentCodec, config)


def _from_file(path: Path) -> tuple[LatentCodec, list[str]]:
    weights = open_safetensors(path)
    if any(name.startswith(TINY_LAYERS) for name in weights.shapes):
        codec = _empty(_config(path, weights, AutoencoderTinyConfig()), path)
        return codec, fill(codec.model, weights, str(path))
    codec = _empty(_config(path, weights, sd15().codec), path)
    if any(name.startswith(KL_BLOCKS) for name in weights.shapes):
        return codec, fill(codec.model, weights, str(path), modern_names)
    return codec, fill_original(codec.model, weights, path)


def _config(path: Path, weights: Weights, default: CodecConfig) -> CodecConfig:
    stated = stated_config(path, weights)
    if stated is not None:
        return stated.codec
    beside = path.with_name("config.json")
    if beside.is_file():
        config = read_json(beside)
        if config.get("_class_name") == (
            "AutoencoderKL" if isinstance(default, AutoencoderKLConfig) else "AutoencoderTiny"
        ):
            return configs.codec_config(config, str(beside))
    return default


def fill_original(module: nn.Module, weights: Weights, path: Path) -> list[str]:
    """Gives a codec the weights of a file in the original layout, of a VAE or of a whole model."""
    keys = {compvis.canonical(key): key for key in weights.shapes}
    if not any(key.startswith(compvis.CODEC) for key in keys):
        keys = {compvis.canonical(compvis.CODEC + key): key for key in weights.shapes}
    keys = {key: raw for key, raw in keys.items() if key.startswith(compvis.CODEC) and not compvis.is_spare(key)}
    ours = shapes_of(module)
    stages = len({name.split(".")[2] for name in ours if name.startswith("decoder.up_blocks.")})
    names = {compvis.CODEC + compvis.codec_key(name, stages): name for name in ours}
    expected = {key: compvis.with_kernel(key, ours[name]) for key, name in names.items()}
    notes = check_same(expected, {k: compvis.with_kernel(k, weights.shapes[raw]) for k, raw in keys.items()}, str(path))
    read = weights.read(keys[key] for key in names)
    module.load_state_dict({name: read[keys[key]].reshape(ours[name]) for key, name in names.items()}, assign=True)
    return notes
