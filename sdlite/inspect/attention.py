"""Where each word of the prompt was looked at.

    with record_attention(pipe.denoiser) as record:        softmax(Q K^T / sqrt(K)) of every cross-attention,
        (image,) = pipe("a red apple")                      summed over heads and steps
    heat = record.mean()                                    (B, T, H, W): one map for each token of the prompt

Recording hangs hooks on the network and takes them off again, so the network's own code does not know of it and costs
nothing more without a record.
Maps as in DAAM (Tang et al. 2023, section 3): averaged over heads, layers and steps, coarse layers enlarged.
Letters: B batch, of images times prompts under guidance, N heads, L image tokens, T text tokens, H W latent cells.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from sdlite.contracts import Denoiser
from sdlite.images.pixels import from_pil, to_pil
from sdlite.images.sheet import contact_sheet
from sdlite.models.attention import KV, Attention
from sdlite.pipeline import Pipeline, Sources
from sdlite.request import Request


class AttentionRecord:
    """Cross-attention of the calls of one batch. sums: per layer (B, T, rows, columns), over `counts` calls."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}
        self.size = (0, 0)

    def add(self, layer: str, maps: Tensor) -> None:
        """maps: (B, T, rows, columns). Raises ValueError if they are not of the batch that was recorded before."""
        before = self.sums.get(layer)
        if before is not None and before.shape != maps.shape:
            shapes = f"a batch of {tuple(before.shape)} and now {tuple(maps.shape)}"
            raise ValueError(f"recorded {shapes}; open a record for each")
        self.sums[layer] = maps if before is None else before + maps
        self.counts[layer] = self.counts.get(layer, 0) + 1

    def mean(self) -> Tensor:
        """(B, T, H, W) float32: mean over layers and calls, all as large as the latents; sums to 1 over T.

        Under guidance the first half of B is the negative prompts'. Raises ValueError if nothing was recorded.
        """
        if not self.sums:
            raise ValueError("nothing was recorded; call the denoiser within `with record_attention(...)`")
        means = (maps / self.counts[layer] for layer, maps in self.sums.items())
        return torch.stack([F.interpolate(mean, size=self.size, mode="bilinear") for mean in means]).mean(0)


def attention_maps(attention: Attention, x: Tensor, kv: KV) -> Tensor:
    """Where the image tokens look: (B, L, T) float32, mean over heads. Arguments as for `attention`."""
    q = attention.to_q(x).view(*x.shape[:2], attention.num_heads, -1).transpose(1, 2).float()  # (B, N, L, K)
    k = kv[0].float()  # (B, N, T, K)
    return (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1).mean(1)


@contextmanager
def record_attention(denoiser: Denoiser) -> Iterator[AttentionRecord]:
    """Records every cross-attention of a UNet, DiT or other network of our attention layers while the context is open.

    Raises ValueError for a denoiser without such layers, and for a wrapped one, whose network is not ours to know.
    """
    network = denoiser if isinstance(denoiser, nn.Module) else nn.Identity()
    layers = {name: module for name, module in network.named_modules() if name.endswith("attn2")}
    if not layers:
        raise ValueError(f"attention of a {type(denoiser).__name__} cannot be recorded; give the UNet or DiT inside")
    record = AttentionRecord()

    def begins(_: Any, inputs: Any) -> None:
        record.size = tuple(inputs[0].shape[-2:])

    @torch.no_grad()
    def attends(layer: str, attention: Any, inputs: Any) -> None:
        maps = attention_maps(attention, *inputs)  # (B, L, T)
        rows, columns = token_grid(record.size, denoiser.patch_size, maps.shape[1])
        record.add(layer, maps.transpose(1, 2).reshape(*maps.shape[::2], rows, columns))

    hooks = [network.register_forward_pre_hook(begins)]
    hooks += [module.register_forward_pre_hook(partial(attends, name)) for name, module in layers.items()]
    try:
        yield record
    finally:
        for hook in hooks:
            hook.remove()


def token_grid(size: tuple[int, int], patch_size: int, tokens: int) -> tuple[int, int]:
    """(rows, columns) of an attention over that many image tokens. size: (H, W) of the latents."""
    rows, columns = size[0] // patch_size, size[1] // patch_size
    while rows * columns > tokens:
        rows, columns = (rows + 1) // 2, (columns + 1) // 2  # as the UNet's Downsample rounds
    assert rows * columns == tokens, f"{tokens} tokens are no grid of {size} latents"
    return rows, columns


class WordMap(NamedTuple):
    """A word of the prompt and its part of the attention in each latent cell, (H, W) on the CPU."""

    word: str
    heat: Tensor


def word_maps(
    pipe: Pipeline, request: Request, *, images: Sources = None, masks: Sources = None
) -> tuple[Image.Image, list[WordMap]]:
    """The image of a request, as `generate` draws it, and a map for each word of its prompt, in order.

    In each cell the maps and the tokens that are no words (start, end, padding) add up to 1.
    """
    with record_attention(pipe.denoiser) as record:
        (picture,) = pipe.generate(request, images=images, masks=masks, progress=False)
    heat = record.mean()[-1].cpu()  # (T, H, W), of the prompt: the negative one comes first
    return picture, [WordMap(word, heat[rows].sum(0)) for word, rows in pipe.text.words(request.prompt)]


def overlay(picture: Image.Image, heat: Tensor) -> Image.Image:
    """The image in grey under a map (H, W) from black over red and yellow to white, where the map is largest."""
    heat = heat / heat.max().clamp(min=torch.finfo(heat.dtype).tiny)
    size = (picture.height, picture.width)
    large = F.interpolate(heat[None, None], size=size, mode="bilinear")  # (1, 1, height, width) in [0, 1]
    colours = torch.cat([(3 * large - i).clamp(0, 1) for i in range(3)], dim=1)  # (1, 3, height, width)
    grey = from_pil(picture.convert("L"), picture.size)  # (1, 3, height, width) in [-1, 1]
    return to_pil((grey + 2 * colours - 1) / 2)[0]


def attention_sheet(picture: Image.Image, maps: list[WordMap], *, columns: int = 4) -> Image.Image:
    """The image, and then every word's map over it, in one."""
    pictures = [picture, *(overlay(picture, heat) for _, heat in maps)]
    return contact_sheet(pictures, ["", *(word for word, _ in maps)], columns=columns)
