"""From rows to items: every request checked, its seed and size filled in, its key and file name made.

    row --columns--> Request + extra --num_images--> requests with seeds --resolve--> Item (key, file name)

An item is plain data, so that any process or machine may draw it. Its key is the SHA-256 of all that decides the
picture; equal keys mean equal bytes. Its seed depends on the row alone, never on who draws it or when.
"""

import hashlib
import json
import math
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from sdlite.batch.names import DEFAULT, fill, parse_template, same_file
from sdlite.batch.read import MAX_ROWS, Columns, Faults, Row, Source, column_of, read_table
from sdlite.config import ELSEWHERE
from sdlite.request import Request

SCHEMA = 1  # of keys and folders; a change of what they mean counts it up
MAX_IMAGES = 10_000  # of one row
RESERVED = ("file_name", "sha256", "seconds", "key", "index", "init_image", "init_mask")  # columns of metadata.jsonl
CANONICAL = json.JSONEncoder(sort_keys=True, separators=(",", ":"))
FIELDS = set(Request.model_fields)
ANY_SEED = (-1, "-1", "random")  # Automatic1111's words for a row without a seed
NOTHING: Mapping[str, Any] = {}
KNOWN = {*FIELDS, *ELSEWHERE, "num_images"}  # names of columns that may be written with capitals, spaces or hyphens


@dataclass(frozen=True, slots=True)
class Item:
    """One picture to draw. index: its place in the output. row: of the input, from 0. extra: unknown columns.

    request: size and seed filled in, pictures as digests; image, mask: where those lie.
    """

    index: int
    row: int
    request: Request
    extra: dict[str, Any]
    key: str
    file_name: str
    image: Path | None = None
    mask: Path | None = None


class Plan(NamedTuple):
    """Items in the order of the output. axes: of a grid file, the last varying fastest. notes: for the user."""

    items: list[Item]
    axes: dict[str, list[Any]] | None
    notes: Sequence[str] = ()


class Picture(NamedTuple):
    """What is known of a picture or mask, once it was opened. size: (width, height) in pixels. grey: of a mask."""

    digest: str
    size: tuple[int, int]
    grey: bool = False


def make_plan(
    source: Source,
    *,
    resolve: Callable[[Request, Any], Request],
    engine: Mapping[str, Any],
    seed: int = 0,
    same_seed: bool = False,
    defaults: Mapping[str, Any] = NOTHING,
    name: str | None = None,
) -> Plan:
    """All items of a request file, checked.

    resolve: (request, Picture or None) -> request with its size, or ValueError; `Pipeline.resolve` and what else a
    model wants. engine: what decides a picture besides the request: model hash, prediction, numerics; part of the key.
    seed: base of the seeds of rows without one; with same_seed it is their seed. defaults: columns of rows that do not
    have them. Raises ValueError with a line per fault.
    """
    _request(Row(0, {}), {"prompt": "", **defaults})  # so that a fault in them is shown once, not for each row
    parts = parse_template(DEFAULT if name is None else name)
    faults = Faults("stdin" if source == "-" else str(source) if isinstance(source, str | Path) else "requests")
    table = read_table(source, faults)
    pictures: dict[tuple[Path, str], Picture] = {}
    items: list[Item] = []
    taken: dict[str, int] = {}
    for number, row in enumerate(table.rows):
        try:
            own = seed if same_seed else derived_seed(seed, 0 if table.axes is not None else number)
            request, extra, count = _request(row, {"seed": own, **defaults})
            if len(items) + count > MAX_ROWS:
                raise ValueError(f"num_images={count} makes more than {MAX_ROWS:,} pictures; split the file")
            paths = {side: _path(table.folder, getattr(request, side)) for side in ("image", "mask")}
            known = {side: _opened(path, side, pictures) for side, path in paths.items() if path is not None}
            if known:
                request = request.replace(**{side: picture.digest for side, picture in known.items()})
            request = resolve(request, known.get("image"))
            _note_mask(faults, **known)
            for k in range(count):
                drawn = request if k == 0 else request.model_copy(update={"seed": request.seed + k})
                key = item_key(drawn, engine)
                file_name = fill(parts, drawn, index=len(items), row=number, key=key)
                if (other := taken.setdefault(same_file(file_name), len(items))) != len(items):
                    raise ValueError(
                        f"file name {file_name!r} is also that of picture {other}; add {{index}} to --name"
                    )
                items.append(Item(len(items), number, drawn, extra, key, file_name, **paths))
        except (ValueError, OSError) as error:
            faults.add(row.line if table.axes is None else None, error)
    faults.check()
    if not items:
        raise ValueError(f"{faults.name} holds no requests")
    if "strength" in defaults and not any(item.image for item in items):
        faults.note("strength", "strength has no effect: no row names an image to start from")
    return Plan(items, table.axes, faults.notes)


def derived_seed(base: int, row: int) -> int:
    """The seed of a row that names none: 31 bits of SHA-256, so that rows added at the end change no other."""
    return int.from_bytes(hashlib.sha256(f"{base}:{row}".encode()).digest()[:4]) >> 1


def item_key(request: Request, engine: Mapping[str, Any]) -> str:
    """SHA-256, hexadecimal, of all that decides a picture. Texts count in Unicode's composed form (NFC)."""
    fields = request.deciding()
    fields |= {name: unicodedata.normalize("NFC", fields[name]) for name in ("prompt", "negative_prompt")}
    whole = {"request": fields, "engine": dict(engine), "schema": SCHEMA}
    return hashlib.sha256(CANONICAL.encode(whole).encode()).hexdigest()


def parse_shard(text: str) -> tuple[int, int]:
    """ "2/8" is the second of eight parts. Raises ValueError."""
    part, slash, count = text.partition("/")
    if not (slash and part.isascii() and part.isdecimal() and count.isascii() and count.isdecimal()):
        raise ValueError(f"shards={text!r:.40} must be I/N, e.g. 2/8 for the second of eight parts")
    if not 1 <= int(part) <= int(count):
        raise ValueError(f"shards={text!r:.40}: the part must be 1 to {int(count)}")
    return int(part), int(count)


def in_shard(item: Item, shard: tuple[int, int]) -> bool:
    """Whether an item belongs to part I of N. By its key, so that it stays there when rows are added."""
    return int(item.key, 16) % shard[1] == shard[0] - 1


def _request(row: Row, defaults: Mapping[str, Any]) -> tuple[Request, Columns, int]:
    """The request of a row, its unknown columns, and how many pictures. None counts as not given."""
    columns = _named(row.columns)
    if columns.get("seed") in ANY_SEED:
        columns = columns | {"seed": None}
    given = {**defaults, **{name: value for name, value in columns.items() if value is not None}}
    fields = {name: value for name, value in given.items() if name in FIELDS}
    for name, value in columns.items():
        if name in ELSEWHERE:
            raise ValueError(f"{name}={value!r:.40}: the column is called {ELSEWHERE[name]!r} here")
        if name in RESERVED:
            raise ValueError(f"{name}={value!r:.40}: metadata.jsonl has a column of that name; rename yours")
        if name not in FIELDS and not _is_scalar(value):
            raise ValueError(f"{name}={value!r:.40} must be a text, a finite number, true, false or empty")
    count = _whole("num_images", given.get("num_images", 1))
    if not 1 <= count <= MAX_IMAGES:
        raise ValueError(f"num_images={count} must be 1 to {MAX_IMAGES:,}")
    request = Request(**fields)
    if request.seed + count > 2**64:
        raise ValueError(f"seed={request.seed} counted up for num_images={count} must stay below 2**64")
    extra = {name: columns[name] for name in columns if name not in FIELDS and name != "num_images"}
    return request, extra, count


def _named(columns: Columns) -> Columns:
    """Columns under the names of fields, however they are capitalized. Raises ValueError for two of one name."""
    named: Columns = {}
    for name, value in columns.items():
        if not isinstance(name, str):
            raise ValueError(f"{name!r:.40} must be a text, as every column's name")
        plain = column_of(name)
        plain = plain if plain in KNOWN else name
        if plain in named:
            raise ValueError(f"two columns mean {plain!r}, one of them {name!r:.40}")
        named[plain] = value
    return named


def _is_scalar(value: Any) -> bool:
    return value is None or isinstance(value, str | bool | int) or (isinstance(value, float) and math.isfinite(value))


def _whole(name: str, value: Any) -> int:
    try:
        if isinstance(value, bool) or int(value) != float(value):
            raise ValueError
        return int(value)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"{name}={value!r:.40} must be a whole number") from None


def _path(folder: Path, name: str | None) -> Path | None:
    return None if name is None else folder / name


def _note_mask(faults: Faults, image: Picture | None = None, mask: Picture | None = None) -> None:
    """How the mask of a row is read, where that is not certain; said once for all rows."""
    if image is not None and mask is not None:
        from sdlite.images.pixels import mask_notes

        for note in mask_notes(mask.size, mask.grey, image.size):
            faults.note(without_sizes(note), note)


def without_sizes(note: str) -> str:
    """What notes that differ only in the sizes of pictures have in common."""
    return re.sub(r"\d+x\d+", "", note)


def _opened(path: Path, side: str, known: dict[tuple[Path, str], Picture]) -> Picture:
    """What is known of a picture or mask, each opened once. Raises FileNotFoundError or ValueError."""
    from sdlite.images.files import open_picture
    from sdlite.images.pixels import digest, has_grey

    if (path, side) not in known:
        image = open_picture(path, for_mask=side == "mask")
        known[path, side] = Picture(digest(image), image.size, side == "mask" and has_grey(image))
    return known[path, side]
