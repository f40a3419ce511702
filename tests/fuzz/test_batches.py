"""Request files and batch folders with hostile changes."""

import json
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest

from sdlite.batch.check import verify
from sdlite.batch.plan import Resolved, make_plan
from sdlite.batch.store import Store, read_settings
from tests.fuzz.rule import Choices, changed, edited, fuzz, hold

ROW: dict[str, Any] = {"prompt": "a cat", "negative_prompt": "b", "seed": 1, "steps": 2, "width": 64, "num_images": 2}
ROW |= {"guidance_scale": 1.5, "solver": "ddim", "image": None, "note": "mine"}
LINES = 11  # ten faults of a request file are told, and how many more there are


def csv(row: Mapping[str, Any]) -> bytes:
    cells = [str(value).replace('"', '""') for value in row.values()]
    lines = [",".join(row), ",".join(f'"{cell}"' for cell in cells)]
    return "\n".join(lines * 2).encode("utf-8", "surrogatepass")


def jsonl(row: Mapping[str, Any]) -> bytes:
    return b"\n".join([json.dumps(row).encode()] * 3)


def grid(row: Mapping[str, Any]) -> bytes:
    return json.dumps({"prompt": ["a", "b"], "steps": [1, 2]} | dict(row)).encode()


def txt(row: Mapping[str, Any]) -> bytes:
    return "\n".join(f"a cat --{name} {value}" for name, value in row.items()).encode("utf-8", "surrogatepass")


WRITERS = {".csv": csv, ".jsonl": jsonl, ".json": grid, ".txt": txt}


def test_request_files(folder: Path, examples: int):
    kinds = sorted(WRITERS)

    def check(choices: Choices) -> None:
        kind = choices.one_of(kinds)
        path = folder / f"requests{kind}"
        path.write_bytes(edited(WRITERS[kind](changed(ROW, choices)), choices))
        hold(lambda: make_plan(path, resolve=lambda request, *_: Resolved(request), model={}), folder, lines=LINES)

    fuzz(check, examples)


def test_parquet(folder: Path, examples: int):
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    table = arrow.table({name: [value] * 3 for name, value in ROW.items()})
    whole = BytesIO()
    parquet.write_table(table, whole)
    path = folder / "requests.parquet"

    def check(choices: Choices) -> None:
        path.write_bytes(edited(whole.getvalue(), choices))
        hold(lambda: make_plan(path, resolve=lambda request, *_: Resolved(request), model={}), folder, lines=LINES)

    fuzz(check, examples // 10)


def test_batch_folders(folder: Path, examples: int):
    """run.json, the manifest and the list of errors of another program, or of a disk that lies."""
    entry = {"index": 0, "file_name": "a.png", "key": "0" * 64, "sha256": "1" * 64, "seconds": 0.5, "crc32": "0" * 8}
    contents: dict[str, dict[str, Any]] = {
        "run.json": {"format": "folder", "model_hash": "ab" * 32, "version": 1},
        ".manifest-host-0.jsonl": entry,
        "errors.jsonl": {"index": 0, "key": "0" * 64, "error": "x", "prompt": "a"},
        "metadata.jsonl": {"file_name": "a.png", "text": "x"},
    }
    names = sorted(contents)

    def read() -> None:
        read_settings(folder)
        verify(folder)
        Store(folder).done([])

    def check(choices: Choices) -> None:
        for other, content in contents.items():
            (folder / other).write_text(json.dumps(content) + "\n")
        name = choices.one_of(names)
        (folder / name).write_bytes(edited(json.dumps(changed(contents[name], choices)).encode(), choices))
        hold(read, folder)

    fuzz(check, examples)
