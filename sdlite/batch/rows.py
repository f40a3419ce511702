"""Rows of a request file: what a row may hold, which request it makes, and how its faults are told.

    {"Prompt": "a fox", "Steps": "20", "num_images": 2, "author": "me"}  ->  Request, 2, {"author": "me"}

A column that has the name of a field sets that field, whether or not it is written with capitals, spaces or hyphens.
Every other column goes into the metadata.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Self

from pydantic import Field, model_validator

from sdlite.config import ELSEWHERE
from sdlite.request import Request

MAX_ROWS = 1_000_000
MAX_CELLS = 10_000_000
MAX_IMAGES = 10_000  # of one row
SHOWN_FAULTS = 10
RESERVED = ("file_name", "sha256", "seconds", "key", "index", "init_image", "init_mask")  # columns of metadata.jsonl
ANY_SEED = (-1, "-1", "random")  # Automatic1111's words for a row without a seed
A_CELL = "must be a text, a finite number, true, false or empty"

Columns = dict[str, Any]


class Repeated(Request):
    """A request and the number of its images, whose seeds count up."""

    num_images: int = Field(1, ge=1, le=MAX_IMAGES)

    @model_validator(mode="after")
    def _seeds_fit(self) -> Self:
        if self.seed + self.num_images > 2**64:
            raise ValueError(f"seed={self.seed} counted up for num_images={self.num_images} must stay below 2**64")
        return self


FIELDS = set(Repeated.model_fields)


class Row(NamedTuple):
    """One row as it was written. line: its place in the file, counted from 1 as editors do."""

    line: int
    columns: Columns


@dataclass
class Faults:
    """The faults of a request file, one line each. It keeps the first ten and counts all.

    notes: how the file was read where that is not certain, by kind; the caller shows them.
    """

    name: str
    count: int = 0
    lines: list[str] = field(default_factory=list)
    notes: dict[str, str] = field(default_factory=dict)

    def add(self, line: int | None, fault: object) -> None:
        """line: None for a file without lines; there equal faults count once."""
        text = f"{self.name}{'' if line is None else f':{line}'}: {' '.join(str(fault).split()):.500}"
        if line is not None or text not in self.lines:
            self.count += 1
            self.lines += [text] if self.count <= SHOWN_FAULTS else []

    def note(self, kind: str, text: str) -> None:
        """Keeps the first note of each kind, and ten kinds."""
        if len(self.notes) < SHOWN_FAULTS:
            self.notes.setdefault(kind, text)

    def check(self) -> None:
        """Raises ValueError if there was any fault."""
        more = [f"and {self.count - SHOWN_FAULTS} more"] if self.count > SHOWN_FAULTS else []
        if self.count:
            raise ValueError("\n".join(self.lines + more))


def column_of(name: str) -> str:
    """The name of a column, written as a field is: "Negative Prompt" is negative_prompt."""
    return re.sub(r"[\s-]+", "_", name.strip().lower())


def read_row(columns: Columns, defaults: Mapping[str, Any]) -> tuple[Request, int, Columns]:
    """The request of a row, its number of images, and its other columns. A cell of None counts as left out.

    defaults: columns of rows that do not have them. Raises ValueError.
    """
    columns = _named(columns)
    if columns.get("seed") in ANY_SEED:
        columns["seed"] = None
    extra = {name: value for name, value in columns.items() if name not in FIELDS}
    for name, value in extra.items():
        _check_extra(name, value)
    own = {name: value for name, value in columns.items() if name in FIELDS and value is not None}
    read = Repeated(**{**defaults, **own})
    return Request(**{name: getattr(read, name) for name in Request.model_fields}), read.num_images, extra


def _named(columns: Columns) -> Columns:
    """Columns under the names of fields. Raises ValueError if two have one name, or one holds a list or an object."""
    named: Columns = {}
    for name, value in columns.items():
        if not isinstance(name, str):
            raise ValueError(f"{name!r:.40} must be a text, as every column's name")
        if isinstance(value, list | dict):
            raise ValueError(f"{name:.80} is {'a list' if isinstance(value, list) else 'an object'}; it {A_CELL}")
        plain = column_of(name)
        plain = plain if plain in FIELDS or plain in ELSEWHERE else name
        if plain in named:
            raise ValueError(f"two columns mean {plain!r}, one of them {name!r:.40}")
        named[plain] = value
    return named


def _check_extra(name: str, value: Any) -> None:
    """Raises ValueError for a column that is no field and that metadata.jsonl cannot hold."""
    if name in ELSEWHERE:
        raise ValueError(f"{name}={value!r:.40}: the column is called {ELSEWHERE[name]!r} here")
    if name in RESERVED:
        raise ValueError(f"{name}={value!r:.40}: metadata.jsonl has a column of that name; rename yours")
    if not (value is None or isinstance(value, str | int) or (isinstance(value, float) and math.isfinite(value))):
        raise ValueError(f"{name}={value!r:.40} {A_CELL}")
