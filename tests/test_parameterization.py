"""Conversions between noise, image and velocity against diffusers, round trips, and the loss built on them."""

import pytest
import torch
from diffusers import DDIMScheduler
from diffusers.training_utils import compute_snr

from sdlite.config import ScheduleConfig
from sdlite.contracts import Conditioning
from sdlite.diffusion.loss import diffusion_loss, min_snr_weight
from sdlite.diffusion.schedule import (
    Schedule,
    add_noise,
    eps_from_v,
    eps_from_x0,
    split_output,
    training_target,
    v_from_eps,
    x0_from_eps,
    x0_from_v,
)
from tests.references.closed_form import GaussianDenoiser, normal

SCHEDULE = Schedule(ScheduleConfig())
T = torch.tensor([0, 250, 999])
ABAR = SCHEDULE.abar(T)
X_0, EPS = normal(3, 4, 5, 6), normal(3, 4, 5, 6, seed=1)
DIFFUSERS = DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)


def test_forward_process_and_velocity_equal_diffusers():
    assert torch.allclose(add_noise(X_0, EPS, ABAR), DIFFUSERS.add_noise(X_0, EPS, T), atol=1e-5)
    assert torch.allclose(v_from_eps(X_0, EPS, ABAR), DIFFUSERS.get_velocity(X_0, EPS, T), atol=1e-5)


def test_round_trips():
    x_t, v = add_noise(X_0, EPS, ABAR), v_from_eps(X_0, EPS, ABAR)
    for found, expected in [
        (x0_from_eps(x_t, EPS, ABAR), X_0),
        (eps_from_x0(x_t, X_0, ABAR), EPS),
        (x0_from_v(x_t, v, ABAR), X_0),
        (eps_from_v(x_t, v, ABAR), EPS),
    ]:
        assert torch.allclose(found, expected, atol=1e-10)


@pytest.mark.parametrize("prediction", ["epsilon", "v", "sample"])
def test_a_perfect_output_splits_into_image_and_noise(prediction):
    x_t = add_noise(X_0, EPS, ABAR)
    x_0, eps = split_output(training_target(X_0, EPS, ABAR, prediction), x_t, ABAR, prediction)
    assert torch.allclose(x_0, X_0, atol=1e-10)
    assert torch.allclose(eps, EPS, atol=1e-10)


def test_v_is_finite_where_nothing_of_the_image_is_left():
    zero = torch.zeros((), dtype=torch.float64)
    x_0, eps = split_output(-X_0, EPS, zero, "v")
    assert torch.equal(x_0, X_0)
    assert torch.equal(eps, EPS)


def test_shapes_must_agree():
    with pytest.raises(ValueError, match=r"noise has shape \(1, 4, 5, 6\), but x_0 has \(3, 4, 5, 6\)"):
        add_noise(X_0, EPS[:1], ABAR)


@pytest.mark.parametrize("prediction", ["epsilon", "v"])
def test_loss_of_the_best_denoiser_is_the_variance_that_remains(prediction):
    """x_0 ~ N(mu, s^2) leaves E[(eps - E[eps|x_t])^2] = abar s^2 / (abar s^2 + 1 - abar), over 1 - abar for v."""
    denoiser = GaussianDenoiser(SCHEDULE.abars, mu=0.5, spread=0.8, prediction=prediction)
    x_0, noise = 0.5 + 0.8 * normal(4, 4, 128, 128), normal(4, 4, 128, 128, seed=1)
    t = torch.full((4,), 400)
    loss = diffusion_loss(denoiser, SCHEDULE, x_0, Conditioning(torch.zeros(4, 1, 1)), t=t, noise=noise)
    abar = SCHEDULE.abars[400]
    remaining = abar * 0.64 / (abar * 0.64 + 1 - abar) / (1 if prediction == "epsilon" else abar)
    assert loss.item() == pytest.approx(remaining.item(), rel=0.01)


def test_min_snr_weights_equal_the_papers():
    snr = compute_snr(DIFFUSERS, T)
    assert torch.allclose(min_snr_weight(ABAR, "epsilon").float(), snr.clamp(max=5) / snr, rtol=1e-4)
    assert torch.allclose(min_snr_weight(ABAR, "sample").float(), snr.clamp(max=5), rtol=1e-4)
    by_hand = min_snr_weight(torch.tensor([0.0, 0.5, 0.9], dtype=torch.float64), "v")  # snr 0, 1, 9
    assert torch.allclose(by_hand, torch.tensor([1.0, 1.0, 0.5], dtype=torch.float64))
