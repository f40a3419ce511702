"""An exponential moving average of a network's weights, whose held-out loss is lower (notebook 04)."""

from collections.abc import Mapping

import torch
from torch import Tensor

RAMP = 0.05  # half life as a part of the samples seen, so that the random start is soon forgotten (Karras et al. 2024)


def ema_decay(samples_seen: int, batch: int, half_life: int) -> float:
    """Factor of the old average at an update after `samples_seen` samples: one half per half life.

    half_life: in samples. Source: NVlabs/edm, training_loop.py, ema_halflife_kimg and ema_rampup_ratio.
    """
    return 0.5 ** (batch / max(min(half_life, RAMP * samples_seen), 1e-8))


@torch.no_grad()
def update_ema(average: Mapping[str, Tensor], weights: Mapping[str, Tensor], decay: float) -> None:
    """In place: average = decay * average + (1 - decay) * weights; what is no float is copied."""
    for name, mean in average.items():
        if mean.is_floating_point():
            mean.lerp_(weights[name].detach().to(mean.dtype), 1 - decay)
        else:
            mean.copy_(weights[name])
