"""The DiT against diffusers' PixArtTransformer2DModel: keys, outputs, gradients; sizes, guidance, errors."""

import pytest
import torch

from sdlite.config import DiTConfig, tiny_dit
from sdlite.contracts import Conditioning
from sdlite.models.dit import DiT
from tests.references.closed_form import normal
from tests.references.diffusers_dit import reference_dit

BASE = DiTConfig(width=48, depth=3, num_heads=3, context_dim=20, sample_size=8)
VARIANTS = {
    "patch 2, odd heads": BASE,
    "patch 1": BASE.replace(patch_size=1, sample_size=12),
    "patch 4": BASE.replace(patch_size=4, sample_size=16, num_heads=1),
    "inpainting": BASE.replace(in_channels=9),
    "wide latents, one block": BASE.replace(in_channels=16, out_channels=16, depth=1, num_heads=6),
    "learned variance, odd channels": BASE.replace(in_channels=3, out_channels=6, width=20, num_heads=5),
    "large sample, positions shrink": BASE.replace(sample_size=192),
}
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-13}


def pair(config: DiTConfig, dtype: torch.dtype):
    torch.manual_seed(0)
    reference = reference_dit(config).to(dtype)
    dit = DiT(config).to(dtype)
    dit.load_state_dict(reference.state_dict())  # strict: the keys and shapes are diffusers'
    return dit, reference


def inputs(config: DiTConfig, dtype: torch.dtype, rows: int = 3, columns: int = 5):
    x = normal(2, config.in_channels, rows * config.patch_size, columns * config.patch_size, dtype=dtype)
    return x, torch.tensor([981, 3]), normal(2, 7, config.context_dim, seed=1, dtype=dtype)


def theirs_of(reference, x, t, context):
    return reference(x, context, t).sample


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_outputs_and_gradients_equal_diffusers(name, dtype):
    config = VARIANTS[name]
    dit, reference = pair(config, dtype)
    x, t, context = inputs(config, dtype)
    leaves = [[tensor.clone().requires_grad_() for tensor in (x, context)] for _ in range(2)]
    ours = dit(leaves[0][0], t, dit.prepare(Conditioning(leaves[0][1])))
    theirs = theirs_of(reference, leaves[1][0], t, leaves[1][1])
    assert relative(ours, theirs) < TOLERANCE[dtype]
    weights = normal(*ours.shape, seed=2, dtype=dtype)
    (ours * weights).sum().backward()
    (theirs * weights).sum().backward()
    for mine, other in zip(*leaves, strict=True):
        assert relative(mine.grad, other.grad) < 10 * TOLERANCE[dtype]
    expected = dict(reference.named_parameters())
    largest = max(p.grad.abs().max() for p in expected.values())
    for key, parameter in dit.named_parameters():
        assert (parameter.grad - expected[key].grad).abs().max() < 10 * TOLERANCE[dtype] * largest, key


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (1, 6), (4, 4), (8, 3), (12, 13), (32, 24)])
@torch.no_grad()
def test_any_size_that_the_patch_divides(name, rows, columns):
    config = VARIANTS[name]
    dit, reference = pair(config, torch.float64)
    x, t, context = inputs(config, torch.float64, rows, columns)
    assert relative(dit(x, t, dit.prepare(Conditioning(context))), theirs_of(reference, x, t, context)) < 1e-13


@pytest.mark.parametrize("name", VARIANTS)
def test_positions_are_those_of_diffusers(name):
    dit, reference = pair(VARIANTS[name], torch.float32)
    side = VARIANTS[name].sample_size // VARIANTS[name].patch_size
    assert torch.equal(dit.pos_embed.positions(side, side).flatten(1).T, reference.pos_embed.pos_embed[0])


@torch.no_grad()
def test_fractional_timesteps_equal_diffusers():
    dit, reference = pair(BASE, torch.float64)
    x, _, context = inputs(BASE, torch.float64)
    t = torch.tensor([999.0, 0.25])
    assert relative(dit(x, t, dit.prepare(Conditioning(context))), theirs_of(reference, x, t, context)) < 1e-13


@torch.no_grad()
def test_prompt_is_projected_once_and_serves_every_step():
    dit, reference = pair(BASE, torch.float64)
    x, _, context = inputs(BASE, torch.float64)
    memory = dit.prepare(Conditioning(context))
    dit.caption_projection.forward = None  # calling one of these again would fail
    for block in dit.transformer_blocks:
        block.attn2.to_k.forward = block.attn2.to_v.forward = None
    for t in (torch.tensor([999, 999]), torch.tensor([1, 500])):
        assert relative(dit(x, t, memory), theirs_of(reference, x, t, context)) < 1e-13


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("prompts", [2, 3])
@torch.no_grad()
def test_several_prompts_per_image_equal_a_repeated_batch(name, prompts):
    config = VARIANTS[name]
    dit, reference = pair(config, torch.float64)
    x, t, _ = inputs(config, torch.float64)
    context = normal(2 * prompts, 7, config.context_dim, seed=3)
    expected = theirs_of(reference, torch.cat([x] * prompts), torch.cat([t] * prompts), context)
    assert relative(dit(x, t, dit.prepare(Conditioning(context))), expected) < 1e-13


@torch.no_grad()
def test_half_precision_weights_take_and_return_float32_latents():
    dit, reference = pair(BASE, torch.bfloat16)
    x, t, context = inputs(BASE, torch.float32)
    ours = dit(x, t, dit.prepare(Conditioning(context)))
    assert ours.dtype == torch.float32
    assert relative(ours, theirs_of(reference, x.bfloat16(), t, context.bfloat16()).float()) < 0.05


def test_bad_sizes_contexts_and_configs_are_one_line():
    dit = DiT(BASE)
    x, t, context = inputs(BASE, torch.float32)
    for build, message in [
        (
            lambda: dit(x[..., :5], t, dit.prepare(Conditioning(context))),
            r"latents of 6x5 cells must be a multiple .*patch_size=2",
        ),
        (
            lambda: dit.prepare(Conditioning(torch.zeros(2, 7, 768))),
            r"context has shape \(2, 7, 768\).* needs \(B, T, 20\)",
        ),
        (lambda: BASE.replace(num_heads=5), "width=48 must be a multiple of num_heads=5"),
        (lambda: BASE.replace(width=30), "width=30 must be a multiple of num_heads=3 and of 4"),
        (lambda: BASE.replace(sample_size=9), "sample_size=9 must be a multiple of patch_size=2"),
        (lambda: BASE.replace(depth=0), "depth=0 must be greater than or equal to 1"),
        (lambda: BASE.replace(heads=2), "unknown field 'heads'"),
        (lambda: tiny_dit().replace(sample_size=64), "sample_size=64 must be the DiT's, 8"),
    ]:
        with pytest.raises(ValueError, match=message) as caught:
            build()
        assert "\n" not in str(caught.value)


def test_full_size_keys_and_shapes_equal_diffusers():
    config = DiTConfig(width=1152, depth=28, num_heads=16, context_dim=4096, out_channels=8)  # PixArt-alpha's, 512 px
    with torch.device("meta"):
        ours, theirs = DiT(config).state_dict(), reference_dit(config).state_dict()
    assert {key: value.shape for key, value in ours.items()} == {key: value.shape for key, value in theirs.items()}


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()
