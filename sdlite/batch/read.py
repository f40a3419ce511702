"""Request files to rows: .txt, .jsonl, .csv, .parquet, a grid in .json, or "-" for stdin.

    a prompt a line (.txt) | an object a line (.jsonl) | a header and cells (.csv) | a table (.parquet)
    one object, lists in it combined each with each, the last varying fastest (.json)

A row is a dict of columns; what they mean is `plan`'s matter. A file is hostile input: its size, lines, rows and depth
have limits, text is strict UTF-8 without NUL, numbers are finite, no name stands twice. A byte order mark in front is
dropped, since Excel and Notepad write one that nobody sees.
"""

import csv
import itertools
import json
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from sdlite.config import Request

MAX_BYTES = 256 * 1024 * 1024  # of a file; a million prompts of 256 letters
MAX_LINE = 1024 * 1024
MAX_ROWS = 1_000_000
SHOWN_FAULTS = 10
FORMATS = (".txt", ".jsonl", ".csv", ".parquet", ".json")

Columns = dict[str, Any]
Source = str | Path | Iterable[Request | Mapping[str, Any] | str]


class Row(NamedTuple):
    """One request as it was written. line: where, counted from 1 as editors do."""

    line: int
    columns: Columns


class Faults:
    """What is wrong with a request file, a line each; the first ten are told and all are counted."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.lines: list[str] = []
        self.count = 0

    def add(self, line: int, fault: object) -> None:
        self.count += 1
        if self.count <= SHOWN_FAULTS:
            self.lines.append(f"{self.name}:{line}: {' '.join(str(fault).split())}")

    def check(self) -> None:
        """Raises ValueError if there was any fault."""
        if self.count:
            more = [f"and {self.count - SHOWN_FAULTS} more"] if self.count > SHOWN_FAULTS else []
            raise ValueError("\n".join(self.lines + more))


class Table(NamedTuple):
    """Rows in order, and for a grid its axes: the columns that had lists, with their values."""

    rows: list[Row]
    axes: dict[str, list[Any]] | None
    folder: Path  # names of pictures in the rows are relative to it


def read_table(source: Source, faults: Faults) -> Table:
    """All rows of a file, of stdin ("-"), or of requests, dicts and prompts given in Python.

    Rows that cannot be read are added to `faults`. Raises ValueError or OSError for a file that is wrong as a whole.
    """
    if not isinstance(source, str | Path):
        return Table(_limited(Row(i + 1, _columns(given)) for i, given in enumerate(source)), None, Path())
    if str(source) == "-":
        lines = _text_lines(sys.stdin.buffer, faults.name)
        first = next((row for row in lines if row[1].strip()), (1, ""))
        kind = ".jsonl" if first[1].lstrip().startswith("{") else ".txt"
        return Table(_limited(READERS[kind](itertools.chain([first], lines), faults)), None, Path())
    path = Path(source)
    if path.suffix.lower() not in FORMATS:
        raise ValueError(f"{path}: requests must be one of {', '.join(FORMATS)}, or - for stdin")
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(f"{path} is larger than {MAX_BYTES >> 20} MiB; split it")
    if path.suffix.lower() == ".parquet":
        return Table(_limited(_parquet(path)), None, path.parent)
    with path.open("rb") as file:
        if path.suffix.lower() == ".json":
            rows, axes = _grid(file, faults.name)
            return Table(rows, axes, path.parent)
        return Table(_limited(READERS[path.suffix.lower()](_text_lines(file, faults.name), faults)), None, path.parent)


def _columns(given: Request | Mapping[str, Any] | str) -> Columns:
    if isinstance(given, str):
        return {"prompt": given}
    return {name: getattr(given, name) for name in given.model_fields_set} if isinstance(given, Request) else {**given}


def _limited(rows: Iterable[Row]) -> list[Row]:
    kept = list(itertools.islice(rows, MAX_ROWS + 1))
    if len(kept) > MAX_ROWS:
        raise ValueError(f"there are more than {MAX_ROWS:,} rows; split the file")
    return kept


def _text_lines(file: BinaryIO, name: str) -> Iterator[tuple[int, str]]:
    """(line number, text without its end), never holding more than a line."""
    total = 0
    for number in itertools.count(1):
        data = file.readline(MAX_LINE + 1)
        total += len(data)
        if not data:
            return
        if len(data) > MAX_LINE:
            raise ValueError(f"{name}:{number}: the line is longer than {MAX_LINE >> 20} MiB")
        if total > MAX_BYTES:
            raise ValueError(f"{name} is larger than {MAX_BYTES >> 20} MiB; split it")
        if b"\0" in data:
            raise ValueError(f"{name}:{number}: there is a NUL byte, so this is not text")
        try:
            text = data.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{name}:{number}: byte {error.start + 1} is not UTF-8; save the file as UTF-8") from None
        yield number, text.removesuffix("\n").removesuffix("\r")


def _txt(lines: Iterable[tuple[int, str]], faults: Faults) -> Iterator[Row]:
    for number, line in lines:
        if "\r" in line.strip():
            faults.add(number, "there is a carriage return inside the line; end lines with a newline")
        elif line.strip():
            yield Row(number, {"prompt": line.strip()})


def _jsonl(lines: Iterable[tuple[int, str]], faults: Faults) -> Iterator[Row]:
    for number, line in lines:
        try:
            if line.strip():
                yield Row(number, _object(line))
        except ValueError as error:
            faults.add(number, error)


def _csv(lines: Iterable[tuple[int, str]], faults: Faults) -> Iterator[Row]:
    """Cells are text and an empty one is one not given."""
    reader = csv.reader((line + "\n" for _, line in lines), strict=True)
    try:
        header = [name.strip() for name in next(reader, [])]
        if not all(header) or len(set(header)) < len(header) or not header:
            raise ValueError(f"{faults.name}:1: the header must name every column, and each once")
        for cells in reader:
            if len(cells) > len(header) or 0 < len(cells) < len(header):
                faults.add(reader.line_num, f"there are {len(cells)} cells for {len(header)} columns")
            elif any(cells):
                yield Row(reader.line_num, {name: cell for name, cell in zip(header, cells, strict=True) if cell})
    except csv.Error as error:
        raise ValueError(f"{faults.name}:{reader.line_num}: not CSV: {error}") from None


READERS: dict[str, Callable[[Iterable[tuple[int, str]], Faults], Iterator[Row]]] = {
    ".txt": _txt,
    ".jsonl": _jsonl,
    ".csv": _csv,
}


def _parquet(path: Path) -> Iterator[Row]:
    try:
        from pyarrow import ArrowException, parquet  # type: ignore[import-untyped]
    except ImportError:
        raise ValueError(f"{path}: reading Parquet needs pyarrow: pip install 'sdlite[parquet]'") from None
    try:
        with parquet.ParquetFile(path) as file:
            groups = [file.metadata.row_group(i) for i in range(file.metadata.num_row_groups)]
            if file.metadata.num_rows > MAX_ROWS or sum(group.total_byte_size for group in groups) > MAX_BYTES:
                raise ValueError(f"{path} unpacks to more than {MAX_ROWS:,} rows or {MAX_BYTES >> 20} MiB; split it")
            numbers = itertools.count(1)
            for batch in file.iter_batches(1024):
                yield from (Row(next(numbers), columns) for columns in batch.to_pylist())
    except ArrowException as error:
        raise ValueError(f"{path} is not Parquet: {str(error).splitlines()[0]}") from None


def _grid(file: BinaryIO, name: str) -> tuple[list[Row], dict[str, list[Any]]]:
    """One object; the rows are all combinations of its lists, numbered from 1."""
    text = "\n".join(line for _, line in _text_lines(file, name))
    try:
        columns = _object(text)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    axes = {column: value for column, value in columns.items() if isinstance(value, list)}
    if not all(axes.values()):
        raise ValueError(f"{name}: {next(a for a in axes if not axes[a])}=[] must hold at least one value")
    if math.prod(map(len, axes.values())) > MAX_ROWS:
        raise ValueError(f"{name}: the lists combine to more than {MAX_ROWS:,} rows; shorten them")
    products = itertools.product(*axes.values())
    return [Row(i + 1, columns | dict(zip(axes, chosen, strict=True))) for i, chosen in enumerate(products)], axes


def _object(text: str) -> Columns:
    """A JSON object of finite numbers and whole text. Raises ValueError in one line."""
    try:
        value = DECODER.decode(text)
        if not isinstance(value, dict):
            raise ValueError('must be a JSON object, e.g. {"prompt": "a fox"}')
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode()  # an escape can spell half of a surrogate pair
        return value
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error}") from None
    except UnicodeEncodeError:
        raise ValueError("the text holds half of a surrogate pair") from None
    except RecursionError:
        raise ValueError("not a request: nested too deeply") from None


def _once(pairs: list[tuple[str, Any]]) -> Columns:
    if len({name for name, _ in pairs}) < len(pairs):
        raise ValueError("a name stands twice")
    return dict(pairs)


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text:.20} must be a finite number")
    return number


DECODER = json.JSONDecoder(object_pairs_hook=_once, parse_constant=_finite, parse_float=_finite)
