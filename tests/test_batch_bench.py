"""What `sdlite bench --batch` measures and prints."""

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_the_machinery_and_the_price_of_exact(tmp_path: Path):
    (tmp_path / "disk").mkdir()
    code = "from sdlite import cli; from sdlite.bench import batches; batches.IMAGES = 6; cli.main()"
    flags = ["bench", "--batch", "--dir", "disk", "-m", "tiny", "--device", "cpu", "--steps", "1", "--runs", "1"]
    command = [sys.executable, "-c", code, *flags, "-o", "bench.json"]
    out = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert out.count("| overhead of the batch, per image |") == 1 and "ratio" not in out[: out.index("pictures: 6")]
    assert "--exact on 1 thread, default on 1 |" in out
    result = json.loads((tmp_path / "bench.json").read_text())
    whole, png, file = (row["median"] for row in result["machinery"]["rows"])
    assert min(*whole.values(), *png.values(), *file.values()) > 0 and whole["CPU"] > png["CPU"]
    assert result["exact"]["rows"][0]["ratio"]["median"] > 0.2
    assert not list((tmp_path / "disk").iterdir())
