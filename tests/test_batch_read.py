"""Request files: every format, every fault in one line, and hostile input."""

import io
import json
from pathlib import Path
from typing import Any

import pytest

from tests.test_batch_plan import plan, planned, written

ROWS = [
    {"prompt": "a fox, red", "seed": 7, "steps": 2, "guidance_scale": 1.5, "author": "me"},
    {"prompt": 'the "owl"\nat night', "seed": 0, "steps": 3, "guidance_scale": 7.0, "author": "=cmd()|' /C calc'!A0"},
]


def csv_of(rows: list[dict[str, Any]]) -> str:
    quoted = [[str(cell).replace('"', '""') for cell in row.values()] for row in rows]
    return "\r\n".join([",".join(rows[0]), *(",".join(f'"{cell}"' for cell in row) for row in quoted)])


def test_every_format_gives_the_same_items(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    lines = "\n\n".join(map(json.dumps, ROWS))
    expected = plan(ROWS)
    assert [(item.request.prompt, item.request.seed, item.extra) for item in expected] == [
        ("a fox, red", 7, {"author": "me"}),
        ('the "owl"\nat night', 0, {"author": "=cmd()|' /C calc'!A0"}),
    ]
    assert plan(written(tmp_path, "a.jsonl", lines)) == expected
    assert plan(written(tmp_path, "a.csv", csv_of(ROWS))) == expected
    assert plan(written(tmp_path, "bom.csv", b"\xef\xbb\xbf" + csv_of(ROWS).encode())) == expected
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(f"\n{lines}".encode())))
    assert plan("-") == expected
    pyarrow = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet").write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    assert plan(tmp_path / "a.parquet") == expected


def test_a_prompt_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    text = "\ufeffa fox\r\n\n  \n  an owl  \nend"
    items = plan(written(tmp_path, "a.txt", text))
    assert [item.request.prompt for item in items] == ["a fox", "an owl", "end"]
    assert [item.row for item in items] == [0, 1, 2]  # of what is not blank
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
    assert plan("-") == items
    assert plan(["a fox", "an owl", "end"]) == items


TABLES = {
    "semicolons.csv": "Prompt;Steps;Negative prompt;author\na fox, red;3;blurry;me\n",
    "excel.csv": "sep=;\r\nprompt;steps;negative prompt;author\r\na fox, red;3;blurry;me\r\n",
    "excel.txt": 'SEP=,\nprompt,steps,negative prompt,author\n"a fox, red",3,blurry,me\n',
    "few.csv": "sep=|\nprompt|steps|negative prompt|author\na fox, red|3|blurry|me\n",
    "tabs.csv": "prompt\tsteps\tnegative-prompt\tauthor\na fox, red\t3\tblurry\tme\n",
    "tabs.tsv": "prompt\tsteps\tnegative_prompt\tauthor\na fox, red\t3\tblurry\tme\n",
    "blank-line-first.csv": '\n"PROMPT",steps,negative_prompt,author\n"a fox, red",3,blurry,me\n',
    "header.txt": 'prompt,steps,negative_prompt,author\n"a fox, red",3,blurry,me\n',
    "objects.txt": '{"prompt": "a fox, red", "steps": 3, "negative_prompt": "blurry", "author": "me"}\n',
}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-be-mark"])
@pytest.mark.parametrize("name", TABLES)
def test_tables_as_spreadsheets_write_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, encoding: str):
    content = b"\xfe\xff" + TABLES[name].encode("utf-16-be") if "mark" in encoding else TABLES[name].encode(encoding)
    expected = plan([{"prompt": "a fox, red", "steps": 3, "negative_prompt": "blurry", "author": "me"}])
    assert plan(written(tmp_path, name, content)) == expected
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content)))
    assert plan("-") == expected


def test_lines_are_counted_with_excels_own(tmp_path: Path):
    with pytest.raises(ValueError, match=r"a\.csv:3: steps='0' "):
        plan(written(tmp_path, "a.csv", "sep=;\nprompt;steps\na;0\n"))


PROMPTS = [
    "{red|blue} apple\na {cat}",
    "a fox, prompt, red\nb",
    "a fox",
    "[a, b]\nc",
    "a -- b\nc --\nd",
    "steps,seed\n2",
]


@pytest.mark.parametrize("text", PROMPTS)
def test_prompts_are_the_same_from_a_file_and_from_stdin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
    items = plan(written(tmp_path, "a.txt", text))
    assert plan("-") == items
    assert [item.request.prompt for item in items] == text.splitlines()


LINES = {
    "a cat --n blurry, dark --s 7 --l 3.5 --d 9 --w 72 --h 80": {
        "prompt": "a cat",
        "negative_prompt": "blurry, dark",
        "steps": 7,
        "guidance_scale": 3.5,
        "seed": 9,
        "width": 72,
        "height": 80,
    },
    """--prompt "a cat's hat" --negative_prompt blurry --sampler_name "DPM++ 2M Karras" --cfg_scale 3 --steps 7""": {
        "prompt": "a cat's hat",
        "negative_prompt": "blurry",
        "solver": "dpmpp_2m_karras",
        "guidance_scale": 3,
        "steps": 7,
    },
    "--steps 5 --prompt a cat --sampler_name Euler a --seed 3": {
        "prompt": "a cat",
        "solver": "euler_a",
        "steps": 5,
        "seed": 3,
    },
    "a well--known cat -- on a mat": {"prompt": "a well--known cat -- on a mat"},
}


@pytest.mark.parametrize("line", LINES)
def test_options_of_a_line_of_prompts(tmp_path: Path, line: str):
    assert plan(written(tmp_path, "a.txt", line)) == plan([LINES[line]])


def test_an_option_that_nobody_knows_is_a_word_and_is_noted(tmp_path: Path):
    made = planned(written(tmp_path, "a.txt", "a cat --ar 16:9\nb"))
    assert [item.request.prompt for item in made.items] == ["a cat --ar 16:9", "b"]
    assert made.notes[0].startswith(
        f"{tmp_path / 'a.txt'}:1: --ar is read as words of the prompt; options of a line are"
    )
    many = "".join(f"a --x{chr(97 + i % 26)} {i}\n" for i in range(1000))
    assert len(planned(written(tmp_path, "a.txt", many)).notes) == 10
    with pytest.raises(ValueError, match=r"a\.txt:1: --restore_faces is not known; options of a line are --prompt, "):
        plan(written(tmp_path, "a.txt", "--prompt a cat --restore_faces true"))
    with pytest.raises(ValueError, match=r"a\.txt:1: steps='many' must be a valid integer"):
        plan(written(tmp_path, "a.txt", "a cat --s many"))
    with pytest.raises(ValueError, match=r"a\.txt:1: an option is there twice"):
        plan(written(tmp_path, "a.txt", "a cat --s 2 --steps 3"))


FAULTS = [
    ("a.csv", "prompt,steps\na,2\nb,many", "a.csv:3: steps='many' must be a valid integer"),
    ("a.csv", "prompt,steps\na", "a.csv:2: there are 1 cells for 2 columns"),
    ("a.csv", "prompt,prompt\na,b", "a.csv:1: the header must name every column, and each once"),
    ("a.csv", 'prompt\n"a', "not CSV"),
    ("a.csv", "prompt\n" + "a" * 200_000, "not CSV: field larger than field limit"),
    ("a.csv", "prompt,cfg_scale\na,3", "a.csv:2: cfg_scale='3': the column is called 'guidance_scale' here"),
    ("a.csv", "prompt,file_name\na,b", "a.csv:2: file_name='b': metadata.jsonl has a column of that name"),
    ("a.csv", "steps\n3", "a.csv:2: prompt is required"),
    ("a.csv", "prompt,width\na,500", "a.csv:2: width=500 must be a multiple of 8"),
    ("a.csv", "prompt,num_images\na,0", "a.csv:2: num_images='0' must be greater than or equal to 1"),
    ("a.csv", "prompt,num_images\na,1.5", "a.csv:2: num_images='1.5' must be a valid integer"),
    ("a.csv", f"prompt,seed,num_images\na,{2**64 - 1},2", "counted up"),
    ("a.txt", b"a fox\n\xff\xfe", "a.txt:2: byte 1 is not UTF-8"),
    ("a.txt", b"a\0b", "a.txt:1: there is a NUL byte"),
    ("a.txt", "a fox\ran owl", "a.txt:1: there is a carriage return"),
    ("a.txt", "a" * (1 << 20) + "bc", "a.txt:1: the line is longer than 1 MiB"),
    ("a.txt", "\n \n", "a.txt holds no requests"),
    ("a.jsonl", '{"prompt": "a"}\n{', "a.jsonl:2: not JSON"),
    ("a.jsonl", '["a"]', "a.jsonl:1: must be a JSON object"),
    ("a.jsonl", '{"prompt": "a", "steps": 2, "steps": 3}', "a.jsonl:1: 'steps' is there twice"),
    ("a.jsonl", '{"prompt": "a", "guidance_scale": NaN}', "NaN is not a JSON number"),
    ("a.jsonl", '{"prompt": "a", "guidance_scale": 1e999}', "guidance_scale=inf must be a finite number"),
    ("a.jsonl", '{"prompt": "\\ud800"}', "half of a surrogate pair"),
    ("a.jsonl", '{"prompt": "a", "x": ' + "[" * 100_000 + "]" * 100_000 + "}", "nested deeper than 64 levels"),
    ("a.jsonl", '{"prompt": "a", "x": {"y": 1}}', "a.jsonl:1: x is an object; it must be a text"),
    ("a.jsonl", '{"prompt": "a", "steps": [2, 3]}', "a.jsonl:1: steps is a list; it must be a text"),
    ("a.jsonl", '{"prompt": "a", "steps": 1' + "0" * 5000 + "}", "a.jsonl:1: "),
    ("a.json", '{"prompt": []}', "prompt=[] must hold at least one value"),
    ("a.json", '[{"prompt": "a"}]', "must be a JSON object"),
    ("a.json", json.dumps({"prompt": "a", "seed": [0] * 2000, "steps": [1] * 2000}), "more than 1,000,000 rows"),
    (
        "a.json",
        '{"prompt": ["a", "b"], "steps": 0, "seed": [1, 2]}',
        "a.json: steps=0 must be greater than or equal to 1",
    ),
    (
        "a.json",
        json.dumps({"prompt": "a", "seed": [0] * 1000} | {f"x{i}": i for i in range(10_000)}),
        "10,000,000 cells",
    ),
    ("a.json", '{"prompt": [["a"]]}', "a.json: prompt is a list; it must be a text"),
    ("a.csv", "Prompt,PROMPT\na,b", "a.csv:2: two columns mean 'prompt', one of them 'PROMPT'"),
    ("a.csv", b"\xff\xfea\0b", "a.csv: byte 5 is not UTF-16"),
    ("a.yaml", "prompt: a", "requests must be one of .txt"),
    ("a.parquet", b"PAR1 nothing", "is not Parquet"),
]


@pytest.mark.parametrize(("name", "content", "message"), FAULTS, ids=[message[:40] for *_, message in FAULTS])
def test_a_wrong_file_is_one_line(tmp_path: Path, name: str, content: str | bytes, message: str):
    if name.endswith(".parquet"):
        pytest.importorskip("pyarrow")
    path = written(tmp_path, name, content)
    with pytest.raises(ValueError) as caught:
        plan(path)
    assert message in str(caught.value)
    assert name in str(caught.value) and len(str(caught.value)) < 600 and "\n" not in str(caught.value)


def test_more_cells_than_memory_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("sdlite.batch.read.MAX_CELLS", 9)
    assert len(plan([{"prompt": "a", "x": 1, "y": 2}] * 3)) == 3
    with pytest.raises(ValueError, match=r"a\.csv has more than 1,000,000 rows or 9 cells; split the file"):
        plan(written(tmp_path, "a.csv", "prompt,x\n" + "a,b\n" * 5))


@pytest.mark.parametrize("kind", ["string", "large_string"])
def test_a_parquet_dictionary_that_unpacks_to_gigabytes_is_refused(tmp_path: Path, kind: str):
    """One text of 2 MB, and a thousand rows that name it: a small file, and 2 GB as rows."""
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    column = pyarrow.array(["a" * (2 << 20)] * 1, getattr(pyarrow, kind)())
    column = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 1000, "int32"), column)
    parquet.write_table(pyarrow.table({"prompt": column}), tmp_path / "bomb.parquet", store_schema=False)
    assert (tmp_path / "bomb.parquet").stat().st_size < 500_000
    with pytest.raises(ValueError, match=r"bomb\.parquet unpacks to more than 256 MiB of text"):
        plan(tmp_path / "bomb.parquet")
    table = pyarrow.table({"prompt": ["a"], "tags": [["b"]]})
    parquet.write_table(table, tmp_path / "nested.parquet")
    with pytest.raises(ValueError, match=r"column 'tags' holds list<.*>; give texts and numbers"):
        plan(tmp_path / "nested.parquet")


def test_ten_faults_are_told_and_all_counted(tmp_path: Path):
    with pytest.raises(ValueError) as caught:
        plan(written(tmp_path, "a.csv", "prompt,steps\n" + "a,0\n" * 25))
    lines = str(caught.value).splitlines()
    assert lines[0].endswith("a.csv:2: steps='0' must be greater than or equal to 1")
    assert len(lines) == 11 and lines[-1] == "and 15 more"


def test_a_line_of_a_gigabyte_is_refused_unread(tmp_path: Path):
    path = tmp_path / "a.txt"
    with path.open("wb") as file:
        file.truncate(1 << 30)
    with pytest.raises(ValueError, match="larger than 256 MiB"):
        plan(path)
