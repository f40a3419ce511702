"""The key map against diffusers' own converters, over every structure of UNet and codec and at full size."""

import pytest
import torch

from sdlite.checkpoints import sd_names
from sdlite.checkpoints.parts import empty_parts, shapes_of
from sdlite.checkpoints.tokenizer import load_tokenizer
from sdlite.config import AutoencoderKLConfig, UNetConfig, sd15, sd21, tiny
from sdlite.models.codec import LatentCodec
from sdlite.models.unet import UNet
from tests.references.original_names import codec_names, open_clip_names, unet_names

FULL = {"sd15": sd15(), "sd21": sd21(), "inpainting": sd15(9), "sd2 inpainting": sd21(9, "epsilon")}


def names_of(module: type, config: object) -> list[str]:
    with torch.device("meta"):
        return list(module(config).state_dict())


@pytest.mark.parametrize("attention", [(True,), (True, False), (False, True, True), (True, True, True, False)])
@pytest.mark.parametrize("layers", [1, 2, 3])
def test_unet_names_are_diffusers(attention: tuple[bool, ...], layers: int):
    stages = len(attention)
    config = UNetConfig(
        block_out_channels=(32, 64, 64, 32)[:stages],
        layers_per_block=layers,
        attention_stages=attention,
        num_heads=(4,) * stages,
        context_dim=16,
    )
    ours = names_of(UNet, config)
    originals = [sd_names.UNET + sd_names.unet_key(name, config) for name in ours]
    assert len(set(originals)) == len(ours)
    found = unet_names(originals, tiny().replace(denoiser=config))
    assert found == dict(zip(ours, originals, strict=True))


def test_many_layers_are_not_confused():
    """Beyond input_blocks.9, where a search for "input_blocks.1" also finds input_blocks.10."""
    config = tiny().denoiser.replace(layers_per_block=8, block_out_channels=(32, 32), num_heads=(2, 2))
    ours = names_of(UNet, config)
    originals = [sd_names.UNET + sd_names.unet_key(name, config) for name in ours]
    assert len({key for key in originals if key.startswith(f"{sd_names.UNET}input_blocks.1.")}) < 40
    assert unet_names(originals, tiny().replace(denoiser=config)) == dict(zip(ours, originals, strict=True))


@pytest.mark.parametrize("stages", [1, 2, 4, 5])
@pytest.mark.parametrize("layers", [1, 2])
def test_codec_names_are_diffusers(stages: int, layers: int):
    widths = (8, 16, 32, 16, 8)[:stages]
    config = AutoencoderKLConfig(block_out_channels=widths, layers_per_block=layers, norm_num_groups=4)
    with torch.device("meta"):
        ours = list(LatentCodec(config).model.state_dict())
    originals = [sd_names.CODEC + sd_names.codec_key(name, stages) for name in ours]
    assert codec_names(originals, stages) == dict(zip(ours, originals, strict=True))


@pytest.mark.parametrize("name", FULL)
def test_full_size_names_are_diffusers(name: str):
    config = FULL[name]
    modules = empty_parts(config, load_tokenizer(), name).modules
    ours = {part: list(module.state_dict()) for part, module in modules.items()}
    open_clip = name.startswith("sd2")
    names = sd_names.original_names(ours, config.denoiser, open_clip)
    count = sum(map(len, ours.values()))
    assert sum(map(len, names.values())) == count

    back = {source: key for key, sources in names.items() for source in sources}
    assert unet_names(list(names), config) == {n: back[f"denoiser.{n}"] for n in ours["denoiser"]}
    assert codec_names(list(names), 4) == {n: back[f"codec.{n}"] for n in ours["codec"]}
    if open_clip:
        width = config.text.hidden_size
        for text_name, (key, row) in open_clip_names(list(names), width).items():
            assert back[f"text.{text_name}"] == key
            assert row == width * names[key].index(f"text.{text_name}")
        assert all(f"text.{name}" in back for name in ours["text"])
    # Facts that are known of these files.
    shapes = {f"denoiser.{n}": s for n, s in shapes_of(modules["denoiser"]).items()}
    first = names["model.diffusion_model.input_blocks.0.0.weight"]
    assert shapes[first[0]] == (320, config.denoiser.in_channels, 3, 3)
    upsamplers = ["output_blocks.2.1.conv.weight", "output_blocks.5.2.conv.weight", "output_blocks.8.2.conv.weight"]
    assert {f"{sd_names.UNET}{key}" for key in upsamplers} <= set(names)
    assert f"{sd_names.UNET}output_blocks.11.1.transformer_blocks.0.norm1.bias" in names
    assert len(ours["denoiser"]) == 686 and len(ours["codec"]) == 248


def test_stacking_is_undone():
    parts = [torch.randn(4, 4) for _ in range(3)]
    key = f"{sd_names.OPEN_CLIP}transformer.resblocks.0.attn.in_proj_weight"
    joined = sd_names.join(key, parts)
    assert joined.shape == (12, 4)
    assert all(map(torch.equal, sd_names.split(joined, [(4, 4)] * 3), parts))
    weight = torch.randn(8, 8)
    kernel = sd_names.join(f"{sd_names.CODEC}encoder.mid.attn_1.q.weight", [weight])
    assert kernel.shape == (8, 8, 1, 1)
    assert torch.equal(sd_names.split(kernel, [(8, 8)])[0], weight)


@pytest.mark.parametrize(
    ("spelling", "key"),
    [
        ("conditioner.embedders.0.model.ln_final.bias", "cond_stage_model.model.ln_final.bias"),
        ("conditioner.embedders.0.transformer.text_model.x", "cond_stage_model.transformer.text_model.x"),
        (
            "cond_stage_model.transformer.embeddings.token_embedding.weight",
            "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight",
        ),
        ("vae.decoder.conv_in.bias", "first_stage_model.decoder.conv_in.bias"),
        ("model.diffusion_model.out.0.bias", "model.diffusion_model.out.0.bias"),
    ],
)
def test_spellings(spelling: str, key: str):
    assert sd_names.canonical(spelling) == key


def test_ema_names_are_those_of_the_original_code():
    """LitEma: `name.replace('.', '')` of names in LatentDiffusion.model, which begin with diffusion_model."""
    name = "diffusion_model.input_blocks.1.0.in_layers.0.weight"
    assert sd_names.ema_key(f"model.{name}") == "model_ema." + name.replace(".", "")


def test_what_is_unused():
    layers = sd21().text.num_hidden_layers
    for key in ("betas", "model_ema.decay", "loss.logvar", "cond_stage_model.model.text_projection"):
        assert sd_names.is_unused(key, layers)
    last = "cond_stage_model.model.transformer.resblocks.{}.ln_1.bias"
    assert sd_names.is_unused(last.format(23), layers)
    assert not sd_names.is_unused(last.format(22), layers)
    assert not sd_names.is_unused("model.diffusion_model.extra.weight", layers)
