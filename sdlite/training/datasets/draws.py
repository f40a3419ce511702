"""The randomness of a training sample: everything is drawn from a generator that its number decides."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

Generator = np.random.Generator


def sample_generator(seed: int, number: int) -> Generator:
    """The generator for all random choices of one training sample."""
    return np.random.default_rng((seed, int(number)))


def normal(generators: Sequence[Generator], shape: tuple[int, ...]) -> Tensor:
    """(B, *shape) standard normal noise, each row from its own generator."""
    return torch.from_numpy(np.stack([g.standard_normal(shape, np.float32) for g in generators]))
