"""Request files to rows: .txt, .jsonl, .csv, .tsv, .parquet, a grid in .json, or "-" for stdin.

    a prompt a line (.txt) | an object a line (.jsonl) | a header and cells (.csv, .tsv) | a table (.parquet)
    one object, lists in it combined each with each, the last varying fastest (.json)

A row is a dict of columns; what they mean is `plan`'s matter. Stdin and .txt are read alike: the first line decides
between prompts, objects and a header. A line of prompts may end in options, as Automatic1111's and kohya's prompt files
have them. A file is hostile input: its size, lines, rows, cells and depth have limits, text is strict UTF-8 (or UTF-16
with a byte order mark) without NUL, numbers are finite, no name stands twice.
"""

import codecs
import csv
import itertools
import json
import math
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from sdlite.diffusion.solver_names import SOLVERS
from sdlite.files import csv_delimiter
from sdlite.request import Request

MAX_BYTES = 256 * 1024 * 1024  # of a file, and of all its text; a million prompts of 256 letters
MAX_UTF16_BYTES = 64 * 1024 * 1024  # the whole file is held at once
MAX_LINE = 1024 * 1024
MAX_ROWS = 1_000_000
MAX_CELLS = 10_000_000
SHOWN_FAULTS = 10
FORMATS = (".txt", ".jsonl", ".csv", ".tsv", ".parquet", ".json")
OPTION = re.compile(r"(?:^|\s)--([A-Za-z_]+)(?=\s|$)")
OPTIONS = {  # of a line of a .txt file -> column; the short ones are kohya's
    "prompt": "prompt",
    "negative_prompt": "negative_prompt",
    "n": "negative_prompt",
    "seed": "seed",
    "d": "seed",
    "steps": "steps",
    "s": "steps",
    "cfg_scale": "guidance_scale",
    "l": "guidance_scale",
    "width": "width",
    "w": "width",
    "height": "height",
    "h": "height",
    "sampler_name": "solver",
    "n_iter": "num_images",
}

Columns = dict[str, Any]
Source = str | Path | Iterable[Request | Mapping[str, Any] | str]


class Row(NamedTuple):
    """One request as it was written. line: where, counted from 1 as editors do."""

    line: int
    columns: Columns


class Faults:
    """What is wrong with a request file, a line each; shows the first ten and counts all.

    notes: how a file was read where that is not certain, for the caller to say.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.lines: list[str] = []
        self.count = 0
        self._notes: dict[str, str] = {}
        self._seen: set[str] = set()

    def add(self, line: int | None, fault: object) -> None:
        """line: None for a file without lines, where equal faults are shown once."""
        text = f"{self.name}{'' if line is None else f':{line}'}: {' '.join(str(fault).split()):.500}"
        if line is None and text in self._seen:
            return
        self._seen |= {text} if line is None else set()
        self.count += 1
        if self.count <= SHOWN_FAULTS:
            self.lines.append(text)

    def note(self, kind: str, text: str) -> None:
        """Of each kind the first is kept, and of few kinds."""
        if len(self._notes) < SHOWN_FAULTS:
            self._notes.setdefault(kind, text)

    @property
    def notes(self) -> list[str]:
        return list(self._notes.values())

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
        return Table(_limited((Row(i + 1, _columns(given)) for i, given in enumerate(source)), faults), None, Path())
    if str(source) == "-":
        if sys.stdin is None:
            raise ValueError("stdin is closed; give a file of requests instead of -")
        return Table(_limited(_text_rows(sys.stdin.buffer, faults), faults), None, Path())
    path, kind = Path(source), Path(source).suffix.lower()
    if kind not in FORMATS:
        raise ValueError(f"{path}: requests must be one of {', '.join(FORMATS)}, or - for stdin")
    if not path.is_file():
        raise ValueError(f"{path} is not a file" if path.exists() else f"{path} does not exist")
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(f"{path} is larger than {MAX_BYTES >> 20} MiB; split it")
    if kind == ".parquet":
        return Table(_limited(_parquet(path), faults), None, path.parent)
    with path.open("rb") as file:
        if kind == ".json":
            rows, axes = _grid(file, faults.name)
            return Table(rows, axes, path.parent)
        rows_of = _text_rows(file, faults) if kind == ".txt" else READERS[kind](_text_lines(file, faults.name), faults)
        return Table(_limited(rows_of, faults), None, path.parent)


def _columns(given: Request | Mapping[str, Any] | str) -> Columns:
    if isinstance(given, str):
        return {"prompt": given}
    return {name: getattr(given, name) for name in given.model_fields_set} if isinstance(given, Request) else {**given}


def _limited(rows: Iterable[Row], faults: Faults) -> list[Row]:
    kept, cells = [], 0
    for row in rows:
        kept.append(row)
        cells += len(row.columns)
        if len(kept) > MAX_ROWS or cells > MAX_CELLS:
            raise ValueError(f"{faults.name} has more than {MAX_ROWS:,} rows or {MAX_CELLS:,} cells; split the file")
    return kept


def _text_lines(file: BinaryIO, name: str) -> Iterator[tuple[int, str]]:
    """(line number, text without its end), never holding more than a line."""
    total = 0
    for number in itertools.count(1):
        data = file.readline(MAX_LINE + 1)
        total += len(data)
        if not data:
            return
        if number == 1 and data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            yield from _text_lines(BytesIO(_as_utf8(data, file, name)), name)
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


def _as_utf8(start: bytes, file: BinaryIO, name: str) -> bytes:
    """A file in UTF-16, as Excel and Notepad write it, of which `start` is read already."""
    whole = start + file.read(MAX_UTF16_BYTES)
    if len(whole) > MAX_UTF16_BYTES:
        raise ValueError(f"{name} is UTF-16 and larger than {MAX_UTF16_BYTES >> 20} MiB; save it as UTF-8")
    try:
        return whole.decode("utf-16").encode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{name}: byte {error.start + 1} is not UTF-16; save the file as UTF-8") from None


def _text_rows(file: BinaryIO, faults: Faults) -> Iterator[Row]:
    """Rows of stdin or a .txt file, whose first line says what it holds."""
    lines = _text_lines(file, faults.name)
    first = next((line for line in lines if line[1].strip()), (1, ""))
    kind = ".txt"
    if re.match(r'\s*\{\s*(["}]|$)', first[1]):
        kind = ".jsonl"
    elif csv_delimiter(first[1])[1] or _is_header(first[1]):
        kind = ".csv"
        faults.note("csv", f"{faults.name} is read as CSV, as its first line says: {first[1]:.80}")
    yield from READERS[kind](itertools.chain([first], lines), faults)


def column_of(name: str) -> str:
    """A column's name as a field is written: "Negative Prompt" is negative_prompt."""
    return re.sub(r"[\s-]+", "_", name.strip().lower())


def _is_header(line: str) -> bool:
    """Whether a line names columns, one of them prompt; the others are a word each, or fields of a request."""
    names = [name.strip().strip('"') for name in line.split(csv_delimiter(line)[0])]
    columns = [column_of(name) for name in names]
    return "prompt" in columns and all(
        column in Request.model_fields or " " not in name for column, name in zip(columns, names, strict=True)
    )


def _txt(lines: Iterable[tuple[int, str]], faults: Faults) -> Iterator[Row]:
    for number, line in lines:
        if "\r" in line.strip():
            faults.add(number, "there is a carriage return inside the line; end lines with a newline")
        elif line.strip():
            try:
                yield Row(number, _with_options(line.strip(), number, faults))
            except ValueError as error:
                faults.add(number, error)


def _with_options(line: str, number: int, faults: Faults) -> Columns:
    """A prompt and the options behind it, or options of which one is --prompt (Automatic1111). Raises ValueError.

    A line with an option that nobody knows is a prompt as a whole, and that is noted.
    """
    text, *rest = OPTION.split(line)
    pairs = list(zip(rest[::2], (_unquoted(value) for value in rest[1::2]), strict=True))
    unknown = [f"--{name}" for name, _ in pairs if name not in OPTIONS]
    if unknown and "prompt" in rest[::2]:
        raise ValueError(f"{unknown[0]} is not known; options of a line are --{', --'.join(OPTIONS)}")
    if unknown:
        known = f"options of a line are --{', --'.join(OPTIONS)}"
        faults.note(unknown[0], f"{faults.name}:{number}: {unknown[0]:.40} is read as words of the prompt; {known}")
        return {"prompt": line}
    given = [("prompt", text.strip())] if text.strip() else []
    given += [(OPTIONS[name], value) for name, value in pairs]
    columns = _once(given)
    return columns | ({"solver": _solver(columns["solver"])} if "solver" in columns else {})


def _unquoted(value: str) -> str:
    value = value.strip()
    return value[1:-1] if len(value) > 1 and value[0] == value[-1] and value[0] in "\"'" else value


def _solver(sampler: str) -> str:
    """Our name of a sampler that Automatic1111 knows, or the name itself."""
    names = {entry.full_sampler.lower(): solver for solver, entry in SOLVERS.items()}
    return names.get(sampler.lower(), sampler)


def _jsonl(lines: Iterable[tuple[int, str]], faults: Faults) -> Iterator[Row]:
    for number, line in lines:
        try:
            if line.strip():
                yield Row(number, {name: _flat(name, value) for name, value in _object(line).items()})
        except ValueError as error:
            faults.add(number, error)


def _csv(lines: Iterable[tuple[int, str]], faults: Faults) -> Iterator[Row]:
    """Cells are text and an empty one is one not given."""
    lines = iter(lines)
    first, start = next((line for line in lines if line[1].strip()), (1, ""))[::-1]
    delimiter, stated = csv_delimiter(first)
    texts = itertools.chain([] if stated else [first + "\n"], (line + "\n" for _, line in lines))
    start += stated
    reader = csv.reader(texts, strict=True, delimiter=delimiter)
    try:
        header = [name.strip() for name in next(reader, [])]
        if not all(header) or len(set(header)) < len(header) or not header:
            raise ValueError(f"{faults.name}:{start}: the header must name every column, and each once")
        for cells in reader:
            number = reader.line_num + start - 1
            if len(cells) > len(header) or 0 < len(cells) < len(header):
                faults.add(number, f"there are {len(cells)} cells for {len(header)} columns")
            elif any(cells):
                yield Row(number, {name: cell for name, cell in zip(header, cells, strict=True) if cell})
    except csv.Error as error:
        raise ValueError(f"{faults.name}:{reader.line_num + start - 1}: not CSV: {error}") from None


READERS: dict[str, Callable[[Iterable[tuple[int, str]], Faults], Iterator[Row]]] = {
    ".txt": _txt,
    ".jsonl": _jsonl,
    ".csv": _csv,
    ".tsv": _csv,
}


def _parquet(path: Path) -> Iterator[Row]:
    """Rows of a table, its texts counted before they are unpacked: a dictionary repeats a long one in a few bytes."""
    try:
        from pyarrow import ArrowException, parquet, types  # type: ignore[import-untyped]
    except ImportError:
        raise ValueError(f"{path}: reading Parquet needs pyarrow: pip install 'sdlite[parquet]'") from None
    try:
        with parquet.ParquetFile(path) as file:
            schema, about = file.schema_arrow, file.metadata
            for field in schema:
                kind = field.type.value_type if types.is_dictionary(field.type) else field.type
                if not (_is_text(kind) or types.is_primitive(kind) or types.is_null(kind)):
                    raise ValueError(f"{path}: column {field.name!r:.80} holds {kind!s:.40}; give texts and numbers")
            groups = [about.row_group(i) for i in range(min(about.num_row_groups, MAX_ROWS))]
            if about.num_rows * len(schema) > MAX_CELLS or sum(group.total_byte_size for group in groups) > MAX_BYTES:
                raise ValueError(f"{path} unpacks to more than {MAX_CELLS:,} cells or {MAX_BYTES >> 20} MiB; split it")
            texts = [field.name for field in schema if _is_text(field.type)]
        with parquet.ParquetFile(path, read_dictionary=texts) as file:
            numbers, size = itertools.count(1), 0
            for batch in file.iter_batches(1024):
                size += sum(map(_text_bytes, batch.columns))
                if size > MAX_BYTES:
                    raise ValueError(f"{path} unpacks to more than {MAX_BYTES >> 20} MiB of text; split it")
                yield from (Row(next(numbers), columns) for columns in batch.to_pylist())
    except ArrowException as error:
        raise ValueError(f"{path} is not Parquet: {(str(error).splitlines() or ['damaged'])[0]}") from None


def _is_text(kind: Any) -> bool:
    from pyarrow import types

    return types.is_string(kind) or types.is_large_string(kind)


def _text_bytes(column: Any) -> int:
    """Bytes of all cells of a column once each has its own text; 0 for numbers."""
    from pyarrow import DictionaryArray, compute

    if not isinstance(column, DictionaryArray) or not _is_text(column.dictionary.type):
        return 0
    lengths = compute.binary_length(column.dictionary)
    return compute.sum(compute.cast(lengths.take(column.indices), "int64")).as_py() or 0


def _grid(file: BinaryIO, name: str) -> tuple[list[Row], dict[str, list[Any]]]:
    """One object; the rows are all combinations of its lists, numbered from 1."""
    text = "\n".join(line for _, line in _text_lines(file, name))
    try:
        columns = _object(text)
        axes = {column: value for column, value in columns.items() if isinstance(value, list)}
        for column, value in columns.items():
            for cell in value if isinstance(value, list) else [value]:
                _flat(column, cell)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    if not all(axes.values()):
        raise ValueError(f"{name}: {next(a for a in axes if not axes[a])}=[] must hold at least one value")
    count = math.prod(map(len, axes.values()))
    if count > MAX_ROWS or count * len(columns) > MAX_CELLS:
        raise ValueError(
            f"{name}: the lists combine to more than {MAX_ROWS:,} rows or {MAX_CELLS:,} cells; shorten them"
        )
    products = itertools.product(*axes.values())
    return [Row(i + 1, columns | dict(zip(axes, chosen, strict=True))) for i, chosen in enumerate(products)], axes


def _flat(name: str, value: Any) -> Any:
    """The value, if it is one that a cell can hold. Raises ValueError."""
    if isinstance(value, list | dict):
        kind = "a list" if isinstance(value, list) else "an object"
        raise ValueError(f"{name:.80} is {kind}; it must be a text, a finite number, true, false or empty")
    return value


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
