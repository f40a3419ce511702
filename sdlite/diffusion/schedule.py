"""The noise schedule, and the conversions between what a network may predict: noise eps, clean latents x_0, velocity v.

    x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps          (Ho et al. 2020, eq. 4)
    v   = sqrt(abar_t) eps - sqrt(1 - abar_t) x_0          (Salimans and Ho 2022, appendix D)

abar_t, the cumulative product of 1 - beta, is how much of the image is left at a training timestep: at timestep 0 x_t
is almost the image. At the last timestep it is almost pure noise, or exactly that with a zero terminal SNR.
In the conversions x_t, x_0, eps, v, noise are (B, C, H, W), scaled latents, and abar_t is float64, () for all images or
(B,) for one each, as `Schedule.abar` gives it. They return the shape and dtype of the latents.
"""

import math

import torch
from torch import Tensor

from sdlite.config import Prediction, ScheduleConfig

COSINE_OFFSET = 0.008  # Nichol and Dhariwal 2021, eq. 17: keeps the first betas from vanishing
COSINE_MAX_BETA = 0.999  # ibid.: keeps the last beta from being singular


def betas(config: ScheduleConfig) -> Tensor:
    """Noise variances of the training steps, (num_train_steps,) float64.

    "scaled_linear" is linear in the square root (CompVis calls it "linear"); "cosine" is Nichol and Dhariwal's.
    """
    n, start, end = config.num_train_steps, config.beta_start, config.beta_end
    if config.beta_schedule == "linear":
        return torch.linspace(start, end, n, dtype=torch.float64)
    if config.beta_schedule == "scaled_linear":
        return torch.linspace(math.sqrt(start), math.sqrt(end), n, dtype=torch.float64) ** 2
    angles = (torch.arange(n + 1, dtype=torch.float64) / n + COSINE_OFFSET) / (1 + COSINE_OFFSET) * math.pi / 2
    abars = angles.cos() ** 2
    return (1 - abars[1:] / abars[:-1]).clamp(max=COSINE_MAX_BETA)


def with_zero_terminal_snr(abars: Tensor) -> Tensor:
    """Shifts and scales sqrt(abar) so that the last is 0 and the first is kept (Lin et al. 2023, algorithm 1)."""
    roots = abars.sqrt()
    first, last = roots[0], roots[-1]
    return ((roots - last) * first / (first - last)) ** 2


def spaced_timesteps(num_train_steps: int, steps: int, spacing: str, offset: int = 0) -> Tensor:
    """The `steps` training timesteps of a run, (steps,) int64, descending.

    "leading": multiples of num_train_steps // steps, plus offset; the usual grid of Stable Diffusion. "trailing": the
    ends of equal intervals, beginning at the last timestep; needed for a zero terminal SNR. "linspace": equal distances
    from the first to the last. Source: Lin et al. 2023, table 2. ValueError for steps not in 1..num_train_steps.
    """
    if not 1 <= steps <= num_train_steps:
        raise ValueError(f"steps={steps} must be from 1 to {num_train_steps}, the timesteps of the training schedule")
    i = torch.arange(steps, dtype=torch.float64)
    if spacing == "leading":
        t = (i * (num_train_steps // steps) + offset).flip(0)
    elif spacing == "trailing":
        t = (num_train_steps - i * (num_train_steps / steps)).round() - 1
    else:
        t = torch.linspace(0, num_train_steps - 1, steps, dtype=torch.float64).round().flip(0)
    return t.long().clamp(max=num_train_steps - 1)  # offset 1 with all 1000 steps would reach past the last


class Schedule:
    """The noise schedule as a float64 table of abar, and the timestep grids over it."""

    def __init__(self, config: ScheduleConfig) -> None:
        self.config = config
        self.abars = (1 - betas(config)).cumprod(0)  # (num_train_steps,)
        if config.zero_terminal_snr:
            self.abars = with_zero_terminal_snr(self.abars)
        self.final_abar = torch.ones_like(self.abars[0]) if config.final_abar_one else self.abars[0]

    @property
    def sigmas(self) -> Tensor:
        """Noise in units of the image, sqrt((1 - abar) / abar): (num_train_steps,) float64, ascending."""
        return ((1 - self.abars) / self.abars).sqrt()

    def abar(self, t: Tensor) -> Tensor:
        """abar at integer timesteps t of any shape, float64 on the CPU. t = -1 stands for the end of a run."""
        return torch.cat([self.abars, self.final_abar[None]])[t.cpu()]  # index -1 is the end

    def timesteps(self, steps: int) -> Tensor:
        """The grid of a run, (steps,) int64 descending; "leading" if the config does not name one."""
        config = self.config
        return spaced_timesteps(config.num_train_steps, steps, config.spacing or "leading", config.steps_offset)


def signal_and_noise(abar_t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """sqrt(abar_t) and sqrt(1 - abar_t), taken in abar_t's float64, then shaped and cast to multiply `like`."""
    abar_t = abar_t.reshape(abar_t.shape + (1,) * (like.ndim - 1)) if abar_t.ndim else abar_t  # (B, 1, 1, 1) or ()
    device = like.device if abar_t.ndim else abar_t.device  # a number may stay on the CPU
    return abar_t.sqrt().to(device, like.dtype), (1 - abar_t).sqrt().to(device, like.dtype)


def add_noise(x_0: Tensor, noise: Tensor, abar_t: Tensor) -> Tensor:
    """x_t: the forward process in one step. Raises ValueError if the shapes of x_0 and noise differ."""
    if x_0.shape != noise.shape:
        raise ValueError(f"noise has shape {tuple(noise.shape)}, but x_0 has {tuple(x_0.shape)}; they must be equal")
    signal, sigma = signal_and_noise(abar_t, x_0)
    return signal * x_0 + sigma * noise


def x0_from_eps(x_t: Tensor, eps: Tensor, abar_t: Tensor) -> Tensor:
    """x_0 that eps implies. Infinite at abar_t = 0: there only v or x_0 can be predicted."""
    signal, sigma = signal_and_noise(abar_t, x_t)
    return (x_t - sigma * eps) / signal


def eps_from_x0(x_t: Tensor, x_0: Tensor, abar_t: Tensor) -> Tensor:
    """eps that x_0 implies."""
    signal, sigma = signal_and_noise(abar_t, x_t)
    return (x_t - signal * x_0) / sigma


def x0_from_v(x_t: Tensor, v: Tensor, abar_t: Tensor) -> Tensor:
    """x_0 that v implies; finite at every abar_t."""
    signal, sigma = signal_and_noise(abar_t, x_t)
    return signal * x_t - sigma * v


def eps_from_v(x_t: Tensor, v: Tensor, abar_t: Tensor) -> Tensor:
    """eps that v implies; finite at every abar_t."""
    signal, sigma = signal_and_noise(abar_t, x_t)
    return signal * v + sigma * x_t


def v_from_eps(x_0: Tensor, eps: Tensor, abar_t: Tensor) -> Tensor:
    """The velocity of the pair, what a v-predicting network is trained on."""
    signal, sigma = signal_and_noise(abar_t, x_0)
    return signal * eps - sigma * x_0


def split_output(output: Tensor, x_t: Tensor, abar_t: Tensor, prediction: Prediction) -> tuple[Tensor, Tensor]:
    """(x_0, eps) from a network's output, whatever it predicts."""
    if prediction == "epsilon":
        return x0_from_eps(x_t, output, abar_t), output
    if prediction == "v":
        return x0_from_v(x_t, output, abar_t), eps_from_v(x_t, output, abar_t)
    return output, eps_from_x0(x_t, output, abar_t)


def training_target(x_0: Tensor, noise: Tensor, abar_t: Tensor, prediction: Prediction) -> Tensor:
    """What the network should output for x_t = add_noise(x_0, noise, abar_t)."""
    if prediction == "epsilon":
        return noise
    return v_from_eps(x_0, noise, abar_t) if prediction == "v" else x_0
