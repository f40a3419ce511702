"""Batches over a Ray cluster of this machine, in real processes: the same bytes as a local run, whoever is killed."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sdlite import batch
from sdlite.batch.drawer import Drawer, Result
from sdlite.batch.plan import Item
from sdlite.batch.workers import hand_out
from sdlite.pipeline import Pipeline

pytest.importorskip("ray")
pytestmark = pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks for actors in /proc")

ROWS = [{"prompt": f"a fox, number {i}", "steps": 2} for i in range(24)]
COMMAND = [sys.executable, "-m", "sdlite", "batch", "a.jsonl", "-o", "out", "-m", "tiny", "--device", "cpu", "--exact"]


def pictures(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.png")}


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Bytes of every picture of the local run."""
    folder = tmp_path_factory.mktemp("reference")
    batch.run(ROWS, folder, pipe=Pipeline.load("tiny", device="cpu"), exact=True)
    return pictures(folder)


def actors(parent: int) -> list[int]:
    """Processes of ours that draw."""
    parents, found = {}, []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            pid, text = int(stat.parent.name), stat.read_text()
            parents[pid] = int(text[text.rindex(")") :].split()[2])
            if stat.with_name("cmdline").read_text().startswith("ray::RemoteDrawer"):
                found.append(pid)
        except OSError:
            pass  # it ended
    return [pid for pid in found if parent in (parents.get(pid), parents.get(parents.get(pid, 0)))]


def test_an_actor_killed_is_replaced(tmp_path: Path, reference: dict[str, bytes]):
    killed: list[int] = []

    def kill_one(event: batch.Event) -> None:
        if not killed:
            killed.append(actors(os.getpid())[0])
            os.kill(killed[0], signal.SIGKILL)

    before = signal.getsignal(signal.SIGTERM)
    report = batch.run(ROWS, tmp_path, model="tiny", device="cpu", workers=2, exact=True, ray=True, progress=kill_one)
    assert killed and not report.failed and report.done + report.skipped == 24
    assert pictures(tmp_path) == reference and len(batch.verify(tmp_path).good) == 24
    assert len((tmp_path / "metadata.jsonl").read_text().splitlines()) == 24
    assert actors(os.getpid()) == [] and signal.getsignal(signal.SIGTERM) == before


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_the_driver_is_ended_and_started_again(tmp_path: Path, reference: dict[str, bytes], how: signal.Signals):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    command = [*COMMAND, "--ray"]
    process = subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdout is not None and process.stdout.readline().startswith("out/")
    if how == signal.SIGINT:
        os.killpg(process.pid, how)  # as a terminal does
    else:
        process.kill()
    _, err = process.communicate()
    there = pictures(tmp_path / "out")
    assert process.returncode == (-9 if how == signal.SIGKILL else 130)
    assert 0 < len(there) < 24 and there.items() <= reference.items()
    if how == signal.SIGINT:
        assert "sdlite: finishing the current batch; Ctrl-C again stops at once\n" in err and "Traceback" not in err
        assert len((tmp_path / "out/metadata.jsonl").read_text().splitlines()) == len(there)
    again = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert pictures(tmp_path / "out") == reference
    assert 0 < len(again.stdout.splitlines()) <= 24 - len(there)  # an actor may finish what it has after its driver
    assert {line.split(":")[1] for line in again.stderr.splitlines()} == {" note"}  # nothing of Ray's


def test_without_ray_one_line_says_what_to_install(tmp_path: Path):
    (tmp_path / "a.jsonl").write_text('{"prompt": "a"}\n')
    code = "import sys; sys.modules['ray'] = None; from sdlite.cli import main; main(sys.argv[1:])"
    process = subprocess.run(
        [sys.executable, "-c", code, *COMMAND[3:], "--ray"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert (process.returncode, process.stdout) == (2, "")
    assert process.stderr == "sdlite: error: --ray needs the package ray: pip install 'sdlite[ray]'\n"


class DiesOn(Drawer):
    """Draws nothing; the process ends at item 2."""

    def __init__(self, number: int, threads: int) -> None:
        self.done: list[Result] = []

    def submit(self, items: Any) -> None:
        for item in items:
            if item.index == 2:
                os.kill(os.getpid(), signal.SIGKILL)
            self.done.append(Result(item.index))

    def results(self, wait: bool = False) -> list[Result]:
        done, self.done = self.done, []
        return done


def refuses(number: int, threads: int) -> Drawer:
    raise ValueError("no such model")


@pytest.mark.slow
def test_what_kills_its_actor_fails_after_three():
    from sdlite.batch.ray_runner import cluster

    items = [Item(i, i, None, {}, "", "") for i in range(4)]  # type: ignore[arg-type]
    with cluster(DiesOn, address=None, count=1, threads=1, on_gpu=False) as team:
        results = [r for some in hand_out(team, [items[:2], items[2:]], 1, lambda: False) for r in some]
        assert sorted(result.index for result in results) == [0, 1, 2, 3]
        assert [(result.index, result.error) for result in results if result.error] == [
            (2, "the process that drew it died, 3 times")
        ]
        inner = cluster(refuses, address=None, count=1, threads=None, on_gpu=False)  # on the one that runs
        with inner as team, pytest.raises(ValueError, match="no such model"):
            list(hand_out(team, [items], 1, lambda: False))
        many = cluster(refuses, address=None, count=9, threads=1, on_gpu=False)
        with pytest.raises(ValueError, match="workers=9 need 9 CPUs, the cluster has 1; give fewer --workers"), many:
            pass


@pytest.mark.slow
def test_an_address(tmp_path: Path, reference: dict[str, bytes]):
    with pytest.raises(ValueError, match=r"no Ray cluster at 127\.0\.0\.1:1: "):
        batch.run(ROWS, tmp_path / "none", model="tiny", device="cpu", exact=True, ray_address="127.0.0.1:1")
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = os.environ | {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled", "PATH": path}
    start = ["ray", "start", "--head", "--port=0", "--num-cpus=2", "--include-dashboard=false", "--block"]
    head = subprocess.Popen(start, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        assert head.stdout is not None
        address = next(line.split("'")[1] for line in head.stdout if "--address=" in line)
        command = [*COMMAND, "--ray-address", address, "--workers", "2", "-q"]
        drawn = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
        assert len(drawn.stdout.splitlines()) == 24 and drawn.stderr == ""
        assert pictures(tmp_path / "out") == reference
    finally:
        head.terminate()
        head.wait()
