"""diffusers' UNet for one of our configs: the independent truth of tests/test_unet.py."""

from diffusers import UNet2DConditionModel

from sdlite.config import UNetConfig


def reference_unet(config: UNetConfig) -> UNet2DConditionModel:
    attention = config.attention_stages
    return UNet2DConditionModel(
        sample_size=8,  # which no output depends on
        in_channels=config.in_channels,
        out_channels=config.out_channels,
        down_block_types=["CrossAttnDownBlock2D" if has else "DownBlock2D" for has in attention],
        up_block_types=["CrossAttnUpBlock2D" if has else "UpBlock2D" for has in reversed(attention)],
        block_out_channels=config.block_out_channels,
        layers_per_block=config.layers_per_block,
        attention_head_dim=config.num_heads,  # diffusers' name for the number of heads
        cross_attention_dim=config.context_dim,
        norm_num_groups=config.num_groups,
        use_linear_projection=config.use_linear_projection,
        transformer_layers_per_block=[config.depth(stage) for stage in range(len(attention))],
    )
