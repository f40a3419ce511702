"""Recorded attention against softmax by hand, that recording changes nothing, x_0 previews and sizes."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from sdlite.config import tiny
from sdlite.contracts import Conditioning
from sdlite.inspect import (
    attention_sheet,
    clean_latents,
    feature_sizes,
    overlay,
    record_attention,
    word_maps,
)
from sdlite.models.unet import UNet
from sdlite.pipeline import Pipeline
from sdlite.request import Request

REQUEST = Request(prompt="a red apple, Quetzalcoatlus", negative_prompt="blurry", steps=3, seed=4, width=80, height=64)


@pytest.fixture(scope="module", params=["tiny", "tiny-dit"])
def pipe(request):
    return Pipeline.load(request.param)


def test_maps_are_the_softmax_of_queries_and_keys(pipe):
    """By hand, from the tensors that go into PyTorch's own attention."""
    net, seen = pipe.denoiser, []
    original = F.scaled_dot_product_attention

    def spy(q, k, v):
        if k.shape[2] == 7:  # the prompt, not the picture
            seen.append((q, k))
        return original(q, k, v)

    x, context = torch.randn(2, 4, 6, 10), torch.randn(4, 7, 32)  # two prompts for each image
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(F, "scaled_dot_product_attention", spy)
        with record_attention(net) as record:
            net(x, torch.tensor([5, 900]), net.prepare(Conditioning(context)))
    expected = []
    for q, k in seen:
        weights = torch.einsum("bnlk,bntk->bnlt", q, k).div(q.shape[-1] ** 0.5).exp()
        weights = (weights / weights.sum(-1, keepdim=True)).mean(1)  # (B, L, T)
        scale = {60: 1, 15: 2}[weights.shape[1]]
        grid = weights.transpose(1, 2).reshape(4, 7, 6 // scale, 10 // scale)
        expected.append(F.interpolate(grid, size=(6, 10), mode="bilinear"))
    assert len(expected) == len(record.sums) > 1
    torch.testing.assert_close(record.mean(), sum(expected) / len(expected), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(record.mean().sum(1), torch.ones(4, 6, 10))


def test_drawing_is_the_same_while_recording_and_leaves_no_hook(pipe):
    plain = pipe.generate(REQUEST)[0]
    picture, maps = word_maps(pipe, REQUEST)
    assert np.array_equal(np.asarray(picture), np.asarray(plain))
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in pipe.denoiser.modules())
    with pytest.raises(RuntimeError), record_attention(pipe.denoiser):
        raise RuntimeError
    assert not any(m._forward_pre_hooks for m in pipe.denoiser.modules())
    assert [word for word, _ in maps] == ["a", "red", "apple", ",", "quetzalcoatlus"]
    assert all(heat.shape == (8, 10) and heat.min() >= 0 for _, heat in maps)


def test_maps_are_those_of_the_prompt_and_not_of_the_negative_one(pipe):
    maps = {}
    for prompt, negative in [("a", "a"), ("a", "cat cat cat"), ("red", "a")]:
        request = REQUEST.replace(prompt=prompt, negative_prompt=negative, steps=1)
        maps[prompt, negative] = word_maps(pipe, request)[1][0].heat
    torch.testing.assert_close(maps["a", "a"], maps["a", "cat cat cat"])
    assert not torch.allclose(maps["a", "a"], maps["red", "a"])


def test_steps_are_averaged_and_batches_not_mixed(pipe):
    net, (x, context) = pipe.denoiser, (torch.randn(1, 4, 8, 8), torch.randn(1, 7, 32))
    with torch.no_grad():
        means = []
        for times in ([900], [10], [900, 10]):
            with record_attention(net) as record:
                for t in times:
                    net(x, torch.tensor([t]), net.prepare(Conditioning(context)))
            means.append(record.mean())
    torch.testing.assert_close(means[2], (means[0] + means[1]) / 2)
    with record_attention(net) as record, torch.no_grad():
        net(x, torch.tensor([1]), net.prepare(Conditioning(context)))
        with pytest.raises(ValueError, match="open a record for each"):
            net(x, torch.tensor([1]), net.prepare(Conditioning(torch.randn(2, 7, 32))))


def test_what_cannot_be_recorded_is_said():
    with pytest.raises(ValueError, match="attention of a object cannot be recorded"), record_attention(object()):
        pass
    pipe = Pipeline.load("tiny")
    with record_attention(pipe.denoiser) as record, pytest.raises(ValueError, match="nothing was recorded"):
        record.mean()


def test_maps_of_any_size_of_latents():
    net = UNet(tiny().denoiser.replace(block_out_channels=(8,) * 4, num_heads=(1,) * 4, attention_stages=(True,) * 4))
    with record_attention(net) as record, torch.no_grad():
        net(torch.randn(1, 4, 11, 7), torch.tensor([1]), net.prepare(Conditioning(torch.randn(1, 3, 32))))
    assert {tuple(m.shape[2:]) for m in record.sums.values()} == {(11, 7), (6, 4), (3, 2), (2, 1)}
    torch.testing.assert_close(record.mean().sum(1), torch.ones(1, 11, 7))


@pytest.mark.parametrize("prompt", ["", "a (red:1.3) cat BREAK [fog]", "it's 3 o'clock", "cat " * 100])
def test_words_are_in_their_rows(pipe, prompt):
    words, length = pipe.text.words(prompt), pipe.text.config.max_position_embeddings
    rows = [row for _, rows in words for row in rows]
    assert rows == sorted(set(rows)) and len(rows) == sum(len(chunk) for chunk in pipe.text._chunks(prompt))
    if "BREAK" in prompt:
        assert [(word, rows) for word, rows in words][-1] == ("fog", [length + 1])
    if prompt.startswith("cat"):
        assert len(words) == 100 and {word for word, _ in words} == {"cat"}


@pytest.mark.parametrize("scale", [1.0, 5.0])
@pytest.mark.parametrize("solver", ["ddim", "euler_a", "dpmpp_2m"])
def test_clean_latents_end_in_the_picture(pipe, scale, solver):
    """At the last step of a solver that ends at x_0, the network's idea of x_0 is what is drawn."""
    request = REQUEST.replace(guidance_scale=scale, solver=solver, guidance_rescale=0.3, steps=4)
    steps = list(pipe.sample_latents(request))
    seen = list(clean_latents(pipe, request))
    assert len(seen) == len(steps) and all(x.shape == steps[0].shape for x in seen)
    if solver == "ddim":  # x_0 of the last step, noised to timestep 0 as Stable Diffusion's schedule ends
        assert (seen[-1] - steps[-1]).abs().max() < 0.2 * steps[-1].std()
    else:
        torch.testing.assert_close(seen[-1], steps[-1], atol=2e-3, rtol=2e-3)
    assert pipe.decode(seen[0], request)[0].size == (80, 64)


def test_sizes_along_the_u_and_the_blocks():
    unet, dit = (Pipeline.load(name).denoiser for name in ("tiny", "tiny-dit"))
    assert feature_sizes(unet, 9, 14) == [
        ("conv_in", (32, 9, 14)),
        ("down_blocks.0", (32, 5, 7)),
        ("down_blocks.1", (64, 5, 7)),
        ("mid_block", (64, 5, 7)),
        ("up_blocks.0", (64, 9, 14)),
        ("up_blocks.1", (32, 9, 14)),
        ("conv_out", (4, 9, 14)),
    ]
    assert feature_sizes(dit, 8, 14) == [
        ("pos_embed", (28, 48)),
        ("transformer_blocks.0", (28, 48)),
        ("transformer_blocks.1", (28, 48)),
        ("proj_out", (28, 16)),
    ]
    assert not any(m._forward_hooks for net in (unet, dit) for m in net.modules())


def test_words_are_drawn_over_the_picture():
    picture, maps = word_maps(Pipeline.load("tiny"), REQUEST.replace(steps=1))
    heat = torch.zeros(8, 10)
    heat[2:4, 6:8] = 3.0
    drawn = np.asarray(overlay(picture, heat)).astype(int)
    assert drawn.shape == (64, 80, 3)
    assert (drawn[20:28, 52:60, 0] >= 127).all() and np.ptp(drawn[40:, :40], axis=2).max() == 0
    assert attention_sheet(picture, maps, columns=3).size == (3 * 84 + 4, 2 * 84 + 4)
    assert overlay(picture, torch.zeros(8, 10)).size == picture.size
