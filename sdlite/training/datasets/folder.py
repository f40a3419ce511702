"""A data folder as files: which images it holds, and what their captions are.

    DIR/metadata.jsonl        one line per image: {"file_name": "a.png", "text": "a red apple", ...}
    DIR/metadata.csv          the same as a table; its header names the columns
    DIR/a.png, DIR/a.txt      without either: the caption is in a text file beside the image
    DIR/red_apple.png         without a text file: the name of the image is its caption

If there is a folder DIR/train, the training data are in it; DIR/validation and DIR/test are optional and have the same
layout. The optional columns "concept", "style" and "keywords" make more captions. The folder is untrusted: a fault is
one error that names the file and the line.
"""

import csv
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from io import StringIO
from pathlib import Path
from typing import Any

from sdlite.files import checksum, csv_delimiter
from sdlite.images.recipe import SUFFIXES

Records = list[dict[str, Any]]
MAX_METADATA_BYTES = 64 * 2**20  # of a table: about 600,000 images
MAX_CAPTION_BYTES = 2**20  # of a text file beside an image
MAX_TEXT = 20_000  # characters, as in a Request
MASKED = ("file_name", "mask_file_name")  # columns of data for segmentation
MAX_NAME = 255  # bytes, on every common disk
TABLES = ("metadata.jsonl", "metadata.csv")


def read_records(folder: Path, split: str = "train", fields: Sequence[str] = ("file_name", "text")) -> Records:
    """One record per image of a split, file names made relative to folder; none for an absent held-out split.

    fields: the columns that every record must have as text; those whose name ends in "file_name" name files.
    Raises FileNotFoundError without training data, ValueError for a line that is no record and for a file outside.
    """
    inside = _inside(folder, split)
    if inside is None:
        return []
    records = [_placed(record, fields, inside, folder, place) for place, record in _found(inside, fields)]
    if split == "train" and not records:
        raise ValueError(f"{_table(inside) or inside} lists no images; give a folder with some")
    return records


def write_records(inside: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Writes metadata.jsonl, which lists the images of a split."""
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (inside / "metadata.jsonl").write_text(lines, encoding="utf-8")


def caption_notes(folder: Path) -> list[str]:
    """Notes for the user on the source of the training captions."""
    inside = _inside(folder, "train")
    if inside is None or _table(inside) is not None:
        return []
    files = _image_files(inside)
    named = [file for file in files if not _beside(file).is_file()]
    if not named:
        return []
    return [
        f"{len(named)} of {len(files)} images have no caption, so their file names are used, such as "
        f"{_from_name(named[0])!r:.80}; put a text file beside each ({_beside(named[0]).name}) for a better one"
    ]


def fingerprints(folder: Path, records: Records, fields: Sequence[str] = ("file_name",)) -> dict[str, str]:
    """Identifies the data of a run: a hash of the records ("data") and one of the files ("pictures").

    fields: the columns that name files.
    """
    files = hashlib.sha256()
    for record in records:
        for name in (record[field] for field in fields):
            files.update(bytes.fromhex(checksum(folder / name)))
    return {"data": hashlib.sha256(json.dumps(records).encode()).hexdigest()[:12], "pictures": files.hexdigest()[:12]}


def _inside(folder: Path, split: str) -> Path | None:
    """Where the files of a split are; None for a held-out split that is not there."""
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{folder} is no folder; give one with images, or make it with `sdlite data emoji -o {folder}`"
        )
    if (folder / "train").is_dir():
        return folder / split if split == "train" or (folder / split).is_dir() else None
    return folder if split == "train" else None


def _table(inside: Path) -> Path | None:
    return next((inside / name for name in TABLES if (inside / name).is_file()), None)


def _found(inside: Path, fields: Sequence[str]) -> Iterator[tuple[str, object]]:
    """(place, record) for each image, nothing checked yet; the place is for error messages."""
    table = _table(inside)
    if table is None:
        if fields != ("file_name", "text"):
            raise FileNotFoundError(f"{inside} has no metadata.jsonl; it must list " + " and ".join(fields))
        yield from _captioned(inside)
        return
    if table.stat().st_size > MAX_METADATA_BYTES:
        raise ValueError(f"{table} has more than {MAX_METADATA_BYTES >> 20} MiB")
    yield from _lines(table) if table.suffix == ".jsonl" else _rows(table, fields)


def _lines(table: Path) -> Iterator[tuple[str, object]]:
    for i, line in enumerate(table.read_bytes().splitlines(), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        yield f"{table}:{i}", record


def _rows(table: Path, fields: Sequence[str]) -> Iterator[tuple[str, object]]:
    text = _utf8(table)
    lines = StringIO(text, newline="")
    delimiter, stated = csv_delimiter(text.partition("\n")[0])
    if stated:
        lines.readline()
    rows = csv.DictReader(lines, delimiter=delimiter, strict=True)
    try:
        place = f"{table}:{stated + 1}"
        if missing := [name for name in fields if name not in (rows.fieldnames or ())]:
            raise ValueError(f"{place}: the header has no column {missing[0]!r}; it needs " + " and ".join(fields))
        for row in rows:
            place = f"{table}:{stated + rows.line_num}"
            if None in row or None in row.values():
                raise ValueError(f"{place} must have {len(rows.fieldnames or ())} values, as the header has")
            yield place, {name: value for name, value in row.items() if value or name in fields}
    except csv.Error as error:
        raise ValueError(f"{table}:{stated + rows.line_num} is not CSV: {error}") from None


def _captioned(inside: Path) -> Iterator[tuple[str, object]]:
    """Images without a table: captions are in text files beside them, or are their names."""
    files = _image_files(inside)
    if not files:
        deeper = next((path.parent for path in sorted(inside.glob("*/*")) if path.suffix.lower() in SUFFIXES), None)
        other = f"give a folder with some, or make one with `sdlite data emoji -o {inside}`"
        hint = f"; did you mean {deeper}?" if deeper else f"; {other}"
        raise FileNotFoundError(f"{inside} holds no PNG, JPEG or WebP images and no metadata.jsonl{hint}")
    for file in files:
        beside = _beside(file)
        caption = _caption_in(beside) if beside.is_file() else _from_name(file)
        yield str(file), {"file_name": file.name, "text": caption}


def _image_files(inside: Path) -> list[Path]:
    return sorted(file for file in inside.iterdir() if file.suffix.lower() in SUFFIXES and file.name[0] != ".")


def _beside(file: Path) -> Path:
    return file.with_suffix(".txt")


def _from_name(file: Path) -> str:
    return re.sub(r"[\s_-]+", " ", file.stem).strip()


def _caption_in(path: Path) -> str:
    """The text of a caption file on one line."""
    check_contained(path, path.parent)
    if path.stat().st_size > MAX_CAPTION_BYTES:
        raise ValueError(f"{path} is no caption: it has more than {MAX_CAPTION_BYTES >> 20} MiB")
    return " ".join(_utf8(path).split())


def _utf8(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} must be text in UTF-8; it is not at byte {error.start}") from None


def _placed(record: object, fields: Sequence[str], inside: Path, folder: Path, place: str) -> dict[str, Any]:
    """The checked record, with null columns left out and file names relative to folder."""
    if not isinstance(record, dict) or not all(isinstance(record.get(name), str) for name in fields):
        raise ValueError(f"{place} must be a JSON object with text as " + " and ".join(f'"{n}"' for n in fields))
    record = {name: value for name, value in record.items() if value is not None}  # pandas writes null for "nothing"
    for name in ("text", "concept", "style"):
        if not isinstance(text := record.get(name, ""), str) or len(text) > MAX_TEXT:
            raise ValueError(f"{place}: {name}={text!r:.40} must be text of at most {MAX_TEXT} characters")
    for name in ("keywords", "names", "descriptions"):
        if isinstance(texts := record.get(name, []), str):
            record[name] = texts = [text.strip() for text in texts.split(",") if text.strip()]
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise ValueError(f"{place}: {name}={texts!r:.40} must be a list of texts")
    try:
        json.dumps(record, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        fault = f"{error.object[max(0, error.start - 40) : error.end]!r} has half of a surrogate pair"
        raise ValueError(f"{place}: {fault}, which is no character") from None
    for name in fields:
        if name.endswith("file_name"):
            record[name] = _file(record[name], inside, folder, f"{place}: {name}")
    return record


def _file(name: str, inside: Path, folder: Path, place: str) -> str:
    """A file name from metadata, relative to folder. Raises ValueError if it leads out of it, by its name or a link."""
    file = Path(os.path.normpath(name))
    if not name or "\0" in name or file.is_absolute() or ".." in file.parts:
        raise ValueError(f"{place}={name!r:.80} leads out of the folder; copy it there")
    if any(len(part.encode()) > MAX_NAME for part in file.parts):
        raise ValueError(f"{place}={name!r:.80} is longer than the {MAX_NAME} bytes that a file's name may have")
    check_contained(inside / file, folder)
    return (inside / file).relative_to(folder).as_posix()


def check_contained(path: Path, folder: Path) -> None:
    """Raises ValueError if path is a link, or lies behind one, that leads out of folder."""
    try:
        real = path.resolve()
    except (OSError, RuntimeError):  # a circle of links
        raise ValueError(f"{path} is a link that leads nowhere") from None
    if not real.is_relative_to(folder.resolve()):
        raise ValueError(f"{path} is a link to outside of {folder}; copy the file itself there")
