"""The pictures and captions of a data folder (see folder.py) in memory, and the randomness of a sample.

Pictures may have any size. Their transparency is kept, so that backgrounds can vary. If a record has "concept" and
"style", its captions use these, "names" (what people call it) and "descriptions".
"""

import hashlib
import json
import math
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from sdlite.files import atomic_file
from sdlite.images.files import FORMATS, decoded, open_picture
from sdlite.models.text import TextEncoder
from sdlite.training.datasets.folder import Records

Generator = np.random.Generator
MAX_HELD = 64 * 2**30  # bytes of all pictures of a data folder
Fit = Literal["crop", "pad", "bucket"]
WIDEST = 2.5  # longer side over the shorter one, of a bucket


def sample_generator(seed: int, number: int) -> Generator:
    """The generator for all random choices of one training sample."""
    return np.random.default_rng((seed, int(number)))


def normal(generators: Sequence[Generator], shape: tuple[int, ...]) -> Tensor:
    """(B, *shape) standard normal noise, each row from its own generator."""
    return torch.from_numpy(np.stack([g.standard_normal(shape, np.float32) for g in generators]))


def cached(path: Path | None, key: str, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """The result of make(), or the file at path if it was written with the same key.

    key: a hash of everything that the tensors depend on. A file with another key, or a damaged one, is replaced.
    """
    if path is None:
        return make()
    if path.is_file():
        with suppress(SafetensorError, OSError), safe_open(path, framework="pt") as file:
            if (file.metadata() or {}).get("key") == key:
                return load_file(path)
    tensors = {name: tensor.contiguous() for name, tensor in make().items()}
    with atomic_file(path, force=True) as temporary:
        save_file(tensors, temporary, {"key": key})
    return tensors


def key_of(**facts: Any) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def load_pixels(folder: Path, records: Records, size: int, fit: Fit = "crop") -> Tensor:
    """(N, 4, size, size) uint8 RGBA of all records; see `fitted`. Raises ValueError if no memory can hold them."""
    if fit == "bucket":
        raise ValueError("fit=bucket is for the denoiser; use crop or pad")
    pixels = _held(len(records), size)
    for row, record in zip(pixels, records, strict=True):
        row[:] = np.asarray(fitted(_rgba(folder / record["file_name"]), size, fit))
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()


def load_shaped(folder: Path, records: Records, size: int, fit: Fit, step: int) -> tuple[Tensor, Tensor | None]:
    """`load_buckets`, or `load_pixels` and None for the shapes."""
    if fit == "bucket":
        return load_buckets(folder, records, size, step)
    return load_pixels(folder, records, size, fit), None


def load_buckets(folder: Path, records: Records, size: int, step: int) -> tuple[Tensor, Tensor]:
    """Pictures cut to the bucket that is nearest to their shape, and these shapes.

    The sides of a bucket are multiples of step; it has at most size * size pixels. Returns (N, 4, M, M) uint8 RGBA,
    each picture at the top left, where M is the longest side, and (N, 2) int64, height and width of each in pixels.
    """
    shapes = [bucket_of(*_shape(folder / record["file_name"]), size, step) for record in records]
    longest = max((max(shape) for shape in shapes), default=size)
    pixels = _held(len(records), longest)
    for row, record, (height, width) in zip(pixels, records, shapes, strict=True):
        picture = _rgba(folder / record["file_name"])
        row[:height, :width] = np.asarray(ImageOps.fit(picture, (width, height), Image.Resampling.LANCZOS))
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(), torch.tensor(shapes).view(-1, 2)


def bucket_of(width: int, height: int, size: int, step: int) -> tuple[int, int]:
    """Height and width of the bucket whose proportions are nearest to a picture's."""
    heights = range(step, int(size * WIDEST) + 1, step)
    fullest = [(h, size**2 // h // step * step) for h in heights]  # the widest of each height
    buckets = [(h, w) for h, w in fullest if max(h, w) <= WIDEST * min(h, w)]
    return min(buckets, key=lambda bucket: abs(math.log(bucket[1] / bucket[0] * height / width)))


def _held(count: int, size: int) -> np.ndarray:
    """Room for that many RGBA pictures."""
    needed = count * 4 * size**2
    if needed > MAX_HELD:
        raise ValueError(
            f"{count} pictures of {size} pixels take {needed >> 30} GiB of memory, and at most {MAX_HELD >> 30} are "
            "given; take fewer pictures, or a smaller size"
        )
    return np.zeros((count, size, size, 4), np.uint8)


def _rgba(path: Path) -> Image.Image:
    """A picture as `open_picture` reads it, but with its transparency."""
    image = decoded(path)
    return (image if image.has_transparency_data else open_picture(image)).convert("RGBA")


def fitted(image: Image.Image, size: int, fit: Fit = "crop") -> Image.Image:
    """An RGBA picture as a square of size x size pixels.

    fit: "pad" puts the whole picture into the middle of a transparent square; "crop" keeps its middle square. A picture
    with transparent parts is always padded.
    """
    if image.size == (size, size):
        return image
    if fit == "crop" and np.asarray(image)[..., 3].min() == 255:
        return ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS)
    scale = size / max(image.size)
    small = image.resize([max(1, round(side * scale)) for side in image.size], Image.Resampling.LANCZOS)
    square = Image.new("RGBA", (size, size))
    square.paste(small, ((size - small.width) // 2, (size - small.height) // 2))
    return square


def fit_notes(folder: Path, records: Records, fit: Fit) -> list[str]:
    """Notes for the user on pictures that are not square."""
    shapes = [_shape(folder / record["file_name"]) for record in records]
    count = sum(width != height for width, height in shapes)
    if not count:
        return []
    if fit == "bucket":
        return [f"{count} of {len(records)} pictures are not square: each is cut to the nearest of a few shapes"]
    what = "get white bars" if fit == "pad" else "lose their ends, unless they are transparent; --fit pad keeps all"
    return [f"{count} of {len(records)} pictures are not square: they {what}"]


def _shape(path: Path) -> tuple[int, int]:
    """Width and height of the upright picture, read from its header."""
    try:
        with Image.open(path, formats=FORMATS) as image:
            turned = image.getexif().get(ExifTags.Base.Orientation, 1) > 4
            return (image.height, image.width) if turned else image.size
    except Exception:  # whatever it is, reading the whole picture says it in one line
        return _rgba(path).size


def composed(pixels: Tensor, colours: Tensor) -> Tensor:
    """RGBA (B, 4, H, W) uint8 on background colours (B, 3) in [0, 1]: images (B, 3, H, W) in [-1, 1]."""
    rgba = pixels.float() / 255
    alpha = rgba[:, 3:]  # (B, 1, H, W)
    return (rgba[:, :3] * alpha + colours[:, :, None, None] * (1 - alpha)) * 2 - 1


def on_white(pixels: Tensor) -> Tensor:
    return composed(pixels, torch.ones(len(pixels), 3))


def tokenize(text: TextEncoder, captions: Sequence[str]) -> Tensor:
    """(B, L) token ids as the pipeline makes them of each caption's first chunk: start, tokens, end, padding."""
    config, length = text.config, text.config.max_position_embeddings
    rows = [[config.bos_token_id, *text.caption_tokens(c)[0], config.eos_token_id] for c in captions]
    return torch.tensor([row + [config.pad_token_id] * (length - len(row)) for row in rows])


def cut_notes(text: TextEncoder, captions: Sequence[str]) -> list[str]:
    """Notes for the user on captions that are too long to be learned completely."""
    cut = sum(not text.caption_tokens(caption)[1] for caption in captions)
    tokens = text.config.max_position_embeddings - 2
    what = f"{cut} of {len(captions)} captions have more than {tokens} tokens; what comes after them is not learned"
    return [what] if cut else []


TEMPLATES = (
    "{a} {subject}, {style} style",
    "{subject}, {style} style",
    "{subject} in {style} style",
    "{a} {subject}",
    "{subject}",
    "a picture of {a} {subject}",
    "{description}, {style} style",
    "{description}",
)
TEMPLATE_WEIGHTS = (0.25, 0.2, 0.1, 0.15, 0.15, 0.05, 0.05, 0.05)
FIRST_NAME = 0.6  # part of the captions that have the commonest name of a concept


def is_plural(noun: str) -> bool:
    """Whether a noun looks like several things: "cherries", "glasses", not "glass", "cactus" or "tennis"."""
    return bool(re.search(r"[^sui]s$", noun))


def article(noun: str) -> str:
    """ "a", "an", or nothing before a plural."""
    return "" if is_plural(noun) else "an" if noun[:1] in "aeiou" else "a"


def subject_of(record: dict[str, Any], generator: Generator) -> str:
    """One of the record's "names", most often the first; the concept if it has none."""
    names = record.get("names") or [record.get("concept", record["text"])]
    first = len(names) == 1 or generator.random() < FIRST_NAME
    return str(names[0] if first else generator.choice(names[1:]))


def caption_of(record: dict[str, Any], generator: Generator) -> str:
    """One of several captions for the picture; the record's "text" if it has no concept and style."""
    if "concept" not in record or "style" not in record:
        return str(record["text"])
    template = str(generator.choice(TEMPLATES, p=TEMPLATE_WEIGHTS))
    subject = subject_of(record, generator)
    described = str(generator.choice(record.get("descriptions") or [subject]))
    filled = template.format(a=article(subject), subject=subject, style=record["style"], description=described)
    return " ".join(filled.split())  # an empty article leaves two spaces
