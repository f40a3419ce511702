"""Models with random weights: "tiny", "sd15" and the like, to try the machinery and to start training."""

import math

import torch
from torch import Tensor

from sdlite.checkpoints.parts import UNTRAINED, ModelParts, empty_parts, finished
from sdlite.checkpoints.tokenizer import load_tokenizer
from sdlite.config import UNTRAINED_NOTE, ModelConfig
from sdlite.models.codec import LatentCodec


def random_model(config: ModelConfig, seed: int, codec: LatentCodec | None = None) -> ModelParts:
    """An untrained model whose random weights depend on the seed. It runs, but its images are noise.

    codec: used instead of a random one.
    """
    config = config if codec is None else config.replace(codec=codec.config)
    parts = empty_parts(config, load_tokenizer(), UNTRAINED, codec)
    generator = torch.Generator().manual_seed(seed)
    for part, module in parts.modules.items():
        if part != "codec" or codec is None:
            drawn = {name: _random(name, tensor, generator) for name, tensor in module.state_dict().items()}
            module.load_state_dict(drawn, assign=True)
    return finished(parts, [UNTRAINED_NOTE])


def _random(name: str, like: Tensor, generator: torch.Generator) -> Tensor:
    """Uniform weights of variance 1 / (3 fan_in), PyTorch's own; small biases; norms near 1, so that none is unused."""
    drawn = torch.empty(like.shape).uniform_(-1, 1, generator=generator)
    if like.ndim > 1:
        return drawn / math.sqrt(like[0].numel())
    return drawn / 10 + (0 if name.endswith("bias") else 1)
