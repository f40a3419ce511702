"""diffusers' PixArt transformer for one of our configs: the independent truth of tests/test_dit.py."""

from diffusers import PixArtTransformer2DModel

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
