"""Noise schedule and timestep grids against diffusers' tables and values worked out by hand."""

import pytest
import torch
from diffusers import DDIMScheduler

from sdlite.config import ScheduleConfig
from sdlite.diffusion.schedule import Schedule, spaced_timesteps

NAMES = {"scaled_linear": "scaled_linear", "linear": "linear", "cosine": "squaredcos_cap_v2"}


def reference(config: ScheduleConfig) -> DDIMScheduler:
    return DDIMScheduler(
        num_train_timesteps=config.num_train_steps,
        beta_start=config.beta_start,
        beta_end=config.beta_end,
        beta_schedule=NAMES[config.beta_schedule],
        rescale_betas_zero_snr=config.zero_terminal_snr,
        timestep_spacing=config.spacing or "leading",
        steps_offset=config.steps_offset,
        set_alpha_to_one=config.final_abar_one,
        clip_sample=False,
    )


@pytest.mark.parametrize("zero_terminal_snr", [False, True])
@pytest.mark.parametrize("beta_schedule", NAMES)
def test_abar_equals_diffusers(beta_schedule, zero_terminal_snr):
    config = ScheduleConfig(beta_schedule=beta_schedule, zero_terminal_snr=zero_terminal_snr)
    ours, theirs = Schedule(config).abars, reference(config).alphas_cumprod.double()
    assert ((ours - theirs).abs() / theirs.clamp(min=1e-3)).max() < 2e-5  # diffusers' table is float32


def test_stable_diffusion_constants():
    abars = Schedule(ScheduleConfig()).abars  # exactness page, item 40
    assert abars[0].item() == pytest.approx(1 - 0.00085, abs=1e-12)
    assert abars[999].item() == pytest.approx(0.0046601, abs=5e-8)
    assert ((1 - abars[999]) / abars[999]).sqrt().item() == pytest.approx(14.6146, abs=1e-4)


def test_zero_terminal_snr_ends_in_pure_noise():
    assert Schedule(ScheduleConfig(zero_terminal_snr=True)).abars[-1] == 0


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("steps", [1, 2, 3, 7, 10, 19, 30, 50, 333, 700, 999, 1000])
def test_timesteps_equal_diffusers(spacing, steps):
    config = ScheduleConfig(spacing=spacing)
    scheduler = reference(config)
    scheduler.set_timesteps(steps)
    theirs = scheduler.timesteps.clamp(max=999)  # with all 1000 steps and an offset diffusers goes past its own table
    assert Schedule(config).timesteps(steps).tolist() == theirs.tolist()[:steps]


def test_timesteps_by_hand():
    assert spaced_timesteps(1000, 4, "leading", 1).tolist() == [751, 501, 251, 1]
    assert spaced_timesteps(1000, 4, "trailing").tolist() == [999, 749, 499, 249]
    assert spaced_timesteps(1000, 4, "linspace").tolist() == [999, 666, 333, 0]
    assert [spaced_timesteps(1000, n, "leading", 1)[0].item() for n in (50, 25, 30)] == [981, 961, 958]


@pytest.mark.parametrize("steps", [0, 1001, -3])
def test_impossible_steps_are_refused(steps):
    with pytest.raises(ValueError, match=f"steps={steps} must be from 1 to 1000"):
        spaced_timesteps(1000, steps, "trailing")


@pytest.mark.parametrize("one", [False, True])
def test_a_run_ends_at_the_first_abar_or_at_one(one):
    schedule = Schedule(ScheduleConfig(final_abar_one=one))
    assert schedule.abar(torch.tensor(-1)) == (1 if one else schedule.abars[0])
    assert schedule.abar(torch.tensor([[0, 999]])).tolist() == [schedule.abars[[0, 999]].tolist()]
