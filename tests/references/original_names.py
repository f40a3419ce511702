"""Original files from diffusers models: the independent truth for the key map.

diffusers' converters go from original to diffusers names. Here they are run on every original key with a tensor that
holds the key's number, so what comes out says which original key each diffusers key is made of.
"""

from collections.abc import Iterable
from typing import Any

import torch
from diffusers.loaders.single_file_utils import (
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
    convert_open_clip_checkpoint,
)

from sdlite.config import ModelConfig


def numbered(keys: Iterable[str]) -> dict[str, torch.Tensor]:
    return {key: torch.tensor(float(i)) for i, key in enumerate(keys)}


def theirs(converted: dict[str, torch.Tensor], keys: list[str]) -> dict[str, str]:
    """diffusers name -> original key, out of a converted dict of numbered tensors."""
    return {name: keys[int(tensor.flatten()[0])] for name, tensor in converted.items()}


def unet_names(keys: list[str], config: ModelConfig) -> dict[str, str]:
    layers = {"layers_per_block": config.denoiser.layers_per_block}
    return theirs(convert_ldm_unet_checkpoint(numbered(keys), layers), keys)


def codec_names(keys: list[str], stages: int) -> dict[str, str]:
    blocks = {"down_block_types": [""] * stages, "up_block_types": [""] * stages}
    tensors = {key: tensor.reshape(1, 1, 1, 1) for key, tensor in numbered(keys).items()}
    return theirs(convert_ldm_vae_checkpoint(tensors, blocks), keys)


def open_clip_names(keys: list[str], width: int) -> dict[str, list[Any]]:
    """transformers name -> [original key, first row]."""
    tensors = {
        key: torch.stack([torch.full((3 * width,), float(i)), torch.arange(3 * width)], dim=1)
        for i, key in enumerate(keys)
    }
    tensors |= {key: t.T for key, t in tensors.items() if key.endswith("text_projection")}
    fake = type("Model", (), {"config": type("Config", (), {"hidden_size": width})})
    converted = convert_open_clip_checkpoint(fake, tensors)
    return {
        name.removeprefix("text_model."): [keys[int(rows[0, 0])], int(rows[0, 1])] for name, rows in converted.items()
    }
