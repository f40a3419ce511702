"""Single files in the original layout: recognised, read in all spellings, written for diffusers."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file

from sdlite.checkpoints import sd_names, single_file
from sdlite.checkpoints.load import load_model
from sdlite.checkpoints.parts import ModelParts, empty_parts, shapes_of
from sdlite.checkpoints.places import CheckpointError
from sdlite.checkpoints.single_file import save_single_file
from sdlite.checkpoints.tokenizer import load_tokenizer
from sdlite.checkpoints.untrained import random_model
from sdlite.checkpoints.weights import Weights
from sdlite.config import ModelConfig, sd15, sd21, tiny, tiny_dit
from tests.checkpoints.cases import assert_same, assert_same_weights, changed, refused, save_original


def meta_file(config: Any, metadata: dict[str, str] | None = None, **tensors: torch.Tensor) -> Weights:
    """A full-size original file without its data: names and shapes only, but for the given tensors."""
    modules = empty_parts(config, load_tokenizer(), "full").modules
    ours = {f"{part}.{name}": shape for part, module in modules.items() for name, shape in shapes_of(module).items()}
    open_clip = config.text.hidden_act == "gelu"
    names = sd_names.original_names(
        {part: list(shapes_of(module)) for part, module in modules.items()}, config.denoiser, open_clip
    )
    shapes = {key: sd_names.original_shape(key, [ours[n] for n in sources]) for key, sources in names.items()}
    shapes |= {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    return Weights(shapes, metadata or {}, lambda wanted: {name: tensors[name] for name in wanted})


@pytest.mark.usefixtures("one_tokenizer")
def test_wrong_tensors_in_a_single_file(original: Path, tmp_path: Path):
    path = Path(shutil.copy(original, tmp_path))
    for name in (
        "model.diffusion_model.input_blocks.1.0.in_layers.0.weight",
        "first_stage_model.decoder.up.3.block.0.conv1.weight",
        "cond_stage_model.transformer.text_model.final_layer_norm.bias",
    ):
        for change, message in (
            (lambda t, name=name: t.pop(name), "is missing"),
            (lambda t, name=name: t.update({name: torch.ones(1, 2)}), r"is \(1, 2\), not"),
            (lambda t, name=name: t[name].fill_(float("inf")), "has NaN or Inf"),
        ):
            changed(path, change)
            refused(path, message, config=tiny())
            shutil.copy(original, path)


@pytest.mark.parametrize("expected", [sd15(), sd15(9), sd21(), sd21(prediction="epsilon"), sd21(9, "epsilon")])
def test_full_size_files_are_recognised(expected: Any, tmp_path: Path):
    is_v = expected.denoiser.prediction == "v"
    bias = torch.tensor([-1.0, 1.0] * 160) * (0.2 if is_v else 0.05)
    file = meta_file(expected, **{single_file.SD2_V_KEY: bias})
    keys = {key: key for key in file.shapes}
    config, stated, notes = single_file.find_config(tmp_path / "m.safetensors", file, keys, None)
    prediction, reasons = single_file.find_prediction(tmp_path / "m.safetensors", file, keys, config, stated)
    assert config.replace(
        denoiser=config.denoiser.replace(prediction=prediction), sample_size=expected.sample_size
    ) == (expected)
    assert not stated and not notes
    assert "is a guess" in reasons[0] and "--prediction" in reasons[0]


def test_what_says_epsilon_or_v(tmp_path: Path):
    path, config = tmp_path / "m.safetensors", sd21(prediction="epsilon")

    def found(metadata: dict[str, str], *markers: str) -> tuple[str, str]:
        keys = {name: name for name in (*markers, single_file.SD2_V_KEY)}
        file = Weights({}, metadata, lambda names: {single_file.SD2_V_KEY: torch.tensor([-0.01, 0.01])})
        prediction, (reason,) = single_file.find_prediction(path, file, keys, config, False)
        return prediction, reason

    assert found({})[0] == "epsilon" and "0.010" in found({})[1]
    assert found({}, "v_pred") == ("v", "prediction v: the file has the marker tensor v_pred")
    assert found({single_file.PREDICTION_KEY: "epsilon"}, "v_pred")[1].endswith("the metadata says so")
    path.with_suffix(".json").write_text('{"prediction_type": "v_prediction"}')
    assert found({single_file.PREDICTION_KEY: "epsilon"}) == ("v", "prediction v: the file next to the model says so")
    path.with_suffix(".yaml").write_text("model:\n  params:\n    linear_start: 0.00085\n")
    assert found({})[0] == "epsilon"
    path.with_suffix(".yaml").write_text('model:\n  params:\n    parameterization: "v"\n')
    assert found({}) == ("v", "prediction v: the file next to the model says so")


def test_explicit_prediction_wins(saved: Path, original: Path):
    assert load_model(saved, prediction="v").denoiser.prediction == "v"
    assert load_model(original, prediction="sample").config.denoiser.prediction == "sample"


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("conditioner.embedders.1.model.ln_final.weight", "Stable Diffusion XL"),
        ("model.diffusion_model.label_emb.0.0.weight", "Stable Diffusion XL"),
        ("model.diffusion_model.double_blocks.0.img_attn.proj.weight", "is Flux"),
        ("double_blocks.0.img_attn.proj.weight", "is Flux"),
        ("model.diffusion_model.joint_blocks.0.x_block.attn.proj.weight", "Stable Diffusion 3"),
        ("lora_unet_down_blocks_0_attentions_0_proj_in.lora_up.weight", "is a LoRA"),
        ("lora_te_text_model_encoder.alpha", "is a LoRA"),
        ("unet.down_blocks.0.attentions.0.to_q.lora_A.weight", "is a LoRA"),
        ("emb_params", "textual inversion"),
        ("control_model.input_hint_block.0.weight", "ControlNet"),
        ("decoder.conv_in.weight", "VAE alone; give a whole model, and this as vae"),
        ("first_stage_model.decoder.conv_in.weight", "VAE alone"),
        ("down_blocks.0.resnets.0.conv1.weight", "UNet of a folder"),
        ("text_model.encoder.layers.0.mlp.fc1.bias", "text encoder alone"),
        ("something.else", "no UNet that sdlite knows"),
    ],
)
def test_other_models_are_named(key: str, message: str, tmp_path: Path):
    path = tmp_path / "m.safetensors"
    save_file({key: torch.ones(2, 2)}, path)
    refused(path, f"{message}.*sdlite loads Stable Diffusion 1.x and 2.x")


def test_other_sizes_need_a_config(original: Path, tmp_path: Path, sd1: ModelParts):
    path = tmp_path / "m.safetensors"
    save_file(load_file(original), path)
    refused(path, "UNet of width 32 for 4 channels and text features of 32")
    assert load_model(path, config=tiny()).hash == sd1.hash
    save_file(load_file(original), path, {single_file.CONFIG_KEY: '{"denoiser": 3}'})
    refused(path, "metadata sdlite.config")


@pytest.mark.usefixtures("one_tokenizer")
def test_schedule_in_the_file(original: Path, tmp_path: Path):
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    abar = (1 - betas).cumprod(0).float()
    for table, count in ((abar, 0), (abar.half().float(), 0), (abar**2, 1)):
        file = meta_file(sd15(), alphas_cumprod=table)
        notes = single_file.find_config(Path("m"), file, {key: key for key in file.shapes}, None)[2]
        assert len(notes) == count
    path = tmp_path / "m.safetensors"
    save_file(load_file(original) | {"ztsnr": torch.ones(1), "v_pred": torch.ones(1)}, path)
    assert load_model(path, config=tiny()).config.schedule.zero_terminal_snr


@pytest.mark.parametrize(
    "key",
    [
        "model.diffusion_model.input_blocks.0.0.weight",
        "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight",
        "alphas_cumprod",
        single_file.SD2_V_KEY,
    ],
)
@pytest.mark.parametrize("shape", [(), (0,), (0, 320, 0, 1)])
def test_odd_shapes_of_the_keys_that_tell_models_apart(
    key: str, shape: tuple[int, ...], original: Path, tmp_path: Path
):
    path = tmp_path / "m.safetensors"
    save_file(load_file(original) | {key: torch.ones(shape)}, path)
    refused(path, "is not Stable Diffusion")


def test_diffusers_loads_the_single_file(parts: ModelParts, parts_folder: Path, parts_file: Path):
    theirs = StableDiffusionPipeline.from_single_file(parts_file, config=str(parts_folder), local_files_only=True)
    assert_same_weights(parts, theirs)


@pytest.mark.usefixtures("one_tokenizer")
def test_original_spellings_and_unused_keys(sd1: ModelParts, original_tensors: dict[str, torch.Tensor], tmp_path: Path):
    variants = {
        "novelai": {
            k.replace("cond_stage_model.transformer.text_model.", "cond_stage_model.transformer."): v
            for k, v in original_tensors.items()
        },
        "sgm": {k.replace("cond_stage_model.", "conditioner.embedders.0."): v for k, v in original_tensors.items()},
        "unused": original_tensors
        | {
            "betas": torch.ones(1000),
            "loss.logvar": torch.ones(1),
            "cond_stage_model.transformer.text_model.embeddings.position_ids": torch.arange(77)[None],
            "model_ema.decay": torch.tensor(0.9999),
            "model_ema.num_updates": torch.tensor(3),
            "cond_stage_model.logit_scale": torch.ones(()),
        },
        "2-d attention": {
            k: v[:, :, 0, 0] if ".attn_1." in k and v.ndim == 4 else v for k, v in original_tensors.items()
        },
    }
    for name, tensors in variants.items():
        loaded = load_model(save_original(tmp_path / f"{name}.safetensors", tensors), config=tiny())
        assert loaded.hash == sd1.hash, name


@pytest.mark.usefixtures("one_tokenizer")
def test_ema(sd1: ModelParts, original_tensors: dict[str, torch.Tensor], tmp_path: Path):
    unet = {k: v for k, v in original_tensors.items() if k.startswith("model.diffusion_model.")}
    averages = {"model_ema." + k.removeprefix("model.").replace(".", ""): v + 1 for k, v in unet.items()}
    path = save_original(tmp_path / "both.safetensors", original_tensors | averages)
    assert load_model(path, config=tiny()).hash == sd1.hash
    averaged = load_model(path, config=tiny(), ema=True)
    assert torch.equal(averaged.denoiser.conv_out.bias, sd1.denoiser.conv_out.bias + 1)
    assert torch.equal(averaged.codec.model.quant_conv.bias, sd1.codec.model.quant_conv.bias)
    with pytest.raises(CheckpointError, match="moving average"):
        load_model(save_original(tmp_path / "one.safetensors", original_tensors), config=tiny(), ema=True)


def test_custom_tokenizer_stays_in_folders(sd1: ModelParts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(single_file, "load_tokenizer", lambda: type("T", (), {"get_vocab": lambda self: {}})())
    with pytest.raises(CheckpointError, match="tokenizer that is not CLIP's"):
        save_single_file(sd1, tmp_path / "one.safetensors")


@pytest.mark.usefixtures("one_tokenizer")
def test_configs_of_any_structure_survive(tmp_path: Path):
    base = tiny()
    denoiser = base.denoiser.replace(
        block_out_channels=(16, 32, 32), attention_stages=(False, True, True), num_heads=(2, 4, 8), layers_per_block=2
    )
    config: ModelConfig = base.replace(denoiser=denoiser, sample_size=12)
    parts = random_model(config, seed=5)
    save_single_file(parts, tmp_path / "one.safetensors")
    assert_same(load_model(tmp_path / "one.safetensors"), parts)


@pytest.mark.usefixtures("one_tokenizer")
def test_the_original_layout_has_no_place_for_a_dit(parts_file: Path, tmp_path: Path):
    parts = random_model(tiny_dit(), seed=3)
    with pytest.raises(CheckpointError, match="no place for a DiT; save a folder"):
        save_single_file(parts, tmp_path / "one.safetensors")
    with pytest.raises(CheckpointError, match="no place for a DiT; use a folder"):
        load_model(parts_file, config=tiny_dit())
