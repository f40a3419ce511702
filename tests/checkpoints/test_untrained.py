"""Models with random weights."""

import pytest
import torch

from sdlite.checkpoints.untrained import random_model
from sdlite.config import tiny


@pytest.mark.usefixtures("one_tokenizer")
def test_random_models_leave_the_global_generator_alone():
    state = torch.get_rng_state()
    a, b, c = (random_model(tiny(), seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert a.hash == b.hash != c.hash
    assert a.name == "untrained (random weights)" and "untrained" in a.notes[0]
