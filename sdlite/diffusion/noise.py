"""Randomness as an input: one generator per image, so that an image does not depend on its batch, device or order."""

from collections.abc import Sequence

import torch
from torch import Tensor


class ImageNoise:
    """Standard normal noise for a batch, each image from its own seed.

    Drawn on the CPU in float32, as diffusers does with a list of CPU generators: the same seed gives the same image.
    seeds: one per image, 0 <= seed < 2**64. shape: (C, H, W) of one image's latents.
    """

    def __init__(self, seeds: Sequence[int], shape: tuple[int, int, int], device: torch.device | str = "cpu") -> None:
        self.generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
        self.shape = shape
        self.device = device

    def draw(self) -> Tensor:
        """The next (B, C, H, W) of every image's stream."""
        return torch.stack([torch.randn(self.shape, generator=g) for g in self.generators]).to(self.device)
