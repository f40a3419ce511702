"""Request files and their items: every format, every fault in one line, names that are safe, and hostile input."""

import hashlib
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from sdlite.batch.names import DEFAULT, checked, fill, parse_template
from sdlite.batch.keys import derived_seed, sample_key
from sdlite.batch.options import Options
from sdlite.batch.parts import Part
from sdlite.batch.plan import Item, Plan, Resolved, make_plan
from sdlite.images.pixels import digest
from sdlite.request import Request


def resolve(request: Request, image: Any, mask: Any) -> Resolved:
    if (request.width or 64) % 8:
        raise ValueError(f"width={request.width} must be a multiple of 8")
    size = image.size if image else (64, 64)
    return Resolved(request.replace(width=request.width or size[0], height=request.height or size[1]))


def planned(source: Any, model: dict[str, str] | None = None, **options: Any) -> Plan:
    return make_plan(source, Options(**options), resolve=resolve, model={"model": "m"} if model is None else model)


def plan(source: Any, **options: Any) -> list[Item]:
    return planned(source, **options).items


def written(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


ROWS = [
    {"prompt": "a fox, red", "seed": 7, "steps": 2, "guidance_scale": 1.5, "author": "me"},
    {"prompt": 'the "owl"\nat night', "seed": 0, "steps": 3, "guidance_scale": 7.0, "author": "=cmd()|' /C calc'!A0"},
]


def test_keys_of_folders_drawn_before_pasting_stay_valid():
    """The keys that the code before it made; a mask that is pasted back makes another picture and has another."""
    request = Request(prompt="a cat", seed=7, width=64, height=64)
    assert sample_key(request, {"model": "ab"}) == "74e181225660f6bdbde00721153d386e0461f9b8436b42aca456c0b0bed45ba6"
    masked = request.replace(image=f"sha256:{'0' * 64}", mask=f"sha256:{'1' * 64}")
    before = "c849168ede795d4a9a02cf98482399257a335222f5f59babd8baaa1f745c3d37"
    assert sample_key(masked.replace(paste=False, mask_blur=9), {"model": "ab"}) == before
    keys = {sample_key(masked.replace(mask_blur=blur), {"model": "ab"}) for blur in (0, 4)}
    assert len(keys) == 2 and before not in keys


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


def test_defaults_are_of_rows_that_do_not_say_otherwise(tmp_path: Path):
    rows = [{"prompt": "a", "steps": 3}, {"prompt": "b", "seed": 9, "num_images": 1}]
    first, second, third = plan(rows, defaults={"steps": 7, "solver": "euler", "num_images": 2})
    assert [item.request.steps for item in (first, second, third)] == [3, 3, 7]
    assert {item.request.solver for item in (first, second, third)} == {"euler"}
    assert third.request.seed == 9 and first.request.seed == derived_seed(0, 0) == second.request.seed - 1
    assert plan(rows, seed=5, same_seed=True)[0].request.seed == 5 and plan(rows, same_seed=True)[1].request.seed == 9
    given = [Request(prompt="a", steps=3), Request(prompt="b")]
    assert [item.request.steps for item in plan(given, defaults={"steps": 7})] == [3, 7]
    with pytest.raises(ValueError, match=r"^steps=0 must be greater"):  # once, and not for each row
        plan(["a", "b"], defaults={"steps": 0})
    with pytest.raises(ValueError, match=r"^num_images=0 must be greater than or equal to 1$"):
        plan(["a", "b"], defaults={"num_images": 0})
    made = planned(rows, defaults={"strength": 0.5})
    assert made.notes == ["strength has no effect: no row names an image to start from"]


def test_what_python_gives():
    given = [Request(prompt="a", seed=3), {"prompt": "a", "seed": 3}, Request(prompt="a")]
    first, second, third = plan(given)
    assert first.sample_key == second.sample_key and first.request == second.request
    assert third.request.seed == derived_seed(0, 2)  # a seed that the Request did not name


def test_seeds_depend_on_the_row_alone():
    assert derived_seed(5, 17) == int(hashlib.sha256(b"5:17").hexdigest()[:8], 16) // 2
    alone, longer = plan(["a", "b"]), plan(["a", "b", "c"])
    assert longer[:2] == alone and len({item.request.seed for item in longer}) == 3
    assert plan(["a"], seed=1)[0].request.seed != alone[0].request.seed


@pytest.mark.parametrize("seed", [-1, "-1", "random", None])
def test_any_seed_is_the_rows_own(seed: Any):
    rows = [{"prompt": "a", "seed": seed}, {"prompt": "b", "seed": seed}]
    assert [item.request.seed for item in plan(rows)] == [derived_seed(0, 0), derived_seed(0, 1)]
    with pytest.raises(ValueError, match="seed=-2 must be"):
        plan([{"prompt": "a", "seed": -2}])


def test_num_images_counts_seeds_up():
    items = plan([{"prompt": "a", "num_images": 3, "seed": 10}, {"prompt": "b", "num_images": "2"}])
    assert [item.request.seed for item in items][:3] == [10, 11, 12]
    assert items[4].request.seed == items[3].request.seed + 1
    assert [item.index for item in items] == [0, 1, 2, 3, 4] and [item.row for item in items] == [0, 0, 0, 1, 1]
    assert "num_images" not in items[0].extra


def test_a_grid_is_the_product_of_its_lists(tmp_path: Path):
    grid = {"prompt": ["a", "b"], "steps": [2, 3, 4], "solver": "euler"}
    made = planned(written(tmp_path, "g.json", json.dumps(grid)))
    cells = [(item.request.prompt, item.request.steps, item.request.solver) for item in made.items]
    assert cells == [(p, s, "euler") for p in "ab" for s in (2, 3, 4)]
    assert made.axes == {"prompt": ["a", "b"], "steps": [2, 3, 4]}
    assert len({item.request.seed for item in made.items}) == 1  # so that cells differ by their axes alone


def test_pictures_lie_beside_the_file_and_are_recorded_by_digest(tmp_path: Path):
    picture = Image.new("RGB", (40, 24), "red")
    (tmp_path / "in").mkdir()
    picture.save(tmp_path / "in/a.png")
    item = plan(written(tmp_path, "a.csv", "prompt,image\na fox,in/a.png"))[0]
    assert item.request.image == digest(picture) and item.image == tmp_path / "in/a.png"
    assert (item.request.width, item.request.height) == (40, 24)
    with pytest.raises(ValueError, match=r"b\.csv:2: .*none\.png does not exist"):
        plan(written(tmp_path, "b.csv", "prompt,image\na fox,none.png"))


def test_the_key_is_of_all_that_decides_the_picture():
    base = {"prompt": "caf\u00e9", "seed": 1}

    def key(row: dict[str, Any], **options: Any) -> str:
        return plan([row], **options)[0].sample_key

    assert key(base) == key({"prompt": "cafe\u0301", "seed": 1}) == key(base | {"note": "kept"})
    others = [{"seed": 2}, {"steps": 2}, {"solver": "euler"}, {"negative_prompt": "x"}, {"guidance_scale": 3}]
    keys = {key(base | change) for change in others} | {key(base), key(base, model={"model": "other"})}
    assert len(keys) == 7
    assert plan([base])[0].file_name == f"000000-{key(base)[:16]}.png"


def test_parts_are_disjoint_and_whole():
    items = plan([f"a fox {i}" for i in range(100)])
    parts = [[item.index for item in items if Part.parse(f"{i}/3").has(item)] for i in (1, 2, 3)]
    assert sorted(index for part in parts for index in part) == list(range(100)) and all(parts)
    for text in ("0/3", "4/3", "1", "a/b", "1/0", "-1/3", "1/3/5", "²/3"):
        with pytest.raises(ValueError, match="part="):
            Part.parse(text)


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
    ("a.jsonl", '{"prompt": "a", "guidance_scale": NaN}', "NaN is no JSON number"),
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


NAMES = ["../a.png", "/a.png", "a/b.png", "a\\b.png", "C:a.png", "CON.png", "com1.x.png", ".a.png", " a.png", "a\0.png"]
NAMES += ["a\u202e.png", "a\u200b.png", "a\n.png", "é" * 150 + ".png", "a\u2028.png", "", "a?.png", "nul.png"]


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_unsafe_names_are_refused(name: str):
    with pytest.raises(ValueError, match="file name"):
        checked(name)


TEMPLATES = ["{0.__class__}.png", "{request.prompt}.png", "{seed[0]}.png", "{prompt!r}.png", "{}.png", "{0}.png"]
TEMPLATES += ["{seed:>99999999}.png", "{seed:{steps}}.png", "{index", "{index}.jpg", "{model}.png", "{key:8d}.png"]


@pytest.mark.parametrize("template", TEMPLATES)
def test_templates_name_fixed_fields_only(template: str):
    with pytest.raises(ValueError, match="name="):
        parse_template(template)


@pytest.mark.parametrize(
    "template",
    ["../{index}.png", "/tmp/{index}.png", "{index}/x.png", "a\0{index}.png", "{index}\u202e.png", "CON.png"],
)
def test_a_template_cannot_leave_the_folder(template: str):
    with pytest.raises(ValueError, match="file name") as caught:
        plan(["a", "b"], name=template)
    assert "\n" not in str(caught.value)  # the template's fault, so told once


@pytest.mark.parametrize(
    ("prompt", "name"),
    [
        ("../../etc/passwd", "etc-passwd.png"),
        ("C:\\x\0\u202ey", "C-x-y.png"),
        ("狐 и лиса", "狐-и-лиса.png"),
        ("?!", "empty.png"),
        ("é" * 150, "é" * 60 + ".png"),
    ],
)
def test_a_prompt_in_a_name_is_its_words(prompt: str, name: str):
    request = Request(prompt=prompt, width=64, height=64)
    assert fill(parse_template("{prompt}.png"), request, index=0) == name


def test_a_template_filled():
    request = Request(prompt="a fox", width=64, height=32, seed=7, steps=2, guidance_scale=1.5)
    template = "{index:04d}_{seed}_{steps:3}_{guidance_scale}_{width}x{height}_{solver}_{key:8}_{row}.png"
    assert (
        fill(parse_template(template), request, index=1, row=5, key="ab" * 32)
        == "0001_7_002_1.5_64x32_ddim_abababab_5.png"
    )
    assert fill(parse_template(DEFAULT), request, index=1, row=5, key="ab" * 32) == "000001-abababababababab.png"


def test_two_pictures_never_share_a_name():
    with pytest.raises(ValueError, match=r"requests:2: file name 'fox\.png' is also that of image 0"):
        plan(["Fox", "fox"], name="{prompt}.png")
    with pytest.raises(ValueError, match="is also that of image 0"):
        plan([{"prompt": "a", "num_images": 2}], name="{prompt}.png")
    with pytest.raises(ValueError, match="is a device on Windows"):
        plan(["con"], name="{prompt}.png")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_ten_thousand_rows_take_little_memory(tmp_path: Path):
    rows = "\n".join(json.dumps({"prompt": f"a fox, number {i}", "steps": 20}) for i in range(10_000))
    code = """
import re, sys
from pathlib import Path
from sdlite.batch.plan import Resolved, make_plan
items = make_plan(sys.argv[1], resolve=lambda r, *_: Resolved(r.replace(width=64, height=64)), model={}).items
assert len({item.sample_key for item in items}) == 10_000 and "torch" not in sys.modules
print(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
"""
    path = written(tmp_path, "a.jsonl", rows)
    child = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    assert int(child.stdout) < 300 * 1024
