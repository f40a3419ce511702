"""Ways to spoil files of models, and to compare models."""

import hashlib
import io
import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save, save_file

from sdlite.checkpoints.load import load_model
from sdlite.checkpoints.parts import ModelParts
from sdlite.checkpoints.places import CheckpointError
from sdlite.checkpoints.weights import open_safetensors
from sdlite.config import tiny

SD2_LIKE = tiny(9, "v").replace(  # and inpainting
    denoiser=tiny(9, "v").denoiser.replace(use_linear_projection=True, layers_per_block=2),
    text=tiny().text.replace(hidden_act="gelu", pad_token_id=0),
    schedule=tiny().schedule.replace(spacing="trailing", zero_terminal_snr=True, final_abar_one=True),
)
PART_FILES = {
    "unet": "unet/diffusion_pytorch_model.safetensors",
    "transformer": "transformer/diffusion_pytorch_model.safetensors",
    "vae": "vae/diffusion_pytorch_model.safetensors",
    "text_encoder": "text_encoder/model.safetensors",
}


def refused(path: Path | str, message: str, **options: Any) -> str:
    with pytest.raises(CheckpointError, match=message) as error:
        load_model(path, **options)
    text = str(error.value)
    assert "\n" not in text and len(text) < 1000, text
    return text


def changed(path: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


def edited(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def small(**tensors: torch.Tensor) -> bytes:
    buffer = io.BytesIO()
    buffer.write(save(tensors or {"a": torch.ones(2, 2), "b": torch.zeros(3)}))
    return buffer.getvalue()


def raw(header: str | bytes, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else header.encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(dtype: str = "F32", shape: Any = (1,), offsets: Any = (0, 4)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def fake_hub(saved: Path, cache: Path) -> Path:
    """A snapshot as the hub's cache has it: every file a link to ../../blobs."""
    snapshot = cache / "models--org--name" / "snapshots" / "abc"
    for file in [file for file in saved.rglob("*") if file.is_file()]:
        blob = cache / "models--org--name" / "blobs" / hashlib.sha256(str(file).encode()).hexdigest()
        blob.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, blob)
        link = snapshot / file.relative_to(saved)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(blob)
    return snapshot


def assert_same_weights(parts: ModelParts, theirs: StableDiffusionPipeline) -> None:
    pairs = {
        "unet": (parts.denoiser, theirs.unet),
        "vae": (parts.codec.model, theirs.vae),
        "text": (parts.text.model, theirs.text_encoder),
    }
    for part, (our, their) in pairs.items():
        a, b = our.state_dict(), their.state_dict()
        assert set(a) == set(b), part
        for name in a:
            assert torch.equal(a[name], b[name]), f"{part}.{name}"


def assert_same(a: ModelParts, b: ModelParts) -> None:
    assert a.config == b.config
    assert a.hash == b.hash


def save_original(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> Path:
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, path, metadata)
    return path


def read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    """All weights of a file."""
    file = open_safetensors(path)
    return file.read(file.shapes)
