"""Captions of a record, drawn anew for every sample, and their tokens.

If a record has "concept" and "style", its captions use these, "names" (what people call it) and "descriptions". For a
new form of captions, add one of the TEMPLATES.
"""

import math
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sdlite.models.text import TextEncoder
from sdlite.training.datasets.draws import Generator

TEMPLATES = {  # template: how often it is used, compared with the others
    "{a} {subject}, {style} style": 0.25,
    "{subject}, {style} style": 0.2,
    "{subject} in {style} style": 0.1,
    "{a} {subject}": 0.15,
    "{subject}": 0.15,
    "a picture of {a} {subject}": 0.05,
    "{description}, {style} style": 0.05,
    "{description}": 0.05,
}
FIRST_NAME = 0.6  # part of the captions that have the commonest name of a concept


def is_plural(noun: str) -> bool:
    """Whether a noun looks like several things: "cherries", "glasses", not "glass", "cactus" or "tennis"."""
    return bool(re.search(r"[^sui]s$", noun))


def plural(noun: str) -> str:
    """The usual English plural of the last word."""
    if re.search(r"(s|x|z|ch|sh)$", noun):
        return f"{noun}es"
    return f"{noun[:-1]}ies" if re.search(r"[^aeiou]y$", noun) else f"{noun}s"


def article(noun: str) -> str:
    """ "a", "an", or nothing before a plural."""
    return "" if is_plural(noun) else "an" if noun[:1] in "aeiou" else "a"


def with_article(noun: str) -> str:
    return f"{article(noun)} {noun}".strip()


def subject_of(record: dict[str, Any], generator: Generator) -> str:
    """One of the record's "names", most often the first; the concept if it has none."""
    names = record.get("names") or [record.get("concept", record["text"])]
    first = len(names) == 1 or generator.random() < FIRST_NAME
    return str(names[0] if first else generator.choice(names[1:]))


def caption_of(record: dict[str, Any], generator: Generator) -> str:
    """One of several captions for the image; the record's "text" if it has no concept and style."""
    if "concept" not in record or "style" not in record:
        return str(record["text"])
    total = math.fsum(TEMPLATES.values())
    template = str(generator.choice(tuple(TEMPLATES), p=[part / total for part in TEMPLATES.values()]))
    subject = subject_of(record, generator)
    described = str(generator.choice(record.get("descriptions") or [subject]))
    filled = template.format(a=article(subject), subject=subject, style=record["style"], description=described)
    return " ".join(filled.split())  # an empty article leaves two spaces


def tokenize(text: TextEncoder, captions: Sequence[str]) -> Tensor:
    """(B, L) token ids as the pipeline makes them of each caption's first chunk: start, tokens, end, padding."""
    config, length = text.config, text.config.max_position_embeddings
    rows = [[config.bos_token_id, *text.caption_tokens(c)[0], config.eos_token_id] for c in captions]
    return torch.tensor([row + [config.pad_token_id] * (length - len(row)) for row in rows])


def cut_notes(text: TextEncoder, captions: Sequence[str]) -> list[str]:
    """Notes for the user on captions that are too long to be learned completely."""
    cut = sum(not text.caption_tokens(caption)[1] for caption in captions)
    tokens = text.config.max_position_embeddings - 2
    what = f"{cut} of {len(captions)} captions have more than {tokens} tokens; the rest of each is not learned"
    return [what] if cut else []
