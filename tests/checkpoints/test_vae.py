"""A VAE from elsewhere, in place of the model's own."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sdlite.checkpoints import single_file
from sdlite.checkpoints.folder import save_folder
from sdlite.checkpoints.load import load_model
from sdlite.checkpoints.parts import ModelParts
from sdlite.checkpoints.places import CheckpointError
from sdlite.checkpoints.single_file import save_single_file
from sdlite.config import AutoencoderTinyConfig
from sdlite.models.codec import LatentCodec
from tests.checkpoints.cases import PART_FILES, refused


def vae_tensors(sd1: ModelParts) -> dict[str, torch.Tensor]:
    return {name: tensor + 1 for name, tensor in sd1.codec.model.state_dict().items()}


@pytest.mark.usefixtures("one_tokenizer")
def test_a_vae_from_elsewhere(saved: Path, original: Path, tmp_path: Path, sd1: ModelParts):
    """From every form of file that people have, in place of the model's own or where it has none."""
    other = ModelParts(sd1.text, sd1.denoiser, LatentCodec(sd1.config.codec), sd1.config, "", "")
    other.codec.model.load_state_dict(vae_tensors(sd1))
    whole, folder = tmp_path / "whole.safetensors", tmp_path / "folder"
    save_single_file(other, whole)
    save_folder(other, folder)
    config = {single_file.CONFIG_KEY: sd1.config.model_dump_json()}
    alone = {k: v for k, v in load_file(whole).items() if k.startswith("first_stage_model.")}
    bare = {k.removeprefix("first_stage_model."): v for k, v in alone.items()} | {"loss.discriminator": torch.ones(1)}
    save_file(alone, tmp_path / "alone.safetensors", config)
    save_file(bare, tmp_path / "bare.safetensors", config)
    places = [whole, folder, folder / "vae", folder / PART_FILES["vae"], tmp_path / "alone.safetensors"]
    expected = None
    for place in [*places, tmp_path / "bare.safetensors"]:
        loaded = load_model(saved, vae=place)
        found = loaded.codec.model.state_dict()
        assert all(torch.equal(found[name], tensor) for name, tensor in vae_tensors(sd1).items()), place
        assert expected in (None, loaded.hash) and loaded.hash != sd1.hash
        expected = loaded.hash

    without = tmp_path / "without.safetensors"
    save_file({k: v for k, v in load_file(original).items() if not k.startswith("first_stage_model.")}, without, config)
    refused(without, "has no VAE; give one with --vae: a file, a folder, or tiny")
    assert load_model(without, vae=folder).hash == expected
    shutil.rmtree(Path(shutil.copytree(saved, tmp_path / "holed")) / "vae")
    refused(tmp_path / "holed", "vae/config.json is missing")
    assert load_model(tmp_path / "holed", vae=whole).hash == load_model("tiny", vae=whole).hash == expected
    with pytest.raises(CheckpointError, match="vae='nowhere' does not exist"):
        load_model(saved, vae="nowhere")
    refused(saved, "not a VAE: config.json is missing", vae=tmp_path)


def test_the_tiny_vae_is_taesd_from_the_hub(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    codec = LatentCodec(AutoencoderTinyConfig())
    codec.model.save_pretrained(tmp_path / "taesd")
    asked: list[str] = []
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download", lambda name, **_: [str(tmp_path / "taesd"), asked.append(name)][0]
    )
    loaded = load_model(saved, vae="tiny")
    assert asked == ["madebyollin/taesd"] and loaded.config.codec == AutoencoderTinyConfig()
    assert torch.equal(loaded.codec.model.encoder.layers[0].weight, codec.model.encoder.layers[0].weight)
    file = tmp_path / "taesd" / "diffusion_pytorch_model.safetensors"
    assert load_model(saved, vae=file).hash == loaded.hash
