"""Settings of every test run."""

import torch

torch.set_num_threads(1)  # toy models are faster so, and a busy machine then slows the tests in proportion only
