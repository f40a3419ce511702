"""What a denoiser is trained on: views of images as latents, and captions as tokens.

images --views--> images --codec--> x_0      captions --tokenizer--> tokens --text encoder--> contexts
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sdlite.models.codec import LatentCodec
from sdlite.models.prompt import escaped
from sdlite.models.text import TextEncoder
from sdlite.training.datasets.augment import SIDED, Example, augmented
from sdlite.training.datasets.captions import caption_of, subject_of, tokenize
from sdlite.training.datasets.draws import Generator, sample_generator
from sdlite.training.datasets.folder import Records
from sdlite.training.datasets.pixels import Shaped, on_white

PLAIN = 2  # views of an image that show all of it: itself and mirrored
ENCODED = 32  # images at once


class Latents(NamedTuple):
    """Training data of the denoiser, view by view of all records.

    x_0: (N, C, h, w). tokens: (N, T), of the captions. shapes: (N, 2), height and width of each in latent cells; cells
    beyond them are padding.
    """

    x_0: Tensor
    tokens: Tensor
    shapes: Tensor


def view(
    mine: tuple[dict[str, Any], Tensor], other: tuple[dict[str, Any], Tensor], number: int, generator: Generator
) -> tuple[Tensor, str]:
    """Image (4, H, W) uint8 and caption. View 0 is plain, view 1 mirrored if the caption allows it, others composed.

    Images that are not square are not composed; their views are plain and mirrored alternately.
    """
    record, pixels = mine
    caption = caption_of(record, generator)
    square = pixels.shape[1] == pixels.shape[2]
    if "concept" not in record or (number == 0 if square else number % PLAIN == 0):
        return pixels, caption
    if number < PLAIN or not square:
        return (pixels if SIDED.search(str(record["concept"])) else pixels.flip(-1)), caption
    first, second = (
        Example(Image.fromarray(p.permute(1, 2, 0).numpy()), subject_of(r, generator), str(r.get("style", "")))
        for r, p in (mine, other)
    )
    made = augmented(first, second, generator)
    return torch.from_numpy(np.array(made.image)).permute(2, 0, 1), made.caption


@torch.no_grad()
def encode(
    parts: tuple[LatentCodec, TextEncoder],
    records: Records,
    images: Shaped,
    *,
    views: int,
    seed: int,
    say: Callable[[str], None],
) -> Latents:
    """All views of all records as latents in float16 and tokens."""
    codec, text = parts
    x_0, captions = [], []
    for number in range(views):
        say(f"encoding {len(records)} images and captions, view {number + 1} of {views}")
        for start in range(0, len(records), ENCODED):
            rows = range(start, min(start + ENCODED, len(records)))
            made = [_view(records, images, number, i, seed) for i in rows]
            x_0.append(_encoded(codec, [image for image, _ in made], images.pixels.shape[-1]))
            captions += [caption for _, caption in made]
    return Latents(torch.cat(x_0), tokenize(text, captions), (images.shapes // codec.factor).repeat(views, 1))


def _view(records: Records, images: Shaped, number: int, i: int, seed: int) -> tuple[Tensor, str]:
    """View `number` of record i; it may be composed with another image of the same shape."""
    generator = sample_generator(seed, number * len(records) + i)
    j = int(generator.integers(len(records)))
    j = j if torch.equal(images.shapes[i], images.shapes[j]) else i
    h, w = images.shapes[i].tolist()
    mine, other = ((records[k], images.pixels[k, :, :h, :w]) for k in (i, j))
    return view(mine, other, number, generator)


def _encoded(codec: LatentCodec, images: list[Tensor], longest: int) -> Tensor:
    """(B, C, M, M) float16 of images (4, H, W) uint8; each at the top left, where M is of `longest` pixels."""
    side = longest // codec.factor
    x_0 = torch.zeros(len(images), codec.latent_channels, side, side, dtype=torch.float16)
    for shape in {image.shape for image in images}:
        rows = [i for i, image in enumerate(images) if image.shape == shape]
        encoded = codec.encode(on_white(torch.stack([images[i] for i in rows])))  # (b, C, h, w)
        x_0[rows, :, : encoded.shape[2], : encoded.shape[3]] = encoded.half()
    return x_0


@torch.no_grad()
def encode_tokens(text: TextEncoder, tokens: Tensor) -> Tensor:
    """(B, T, D) of tokens (B, T)."""
    return text.model(tokens).last_hidden_state


def preview_prompt(text: TextEncoder, caption: str) -> str:
    """A prompt with the tokens of a caption that were trained on."""
    tokens, whole = text.caption_tokens(caption)
    return escaped(caption if whole else text.tokenizer.decode(tokens))
