"""What the README shows can be typed: its blocks run in order in an empty folder, its counts and links are right."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from sdlite import cli, images
from sdlite.pipeline import Pipeline
from sdlite.training.datasets.emoji import write

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
CI = "CI runs it as it stands"
NOT_RUN = {  # the start of each block that is not run as it stands, and why
    "pip install .": CI,
    "pip install -e": CI,
    "sbatch": "a SLURM cluster, several GPUs, a Ray cluster elsewhere; the commands in it are dry-run",
    "sdlite data emoji": "hours, and the network; test_train_tasks.py runs these stages at toy size",
    "sdlite data nuclei": "the network; test_train_segmentation.py runs these commands on made pictures",
}
SHORTER = ("--minutes 10", "--minutes 0.05")  # as shown, as run
NEAR = 10  # lines by which a count may be off


def has_own_checkpoints(folder: Path) -> None:
    pipe = Pipeline.load("tiny")
    for name in ("path/to/model", "stable-diffusion-v1-5/stable-diffusion-v1-5"):
        pipe.save(folder / name)
    sh("sdlite convert path/to/model v1-5.safetensors -q", folder)
    Image.new("RGB", (64, 64), "green").save(folder / "photo.png")


def has_the_prompts(folder: Path) -> None:
    (folder / "notebooks").symlink_to(ROOT / "notebooks")


def has_captioned_pictures(folder: Path) -> None:
    records = [({"red": "#d33", "blue": "#36c"}[name], f"{name}.png", f"a {name} square") for name in ("red", "blue")]
    write(folder / "pictures", [{"file_name": name, "text": text, "split": "train"} for _, name, text in records],
          [Image.new("RGBA", (64, 64), colour) for colour, *_ in records])  # fmt: skip


BEFORE = {
    "sdlite": has_the_prompts,
    "Your own checkpoint": has_own_checkpoints,
    "Training": has_captioned_pictures,
}
AFTER = {
    "sdlite": ["sheet.png"],
    "Python": ["folder/model_index.json", "cats/000003-4.png"],
    "Command line": ["four.png", "strawberries/000003-10.png", "dog.png", "words.png", "star.png"],
    "Batches": ["out/000001-*.png", "out/metadata.jsonl", "grid.png", "shards/00000.tar", "table/000001-*.png"],
    "Your own checkpoint": ["cats.png", "folder/model_index.json"],
    "Training": ["mine/export/model_index.json", "000000-*.png"],
}
SLOW = ("Command line", "Batches", "Your own checkpoint", "Training")


def sections() -> dict[str, list[tuple[str, str]]]:
    """(language, code) of the blocks of each section that has any; drawings have no language."""
    parts = re.split(r"^##? (.*)\n", README, flags=re.M)[1:]
    found = {
        name: re.findall(r"^```(\w+)\n(.*?)^```$", body, re.M | re.S)
        for name, body in zip(parts[::2], parts[1::2], strict=True)
    }
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
        code = shown.replace(*SHORTER)
        if not code.startswith(tuple(NOT_RUN)):
            {"sh": sh, "python": lambda c, f: started([sys.executable, "-c", c], f)}[language](code, tmp_path)
    assert not [pattern for pattern in AFTER.get(section, []) if not list(tmp_path.glob(pattern))]
    if section == "sdlite":
        drawn, there = (images.open_picture(p) for p in (tmp_path / AFTER[section][0], ROOT / "notebooks/sheet.png"))
        assert drawn.size == there.size and images.largest_difference(drawn, there) <= 2


def test_every_block_that_is_not_run_is_there():
    code = [code for blocks in sections().values() for _, code in blocks]
    for start in NOT_RUN:
        assert [c for c in code if c.startswith(start)], f"README has no block that starts with {start!r}"


@pytest.mark.skipif(os.name != "posix", reason="sh")
def test_the_commands_for_many_machines_take_their_flags(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Cluster and GPU commands, with the variables that a scheduler sets, as far as a dry run goes."""
    block = next(code for _, code in sections()["Batches"] if code.startswith("sbatch"))
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


def test_links_and_names_lead_somewhere():
    targets = re.findall(r"\]\((?!https?:)([^)#]+)\)|(?:src|href)=\"(?!https?:)([^\"]+)\"", README)
    for target in {a or b for a, b in targets}:
        assert (ROOT / target).exists(), f"README links to {target}, which is not there"
    for name in set(re.findall(r"`(test_\w+\.py)`|tests/(test_\w+\.py)", README)):
        assert (ROOT / "tests" / (name[0] or name[1])).is_file(), f"README names tests/{name}, which is not there"
    tests = "\n".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    for name in set(re.findall(r"`(test_\w+?)(?:_?\*)?`", README)):
        assert f"def {name}" in tests, f"README names the test {name}, which is not there"


def test_the_questions_of_the_notebooks_are_their_titles():
    rows = re.findall(r"^\| \[[^]]*\]\((notebooks/\w+\.ipynb)\) \| (.*) \|$", README, re.M)
    assert [name for name, _ in rows] == sorted(
        f"notebooks/{path.name}" for path in (ROOT / "notebooks").glob("*.ipynb")
    )
    for name, question in rows:
        first = "".join(json.loads((ROOT / name).read_text())["cells"][0]["source"])
        assert first.startswith(f"# {question}\n"), f"README gives {name} another question than its title"
