"""A folder of pictures and captions, in memory: what `sdlite data emoji` writes, or any "imagefolder" of your own.

    DIR/train/metadata.jsonl   one line per picture: {"file_name": "a.png", "text": "a red apple", ...}
    DIR/train/a.png            any size; transparency is kept, so that backgrounds can vary

validation/ and test/ are alike and optional. Without splits, DIR/metadata.jsonl is the training data. Where a line has
"concept" and "style", captions are made of these, of "names" (what people call it) and of "descriptions".
"""

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from sdlite.images import decoded

Records = list[dict[str, Any]]
Generator = np.random.Generator


def sample_generator(seed: int, number: int) -> Generator:
    """All randomness of one training sample."""
    return np.random.default_rng((seed, int(number)))


def normal(generators: Sequence[Generator], shape: tuple[int, ...]) -> Tensor:
    """(B, *shape) standard normal noise, each row from its own generator."""
    return torch.from_numpy(np.stack([g.standard_normal(shape, np.float32) for g in generators]))


def keep(tensors: dict[str, Tensor], path: Path) -> None:
    """Writes a cache in one step: processes that train together may all do so, while others read it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary)
    temporary.replace(path)


def read_records(folder: Path, split: str = "train", fields: Sequence[str] = ("file_name", "text")) -> Records:
    """Lines of a split's metadata.jsonl, file names made relative to folder; none for an absent held-out split.

    Raises FileNotFoundError without training data, ValueError for a line that is no record.
    """
    inside = folder / split if (folder / "train").is_dir() else folder
    path = inside / "metadata.jsonl"
    if split != "train" and (inside == folder or not path.is_file()):
        return []
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; make the data with `sdlite data emoji -o {folder}`")
    records = []
    for i, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        if not isinstance(record, dict) or not all(isinstance(record.get(name), str) for name in fields):
            raise ValueError(f"{path}:{i} must be a JSON object with text as " + " and ".join(f'"{n}"' for n in fields))
        for name in fields:
            if name.endswith("file_name"):
                file = Path(os.path.normpath(record[name]))
                if file.is_absolute() or ".." in file.parts:
                    raise ValueError(f"{path}:{i}: {name}={record[name]!r} leads out of the folder; copy it there")
                record[name] = (inside / file).relative_to(folder).as_posix()
        records.append(record)
    if split == "train" and not records:
        raise ValueError(f"{path} lists no picture; give a folder with some")
    return records


def load_pixels(folder: Path, records: Records, size: int) -> Tensor:
    """(N, 4, size, size) uint8 RGBA of all records, scaled to fit and centred on transparency."""
    pixels = np.zeros((len(records), size, size, 4), np.uint8)
    for row, record in zip(pixels, records, strict=True):
        row[:] = np.asarray(fitted(decoded(folder / record["file_name"]).convert("RGBA"), size))
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()


def fitted(image: Image.Image, size: int) -> Image.Image:
    """The whole picture in a square of size x size pixels."""
    if image.size == (size, size):
        return image
    scale = size / max(image.size)
    small = image.resize([max(1, round(side * scale)) for side in image.size], Image.Resampling.LANCZOS)
    square = Image.new("RGBA", (size, size))
    square.paste(small, ((size - small.width) // 2, (size - small.height) // 2))
    return square


def composed(pixels: Tensor, colours: Tensor) -> Tensor:
    """RGBA (B, 4, H, W) uint8 on background colours (B, 3) in [0, 1]: images (B, 3, H, W) in [-1, 1]."""
    rgba = pixels.float() / 255
    alpha = rgba[:, 3:]  # (B, 1, H, W)
    return (rgba[:, :3] * alpha + colours[:, :, None, None] * (1 - alpha)) * 2 - 1


def on_white(pixels: Tensor) -> Tensor:
    return composed(pixels, torch.ones(len(pixels), 3))


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
    """One of the record's "names", most often the first; the concept where it has none."""
    names = record.get("names") or [record.get("concept", record["text"])]
    first = len(names) == 1 or generator.random() < FIRST_NAME
    return str(names[0] if first else generator.choice(names[1:]))


def caption_of(record: dict[str, Any], generator: Generator) -> str:
    """One of several ways to ask for the picture; "text" as it is where the record has no concept and style."""
    if "concept" not in record or "style" not in record:
        return str(record["text"])
    template = str(generator.choice(TEMPLATES, p=TEMPLATE_WEIGHTS))
    subject = subject_of(record, generator)
    described = str(generator.choice(record.get("descriptions") or [subject]))
    filled = template.format(a=article(subject), subject=subject, style=record["style"], description=described)
    return " ".join(filled.split())  # an empty article leaves two spaces
