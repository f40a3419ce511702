"""The training loss of a noise predictor: the squared error of its output, weighted by the timestep."""

from torch import Tensor

from sdlite.config import Prediction
from sdlite.contracts import Conditioning, Denoiser
from sdlite.diffusion.schedule import Schedule, add_noise, training_target


def min_snr_weight(abar_t: Tensor, prediction: Prediction, gamma: float = 5.0) -> Tensor:
    """Weight of a timestep's error (Hang et al. 2023, section 3.4): min(snr, gamma) in terms of x_0's error.

    For v it uses snr + 1, so that pure noise (snr 0) is trained as well. Returns abar_t's shape. gamma 5: the paper's.
    """
    snr = abar_t / (1 - abar_t)
    if prediction == "epsilon":
        return snr.clamp(max=gamma) / snr
    return (snr + 1).clamp(max=gamma) / (snr + 1) if prediction == "v" else snr.clamp(max=gamma)


def diffusion_loss(
    denoiser: Denoiser,
    schedule: Schedule,
    x_0: Tensor,
    conditioning: Conditioning,
    *,
    t: Tensor,
    noise: Tensor,
    gamma: float | None = None,
) -> Tensor:
    """Mean squared error of the denoiser at x_t (Ho et al. 2020, eq. 14), a scalar.

    x_0, noise: (B, C, H, W). conditioning: B rows. t: (B,) int64. gamma: of `min_snr_weight`; None weighs all t alike.
    """
    abar_t = schedule.abar(t)  # (B,)
    output = denoiser(add_noise(x_0, noise, abar_t), t, denoiser.prepare(conditioning))
    error = (output - training_target(x_0, noise, abar_t, denoiser.prediction)).float().square().flatten(1).mean(1)
    weight = 1.0 if gamma is None else min_snr_weight(abar_t, denoiser.prediction, gamma).to(error)
    return (weight * error).mean()
