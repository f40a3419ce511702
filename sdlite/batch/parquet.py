"""Parquet tables as rows of requests."""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sdlite.batch.rows import MAX_CELLS, MAX_ROWS, Row


def parquet_rows(path: Path, max_bytes: int) -> Iterator[Row]:
    """Rows of a table. Its texts are counted before they are unpacked: a dictionary repeats a long one in a few bytes.

    max_bytes: of all texts together. Raises ValueError.
    """
    try:
        from pyarrow import ArrowException, parquet  # type: ignore[import-untyped]
    except ImportError:
        raise ValueError(f"{path}: reading Parquet needs pyarrow: pip install 'sdlite[parquet]'") from None
    try:
        with parquet.ParquetFile(path) as file:
            _check_schema(path, file.schema_arrow)
            _check_size(path, file.metadata, max_bytes)
            texts = [field.name for field in file.schema_arrow if _is_text(field.type)]
        with parquet.ParquetFile(path, read_dictionary=texts) as file:
            numbers, size = itertools.count(1), 0
            for batch in file.iter_batches(1024):
                size += sum(map(_text_bytes, batch.columns))
                if size > max_bytes:
                    raise ValueError(f"{path} unpacks to more than {max_bytes >> 20} MiB of text; split it")
                yield from (Row(next(numbers), columns) for columns in batch.to_pylist())
    except ArrowException as error:
        raise ValueError(f"{path} is not Parquet: {(str(error).splitlines() or ['damaged'])[0]}") from None


def _check_schema(path: Path, schema: Any) -> None:
    """Raises ValueError for a column of anything but texts and numbers."""
    from pyarrow import types

    for field in schema:
        kind = field.type.value_type if types.is_dictionary(field.type) else field.type
        if not (_is_text(kind) or types.is_primitive(kind) or types.is_null(kind)):
            raise ValueError(f"{path}: column {field.name!r:.80} holds {kind!s:.40}; give texts and numbers")


def _check_size(path: Path, table: Any, max_bytes: int) -> None:
    groups = [table.row_group(i) for i in range(min(table.num_row_groups, MAX_ROWS))]
    if table.num_rows * table.num_columns > MAX_CELLS or sum(group.total_byte_size for group in groups) > max_bytes:
        raise ValueError(f"{path} unpacks to more than {MAX_CELLS:,} cells or {max_bytes >> 20} MiB; split it")


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
