"""Conversions between what a network may predict: noise eps, clean latents x_0, velocity v.

    x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps          (Ho et al. 2020, eq. 4)
    v   = sqrt(abar_t) eps - sqrt(1 - abar_t) x_0          (Salimans and Ho 2022, appendix D)

x_t, x_0, eps, v, noise: (B, C, H, W), scaled latents. abar_t: float64, () for all images or (B,) for one each, as
`Schedule.abar` gives it. All functions return the shape and dtype of the latents.
"""

from torch import Tensor

from sdlite.config import Prediction


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
