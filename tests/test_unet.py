"""The UNet against diffusers' UNet2DConditionModel: keys, outputs, gradients, in every structural variant."""

import pytest
import torch

from sdlite.config import UNetConfig, sd15, sd21, tiny
from sdlite.contracts import Conditioning
from sdlite.models.attention import PointwiseConv, attend
from sdlite.models.unet import UNet
from tests.references.closed_form import normal
from tests.references.diffusers_unet import reference_unet

BASE = tiny().denoiser.replace(
    block_out_channels=(16, 32, 48), num_heads=(2, 4, 6), attention_stages=(True, True, False), context_dim=20
)
VARIANTS = {
    "sd1-like": BASE.replace(layers_per_block=2),
    "sd2-like": BASE.replace(use_linear_projection=True, layers_per_block=2, num_heads=(1, 2, 3)),
    "inpainting": BASE.replace(in_channels=9),
    "attention everywhere": BASE.replace(attention_stages=(True, True, True)),
    "attention below": BASE.replace(attention_stages=(False, True, True), use_linear_projection=True),
    "attention only in the middle": BASE.replace(attention_stages=(False, False, False)),
    "three layers": BASE.replace(layers_per_block=3),
    "one stage": BASE.replace(block_out_channels=(16,), num_heads=(4,), attention_stages=(True,)),
    "five stages": BASE.replace(
        block_out_channels=(8, 8, 16, 16, 32), num_heads=(1, 2, 2, 4, 4), attention_stages=(True,) * 4 + (False,)
    ),
    "depth 0, 2, 4": BASE.replace(transformer_depth=(0, 2, 4), attention_stages=(True, True, True)),
    "depth of SDXL": BASE.replace(
        transformer_depth=(0, 2, 4), attention_stages=(False, True, True), use_linear_projection=True
    ),
    "depth of SDXL's refiner": BASE.replace(transformer_depth=(3,), attention_stages=(False, True, False)),
    "other widths": BASE.replace(num_groups=2, context_dim=24, out_channels=8, in_channels=8),
}


def pair(config: UNetConfig, dtype: torch.dtype):
    torch.manual_seed(0)
    reference = reference_unet(config).to(dtype)
    unet = UNet(config).to(dtype)
    unet.load_state_dict(reference.state_dict())  # strict: the keys and shapes are diffusers'
    return unet, reference


def inputs(config: UNetConfig, dtype: torch.dtype, height: int = 9, width: int = 14):
    x = normal(2, config.in_channels, height, width, dtype=dtype)
    return x, torch.tensor([981, 3]), normal(2, 7, config.context_dim, seed=1, dtype=dtype)


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_outputs_and_gradients_equal_diffusers(name, dtype, tolerance):
    config = VARIANTS[name]
    unet, reference = pair(config, dtype)
    x, t, context = inputs(config, dtype)
    ours, theirs = unet(x, t, unet.prepare(Conditioning(context))), reference(x, t, context).sample
    assert relative(ours, theirs) < tolerance
    weights = normal(*ours.shape, seed=2, dtype=dtype)
    (ours * weights).sum().backward()
    (theirs * weights).sum().backward()
    expected = dict(reference.named_parameters())
    largest = max(p.grad.abs().max() for p in expected.values())
    for key, parameter in unet.named_parameters():
        assert (parameter.grad - expected[key].grad).abs().max() < tolerance * largest, key


@pytest.mark.parametrize(("height", "width"), [(1, 1), (2, 3), (5, 8), (7, 7), (11, 16)])
def test_any_latent_size(height, width):
    config = VARIANTS["five stages"]
    unet, reference = pair(config, torch.float64)
    x, t, context = inputs(config, torch.float64, height, width)
    assert relative(unet(x, t, unet.prepare(Conditioning(context))), reference(x, t, context).sample) < 1e-10


def test_fractional_timesteps_equal_diffusers():
    unet, reference = pair(BASE, torch.float64)
    x, _, context = inputs(BASE, torch.float64)
    t = torch.tensor([999.0, 0.25])
    assert relative(unet(x, t, unet.prepare(Conditioning(context))), reference(x, t, context).sample) < 1e-10


def test_prompt_is_projected_once_and_serves_every_step():
    unet, reference = pair(BASE, torch.float64)
    x, _, context = inputs(BASE, torch.float64)
    memory = unet.prepare(Conditioning(context))
    for layer in [m for m in unet.modules() if isinstance(m, torch.nn.Linear) and m.in_features == BASE.context_dim]:
        layer.forward = None  # to_k and to_v of the prompt: calling one again would fail
    for t in (torch.tensor([999, 999]), torch.tensor([1, 500])):
        assert relative(unet(x, t, memory), reference(x, t, context).sample) < 1e-10


@pytest.mark.parametrize("name", VARIANTS)
def test_several_prompts_per_image_equal_a_repeated_batch(name):
    config = VARIANTS[name]
    unet, reference = pair(config, torch.float64)
    x, t, _ = inputs(config, torch.float64)
    context = normal(4, 7, config.context_dim, seed=3)
    theirs = reference(torch.cat([x, x]), torch.cat([t, t]), context).sample
    assert relative(unet(x, t, unet.prepare(Conditioning(context))), theirs) < 1e-10


def test_half_precision_weights_take_and_return_float32_latents():
    unet, reference = pair(BASE, torch.bfloat16)
    x, t, context = inputs(BASE, torch.float32)
    ours = unet(x, t, unet.prepare(Conditioning(context.bfloat16())))
    assert ours.dtype == torch.float32
    theirs = reference(x.bfloat16(), t, context.bfloat16()).sample
    assert relative(ours, theirs.float()) < 0.05


def test_context_of_another_model_is_refused():
    with pytest.raises(ValueError, match=r"context has shape \(2, 7, 768\).* needs \(B, T, 20\)"):
        UNet(BASE).prepare(Conditioning(torch.zeros(2, 7, 768)))


@pytest.mark.parametrize(
    ("depth", "message"),
    [
        ((1, 2), "transformer_depth must have one entry per stage, 3"),
        ((), "transformer_depth must have one entry per stage, 3"),
        ((0,), r"transformer_depth=\(0,\) leaves no attention to the prompt"),
        ((1, 0, 0), r"transformer_depth=\(1, 0, 0\) leaves no attention"),  # stage 0 has no attention
        ((-1,), "transformer_depth.0=-1 must be greater than or equal to 0"),
    ],
)
def test_depths_that_fit_no_unet_are_one_line(depth, message):
    with pytest.raises(ValueError, match=message):
        BASE.replace(attention_stages=(False, True, True), transformer_depth=depth)


@pytest.mark.parametrize("config", [sd15(), sd15(in_channels=9), sd21()], ids=["sd15", "inpainting", "sd21"])
def test_full_size_keys_and_shapes_equal_diffusers(config):
    with torch.device("meta"):
        ours, theirs = UNet(config.denoiser).state_dict(), reference_unet(config.denoiser).state_dict()
    assert {key: value.shape for key, value in ours.items()} == {key: value.shape for key, value in theirs.items()}


@pytest.mark.slow
@pytest.mark.parametrize("config", [sd15(), sd15(in_channels=9), sd21()], ids=["sd15", "inpainting", "sd21"])
@torch.no_grad()
def test_full_size_outputs_equal_diffusers(config):
    unet, reference = pair(config.denoiser, torch.float32)
    x, t, context = inputs(config.denoiser, torch.float32, 16, 24)
    assert relative(unet(x, t, unet.prepare(Conditioning(context))), reference(x, t, context).sample) < 1e-5


def test_pointwise_conv_is_a_1x1_convolution():
    layer = PointwiseConv(6).double()
    x = normal(2, 6, 3, 5)
    expected = torch.nn.functional.conv2d(x, layer.weight, layer.bias)
    assert torch.allclose(layer(x.flatten(2).transpose(1, 2)).transpose(1, 2).reshape(x.shape), expected, atol=1e-12)


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def test_attention_with_a_gradient_is_that_without():
    q, k, v = torch.randn(3, 2, 4, 9, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with torch.no_grad():
        fused = attend(q, k, v)
    torch.testing.assert_close(attend(q, k, v), fused)
    wide = attend(q, torch.zeros_like(k[:, :, :5]), v[:, :, :5])  # equal scores: the mean of the values
    torch.testing.assert_close(wide, v[:, :, :5].mean(2, keepdim=True).expand_as(wide))
