"""Request files to rows: .txt, .jsonl, .csv, .tsv, .parquet, a grid in .json, or "-" for stdin.

    a prompt a line (.txt) | an object a line (.jsonl) | a header and cells (.csv, .tsv) | a table (.parquet)
    one object; every value of one list is combined with every value of the others, the last varying fastest (.json)

Stdin and .txt are read alike: the first line decides between prompts, objects
and a header. A line of prompts may end in options, as in the prompt files of Automatic1111 and kohya. Files are
untrusted: their size, lines, rows, cells and depth have limits, text is strict UTF-8 (or UTF-16 with a byte order mark)
without NUL, numbers are finite, and no name appears twice.
"""

import codecs
import csv
import itertools
import json
import math
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from sdlite.batch.rows import MAX_CELLS, MAX_ROWS, Columns, Faults, Row, column_of
from sdlite.files import csv_delimiter, parse_json
from sdlite.request import SOLVERS, Request

MAX_BYTES = 256 * 1024 * 1024  # of a file, and of all its text; a million prompts of 256 letters
MAX_UTF16_BYTES = 64 * 1024 * 1024  # the whole file is held at once
MAX_LINE = 1024 * 1024
OPTION = re.compile(r"(?:^|\s)--([A-Za-z_]+)(?=\s|$)")
# Options of a line of a .txt file -> columns: Automatic1111's names, then kohya's short ones.
OPTIONS = {name: name for name in ("prompt", "negative_prompt", "seed", "steps", "width", "height")}
OPTIONS |= {"cfg_scale": "guidance_scale", "sampler_name": "solver", "n_iter": "num_images"}
OPTIONS |= {"n": "negative_prompt", "d": "seed", "s": "steps", "l": "guidance_scale", "w": "width", "h": "height"}
SAMPLERS = {entry.full_sampler.lower(): solver for solver, entry in SOLVERS.items()}

Source = str | Path | Iterable[Request | Mapping[str, Any] | str]
Lines = Iterable[tuple[int, str]]  # number and text of each


class Table(NamedTuple):
    """Rows in order. axes: of a grid, the columns that had lists, with their values."""

    rows: list[Row]
    axes: dict[str, list[Any]] | None
    folder: Path  # file names of images in the rows are relative to it


def read_table(source: Source, faults: Faults) -> Table:
    """All rows of a file, of stdin ("-"), or of requests, dicts and prompts given in Python.

    Rows that cannot be read are added to `faults`. Raises ValueError or OSError for a file that is wrong as a whole.
    """
    if not isinstance(source, str | Path):
        return Table(_limited((Row(i + 1, _columns(given)) for i, given in enumerate(source)), faults), None, Path())
    if str(source) == "-":
        if sys.stdin is None:
            raise ValueError("stdin is closed; give a file of requests instead of -")
        lines = _text_lines(sys.stdin.buffer, faults.name)
        return Table(_limited(_by_first_line(lines, faults), faults), None, Path())
    path = Path(source)
    kind = _checked_kind(path)
    if kind == ".parquet":
        return Table(_limited(_parquet(path), faults), None, path.parent)
    with path.open("rb") as file:
        lines = _text_lines(file, faults.name)
        if kind == ".json":
            return Table(*_grid(lines, faults.name), path.parent)
        return Table(_limited(READERS[kind](lines, faults), faults), None, path.parent)


def _checked_kind(path: Path) -> str:
    """The suffix of a file that can be read. Raises ValueError."""
    kind, known = path.suffix.lower(), (*READERS, ".parquet", ".json")
    if kind not in known:
        raise ValueError(f"{path}: requests must be one of {', '.join(known)}, or - for stdin")
    if not path.is_file():
        raise ValueError(f"{path} is not a file" if path.exists() else f"{path} does not exist")
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(f"{path} is larger than {MAX_BYTES >> 20} MiB; split it")
    return kind


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
    """A file in UTF-16, as Excel and Notepad write it. start: the bytes that were read already."""
    whole = start + file.read(MAX_UTF16_BYTES)
    if len(whole) > MAX_UTF16_BYTES:
        raise ValueError(f"{name} is UTF-16 and larger than {MAX_UTF16_BYTES >> 20} MiB; save it as UTF-8")
    try:
        return whole.decode("utf-16").encode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{name}: byte {error.start + 1} is not UTF-16; save the file as UTF-8") from None


def _by_first_line(lines: Lines, faults: Faults) -> Iterator[Row]:
    """Rows of stdin or a .txt file: prompts, objects or a table, as its first line shows."""
    lines = iter(lines)
    first = next((line for line in lines if line[1].strip()), (1, ""))
    reader = _prompts
    if re.match(r'\s*\{\s*(["}]|$)', first[1]):
        reader = _jsonl
    elif csv_delimiter(first[1])[1] or _is_header(first[1]):
        reader = _csv
        faults.note("csv", f"{faults.name} is read as CSV, as its first line says: {first[1]:.80}")
    yield from reader(itertools.chain([first], lines), faults)


def _is_header(line: str) -> bool:
    """Whether a line names columns, one of them prompt. The others are one word each, or fields of a request."""
    names = [name.strip().strip('"') for name in line.split(csv_delimiter(line)[0])]
    plain = {name: column_of(name) for name in names}
    return "prompt" in plain.values() and all(plain[name] in Request.model_fields or " " not in name for name in plain)


def _by_line(columns_of: Callable[[str, int, Faults], Columns], lines: Lines, faults: Faults) -> Iterator[Row]:
    """A row of each line that is not blank."""
    for number, line in lines:
        try:
            if line.strip():
                yield Row(number, columns_of(line, number, faults))
        except ValueError as error:
            faults.add(number, error)


def _prompt(line: str, number: int, faults: Faults) -> Columns:
    """A prompt and the options behind it, or options of which one is --prompt (Automatic1111). Raises ValueError.

    A line with an unknown option is a prompt as a whole, with a note.
    """
    line = line.strip()
    if "\r" in line:
        raise ValueError("there is a carriage return inside the line; end lines with a newline")
    text, *rest = OPTION.split(line)
    pairs = list(zip(rest[::2], map(_unquoted, rest[1::2]), strict=True))
    unknown = next((f"--{name}" for name, _ in pairs if name not in OPTIONS), None)
    if unknown is not None:
        known = f"options of a line are --{', --'.join(OPTIONS)}"
        if "prompt" in rest[::2]:
            raise ValueError(f"{unknown} is not known; {known}")
        faults.note(unknown, f"{faults.name}:{number}: {unknown:.40} is read as words of the prompt; {known}")
        return {"prompt": line}
    given = [("prompt", text.strip())] if text.strip() else []
    given += [(OPTIONS[name], value) for name, value in pairs]
    columns = dict(given)
    if len(columns) < len(given):
        raise ValueError("an option is there twice, or a prompt in two places")
    if "solver" in columns:
        columns["solver"] = SAMPLERS.get(columns["solver"].lower(), columns["solver"])
    return columns


def _unquoted(value: str) -> str:
    value = value.strip()
    return value[1:-1] if len(value) > 1 and value[0] == value[-1] and value[0] in "\"'" else value


def _csv(lines: Lines, faults: Faults) -> Iterator[Row]:
    """Cells are text; an empty one counts as left out."""
    lines = iter(lines)
    start, first = next((line for line in lines if line[1].strip()), (1, ""))
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


Reader = Callable[[Lines, Faults], Iterator[Row]]
_prompts: Reader = partial(_by_line, _prompt)
_jsonl: Reader = partial(_by_line, lambda line, *_: _object(line))
READERS: dict[str, Reader] = {".txt": _by_first_line, ".jsonl": _jsonl, ".csv": _csv, ".tsv": _csv}


def _grid(lines: Lines, name: str) -> tuple[list[Row], dict[str, list[Any]]]:
    """One object; the rows are all combinations of its lists, numbered from 1."""
    text = "\n".join(line for _, line in lines)
    try:
        columns = _object(text)
        axes = {column: values for column, values in columns.items() if isinstance(values, list)}
        empty = next((column for column in axes if not axes[column]), None)
        if empty is not None:
            raise ValueError(f"{empty}=[] must hold at least one value")
        count = math.prod(map(len, axes.values()))
        if count > MAX_ROWS or count * len(columns) > MAX_CELLS:
            raise ValueError(f"the lists combine to more than {MAX_ROWS:,} rows or {MAX_CELLS:,} cells; shorten them")
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    products = itertools.product(*axes.values())
    return [Row(i + 1, columns | dict(zip(axes, chosen, strict=True))) for i, chosen in enumerate(products)], axes


def _object(text: str) -> Columns:
    """A JSON object of whole text. Raises ValueError in one line."""
    value = parse_json(text)
    if not isinstance(value, dict):
        raise ValueError('must be a JSON object, e.g. {"prompt": "a fox"}')
    if "\\u" in text:
        try:
            json.dumps(value, ensure_ascii=False).encode()  # an escape can spell half of a surrogate pair
        except UnicodeEncodeError:
            raise ValueError("the text holds half of a surrogate pair") from None
    return value


def _parquet(path: Path) -> Iterator[Row]:
    """Rows of a table. Its texts are counted before they are unpacked: a dictionary repeats a long one in a few bytes.

    Raises ValueError.
    """
    try:
        from pyarrow import ArrowException, parquet  # type: ignore[import-untyped]
    except ImportError:
        raise ValueError(f"{path}: reading Parquet needs pyarrow: pip install 'sdlite[parquet]'") from None
    try:
        with parquet.ParquetFile(path) as file:
            texts = _checked_texts(path, file.schema_arrow, file.metadata)
        with parquet.ParquetFile(path, read_dictionary=texts) as file:
            numbers, size = itertools.count(1), 0
            for batch in file.iter_batches(1024):
                size += sum(map(_text_bytes, batch.columns))
                if size > MAX_BYTES:
                    raise ValueError(f"{path} unpacks to more than {MAX_BYTES >> 20} MiB of text; split it")
                yield from (Row(next(numbers), columns) for columns in batch.to_pylist())
    except ArrowException as error:
        raise ValueError(f"{path} is not Parquet: {(str(error).splitlines() or ['damaged'])[0]}") from None


def _checked_texts(path: Path, schema: Any, table: Any) -> list[str]:
    """Names of the columns of texts. Raises ValueError for a column of anything but texts and numbers, and for size."""
    from pyarrow import types

    for field in schema:
        kind = field.type.value_type if types.is_dictionary(field.type) else field.type
        if not (_is_text(kind) or types.is_primitive(kind) or types.is_null(kind)):
            raise ValueError(f"{path}: column {field.name!r:.80} holds {kind!s:.40}; give texts and numbers")
    groups = [table.row_group(i) for i in range(min(table.num_row_groups, MAX_ROWS))]
    if table.num_rows * table.num_columns > MAX_CELLS or sum(group.total_byte_size for group in groups) > MAX_BYTES:
        raise ValueError(f"{path} unpacks to more than {MAX_CELLS:,} cells or {MAX_BYTES >> 20} MiB; split it")
    return [field.name for field in schema if _is_text(field.type)]


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
