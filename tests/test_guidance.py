"""Guidance, inpainting wrappers, per-image noise and the sampling loop."""

import pytest
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg
from diffusers.utils.torch_utils import randn_tensor

from sdlite.config import ScheduleConfig
from sdlite.contracts import Conditioning
from sdlite.diffusion.sampling import Guided, ImageNoise, WithChannels, denoise, guide, keep_known, rescale_guidance
from sdlite.diffusion.schedule import Schedule
from sdlite.diffusion.solvers import DDIM
from tests.references.closed_form import GaussianDenoiser, normal

UNCOND, COND = normal(2, 4, 5, 6), normal(2, 4, 5, 6, seed=1)


class Recorder:
    """A denoiser that returns its context's number everywhere and remembers how it was called."""

    prediction, in_channels, patch_size = "epsilon", 9, 1

    def prepare(self, conditioning):
        return conditioning.context

    def __call__(self, x, t, memory):
        self.x, self.t = x, t
        return memory[:, :1, :1, None].expand(-1, 4, *x.shape[-2:]).clone()


def test_scale_one_is_the_conditional_and_zero_the_unconditional():
    assert torch.allclose(guide(UNCOND, COND, 1.0), COND)
    assert torch.equal(guide(UNCOND, COND, 0.0), UNCOND)


@pytest.mark.parametrize("rescale", [0.0, 0.7, 1.0])
def test_rescale_equals_diffusers(rescale):
    guided = guide(UNCOND, COND, 7.5)
    expected = rescale_noise_cfg(guided, COND, guidance_rescale=rescale)
    assert torch.allclose(rescale_guidance(guided, COND, rescale), expected, atol=1e-12)


def test_guided_runs_unconditional_first_with_a_scale_per_image():
    recorder = Recorder()
    context = torch.tensor([1.0, 2.0, 10.0, 20.0]).reshape(4, 1, 1)  # uncond 1, 2; cond 10, 20
    guided = Guided(recorder, torch.tensor([2.0, 3.0]).reshape(2, 1, 1, 1))
    out = guided(torch.zeros(2, 4, 3, 3), torch.tensor([5, 6]), guided.prepare(Conditioning(context)))
    assert out[:, 0, 0, 0].tolist() == [1 + 2 * 9, 2 + 3 * 18]
    assert recorder.t.tolist() == [5, 6]


def test_extra_channels_follow_the_latents_under_guidance():
    recorder = Recorder()
    x, extra = normal(2, 4, 3, 3), normal(2, 5, 3, 3)
    Guided(WithChannels(recorder, extra), 2.0)(x, torch.tensor([1, 1]), torch.zeros(4, 1, 1))
    assert torch.equal(recorder.x, torch.cat([x, extra], dim=1))


def test_wrappers_answer_for_themselves():
    recorder, extra = Recorder(), normal(2, 5, 3, 3)
    wrapped = Guided(WithChannels(recorder, extra), 2.0)
    assert (wrapped.prediction, wrapped.in_channels, wrapped.patch_size) == ("epsilon", 9 - 5, 1)
    features = normal(4, 7, 8)
    assert wrapped.prepare(Conditioning(features)) is features


def test_known_part_ends_as_the_image_and_the_rest_does_not():
    schedule = Schedule(ScheduleConfig())
    solver, image, noise = DDIM(schedule, 10), normal(1, 4, 4, 4, seed=3), normal(1, 4, 4, 4)
    mask = torch.zeros(1, 1, 4, 4, dtype=torch.float64)
    mask[..., 2:] = 1
    denoiser = GaussianDenoiser(schedule.abars, mu=0.0, spread=0.1)
    keep = keep_known(solver, image, noise, mask)
    *_, x = denoise(denoiser, solver, noise, None, lambda: noise, constrain=keep)
    assert torch.equal(x[..., :2], image[..., :2])
    assert (x[..., 2:] - image[..., 2:]).abs().mean() > 0.3


def test_noise_is_that_of_diffusers_and_independent_of_the_batch():
    noise = ImageNoise([7, 2**64 - 1, 0], (4, 5, 6))
    generators = [torch.Generator().manual_seed(seed) for seed in (7, 2**64 - 1, 0)]
    for _ in range(2):
        drawn = noise.draw()
        assert torch.equal(drawn, randn_tensor((3, 4, 5, 6), generator=generators))
    alone = ImageNoise([0], (4, 5, 6))
    alone.draw()
    assert torch.equal(alone.draw()[0], drawn[2])


def test_the_loop_does_one_step_at_a_time_and_can_start_late():
    schedule = Schedule(ScheduleConfig())
    calls = []

    class Counting(GaussianDenoiser):
        def __call__(self, x, t, memory=None):
            calls.append(t.tolist())
            return super().__call__(x, t, memory)

    steps = denoise(Counting(schedule.abars, 0.0, 1.0), DDIM(schedule, 10), normal(2, 1, 2, 2), None, None, start=7)
    next(steps)
    assert calls == [[201, 201]]
    assert len(list(steps)) == 2
    assert calls[-1] == [1, 1]
