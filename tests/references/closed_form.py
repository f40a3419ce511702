"""Data whose best denoiser is known: all images are one point mu, or normal around it with deviation spread.

For x_0 ~ N(mu, spread^2), x_t = sqrt(abar) x_0 + sqrt(1 - abar) eps is normal, so E[eps | x_t] is linear in x_t, and
the probability-flow ODE keeps (x_t - sqrt(abar) mu) / sqrt(abar spread^2 + 1 - abar) constant (Song et al. 2021b).
"""

import torch
from torch import Tensor

from sdlite.contracts import Conditioning


class GaussianDenoiser:
    """The exact eps, v or x_0 of x_0 ~ N(mu, spread^2), as a Denoiser."""

    in_channels, patch_size = 4, 1

    def __init__(self, abars: Tensor, mu: float, spread: float, prediction: str = "epsilon") -> None:
        self.abars, self.mu, self.spread, self.prediction = abars, mu, spread, prediction

    def prepare(self, conditioning: Conditioning) -> None:
        return None

    def __call__(self, x: Tensor, t: Tensor, memory: None = None) -> Tensor:
        abar = self.abars[t.long()].reshape(-1, *[1] * (x.ndim - 1))
        deviation = x - abar.sqrt() * self.mu
        variance = abar * self.spread**2 + 1 - abar
        eps = (1 - abar).sqrt() * deviation / variance
        if self.prediction == "epsilon":
            return eps
        x_0 = self.mu + abar.sqrt() * self.spread**2 * deviation / variance
        if self.prediction == "sample":
            return x_0
        return abar.sqrt() * eps - (1 - abar).sqrt() * x_0

    def flow(self, x: Tensor, abar_from: Tensor, abar_to: Tensor) -> Tensor:
        """Where the probability-flow ODE takes x from one noise level to another."""
        scales = [(abar * self.spread**2 + 1 - abar).sqrt() for abar in (abar_from, abar_to)]
        return abar_to.sqrt() * self.mu + scales[1] * (x - abar_from.sqrt() * self.mu) / scales[0]


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)
