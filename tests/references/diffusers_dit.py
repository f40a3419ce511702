"""diffusers' PixArt transformer for one of our configs: the independent truth of tests/test_dit.py."""

import torch
from diffusers import ConfigMixin, ModelMixin, PixArtTransformer2DModel
from diffusers.configuration_utils import register_to_config

from sdlite.config import DiTConfig


def reference_dit(config: DiTConfig) -> PixArtTransformer2DModel:
    return PixArtTransformer2DModel(
        sample_size=config.sample_size,
        patch_size=config.patch_size,
        in_channels=config.in_channels,
        out_channels=config.out_channels,
        num_layers=config.depth,
        num_attention_heads=config.num_heads,
        attention_head_dim=config.width // config.num_heads,
        cross_attention_dim=config.width,
        caption_channels=config.context_dim,
        use_additional_conditions=False,
    )


class AsUNet(ModelMixin, ConfigMixin):
    """The reference called as Stable Diffusion's pipelines call their UNet: they then are a reference for whole images.

    diffusers' own pipelines for this network have T5 in CLIP's place.
    """

    @register_to_config
    def __init__(self, in_channels: int, sample_size: int, time_cond_proj_dim: int | None = None) -> None:
        super().__init__()

    @classmethod
    def of(cls, config: DiTConfig) -> "AsUNet":
        unet = cls(config.in_channels, config.sample_size)
        unet.transformer = reference_dit(config)
        return unet

    def load_state_dict(self, tensors: dict[str, torch.Tensor]) -> None:
        self.transformer.load_state_dict(tensors)

    def forward(self, x: torch.Tensor, t: torch.Tensor, encoder_hidden_states: torch.Tensor, **_: object):
        return (self.transformer(x, encoder_hidden_states, t.expand(len(x))).sample,)
