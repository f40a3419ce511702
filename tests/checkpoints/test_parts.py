"""Weights that do not fit their modules, and modules that do not fit each other: one line that says so."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sdlite.checkpoints.folder import save_folder
from sdlite.checkpoints.load import load_model
from sdlite.checkpoints.parts import ModelParts, weights_hash
from sdlite.checkpoints.places import CheckpointError
from sdlite.checkpoints.untrained import random_model
from sdlite.config import tiny, tiny_dit
from tests.checkpoints.cases import PART_FILES, changed, edited, refused


@pytest.mark.usefixtures("one_tokenizer")
@pytest.mark.parametrize("part", PART_FILES)
def test_wrong_tensors(part: str, holder: Path):
    path = holder / PART_FILES[part]
    good = path.read_bytes()
    names = sorted(load_file(path))[:: max(1, len(load_file(path)) // 5)][:5]
    seen = [name.removeprefix("text_model.") for name in names]

    changed(path, lambda tensors: [tensors.pop(name) for name in names])
    text = refused(holder, f"{part}.*is missing.*incomplete")
    assert all(f"{name} is missing" in text for name in seen)

    path.write_bytes(good)
    changed(path, lambda tensors: tensors.update({f"{name}.more": torch.ones(1) for name in names}))
    note = next(note for note in load_model(holder).notes if "not used" in note)
    assert part in note and all(f"{name}.more" in note for name in seen)

    path.write_bytes(good)
    changed(path, lambda tensors: tensors.update({name: torch.ones(3, 7) for name in names}))
    text = refused(holder, f"{part}.*the config is another model's")
    assert all(f"{name} is (3, 7), not" in text for name in seen)

    path.write_bytes(good)
    changed(path, lambda tensors: tensors[names[2]].view(-1)[0].fill_(float("nan")))
    refused(holder, f"{names[2]} has NaN or Inf")


def test_weights_of_another_model(folder: Path):
    shutil.copy(folder / PART_FILES["vae"], folder / PART_FILES["unet"])
    refused(folder, "and [0-9]+ more. Likely these are another model's weights")


@pytest.mark.usefixtures("one_tokenizer")
def test_config_bombs_are_refused_before_memory_is_taken(folder: Path):
    unet = folder / "unet" / "config.json"
    good = unet.read_text()
    edited(unet, block_out_channels=[8192, 8192], attention_head_dim=8, layers_per_block=8)  # 100 GB
    refused(folder, "another model's")
    unet.write_text(good)
    edited(folder / "text_encoder" / "config.json", hidden_size=10**7)
    refused(folder, "hidden_size=10000000")
    edited(folder / "text_encoder" / "config.json", hidden_size=8192, num_hidden_layers=48)
    refused(folder, "another model's")
    (folder / "text_encoder" / "config.json").write_text('{"a":' * 100_000)
    refused(folder, "nested deeper than 64 levels")


@pytest.mark.usefixtures("one_tokenizer")
def test_transformer_bombs_are_refused_before_memory_is_taken(tmp_path: Path):
    save_folder(random_model(tiny_dit(), seed=0), tmp_path / "dit")
    transformer = tmp_path / "dit" / "transformer" / "config.json"
    heads = {"num_attention_heads": 64, "attention_head_dim": 128, "cross_attention_dim": 8192}
    edited(transformer, num_layers=128, **heads)  # 500 GB
    refused(tmp_path / "dit", "another model's")
    transformer.unlink()
    refused(tmp_path / "dit", r"transformer/config\.json is missing")


def test_parts_that_do_not_fit(sd1: ModelParts, tmp_path: Path):
    text = sd1.config.text.replace(hidden_size=16)
    with pytest.raises(CheckpointError, match="gives 16 features, but the UNet takes 32"):
        random_model(tiny().replace(text=text), seed=0)
    with pytest.raises(CheckpointError, match="from 7 to 4 channels"):
        random_model(tiny(7), seed=0)
    with pytest.raises(CheckpointError, match="but the DiT takes 32"):
        random_model(tiny_dit().replace(text=text), seed=0)


@pytest.mark.usefixtures("one_tokenizer")
def test_what_is_not_used_may_be_anything(folder: Path, original: Path, tmp_path: Path, sd1: ModelParts):
    """Strict is for what is drawn with: files of merges and old tools hold more, in types that no weight has."""
    odd = {"embeddings.position_ids": torch.arange(77.0, dtype=torch.float64)[None], "counter": torch.tensor(3)}
    odd |= {"text_projection.weight": torch.ones(4, 4), "rotary": torch.ones(2, dtype=torch.complex64)}
    changed(folder / PART_FILES["text_encoder"], lambda tensors: tensors.update(odd))
    loaded = load_model(folder)
    assert loaded.hash == sd1.hash and any("not used: text_projection.weight" in note for note in loaded.notes)

    path = Path(shutil.copy(original, tmp_path / "merged.safetensors"))
    more = {
        "alphas_cumprod": torch.full((1000,), float("nan"), dtype=torch.float64),
        "cond_stage_model.transformer.text_model.embeddings.position_ids": torch.arange(77.0, dtype=torch.float64)[
            None
        ],
        "model.diffusion_model.merge_ratio": torch.ones(1),
        "lora_unet_mid.alpha": torch.ones(1),
        "v_pred": torch.ones((), dtype=torch.uint8),
        "scales": torch.ones(3).to(torch.float8_e4m3fn),
    }
    old = {"q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0", "norm": "group_norm"}

    def renamed(tensors: dict[str, torch.Tensor]) -> None:
        tensors.update(more)
        for name in [name for name in tensors if ".attn_1." in name]:
            where, module, leaf = name.rsplit(".", 2)
            tensors[f"{where}.{old[module]}.{leaf}"] = tensors.pop(name)

    changed(path, renamed)
    loaded = load_model(path, config=tiny())
    assert loaded.hash == sd1.hash
    assert any("not used: " in note and "model.diffusion_model.merge_ratio" in note for note in loaded.notes)


def test_hash_depends_on_every_weight(saved: Path, sd1: ModelParts):
    loaded = load_model(saved)
    modules = {"text": loaded.text.model, "denoiser": loaded.denoiser, "codec": loaded.codec.model}
    assert weights_hash(modules) == sd1.hash
    with torch.no_grad():
        loaded.codec.model.quant_conv.bias[0] += 1e-3
    assert weights_hash(modules) != sd1.hash
