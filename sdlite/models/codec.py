"""Images to latents and back: diffusers' autoencoders, with latents scaled to about unit variance.

    images (B, 3, H, W) in [-1, 1]  --encode-->  latents (B, C, H/f, W/f)  --decode-->  images

The only module that imports models from diffusers.
"""

from diffusers import AutoencoderKL, AutoencoderTiny
from torch import Tensor, nn

from sdlite.config import AutoencoderKLConfig, AutoencoderTinyConfig, CodecConfig

COPIES = 3  # of the largest activation, which exist at the same time while it is normalised and activated


class LatentCodec(nn.Module):
    """AutoencoderKL (Kingma and Welling 2014; Rombach et al. 2022) or AutoencoderTiny, with its scale and shift.

    Implements `Codec`. `model` is the autoencoder with diffusers' names.
    """

    def __init__(self, config: CodecConfig) -> None:
        super().__init__()
        self.config = config
        self.factor, self.latent_channels = config.factor, config.latent_channels
        self.deterministic = isinstance(config, AutoencoderTinyConfig)
        fields = config.model_dump()
        if isinstance(config, AutoencoderKLConfig):
            stages = len(config.block_out_channels)
            fields |= {
                "down_block_types": ["DownEncoderBlock2D"] * stages,
                "up_block_types": ["UpDecoderBlock2D"] * stages,
            }
            self.model = AutoencoderKL(**fields)
        else:
            self.model = AutoencoderTiny(**fields)

    def encode(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """(B, 3, H, W) -> (B, C, H/f, W/f), see `Codec`; H and W are multiples of `factor`."""
        encoded = self.model.encode(images)
        if isinstance(self.config, AutoencoderKLConfig):
            posterior = encoded.latent_dist
            z = posterior.mean if noise is None else posterior.mean + posterior.std * noise
        else:
            z = encoded.latents
        return (z - (self.config.shift_factor or 0.0)) * self.config.scaling_factor

    def decode(self, latents: Tensor) -> Tensor:
        """(B, C, H/f, W/f) -> (B, 3, H, W), about [-1, 1].

        In one piece: GroupNorm's statistics are the whole image's; tiles of it would differ in colour and contrast.
        """
        return self.model.decode(latents / self.config.scaling_factor + (self.config.shift_factor or 0.0)).sample

    def decode_bytes(self, width: int, height: int) -> int:
        """Of the largest activations, in float32 at the full size."""
        if isinstance(self.config, AutoencoderKLConfig):
            channels = self.config.block_out_channels[:2]  # the finest, and the next as its upsampled input
        else:
            channels = self.config.decoder_block_out_channels[-1:]
        return COPIES * 4 * max(channels) * width * height
