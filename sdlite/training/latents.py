"""What a denoiser is trained on: views of pictures as latents, and captions as tokens.

pictures --views--> images --codec--> x_0      captions --tokenizer--> tokens --text encoder--> contexts
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from sdlite.models.codec import LatentCodec
from sdlite.models.prompt import escaped
from sdlite.models.text import TextEncoder
from sdlite.training.datasets.augment import SIDED, Example, augmented
from sdlite.training.datasets.data import Generator, caption_of, on_white, sample_generator, subject_of, tokenize
from sdlite.training.datasets.folder import Records

PLAIN = 2  # views of a picture that show it whole, as it is and mirrored
ENCODED = 32  # pictures at once


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

    Pictures that are not square are not composed; their views are plain and mirrored alternately.
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
    return torch.frombuffer(bytearray(made.image.tobytes()), dtype=torch.uint8).view(*pixels.shape[1:], 4).permute(
        2, 0, 1
    ), made.caption


@torch.no_grad()
def encode(
    codec: LatentCodec,
    text: TextEncoder,
    records: Records,
    pixels: Tensor,
    *,
    views: int,
    seed: int,
    shapes: Tensor | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Latents:
    """All views of all records as latents in float16 and tokens. shapes: from `load_buckets`; None: whole pictures."""
    shapes = torch.tensor(pixels.shape[-2:]).expand(len(records), 2) if shapes is None else shapes
    x_0, captions = [], []
    for number in range(views):
        say(f"encoding {len(records)} pictures and captions, view {number + 1} of {views}")
        for start in range(0, len(records), ENCODED):
            rows = range(start, min(start + ENCODED, len(records)))
            made = []
            for i in rows:
                generator = sample_generator(seed, number * len(records) + i)
                j = int(generator.integers(len(records)))
                j = j if torch.equal(shapes[i], shapes[j]) else i
                h, w = shapes[i].tolist()
                mine, other = ((records[k], pixels[k, :, :h, :w]) for k in (i, j))
                made.append(view(mine, other, number, generator))
            x_0.append(_encoded(codec, [image for image, _ in made], pixels.shape[-1]))
            captions += [caption for _, caption in made]
    return Latents(torch.cat(x_0), tokenize(text, captions), (shapes // codec.factor).repeat(views, 1))


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
