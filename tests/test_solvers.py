"""DDIM and DDPM against diffusers where diffusers is right, and against closed forms everywhere."""

from itertools import product

import diffusers
import pytest
import torch
from diffusers.utils.torch_utils import randn_tensor

from sdlite.config import ScheduleConfig
from sdlite.diffusion.sampling import ImageNoise, denoise, keep_known
from sdlite.diffusion.schedule import Schedule
from sdlite.diffusion.schedulers import DiffusersSolver, diffusers_scheduler
from sdlite.diffusion.solvers import DDIM, DDPM, ddim_step, ddpm_step, solver_for
from sdlite.pipeline.job import first_step
from sdlite.request import Request
from tests.references.closed_form import GaussianDenoiser, normal
from tests.references.diffusers_pipeline import SCHEDULERS
from tests.test_schedule import reference

ALL = ("ddim", "ddpm", *SCHEDULERS)
SHAPE = (2, 4, 5, 6)
SD = ScheduleConfig()


def run(solver, denoiser, x, noise=None):
    *_, x_0 = denoise(denoiser, solver, x, None, noise or (lambda: normal(*x.shape, seed=9)))
    return x_0


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("prediction", ["epsilon", "v", "sample"])
@pytest.mark.parametrize(
    ("spacing", "steps"),
    [("leading", 10), ("leading", 30), ("leading", 7), ("trailing", 10), ("trailing", 50), (None, 20)],
)
def test_ddim_equals_diffusers_step_by_step(spacing, steps, prediction, eta):
    config = ScheduleConfig(spacing=spacing)
    theirs = reference(config)
    theirs.register_to_config(prediction_type={"v": "v_prediction"}.get(prediction, prediction))
    theirs.set_timesteps(steps)
    ours = DDIM(Schedule(config), steps, eta, prediction)
    assert ours.timesteps.tolist() == theirs.timesteps.tolist()
    x = normal(*SHAPE)
    for i, t in enumerate(theirs.timesteps):
        output, noise = normal(*SHAPE, seed=2 * i), normal(*SHAPE, seed=2 * i + 1)
        expected = theirs.step(output, t, x, eta=eta, variance_noise=noise if eta else None).prev_sample
        found = ours.step(i, x, output, lambda noise=noise: noise)
        # from x_0 to eps divides by sqrt(1 - abar), 0.04 at t = 1, where diffusers' float32 table has 4 digits left
        assert torch.allclose(found, expected, rtol=1e-5, atol=1e-4 if prediction == "sample" else 1e-5)
        x = expected


@pytest.mark.parametrize("prediction", ["epsilon", "v", "sample"])
@pytest.mark.parametrize(("spacing", "steps"), [("leading", 30), ("trailing", 7), ("linspace", 12), ("trailing", 700)])
def test_ddpm_equals_diffusers_step_by_step(spacing, steps, prediction):
    config = ScheduleConfig(spacing=spacing)
    theirs = diffusers.DDPMScheduler.from_config(
        reference(config).config, prediction_type={"v": "v_prediction"}.get(prediction, prediction)
    )
    theirs.set_timesteps(steps)
    ours = DDPM(Schedule(config), steps, prediction)
    x = normal(*SHAPE)
    for i, t in enumerate(theirs.timesteps[:40]):
        output = normal(*SHAPE, seed=i)
        expected = theirs.step(output, t, x, generator=torch.Generator().manual_seed(i)).prev_sample
        noise = torch.randn(SHAPE, generator=torch.Generator().manual_seed(i), dtype=torch.float64)
        assert torch.allclose(ours.step(i, x, output, lambda noise=noise: noise), expected, rtol=1e-5, atol=2e-5)
        x = expected


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("steps", [1, 3, 7, 10, 30, 300, 700, 999])
@pytest.mark.parametrize("prediction", ["epsilon", "v"])
def test_ddim_is_exact_for_a_single_image_on_every_grid(spacing, steps, prediction):
    """With the true noise every step lands on the forward process, so the run ends at its last noise level exactly."""
    schedule = Schedule(ScheduleConfig(spacing=spacing))
    denoiser = GaussianDenoiser(schedule.abars, mu=0.7, spread=0.0, prediction=prediction)
    solver = DDIM(schedule, steps, prediction=prediction)
    z, abar = normal(*SHAPE), solver.abar_t[0]
    x_0 = run(solver, denoiser, abar.sqrt() * 0.7 + (1 - abar).sqrt() * z)
    end = schedule.final_abar
    assert torch.allclose(x_0, end.sqrt() * 0.7 + (1 - end).sqrt() * z, atol=1e-9)


@pytest.mark.parametrize(("spacing", "steps"), [("trailing", 7), ("trailing", 700), ("linspace", 30), ("linspace", 10)])
def test_sdlite_is_right_where_diffusers_previous_timestep_is_not(spacing, steps):
    """diffusers' DDIM takes t - 1000 // steps for the previous timestep, which on these grids is not the next one."""
    config = ScheduleConfig(spacing=spacing)
    schedule, theirs = Schedule(config), reference(config)
    theirs.set_timesteps(steps)
    denoiser = GaussianDenoiser(schedule.abars, mu=0.3, spread=0.0)
    ours = DDIM(schedule, steps)
    start = normal(*SHAPE)
    exact = denoiser.flow(start, ours.abar_t[0], schedule.final_abar)
    x = start
    for t in theirs.timesteps:
        x = theirs.step(denoiser(x, t.expand(len(x))), t, x).prev_sample
    assert (run(ours, denoiser, start) - exact).abs().max() < 1e-9
    assert (x - exact).abs().max() > 1e-4


def test_ddim_converges_to_the_exact_flow():
    schedule = Schedule(ScheduleConfig(spacing="trailing"))
    denoiser = GaussianDenoiser(schedule.abars, mu=0.3, spread=0.5)
    start = normal(*SHAPE)
    exact = denoiser.flow(start, schedule.abars[-1], schedule.final_abar)
    errors = [(run(DDIM(schedule, steps), denoiser, start) - exact).abs().max().item() for steps in (10, 100, 1000)]
    assert errors[0] > 5 * errors[1] > 25 * errors[2]


@pytest.mark.parametrize("stochastic", ["ddpm", "ddim eta 1"])
def test_stochastic_samples_have_the_mean_and_spread_of_the_data(stochastic):
    schedule = Schedule(ScheduleConfig(spacing="trailing"))
    denoiser = GaussianDenoiser(schedule.abars, mu=0.3, spread=0.5)
    solver = DDPM(schedule, 250) if stochastic == "ddpm" else DDIM(schedule, 250, eta=1.0)
    generator = torch.Generator().manual_seed(0)
    x = run(solver, denoiser, normal(1, 1, 200, 200), lambda: torch.randn(1, 1, 200, 200, generator=generator).double())
    assert x.mean().item() == pytest.approx(0.3, abs=0.02)
    assert x.std().item() == pytest.approx(0.5, abs=0.02)


def test_ddim_with_eta_one_is_ddpm():
    x, eps, noise = normal(*SHAPE), normal(*SHAPE, seed=1), normal(*SHAPE, seed=2)
    abar_t, abar_prev = torch.tensor([0.3, 0.5], dtype=torch.float64)
    x_0 = (x - (1 - abar_t).sqrt() * eps) / abar_t.sqrt()
    ddim = ddim_step(x_0, eps, abar_t, abar_prev, eta=1.0, noise=noise)
    assert torch.allclose(ddim, ddpm_step(x, x_0, abar_t, abar_prev, noise=noise), atol=1e-12)


def test_zero_terminal_snr_runs_with_v_and_is_refused_with_epsilon():
    schedule = Schedule(ScheduleConfig(zero_terminal_snr=True, spacing="trailing"))
    denoiser = GaussianDenoiser(schedule.abars, mu=0.3, spread=0.5, prediction="v")
    start = normal(1, 1, 100, 100)
    x_0 = run(DDIM(schedule, 200, prediction="v"), denoiser, start)
    assert torch.allclose(x_0, denoiser.flow(start, schedule.abars[-1], schedule.final_abar), atol=0.03)
    for solver in (DDIM, DDPM):
        with pytest.raises(ValueError, match="predict v"):
            solver(schedule, 10)


def test_noise_is_required_where_it_is_used_and_not_drawn_elsewhere():
    schedule = Schedule(SD)
    with pytest.raises(ValueError, match=r"eta=0\.5 needs noise"):
        ddim_step(normal(*SHAPE), normal(*SHAPE), schedule.abars[5], schedule.abars[2], eta=0.5)
    DDIM(schedule, 10).step(0, normal(*SHAPE), normal(*SHAPE), lambda: pytest.fail("noise drawn with eta 0"))


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("prediction", ["epsilon", "v"])
def test_named_solvers_equal_diffusers_own_loop(name, prediction):
    """The same run as diffusers' pipelines make it, with their `from_config` and a list of generators."""
    scheduler_class = getattr(diffusers, SCHEDULERS[name][0])
    sd = diffusers.PNDMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1, skip_prk_steps=True
    )
    options = {"prediction_type": "v_prediction" if prediction == "v" else "epsilon"} | SCHEDULERS[name][1]
    theirs = scheduler_class.from_config(sd.config, **options)
    theirs.set_timesteps(9)
    denoiser = GaussianDenoiser(Schedule(SD).abars.float(), mu=0.3, spread=0.5, prediction=prediction)
    seeds = [3, 4]
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    x = randn_tensor(SHAPE, generator=generators) * theirs.init_noise_sigma
    extra = {"generator": generators} if name in ("euler", "euler_a", "lcm") else {}
    for t in theirs.timesteps:
        x = theirs.step(denoiser(theirs.scale_model_input(x, t), t.reshape(1)), t, x, **extra).prev_sample
    noise = ImageNoise(seeds, SHAPE[1:])
    request = Request(prompt="", solver=name, steps=9)
    solver = solver_for(request, Schedule(SD), prediction, noise.generators, start=0)
    found = run(solver, denoiser, noise.draw() * solver.initial_scale, noise.draw)
    assert torch.allclose(found, x, atol=1e-6)


def test_a_diffusers_scheduler_is_copied_for_every_run():
    scheduler = diffusers_scheduler("dpmpp_2m", SD, "epsilon")
    denoiser, start = GaussianDenoiser(Schedule(SD).abars, 0.3, 0.5), normal(*SHAPE)
    first, second = (run(DiffusersSolver(scheduler, 8), denoiser, start) for _ in range(2))
    assert torch.equal(first, second)
    assert scheduler.num_inference_steps is None


SCHEDULES = {
    "Stable Diffusion": SD,
    "zero terminal SNR": ScheduleConfig(spacing="trailing", zero_terminal_snr=True, final_abar_one=True),
    "cosine": ScheduleConfig(beta_schedule="cosine", spacing="trailing"),
    "short": ScheduleConfig(num_train_steps=20, beta_schedule="linear"),
    "short and shifted": ScheduleConfig(num_train_steps=30, steps_offset=3, spacing="leading"),
    "linspace": ScheduleConfig(spacing="linspace"),
}


def ends_well(schedule: Schedule, request: Request, prediction: str) -> bool:
    """Whether the run is refused beforehand, or ends at numbers of a latent's size."""
    start, noise = first_step(request), ImageNoise([1], (1, 4, 4))
    try:
        solver = solver_for(request, schedule, prediction, noise.generators, start)
    except ValueError as refusal:
        return "\n" not in str(refusal)
    denoiser = GaussianDenoiser(schedule.abars.float(), 0.3, 0.1, prediction)
    x_0, x = torch.full((1, 1, 4, 4), 0.3), noise.draw()
    known = keep_known(solver, x_0, x, torch.ones(1, 1, 4, 4).triu()) if request.mask else None
    x = x * solver.initial_scale if request.image is None else solver.noised(x_0, x, start)
    *_, end = denoise(denoiser, solver, x, None, noise.draw, start=start, constrain=known)
    return bool(end.abs().max() < 6)


def check_every_run(name: str, numbers: list[int]) -> None:
    schedule = Schedule(SCHEDULES[name])
    modes = ({}, {"image": "given", "strength": 0.7}, {"image": "given", "mask": "given", "strength": 1.0})
    for solver, prediction, mode, steps in product(ALL, ("epsilon", "v", "sample"), modes, numbers):
        # from an abar of 1e-9 float32 cannot tell x_0 by its epsilon, in which diffusers is no better
        if (name, prediction) != ("cosine", "epsilon") and int(steps * mode.get("strength", 1)):
            request = Request(prompt="", solver=solver, steps=steps, **mode)
            assert ends_well(schedule, request, prediction), (solver, prediction, mode, steps)


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_solver_draws_on_every_schedule_or_refuses(name):
    check_every_run(name, [3, 21])


@pytest.mark.slow
@pytest.mark.parametrize("name", SCHEDULES)
def test_every_solver_draws_with_every_number_of_steps_or_refuses(name):
    check_every_run(name, [*range(1, 151), 999, 1000])


def test_karras_steps_where_the_first_timesteps_coincide():
    """The first three of its timesteps are the last of the schedule; a run must not begin at the second of them."""
    schedule = Schedule(ScheduleConfig(beta_schedule="cosine", spacing="trailing"))
    denoiser = GaussianDenoiser(schedule.abars.float(), mu=0.3, spread=0.5, prediction="v")
    request = Request(prompt="", solver="dpmpp_2m_karras", steps=60)
    solver = solver_for(request, schedule, "v", (), start=0)
    assert solver.timesteps[0] == solver.timesteps[1]
    x = normal(*SHAPE, dtype=torch.float32)
    assert torch.allclose(run(solver, denoiser, x), 0.3 + 0.5 * x, atol=0.06)  # the exact flow


@pytest.mark.parametrize("steps", [5, 8, 15])
def test_karras_steps_of_a_zero_terminal_snr_are_spent_where_there_is_something_to_see(steps):
    """With few steps they come closer to the exact flow than even spacing, which diffusers' own, from 4096, do not."""
    schedule = Schedule(SCHEDULES["zero terminal SNR"])
    denoiser = GaussianDenoiser(schedule.abars.float(), mu=0.3, spread=0.5, prediction="v")
    x = normal(*SHAPE, dtype=torch.float32)
    exact = denoiser.flow(x, schedule.abars[-1].float(), torch.tensor(1.0))
    requests = [Request(prompt="", solver=name, steps=steps) for name in ("dpmpp_2m_karras", "dpmpp_2m")]
    solvers = [solver_for(request, schedule, "v", (), start=0) for request in requests]
    assert len(solvers[0].timesteps) == steps and solvers[0].timesteps[0] == 999
    karras, even = [(run(solver, denoiser, x) - exact).abs().max() for solver in solvers]
    assert karras < 0.3 * even


@pytest.mark.parametrize(
    ("fields", "config", "prediction", "message"),
    [
        ({"solver": "euler_a"}, {}, "sample", "'euler_a' knows no model that predicts 'sample'"),
        ({"solver": "pndm"}, {}, "sample", "'pndm' knows no model that predicts 'sample'"),
        ({"solver": "pndm", "steps": 15}, {"num_train_steps": 30, "steps_offset": 3}, "v", "past this schedule's last"),
        ({"solver": "lcm", "steps": 4}, {"zero_terminal_snr": True}, "epsilon", "predict v"),
        ({"solver": "lcm", "steps": 21}, {"num_train_steps": 20}, "v", "steps=21 must be up to 20"),
        ({"solver": "euler"}, {"beta_end": 0.9}, "v", "pure noise before its last timestep; use 'ddim'"),
        ({"solver": "ddim"}, {"beta_end": 0.9}, "epsilon", "predict v"),
    ],
)
def test_what_a_solver_cannot_do_is_said_beforehand(fields, config, prediction, message):
    with pytest.raises(ValueError, match=message):
        solver_for(Request(prompt="", **fields), Schedule(ScheduleConfig(**config)), prediction, (), start=0)
