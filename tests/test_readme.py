"""What README and the docstrings of packages show can be typed: their commands run in order in an empty folder.

A docstring's commands are its indented lines that begin with "$ ". Counts, links and names are right, too.
"""

import ast
import base64
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from PIL import Image

from sdlite import cli, images
from sdlite.cli.app import app
from sdlite.pipeline import Pipeline
from sdlite.training.datasets.emoji import write

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
TESTS = (ROOT / "tests/README.md").read_text()
PACKAGES = {
    f"sdlite.{path.parent.name}": ast.get_docstring(ast.parse(path.read_text())) or ""
    for path in sorted(ROOT.glob("sdlite/*/__init__.py"))
}
CI = "CI runs it"
NOT_RUN = {  # the start of each block that is not run, and why
    "pip install .": CI,
    "pip install -e": CI,
    "sbatch": "a SLURM cluster, several GPUs, a Ray cluster elsewhere; the commands in it are dry-run",
    "sdlite data emoji": "hours, and the network; test_train_tasks.py runs these stages at toy size",
    "sdlite data nuclei": "the network; test_train_segmentation.py runs these commands on images that it makes",
}
SHEET = "sdlite batch notebooks/sheet.txt"  # the start of a line with a test of its own
SHORTER = ("--minutes 10", "--minutes 0.05")  # as shown, as run
NEAR = 10  # lines by which a count may be off


def has_own_checkpoints(folder: Path) -> None:
    Pipeline.load("tiny").save(folder / "path/to/model")
    sh("sdlite convert path/to/model v1-5.safetensors -q", folder)


def has_the_prompts(folder: Path) -> None:
    (folder / "notebooks").symlink_to(ROOT / "notebooks")


def has_captioned_images(folder: Path) -> None:
    records = [({"red": "#d33", "blue": "#36c"}[name], f"{name}.png", f"a {name} square") for name in ("red", "blue")]
    write(folder / "images", [{"file_name": name, "text": text, "split": "train"} for _, name, text in records],
          [Image.new("RGBA", (64, 64), colour) for colour, *_ in records])  # fmt: skip


BEFORE = {
    "Your own images": has_captioned_images,
    "Command line": has_own_checkpoints,
}
AFTER = {
    "Your own images": ["mine/export/model_index.json", "000000-*.png"],
    "Python": ["folder/model_index.json", "cats/000003-4.png"],
    "Command line": ["four.png", "strawberries/000003-10.png", "dog.png", "words.png", "star.png", "folder/unet/*"],
    "Batches": ["out/000001-*.png", "out/metadata.jsonl"],
    "sdlite.batch": ["grid.png", "shards/00000.tar", "table/000001-*.png"],
}  # fmt: skip
SLOW = ("Your own images", "Command line", "Batches", "sdlite.batch")


def sections() -> dict[str, list[tuple[str, str]]]:
    """(language, code) of the blocks of each section and package that has any; drawings have no language."""
    parts = re.split(r"^##? (.*)\n", README, flags=re.M)[1:]
    found = {
        name: re.findall(r"^```(\w+)\n(.*?)^```$", body, re.M | re.S)
        for name, body in zip(parts[::2], parts[1::2], strict=True)
    }
    for name, text in PACKAGES.items():
        paragraphs = [part for part in text.split("\n\n") if part.startswith("    $ ")]
        found[name] = [("sh", re.sub(r"^    (\$ )?", "", part, flags=re.M) + "\n") for part in paragraphs]
    return {name: blocks for name, blocks in found.items() if blocks}


def sh(script: str, folder: Path, **variables: str) -> str:
    return started(["sh", "-ec", script], folder, **variables)


def started(command: list[str], folder: Path, **variables: str) -> str:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])  # where sdlite is
    environment = os.environ | {"PATH": path, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"} | variables
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{command[-1]}\n{done.stderr}"
    return done.stdout


@pytest.mark.skipif(os.name != "posix", reason="sh")
@pytest.mark.parametrize(
    "section", [pytest.param(s, marks=[pytest.mark.slow] if s in SLOW else []) for s in sections()]
)
def test_the_blocks_of_a_section_run(tmp_path: Path, section: str):
    BEFORE.get(section, lambda _: None)(tmp_path)
    for language, shown in sections()[section]:
        code = re.sub(f"^{SHEET}.*\n", "", shown.replace(*SHORTER), flags=re.M)
        if not code.startswith(tuple(NOT_RUN)):
            {"sh": sh, "python": lambda c, f: started([sys.executable, "-c", c], f)}[language](code, tmp_path)
    assert not [pattern for pattern in AFTER.get(section, []) if not list(tmp_path.glob(pattern))]


@pytest.mark.skipif(os.name != "posix", reason="sh")
def test_the_first_image_is_what_its_command_draws(tmp_path: Path):
    has_the_prompts(tmp_path)
    shown = re.search(f"^{SHEET}.*$", README, re.M)
    assert shown and 'src="notebooks/sheet.png"' in README
    sh(shown[0], tmp_path)
    drawn, there = (images.open_picture(path) for path in (tmp_path / "sheet.png", ROOT / "notebooks/sheet.png"))
    assert drawn.size == there.size and images.largest_difference(drawn, there) <= 2


def test_before_and_after_is_what_the_notebook_drew():
    outputs = [
        output["data"]["image/jpeg"]
        for cell in json.loads((ROOT / "notebooks/04_train_your_own.ipynb").read_text())["cells"]
        if cell["cell_type"] == "code" and 'load_model("emoji-128")' in "".join(cell["source"])
        for output in cell["outputs"]
        if "image/jpeg" in output.get("data", {})
    ]
    assert len(outputs) == 1
    assert (ROOT / "notebooks/before-after.jpg").read_bytes() == base64.b64decode("".join(outputs[0]))


def parsed(command: str) -> str:
    """The name of the command of `sdlite ...`; its words and flags are read as the command line reads them."""
    program, *words = shlex.split(command)
    assert program == "sdlite"
    group = typer.main.get_command(app)
    with group.make_context("sdlite", words, resilient_parsing=True) as context:
        name, found, rest = group.resolve_command(context, words)
    options = {flag for option in found.params for flag in (*option.opts, *option.secondary_opts)}
    assert {word for word in rest if re.match("--?[a-zA-Z]", word)} <= options, command
    return name


def test_the_table_has_every_command_once():
    rows = re.findall(r"^\| [^|]* \| `(sdlite [^`]*)` \| \[[^]]*\]\(#[\w-]+\) \|$", README, re.M)
    assert sorted(map(parsed, rows)) == sorted(typer.main.get_command(app).commands)


def test_every_flag_is_known():
    group = typer.main.get_command(app)
    known = {"--help", "--install-completion"}
    for found in group.commands.values():
        known |= {flag for option in found.params for flag in (*option.opts, *option.secondary_opts)}
    others = {"--array", "--wrap", "--multi_gpu", "--no_python"}  # of sbatch and accelerate
    for text in (README, TESTS, *PACKAGES.values()):
        without_arrows = re.sub(r"--[\w ,.]+-->", "", text)
        assert set(re.findall(r"(?<![\w-])--[a-z_][\w-]+", without_arrows)) <= known | others


def test_it_is_short():
    assert len(README.splitlines()) <= 200


def test_the_size_of_the_model():
    said = re.search(r"The model \((\d+) MB\)", README)
    size = sum(path.stat().st_size for path in (ROOT / "weights/emoji-128").rglob("*") if path.is_file())
    assert said and int(said[1]) == round(size / 1e6)


def test_what_is_said_to_be_somewhere_is_there():
    rows = re.findall(r"^\| [^|]*\? \| `([\w/]+\.py)` \| `([\w.]+)` \|$", README, re.M)
    assert len(rows) >= 6
    for name, what in rows:
        assert what in (ROOT / "sdlite" / name).read_text(), f"README looks for {what} in {name}"


def test_every_block_that_is_not_run_is_there():
    code = [code for blocks in sections().values() for _, code in blocks]
    for start in NOT_RUN:
        assert [c for c in code if c.startswith(start)], f"README has no block that starts with {start!r}"


@pytest.mark.skipif(os.name != "posix", reason="sh")
def test_the_commands_for_many_machines_take_their_flags(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Cluster and GPU commands, with the variables that a scheduler sets, as far as a dry run goes."""
    block = next(code for _, code in sections()["sdlite.batch"] if code.startswith("sbatch"))
    commands = re.findall(r"'(sdlite batch [^']*)'|^(sdlite batch .*?)(?:  #|$)", block, re.M)
    assert len(commands) == 3
    (tmp_path / "a.jsonl").write_text('{"prompt": "a fox", "steps": 1}\n')
    monkeypatch.chdir(tmp_path)
    variables = {"SLURM_ARRAY_TASK_ID": "1", "RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}
    for quoted, plain in commands:
        _, *words = sh(f"printf '%s\\n' {quoted or plain}", tmp_path, **variables).splitlines()
        words = ["tiny" if word == "model" else "cpu" if word.startswith("cuda:") else word for word in words]
        with pytest.raises(SystemExit) as exit_:
            cli.main([*words, "--dry-run", "-q"])
        assert not exit_.value.code


def test_line_counts():
    counts = re.findall(r"`([\w/]+\.py)` \((\d+)\)", README)
    assert len(counts) >= 9
    for name, count in counts:
        lines = len((ROOT / "sdlite" / name).read_text().splitlines())
        assert abs(lines - int(count)) <= NEAR, f"README says {count} lines for {name}, which has {lines}"


def headings(text: str) -> set[str]:
    """The anchors that GitHub makes of headings."""
    return {re.sub(r"[^\w -]", "", line).lower().replace(" ", "-") for line in re.findall(r"^#+ (.*)$", text, re.M)}


@pytest.mark.parametrize("name", ["README.md", "tests/README.md", "weights/emoji-128/README.md"])
def test_links_lead_somewhere(name: str):
    path = ROOT / name
    text = path.read_text()
    found = re.findall(r"\]\((?!https?:)([^)#]*)(?:#([\w-]+))?\)|(?:src|href)=\"(?!https?:)([^\"]+)\"", text)
    assert found
    for target, anchor, source in found:
        to = path.parent / (target or source) if target or source else path
        assert to.exists(), f"{name} links to {to}, which is not there"
        assert not anchor or anchor in headings(to.read_text()), f"{name} links to the heading {anchor} of {to}"


def test_names_of_tests_and_files_are_right():
    text = "\n".join((README, TESTS, *PACKAGES.values()))
    for name in set(re.findall(r"`(test_\w+\.py)`|tests/(test_\w+\.py)", text)):
        assert (ROOT / "tests" / (name[0] or name[1])).is_file(), f"tests/{name} is not there"
    tests = "\n".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    names = set(re.findall(r"`(test_\w+?)(?:_?\*)?`", text))
    assert len(names) >= 10
    for name in names:
        assert f"def {name}" in tests, f"no test is called {name}"
    for path in set(re.findall(r"(?:sdlite|tests|weights|notebooks)/[\w./-]+\.(?:py|ipynb|md|txt|png|jpg)", text)):
        assert (ROOT / path).is_file(), f"{path} is not there"


def test_the_questions_of_the_notebooks_are_their_titles():
    rows = re.findall(r"^\| \[[^]]*\]\((notebooks/\w+\.ipynb)\) \| (.*) \|$", README, re.M)
    assert [name for name, _ in rows] == sorted(
        f"notebooks/{path.name}" for path in (ROOT / "notebooks").glob("*.ipynb")
    )
    for name, question in rows:
        first = "".join(json.loads((ROOT / name).read_text())["cells"][0]["source"])
        assert first.startswith(f"# {question}\n"), f"README gives {name} another question than its title"
