"""The contracts between the parts of a pipeline. Anything that has these methods can take a part's place.

    prompts --TextModel.encode--> TextFeatures --> Conditioning --Denoiser.prepare--> Memory
    x_t --Denoiser--> output --Solver.step--> x_prev ... x_0 --Codec.decode--> images

Rows R are prompts per image times images: with guidance the B unconditional rows come first, then the B prompts.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, TypeAlias

from torch import Tensor

from sdlite.config import Prediction

Memory: TypeAlias = Any
"""The result of `Denoiser.prepare`. Only the denoiser that made it looks inside."""

Noise: TypeAlias = Callable[[], Tensor]
"""Draws standard normal noise of the latents' shape, (B, C, H, W)."""


class TextFeatures(NamedTuple):
    """What a text model makes of B prompts. context: (B, T, D). pooled: (B, P), or None if the model has none."""

    context: Tensor
    pooled: Tensor | None = None


class Conditioning(NamedTuple):
    """What a denoiser is conditioned on. context: (R, T, D) text features.

    pooled: (R, P) one vector per prompt, and sizes: (R, S) float32 image sizes and crops, for denoisers that take them
    (SDXL; Podell et al. 2023, section 2.2). Others ignore both.
    """

    context: Tensor
    pooled: Tensor | None = None
    sizes: Tensor | None = None


class TextModel(Protocol):
    """Turns prompts into features."""

    def num_chunks(self, prompt: str) -> int:
        """How many chunks of tokens the prompt has. Only prompts of equally many chunks share a batch."""

    def words(self, prompt: str) -> list[tuple[str, list[int]]]:
        """The prompt's words in order, each with its rows of `context`."""

    def encode(self, prompts: Sequence[str], *, clip_skip: int = 0) -> TextFeatures:
        """Features of B prompts. clip_skip: number of last layers to skip; ValueError if there are fewer."""


class Denoiser(Protocol):
    """Predicts noise (or v, or x_0) from noisy latents: UNet, DiT and every wrapper of them."""

    @property
    def prediction(self) -> Prediction:
        """What `__call__` returns: "epsilon", "v" or "sample" (x_0 itself)."""

    @property
    def in_channels(self) -> int:
        """Channels of x. More than the codec's: an inpainting model, which also takes mask and masked image."""

    @property
    def patch_size(self) -> int:
        """Sides of the latents are multiples of it; 1 for a UNet."""

    def prepare(self, conditioning: Conditioning) -> Memory:
        """Runs once per batch of images and may keep whatever does not change between steps."""

    def __call__(self, x: Tensor, t: Tensor, memory: Memory) -> Tensor:
        """x: (B, C, H, W) noisy latents. t: (B,) training timesteps. memory: from `prepare` of R = G B rows, G whole.

        Returns (G B, C, H, W): all images with the first B rows, then all images with the next B (for guidance).
        """


class Wrapper:
    """A denoiser around another one. It passes everything on; a wrapper overrides what it changes."""

    def __init__(self, denoiser: Denoiser) -> None:
        self.denoiser = denoiser

    @property
    def prediction(self) -> Prediction:
        return self.denoiser.prediction

    @property
    def in_channels(self) -> int:
        return self.denoiser.in_channels

    @property
    def patch_size(self) -> int:
        return self.denoiser.patch_size

    def prepare(self, conditioning: Conditioning) -> Memory:
        return self.denoiser.prepare(conditioning)

    def __call__(self, x: Tensor, t: Tensor, memory: Memory) -> Tensor:
        return self.denoiser(x, t, memory)


class Codec(Protocol):
    """Images to latents of about unit variance, and back."""

    @property
    def factor(self) -> int:
        """Pixels along each side of a latent cell."""

    @property
    def latent_channels(self) -> int: ...

    @property
    def deterministic(self) -> bool:
        """Whether `encode` ignores noise."""

    def encode(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> (B, C, H/f, W/f): the posterior's mean, or a sample of it if noise is given."""

    def decode(self, latents: Tensor) -> Tensor:
        """(B, C, H/f, W/f) -> (B, 3, H, W), about [-1, 1]."""

    def decode_bytes(self, width: int, height: int) -> int:
        """Lower bound of the memory that `decode` takes for an image of that size, in bytes."""


class Solver(Protocol):
    """A run of S steps. The sampling loop iterates over `timesteps`; some solvers have more than S of them."""

    timesteps: Tensor  # (S,) descending
    initial_scale: float  # standard deviation of x_T

    def scale_input(self, x: Tensor, i: int) -> Tensor:
        """x_t as the denoiser expects it before step i."""

    def step(self, i: int, x: Tensor, output: Tensor, noise: Noise) -> Tensor:
        """x at timesteps[i] and the denoiser's output there -> x at the next timestep."""

    def noised(self, x_0: Tensor, noise: Tensor, i: int) -> Tensor:
        """Clean latents at the noise level of timesteps[i]; x_0 itself past the end."""
