"""Automatic1111's prompt grammar: from a prompt to weighted pieces, and from weighted tokens to chunks.

    "a (red:1.3) cat BREAK [fog]"  --parse_prompt-->  [[("a ", 1), ("red", 1.3), (" cat", 1)], [("fog", 1/1.1)]]
    tokens of each section         --split_chunks-->  chunks of at most 75 tokens

`(x)` multiplies the weight of x by 1.1, `[x]` divides it by 1.1, `(x:1.3)` multiplies it by 1.3; brackets nest, and a
backslash makes the next bracket or backslash plain text. A bracket that is never closed applies to the end of the
prompt. A closing bracket without an opening one is text. BREAK ends a section: the text after it starts a new chunk.
Two things differ from Automatic1111: BREAK works inside brackets too, and weights stay within +-MAX_WEIGHT. Its prompt
editing (`[from:to:when]`), AND and <lora:...> are not part of the grammar and are read as text; `foreign_marks` finds
them.
Source: AUTOMATIC1111/stable-diffusion-webui, modules/prompt_parser.py and modules/sd_hijack_clip.py.
"""

import re
from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple

BRACKET_FACTOR = 1.1
MAX_WEIGHT = 10.0  # an arbitrary bound: images fall apart from about 2 on, and float16 overflows from about 1000 on
MAX_POWER = 1000  # of BRACKET_FACTOR, far beyond MAX_WEIGHT; Python refuses 1.1 ** 7500
COMMA_BACKTRACK = 20  # tokens after a comma that may move to the next chunk; Automatic1111's default setting

_GRAMMAR = re.compile(
    r"""
      (?P<escape> \\ [\\()\[\]]? )
    | (?P<open>   [(\[] )
    | (?P<close>  : \s* (?P<weight> [+-]? (?: [0-9]+ (?: \. [0-9]* )? | \. [0-9]+ ) ) \s* \) | [)\]] )
    | (?P<text>   [^\\()\[\]:]+ | : )
    """,
    re.VERBOSE,
)
_FOREIGN = {  # markup of Automatic1111 that is plain text here
    r"<(?:lora|lyco|hypernet):[^<>]*>": "no such networks are loaded",
    r"\[[^\[\]]*:\s*(?:\d+(?:\.\d*)?|\.\d+)\s*\]": "the prompt is not edited while drawing",
    r"\[[^\[\]|]*\|[^\[\]]*\]": "words do not take turns",
    r"\sAND\s": "prompts are not combined",
}
_BREAK = re.compile(r"\bBREAK\b")


class Piece(NamedTuple):
    """A piece of text and its weight."""

    text: str
    weight: float


class Token(NamedTuple):
    """A token of the vocabulary and the weight of the text it comes from."""

    id: int
    weight: float


def foreign_marks(prompt: str) -> list[str]:
    """A note for each kind of Automatic1111's markup in a prompt that is read as plain text here."""
    found = ((re.search(pattern, prompt), why) for pattern, why in _FOREIGN.items())
    return [f"{mark.group().strip()[:60]!r} is read as plain text: {why}" for mark, why in found if mark]


def parse_prompt(prompt: str) -> list[list[Piece]]:
    """Sections of a prompt, separated by BREAK, each a list of pieces without markup (empty for an empty section).

    Weights are in [-MAX_WEIGHT, MAX_WEIGHT], neighbours of equal weight are one piece, and text outside brackets has
    weight 1.0 exactly. Takes time proportional to the prompt's length, whatever the nesting.
    """
    marks = list(_GRAMMAR.finditer(prompt))
    factors, closing = _match_brackets(marks)
    rounds = [(0, 1.0)]  # for each open "(": power of 1.1 and product of the explicit weights
    squares = 0
    sections: list[list[Piece]] = [[]]
    for i, mark in enumerate(marks):
        text = mark.group()
        if i in factors:
            power, product = rounds[-1]
            factor = factors[i]
            rounds.append((power + 1, product) if factor is None else (power, _clamp(product * factor)))
        elif i in closing:
            rounds.pop()
        elif mark.lastgroup == "open":
            squares += 1
        elif text == "]" and squares:
            squares -= 1
        else:
            power, product = rounds[-1]
            power = max(-MAX_POWER, min(MAX_POWER, power - squares))
            text = text[1:] if mark.lastgroup == "escape" else text
            _append_text(sections, text, _clamp(product * BRACKET_FACTOR**power))
    return [_merged(section) for section in sections]


def escaped(text: str) -> str:
    """The prompt that draws `text` literally: brackets and backslashes are escaped.

    BREAK cannot be escaped, so it becomes lower case; CLIP's tokenizer ignores case.
    """
    return _BREAK.sub("break", re.sub(r"[\\()\[\]]", r"\\\g<0>", text))


def _match_brackets(marks: Sequence[re.Match[str]]) -> tuple[dict[int, float | None], set[int]]:
    """Where round brackets open, each with its weight (None: 1.1), and where they close, as indices of marks."""
    factors: dict[int, float | None] = {}
    closing: set[int] = set()
    opened: list[int] = []
    for i, mark in enumerate(marks):
        if mark.group() == "(":
            factors[i] = None
            opened.append(i)
        elif opened and mark.lastgroup == "close" and mark.group() != "]":
            weight = mark.group("weight")
            factors[opened.pop()] = None if weight is None else _clamp(float(weight))
            closing.add(i)
    return factors, closing


def _append_text(sections: list[list[Piece]], text: str, weight: float) -> None:
    """Adds text to the last section, and a section after each BREAK in it, without the spaces around BREAK."""
    first, *rest = _BREAK.split(text)
    sections[-1].append(Piece(first.rstrip() if rest else first, weight))
    for n, part in enumerate(rest, start=1):
        part = part.lstrip()
        sections.append([Piece(part.rstrip() if n < len(rest) else part, weight)])


def _merged(pieces: list[Piece]) -> list[Piece]:
    """The pieces without empty ones; neighbours of equal weight are joined."""
    runs = groupby((piece for piece in pieces if piece.text), key=lambda piece: piece.weight)
    return [Piece("".join(piece.text for piece in run), weight) for weight, run in runs]


def _clamp(weight: float) -> float:
    return max(-MAX_WEIGHT, min(MAX_WEIGHT, weight))


def split_chunks(sections: Sequence[Sequence[Token]], length: int, comma: int | None) -> list[list[Token]]:
    """Tokens in chunks of at most `length`; a section starts a new chunk. At least one chunk, possibly empty.

    A chunk that overflows ends after its last comma if at most COMMA_BACKTRACK - 1 tokens follow that comma in it, so
    that a phrase is not torn apart, and after `length` tokens otherwise. comma: the id of ",", None if there is none.
    """
    chunks = [chunk for section in sections for chunk in _fill_chunks(section, length, comma)]
    return chunks[:-1] if len(chunks) > 1 and not chunks[-1] else chunks or [[]]


def _fill_chunks(tokens: Sequence[Token], length: int, comma: int | None) -> list[list[Token]]:
    """Chunks of one section; a single empty one if it has no tokens."""
    chunks: list[list[Token]] = []
    chunk: list[Token] = []
    last_comma = -1
    for token in tokens:
        if len(chunk) == length:
            torn = token.id != comma and last_comma >= 0 and length - last_comma <= COMMA_BACKTRACK
            end = last_comma + 1 if torn else length
            chunks.append(chunk[:end])
            chunk = chunk[end:]
            last_comma = -1
        if token.id == comma:
            last_comma = len(chunk)
        chunk.append(token)
    return [*chunks, chunk]
