"""Images to latents and back: diffusers' autoencoders, in latents of about unit variance.

    images (B, 3, H, W) in [-1, 1]  --encode-->  latents (B, C, H/f, W/f)  --decode-->  images

The only module that imports models from diffusers.
"""

from diffusers import AutoencoderKL, AutoencoderTiny
from torch import Tensor, nn

from sdlite.config import AutoencoderKLConfig, AutoencoderTinyConfig, CodecConfig

TILE_PIXELS = 512  # side of a tile in pixels; diffusers blends neighbours over a quarter of it


class LatentCodec(nn.Module):
    """AutoencoderKL (Kingma and Welling 2014; Rombach et al. 2022) or AutoencoderTiny with its scale and shift.

    `model` holds the autoencoder under diffusers' names, `factor` the pixels per latent cell.
    """

    def __init__(self, config: CodecConfig) -> None:
        super().__init__()
        self.config = config
        self.factor = config.factor
        fields = config.model_dump()
        if isinstance(config, AutoencoderKLConfig):
            stages = len(config.block_out_channels)
            fields |= {
                "down_block_types": ["DownEncoderBlock2D"] * stages,
                "up_block_types": ["UpDecoderBlock2D"] * stages,
            }
            self.model = AutoencoderKL(**fields)
            self.model.tile_sample_min_size = TILE_PIXELS
            self.model.tile_latent_min_size = TILE_PIXELS // self.factor
        else:
            self.model = AutoencoderTiny(**fields)

    @property
    def deterministic(self) -> bool:
        """Whether `encode` has no use for noise."""
        return isinstance(self.config, AutoencoderTinyConfig)

    def encode(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """Latents of images: the posterior's mean, or with noise a sample of it.

        images: (B, 3, H, W) in [-1, 1], H and W multiples of `factor`. noise: (B, C, H/f, W/f).
        """
        self.model.use_tiling = False  # diffusers has one switch for both directions
        encoded = self.model.encode(images)
        if isinstance(self.config, AutoencoderKLConfig):
            posterior = encoded.latent_dist
            z = posterior.mean if noise is None else posterior.mean + posterior.std * noise
        else:
            z = encoded.latents
        return (z - (self.config.shift_factor or 0.0)) * self.config.scaling_factor

    def decode(self, latents: Tensor, *, tiled: bool = False) -> Tensor:
        """Images (B, 3, H, W), about [-1, 1], of latents (B, C, H/f, W/f).

        tiled: in overlapping tiles, so that large images fit in memory; colours may differ slightly from a decode in
        one piece.
        """
        self.model.use_tiling = tiled
        return self.model.decode(latents / self.config.scaling_factor + (self.config.shift_factor or 0.0)).sample
