"""A VAE alone: a file or folder in diffusers' or the original layout, or the VAE of a whole model.

A VAE's file has no config. sdlite takes config.json beside it, or the config that sdlite wrote into the file, or else
Stable Diffusion's. The names of the tensors distinguish the full autoencoder from the tiny one.
"""

from pathlib import Path

import torch

from sdlite.checkpoints import sd_names
from sdlite.checkpoints.folder import check_links, open_part, read_codec_config
from sdlite.checkpoints.hub import VAE_WANTED, download
from sdlite.checkpoints.parts import fill
from sdlite.checkpoints.places import CheckpointError, check_vae
from sdlite.checkpoints.single_file import fill_original, stated_config
from sdlite.checkpoints.weights import Weights, from_files, open_safetensors, read_json
from sdlite.config import AutoencoderTinyConfig, CodecConfig, LoadOptions, sd15
from sdlite.models.codec import LatentCodec

TINY = "madebyollin/taesd"  # hub id of TAESD, which --vae tiny means
TINY_LAYERS = ("encoder.layers.", "decoder.layers.")
KL_BLOCKS = ("encoder.down_blocks.", "encoder.mid_block.", "decoder.up_blocks.", "decoder.mid_block.")


def load_vae(place: str, options: LoadOptions) -> tuple[LatentCodec, list[str]]:
    """The codec of a file, a folder, a hub id or "tiny" (TAESD, from the hub), with notes on what was not used.

    options: variant and allow_links. Raises CheckpointError with one line.
    """
    check_vae(place)
    location = Path(place)
    if location.is_file():
        return _read_file(location)
    if not location.is_dir():
        location = download(TINY if place == "tiny" else place, VAE_WANTED)
    folder = location / "vae" if (location / "vae").is_dir() else location
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder} is not a VAE: config.json is missing")
    check_links(location, [folder, *folder.glob("*")], options.allow_links)
    codec = _empty(read_codec_config(folder), folder)
    weights = open_part(folder, options.variant, stem="diffusion_pytorch_model")
    return codec, fill(codec.model, weights, str(folder), sd_names.modern_names)


def _empty(config: CodecConfig, where: Path) -> LatentCodec:
    with torch.device("meta"):
        return from_files(where, LatentCodec, config)


def _read_file(path: Path) -> tuple[LatentCodec, list[str]]:
    weights = open_safetensors(path)
    is_tiny = any(name.startswith(TINY_LAYERS) for name in weights.shapes)
    codec = _empty(_file_config(path, weights, AutoencoderTinyConfig() if is_tiny else sd15().codec), path)
    if is_tiny or any(name.startswith(KL_BLOCKS) for name in weights.shapes):
        return codec, fill(codec.model, weights, str(path), sd_names.modern_names)
    keys = {sd_names.canonical(key): key for key in weights.shapes}
    if not any(key.startswith(sd_names.CODEC) for key in keys):  # the file of a VAE alone, without the prefix
        keys = {sd_names.canonical(sd_names.CODEC + key): key for key in weights.shapes}
    return codec, fill_original(path, weights, keys, {"codec": codec.model})


def _file_config(path: Path, weights: Weights, default: CodecConfig) -> CodecConfig:
    if (stated := stated_config(path, weights)) is not None:
        return stated.codec
    beside, kind = path.with_name("config.json"), type(default).__name__.removesuffix("Config")
    if beside.is_file() and read_json(beside).get("_class_name") == kind:
        return read_codec_config(path.parent)
    return default
