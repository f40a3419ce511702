"""What the README shows can be typed: the `sh` blocks of its sections run, one after the other, in an empty folder."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from sdlite import cli

README = (Path(__file__).parents[1] / "README.md").read_text()
# Sections whose blocks are run, with the start of those that are not and why; a section that is not here is not run.
NOT_RUN = {
    "Batches": {"sbatch": "a SLURM cluster, several GPUs, a Ray cluster elsewhere; the commands in it are dry-run"},
}
AFTER = {"Batches": ["out/000001-*.png", "out/metadata.jsonl", "grid/contact-sheet.png", "shards/00000.tar"]}


def blocks(section: str) -> list[str]:
    body = re.search(rf"^## {re.escape(section)}\n(.*?)(?=^## |\Z)", README, re.M | re.S)
    assert body is not None, f"README.md has no section {section}"
    return re.findall(r"^```sh\n(.*?)^```$", body[1], re.M | re.S)


def sh(script: str, folder: Path, **variables: str) -> str:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])  # where sdlite is
    environment = os.environ | {"PATH": path, "HF_HUB_OFFLINE": "1"} | variables
    done = subprocess.run(["sh", "-ec", script], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{script}\n{done.stderr}"
    return done.stdout


@pytest.mark.skipif(os.name != "posix", reason="sh")
@pytest.mark.parametrize("section", NOT_RUN)
def test_the_blocks_of_a_section_run(tmp_path: Path, section: str):
    shown = blocks(section)
    skipped = [block for block in shown if block.startswith(tuple(NOT_RUN[section]))]
    assert len(skipped) == len(NOT_RUN[section]), "a block that is not run is no longer there"
    for block in shown:
        if block not in skipped:
            sh(block, tmp_path)
    assert not [pattern for pattern in AFTER[section] if not list(tmp_path.glob(pattern))]


@pytest.mark.skipif(os.name != "posix", reason="sh")
def test_the_commands_for_many_machines_take_their_flags(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Cluster and GPU commands, with the variables that a scheduler sets, as far as a dry run goes."""
    block = next(block for block in blocks("Batches") if block.startswith("sbatch"))
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
