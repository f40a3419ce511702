"""What the network predicts at every step, and the size of its feature maps."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sdlite.contracts import Conditioning, Denoiser, Memory, Wrapper
from sdlite.diffusion.sampling import guide, rescale_guidance
from sdlite.diffusion.schedule import split_output
from sdlite.models.dit import DiT
from sdlite.models.unet import UNet
from sdlite.pipeline import Pipeline, Sources
from sdlite.request import Request

PATHS = {  # the modules that an image passes, in this order; lists entry by entry
    "UNet": ("conv_in", "down_blocks", "mid_block", "up_blocks", "conv_out"),
    "DiT": ("pos_embed", "transformer_blocks", "proj_out"),
}


class Watched(Wrapper):
    """A denoiser that keeps the latents, timesteps and output of its last call."""

    def __init__(self, denoiser: Denoiser) -> None:
        super().__init__(denoiser)
        self.last: tuple[Tensor, Tensor, Tensor] | None = None

    def __call__(self, x: Tensor, t: Tensor, memory: Memory) -> Tensor:
        output = self.denoiser(x, t, memory)
        self.last = x, t, output
        return output


def clean_latents(
    pipe: Pipeline, request: Request, *, images: Sources = None, masks: Sources = None
) -> Iterator[Tensor]:
    """Yields x_0 as the network predicts it at every step, (1, C, H, W), with guidance.

    `pipe.decode(x_0, request)` makes an image of it. Infinite where eps is predicted at abar_t = 0.
    """
    watched = Watched(pipe.denoiser)
    for _ in pipe.with_parts(denoiser=watched).sample_latents(request, images=images, masks=masks):
        assert watched.last is not None, "a step runs the denoiser"
        x, t, output = watched.last
        if request.guidance_scale > 1:
            uncond, cond = output.chunk(2)  # (1, C, H, W) each
            output = rescale_guidance(guide(uncond, cond, request.guidance_scale), cond, request.guidance_rescale)
        x_t = x[:, : output.shape[1]]  # without the channels of inpainting
        yield split_output(output, x_t, pipe.schedule.abar(t.long()), watched.prediction)[0]


@torch.no_grad()
def feature_sizes(network: UNet | DiT, height: int, width: int) -> list[tuple[str, tuple[int, ...]]]:
    """(module, size of its output) from the latents to the output: (C, h, w), or (L, D) for tokens.

    height, width: of the latents, in cells. Runs the network once, on zeros.
    """
    sizes: list[tuple[str, tuple[int, ...]]] = []

    def left(name: str, _: Any, inputs: Any, output: Any) -> None:
        last = output[-1] if isinstance(output, list) else output  # stages of the way down return their skips
        sizes.append((name, tuple(last.shape[1:])))

    path: dict[str, nn.Module] = {}
    for name in PATHS[type(network).__name__]:
        module = network.get_submodule(name)
        each = module.named_children() if isinstance(module, nn.ModuleList) else [("", module)]
        path |= {f"{name}.{entry}".rstrip("."): m for entry, m in each}
    hooks = [module.register_forward_hook(partial(left, name)) for name, module in path.items()]
    weight = next(network.parameters())
    try:
        x = weight.new_zeros(1, network.in_channels, height, width)
        t = torch.zeros(1, dtype=torch.long, device=weight.device)
        context = weight.new_zeros(1, 1, network.config.context_dim)
        network(x, t, network.prepare(Conditioning(context)))
    finally:
        for handle in hooks:
            handle.remove()
    return sizes
