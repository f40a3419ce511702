"""config.json files: those that are published, those that differ, those that attack."""

import inspect
import json
from typing import Any

import diffusers
import pytest
import torch
from transformers import CLIPTextConfig

from sdlite.checkpoints import configs, known_keys
from sdlite.checkpoints.configs import (
    codec_config,
    denoiser_config,
    dit_config,
    schedule_config,
    text_config,
    to_diffusers,
    unet_config,
)
from sdlite.checkpoints.places import CheckpointError
from sdlite.config import AutoencoderTinyConfig, DiTConfig, ModelConfig, sd15, sd21, tiny, tiny_dit
from sdlite.models.unet import UNet
from sdlite.request import Request

IDS = {"bos_token_id": 49406, "eos_token_id": 49407, "pad_token_id": 49407}

# unet/config.json, vae/config.json, text_encoder/config.json and the scheduler's of Stable Diffusion 1.5, as published.
SD15_UNET: dict[str, Any] = {
    "_class_name": "UNet2DConditionModel",
    "_diffusers_version": "0.6.0",
    "act_fn": "silu",
    "attention_head_dim": 8,
    "block_out_channels": [320, 640, 1280, 1280],
    "center_input_sample": False,
    "cross_attention_dim": 768,
    "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 4,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-05,
    "norm_num_groups": 32,
    "out_channels": 4,
    "sample_size": 64,
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
}
SD21_UNET = SD15_UNET | {
    "attention_head_dim": [5, 10, 20, 20],
    "cross_attention_dim": 1024,
    "use_linear_projection": True,
    "dual_cross_attention": False,
    "num_class_embeds": None,
    "only_cross_attention": False,
    "upcast_attention": True,
    "sample_size": 96,
}
DIT: dict[str, Any] = {  # transformer/config.json of PixArt-alpha at 512 pixels, as diffusers writes it
    "_class_name": "PixArtTransformer2DModel",
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "attention_head_dim": 72,
    "attention_type": "default",
    "caption_channels": 4096,
    "cross_attention_dim": 1152,
    "dropout": 0.0,
    "in_channels": 4,
    "interpolation_scale": None,
    "norm_elementwise_affine": False,
    "norm_eps": 1e-06,
    "norm_num_groups": 32,
    "norm_type": "ada_norm_single",
    "num_attention_heads": 16,
    "num_embeds_ada_norm": 1000,
    "num_layers": 28,
    "out_channels": 8,
    "patch_size": 2,
    "sample_size": 64,
    "upcast_attention": False,
    "use_additional_conditions": False,
}
SD15_VAE = {
    "_class_name": "AutoencoderKL",
    "act_fn": "silu",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "in_channels": 3,
    "latent_channels": 4,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "out_channels": 3,
    "sample_size": 512,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}
SD15_TEXT = {
    "_name_or_path": "openai/clip-vit-large-patch14",
    "architectures": ["CLIPTextModel"],
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "dropout": 0.0,
    "eos_token_id": 2,
    "hidden_act": "quick_gelu",
    "hidden_size": 768,
    "initializer_factor": 1.0,
    "initializer_range": 0.02,
    "intermediate_size": 3072,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 77,
    "model_type": "clip_text_model",
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "pad_token_id": 1,
    "projection_dim": 768,
    "torch_dtype": "float32",
    "transformers_version": "4.22.0.dev0",
    "vocab_size": 49408,
}
SD15_SCHEDULER = {
    "_class_name": "PNDMScheduler",
    "_diffusers_version": "0.6.0",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
    "clip_sample": False,
}


def test_published_configs_are_the_presets():
    sd1, sd2 = sd15(), sd21()
    assert unet_config(SD15_UNET, "epsilon", "") == sd1.denoiser
    assert unet_config(SD21_UNET, "v", "") == sd2.denoiser
    assert unet_config(SD15_UNET | {"in_channels": 9}, "epsilon", "") == sd15(9).denoiser
    assert codec_config(SD15_VAE, "") == sd1.codec
    assert text_config(SD15_TEXT, IDS, "") == sd1.text
    assert schedule_config(SD15_SCHEDULER, "") == (sd1.schedule, None, [])
    assert configs.sample_size(SD21_UNET, "") == 96
    assert configs.sample_size({"sample_size": [16, 24]}, "") == (16, 24)  # height and width, as in diffusers
    assert configs.sample_size({"sample_size": [96, 96]}, "") == 96
    dit = DiTConfig(width=1152, depth=28, num_heads=16, context_dim=4096, out_channels=8)
    assert dit_config(DIT, "epsilon", "") == dit
    assert dit_config(DIT | {"sample_size": 128, "interpolation_scale": 2}, "v", "") == dit.replace(
        sample_size=128, prediction="v"
    )


def defaults(kind: str) -> dict[str, Any]:
    parameters = inspect.signature(getattr(diffusers, kind).__init__).parameters
    return {k: list(p.default) if isinstance(p.default, tuple) else p.default for k, p in parameters.items()}


CLASSES = {keys.kind: keys.defaults for keys in (known_keys.UNET, known_keys.DIT, known_keys.KL, known_keys.TINY)} | {
    name: known_keys.SCHEDULE.defaults | changes
    for name, changes in known_keys.SCHEDULERS.items()
    if name != "DPMSolverSDEScheduler"
}


@pytest.mark.parametrize(("kind", "mapped"), CLASSES.items())
def test_missing_keys_have_the_defaults_of_diffusers(kind: str, mapped: dict[str, Any]):
    theirs = defaults(kind)
    # left to the solver, and set by diffusers' pipeline
    for key in set(mapped) & set(theirs) - {"timestep_spacing", "steps_offset", "clip_sample"}:
        ours = list(mapped[key]) if isinstance(mapped[key], tuple) else mapped[key]
        assert ours == theirs[key], key


def test_text_defaults_are_those_of_transformers():
    theirs = CLIPTextConfig()
    assert {key: getattr(theirs, key) for key in known_keys.TEXT.defaults} == known_keys.TEXT.defaults


@pytest.mark.parametrize(
    "kind",
    ["UNet2DConditionModel", "PixArtTransformer2DModel", "AutoencoderKL", "AutoencoderTiny", "CLIPTextConfig"],
)
def test_every_key_of_the_libraries_is_known(kind: str):
    """A config that the installed libraries write with their defaults is understood."""
    if kind == "CLIPTextConfig":
        config = json.loads(CLIPTextConfig(architectures=["CLIPTextModel"]).to_json_string())
        text_config(config, IDS, "")
    elif kind == "UNet2DConditionModel":
        unet_config({k: v for k, v in defaults(kind).items() if k != "self"}, "epsilon", "")
    elif kind == "PixArtTransformer2DModel":  # whose defaults have no caption projection, but resolution conditions
        needed = {"caption_channels": 8, "use_additional_conditions": False}
        dit_config({k: v for k, v in defaults(kind).items() if k != "self"} | needed, "epsilon", "")
    else:
        codec_config({k: v for k, v in defaults(kind).items() if k != "self"} | {"_class_name": kind}, "")


@pytest.mark.parametrize("config", [sd15(), sd21(), sd15(9), tiny(), sd21(prediction="epsilon"), tiny_dit(9, "v")])
def test_round_trip(config: ModelConfig):
    files = json.loads(json.dumps(to_diffusers(config)))
    schedule, prediction, unknown = schedule_config(files["scheduler/scheduler_config.json"], "")
    ids = {key: getattr(config.text, key) for key in IDS}
    assert not unknown and prediction is not None
    part = "transformer" if isinstance(config.denoiser, DiTConfig) else "unet"
    denoiser, sample_size = denoiser_config(part, files[f"{part}/config.json"], prediction, "")
    assert config == ModelConfig(
        denoiser=denoiser,
        schedule=schedule,
        text=text_config(files["text_encoder/config.json"], ids, ""),
        codec=codec_config(files["vae/config.json"], ""),
        sample_size=sample_size,
    )
    configs.check_model_index(files["model_index.json"], "")


def test_lists_of_equal_entries():
    lists = {"layers_per_block": [2] * 4, "cross_attention_dim": [768] * 4, "only_cross_attention": [False] * 4}
    assert unet_config(SD15_UNET | lists | {"transformer_layers_per_block": [1] * 4}, "epsilon", "") == sd15().denoiser
    assert unet_config(SD15_UNET | {"num_attention_heads": 5}, "epsilon", "").num_heads == (5,) * 4


@pytest.mark.parametrize("depth", [(1,), (3,), (0, 2, 4, 1)])
def test_depths_go_to_diffusers_and_back(depth: tuple[int, ...]):
    config = sd15().denoiser.replace(block_out_channels=(32,) * 4, transformer_depth=depth)
    written = json.loads(json.dumps(configs._denoiser_file(config, 64)))
    assert unet_config(written, "epsilon", "") == config
    with torch.device("meta"):
        theirs = diffusers.UNet2DConditionModel.from_config(written)
        assert UNet(config).state_dict().keys() == theirs.state_dict().keys()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"auto_map": {"AutoModel": "evil/repo--model.Model"}}, "auto_map.* asks for code"),
        ({"_attn_implementation": "evil/kernels"}, "_attn_implementation='evil/kernels' asks for code"),
        ({"_attn_implementation_internal": "evil/kernels:attention"}, "asks for code"),
        ({"attn_implementation": {"": "evil/kernels"}}, "asks for code"),
        ({"trust_remote_code": True}, "trust_remote_code=True asks for code"),
        ({"_class_name": "EvilUNet"}, "_class_name='EvilUNet' is not supported"),
        ({"_class_name": ["evil", "UNet"]}, "_class_name="),
        ({"time_cond_proj_dim": 256}, "time_cond_proj_dim=256 is not supported"),
        ({"norm_eps": 1e-6}, "norm_eps=1e-06"),
        ({"transformer_layers_per_block": [1, 2]}, "transformer_depth must have one entry per stage, 4"),
        ({"transformer_layers_per_block": []}, "transformer_depth must have one entry"),
        ({"transformer_layers_per_block": [[1], [2], [10], [1]]}, "transformer_depth"),
        ({"transformer_layers_per_block": "two"}, "transformer_depth"),
        ({"reverse_transformer_layers_per_block": [1, 2, 10, 1]}, "reverse_transformer_layers_per_block"),
        ({"layers_per_block": [2, 2, 2, 3]}, "layers_per_block.*the same at every stage"),
        ({"up_block_types": ["UpBlock2D"] * 4}, "up_block_types"),
        ({"down_block_types": ["SimpleCrossAttnDownBlock2D"] * 4}, "down_block_types"),
        ({"down_block_types": 3}, "down_block_types"),
        ({"block_out_channels": [10**7] * 4}, "block_out_channels"),
        ({"block_out_channels": [320, 640, float("nan"), 1280]}, "block_out_channels"),
        ({"block_out_channels": "320"}, "block_out_channels"),
        ({"layers_per_block": 10**6}, "layers_per_block"),
        ({"attention_head_dim": 7}, "num_heads=7"),
        ({"attention_heads_dim": 8}, "unknown key 'attention_heads_dim'=8; did you mean 'attention_head_dim'"),
        ({"sample\nsize": 8}, "unknown key"),
    ],
)
def test_refused_unets(changes: dict[str, Any], message: str):
    with pytest.raises(CheckpointError, match=message) as error:
        unet_config(SD15_UNET | changes, "epsilon", "unet/config.json")
    assert "\n" not in str(error.value) and str(error.value).startswith("unet/config.json: ")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"auto_map": {"AutoModel": "evil/repo--model.Model"}}, "auto_map.* asks for code"),
        ({"attn_implementation": "evil/kernels"}, "asks for code"),
        ({"_class_name": "UNet2DConditionModel"}, "_class_name='UNet2DConditionModel' is not supported"),
        ({"norm_type": "ada_norm_zero"}, "norm_type='ada_norm_zero'"),
        ({"attention_bias": False}, "attention_bias=False"),
        ({"activation_fn": "geglu"}, "activation_fn='geglu'"),
        ({"norm_eps": 1e-5}, "norm_eps=1e-05"),
        ({"use_additional_conditions": True}, "use_additional_conditions=True is not supported"),
        ({"sample_size": 128, "use_additional_conditions": None}, "use_additional_conditions=None is not supported"),
        ({"interpolation_scale": 2}, "interpolation_scale=2 is not supported"),
        ({"interpolation_scale": float("nan")}, "interpolation_scale=nan"),
        ({"cross_attention_dim": 768}, "cross_attention_dim=768 is not supported; sdlite implements 1152"),
        ({"caption_channels": None}, "context_dim=None"),
        ({"num_attention_heads": "16"}, "num_attention_heads='16'"),
        ({"num_attention_heads": 10**9}, "num_attention_heads=1000000000"),
        ({"attention_head_dim": [72, 72]}, "attention_head_dim="),
        ({"attention_head_dim": 8000, "num_attention_heads": 8000}, "width=64000000"),
        ({"num_layers": 10**6}, "depth=1000000"),
        ({"patch_size": 0}, "patch_size=0"),
        ({"patch_size": 3}, "sample_size=64 must be a multiple of patch_size=3"),
        ({"sample_size": [64, 64]}, "sample_size="),
        ({"sample_size": 10**9}, "sample_size=1000000000"),
        ({"layers": 2}, "unknown key 'layers'=2"),
    ],
)
def test_refused_transformers(changes: dict[str, Any], message: str):
    with pytest.raises(CheckpointError, match=message) as error:
        dit_config(DIT | changes, "epsilon", "transformer/config.json")
    assert "\n" not in str(error.value) and str(error.value).startswith("transformer/config.json: ")


@pytest.mark.parametrize(
    "changes",
    [{"_attn_implementation_autoset": True}, {"_attn_implementation": "sdpa"}, {"trust_remote_code": False}],
)
def test_inert_hooks_are_left_alone(changes: dict[str, Any]):
    assert text_config(SD15_TEXT | changes, IDS, "") == sd15().text


@pytest.mark.parametrize(
    ("make", "config", "message"),
    [
        (lambda c: text_config(c, IDS, "x"), SD15_TEXT | {"hidden_size": 10**7}, "hidden_size=10000000"),
        (lambda c: text_config(c, IDS, "x"), SD15_TEXT | {"hidden_act": "relu"}, "hidden_act='relu'"),
        (lambda c: text_config(c, IDS, "x"), SD15_TEXT | {"model_type": "t5"}, "model_type='t5'"),
        (lambda c: codec_config(c, "x"), SD15_VAE | {"_class_name": "AutoencoderDC"}, "AutoencoderDC"),
        (lambda c: codec_config(c, "x"), SD15_VAE | {"scaling_factor": float("inf")}, "scaling_factor"),
        (lambda c: codec_config(c, "x"), SD15_VAE | {"latents_mean": [0.1]}, "latents_mean"),
        (
            lambda c: schedule_config(c, "x"),
            SD15_SCHEDULER | {"_class_name": "FlowMatchEulerDiscreteScheduler"},
            "Flow",
        ),
        (lambda c: schedule_config(c, "x"), SD15_SCHEDULER | {"beta_schedule": "sigmoid"}, "beta_schedule='sigmoid'"),
        (lambda c: schedule_config(c, "x"), SD15_SCHEDULER | {"trained_betas": [0.1]}, "trained_betas"),
        (lambda c: schedule_config(c, "x"), SD15_SCHEDULER | {"prediction_type": ["v"]}, "prediction_type"),
        (lambda c: schedule_config(c, "x"), SD15_SCHEDULER | {"auto_map": "evil"}, "asks for code"),
        (lambda c: configs.check_model_index(c, "x"), {"_class_name": "StableDiffusionXLPipeline"}, "XL"),
        (lambda c: configs.check_model_index(c, "x"), {"unet": ["evil", "UNet2DConditionModel"]}, "unet="),
        (lambda c: configs.check_model_index(c, "x"), {"_class_name": "SdlitePipeline"}, "SdlitePipeline"),
        (
            lambda c: configs.check_model_index(c, "x"),
            {"_class_name": "PixArtAlphaPipeline", "transformer": ["diffusers", "PixArtTransformer2DModel"]},
            "PixArtAlphaPipeline' is not supported; sdlite implements SdlitePipeline",
        ),
        (
            lambda c: configs.check_model_index(c, "x"),
            {"unet": ["diffusers", "UNet2DConditionModel"], "transformer": ["diffusers", "PixArtTransformer2DModel"]},
            "not both",
        ),
        (
            lambda c: configs.check_model_index(c, "x"),
            {"transformer": ["diffusers", "FluxTransformer2DModel"]},
            "transformer=",
        ),
        (lambda c: configs.check_model_index(c, "x"), {"custom_pipelines": "evil"}, "asks for code"),
        (
            lambda c: configs.check_model_index(c, "x"),
            {"text_encoder_2": ["transformers", "CLIPTextModel"]},
            "unknown part",
        ),
        (lambda c: configs.sample_size(c, "x"), {"sample_size": [16, "24"]}, "sample_size"),
        (lambda c: configs.sample_size(c, "x"), {"sample_size": 10**6}, "sample_size"),
        (lambda c: configs.sample_size(c, "x"), {"sample_size": [8, "8"]}, "sample_size"),
        (lambda c: configs.sample_size(c, "x"), {"sample_size": [8, 8, 8]}, "sample_size"),
    ],
)
def test_other_refused_configs(make: Any, config: dict[str, Any], message: str):
    with pytest.raises(CheckpointError, match=message) as error:
        make(config)
    assert "\n" not in str(error.value) and str(error.value).startswith("x: ")


def test_options_that_are_off_are_left_alone():
    """Later releases of diffusers write keys that sdlite does not know; those that are off make no difference."""
    later = {"later_option": None, "use_later": False, "later_layers": []}
    assert unet_config(SD15_UNET | later, "epsilon", "") == sd15().denoiser
    with pytest.raises(CheckpointError, match="unknown key 'later_option'=2"):
        unet_config(SD15_UNET | {"later_option": 2}, "epsilon", "")
    parts = {"unet": ["diffusers", "UNet2DConditionModel"], "image_encoder_2": [None, None]}
    configs.check_model_index(parts | {"_ignore_files": ["x"], "_later": 3, "requires_safety_checker": True}, "")


def test_true_is_no_number_and_underscores_are_none():
    for change in ({"layers_per_block": True}, {"layers_per_block": "0_2"}):
        with pytest.raises(CheckpointError, match=r"must be a number, not (True|'0_2')"):
            unet_config(SD15_UNET | change, "epsilon", "")
    with pytest.raises(CheckpointError, match="must be a number, not True"):
        codec_config({"_class_name": "AutoencoderTiny", "num_encoder_blocks": [True, 3, 3, 3]}, "")
    for fields in ({"steps": True}, {"steps": "1_0"}, {"guidance_scale": False}, {"seed": "1_0"}):
        with pytest.raises(ValueError, match="must be a number"):
            Request(prompt="x", **fields)
    assert Request(prompt="1_0", steps="10", image="a_b.png").steps == 10
    assert tiny().denoiser.attention_stages == (True, False)


def test_any_name_of_a_field_is_refused_in_one_line():
    for name in ("self", "x" * 100_000, "cls"):
        with pytest.raises(ValueError, match="unknown field") as error:
            Request(prompt="x", **{name: 1})
        assert len(str(error.value)) < 500
        with pytest.raises(ValueError, match="unknown field"):
            Request(prompt="x").replace(**{name: 1})


def test_bomb_of_tiny_blocks():
    with pytest.raises(CheckpointError, match="num_encoder_blocks"):
        codec_config({"_class_name": "AutoencoderTiny", "num_encoder_blocks": [8000] * 4}, "x")
    assert codec_config({"_class_name": "AutoencoderTiny"}, "x") == AutoencoderTinyConfig()


def test_schedulers():
    ztsnr = {"_class_name": "DDIMScheduler", "rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
    schedule, prediction, unknown = schedule_config(ztsnr | {"timestep_spacing": "trailing", "mystery": 1}, "")
    assert (schedule.zero_terminal_snr, schedule.spacing, prediction, unknown) == (True, "trailing", "v", ["mystery"])
    # diffusers' DDIM defaults, and what StableDiffusionPipeline makes of steps_offset
    assert (schedule.beta_start, schedule.beta_end, schedule.beta_schedule) == (0.0001, 0.02, "linear")
    assert (schedule.final_abar_one, schedule.steps_offset) == (True, 1)
    assert not schedule_config({"_class_name": "PNDMScheduler"}, "")[0].final_abar_one
