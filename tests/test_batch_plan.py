"""From rows to items: seeds, defaults, grids, start images, and little memory."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from sdlite.batch.names import derived_seed
from sdlite.batch.plan import Item, Options, Plan, Resolved, make_plan
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
