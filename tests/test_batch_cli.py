"""`sdlite batch`: flags, exit codes, events, and real processes that are interrupted."""

import io
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from sdlite import batch, cli, images
from sdlite.batch import local, sheet
from sdlite.batch.manifest import sha256
from sdlite.config import UNTRAINED_NOTE
from sdlite.pipeline import Pipeline
from tests.test_batch import poison

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def tiny() -> Pipeline:
    pipe = Pipeline.load("tiny", device="cpu")
    return pipe.with_parts(about=replace(pipe.about, notes=()))  # the note that it is untrained is shown even with -q


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tiny: Pipeline) -> Run:
    """Runs the command in an empty folder: (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Pipeline, "load", lambda *_, **__: tiny)

    def command(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as exit_:
            cli.main(["batch", *(str(argument) for argument in arguments)])
        out, err = capfd.readouterr()
        return int(exit_.value.code or 0), out, err

    Path("fox.csv").write_text("prompt,steps,seed\na fox,2,5\nan owl,2,6\na hen,1,7\n")
    return command


def events(out: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in out.splitlines()]


def test_a_path_a_picture_then_nothing(run: Run):
    code, out, err = run("fox.csv", "-o", "out")
    assert code == 0 and sorted(out.split()) == sorted(map(str, Path("out").glob("*.png")))
    assert "3 drawn, 0 skipped, 0 failed" in err
    code, out, err = run("fox.csv", "-o", "out", "-q")
    assert (code, out, err) == (0, "", "")


def test_events(run: Run):
    start, *drawn, done = events(run("fox.csv", "-o", "out", "--json")[1])
    assert start["event"] == "start" and start["images"] == start["missing"] == 3
    assert sorted(event["index"] for event in drawn) == [0, 1, 2]
    for event in drawn:
        assert event["event"] == "image" and batch.verify(Path("out")).good
        assert event["sha256"] == sha256(Path(event["path"]).read_bytes())
    assert done | {"event": "done", "drawn": 3, "skipped": 0, "failed": 0, "interrupted": False} == done


def test_every_flag_reaches_the_batch(run: Run, monkeypatch: pytest.MonkeyPatch):
    given: dict[str, Any] = {}

    def prepare(requests: str, output: Path, **options: Any) -> None:
        given.update(options, requests=requests, output=output)
        raise ValueError("one\ntwo")

    monkeypatch.setattr(batch, "prepare", prepare, raising=False)
    flags = "-m org/m -b 7 --workers 2 --exact -s 9 --keep-going --part 2/3 --name {index}.png --format webdataset"
    flags += " --ray --ray-address a:1 --same-seed -n blurry --steps 7 --solver euler --guidance-scale 3"
    flags += " --num-images 2 --strength 0.5 -W 72 -H 80"
    code, out, err = run("fox.csv", "-o", "out", *flags.split(), "--device", "cpu", "--dtype", "float32")
    assert (code, out, err) == (2, "", "sdlite: error: one\nsdlite: error: two\n")
    assert given == {
        "requests": "fox.csv",
        "output": Path("out"),
        "model": "org/m",
        "batch_size": 7,
        "workers": 2,
        "exact": True,
        "seed": 9,
        "keep_going": True,
        "same_seed": True,
        "defaults": {
            "negative_prompt": "blurry",
            "steps": 7,
            "solver": "euler",
            "guidance_scale": 3.0,
            "num_images": 2,
            "strength": 0.5,
            "width": 72,
            "height": 80,
        },
        "part": "2/3",
        "name": "{index}.png",
        "format": "webdataset",
        "ray": True,
        "ray_address": "a:1",
        "device": "cpu",
        "dtype": "float32",
        "prediction": None,
        "vae": None,
        "variant": None,
        "allow_links": (),
    }


@pytest.mark.parametrize("flag", ["--shards", "--shard"])
def test_former_names_of_part_still_work(run: Run, flag: str):
    counts = [events(run("fox.csv", "-o", "out", flag, f"{i}/2", "--json")[1])[0]["images"] for i in (1, 2)]
    assert sum(counts) == len(list(Path("out").glob("*.png"))) == 3
    with pytest.raises(ValueError, match="part='3/2': the part must be 1 to 2"):
        batch.prepare(["a"], "new", shard="3/2")


def test_wrong_input_is_a_line_per_fault_and_no_folder(run: Run):
    Path("bad.csv").write_text("prompt,steps\na,0\nb,2\nc,x\n")
    code, out, err = run("bad.csv", "-o", "out")
    assert (code, out) == (2, "")
    assert [line[: line.index("=")] for line in err.splitlines()] == [
        "sdlite: error: bad.csv:2: steps",
        "sdlite: error: bad.csv:4: steps",
    ]
    assert not Path("out").exists()
    for arguments in (["none.csv", "-o", "out"], ["fox.csv"], [], ["fox.csv", "-o", "out", "--part", "0/2"]):
        code, out, err = run(*arguments)
        assert code == 2 and err.startswith("sdlite: error: ") and len(err.splitlines()) == 1


def test_shards_are_printed_and_verified(run: Run):
    code, out, _ = run("fox.csv", "-o", "out", "--format", "webdataset")
    assert (code, out) == (0, "out/00000.tar\n")
    assert run("--verify", "out", "-q") == (0, "", "")
    assert run("fox.csv", "-o", "out", "--format", "webdataset", "-q")[0] == 0
    told = events(run("fox.csv", "-o", "told", "--format", "webdataset", "--json")[1])
    assert [event["event"] for event in told] == ["start", "image", "image", "image", "shard", "done"]
    assert {event["path"] for event in told if "path" in event} == {"told/00000.tar"}
    code, _, err = run("fox.csv", "-o", "new", "--format", "webdataset", "--contact-sheet", "sheet.png")
    assert code == 2 and "--contact-sheet is drawn from a folder" in err and not Path("new").exists()


def test_failures_and_their_exit_codes(run: Run, tiny: Pipeline, monkeypatch: pytest.MonkeyPatch):
    poison(monkeypatch, tiny, lambda request: request.seed == 6, "not finite")
    code, out, _ = run("fox.csv", "-o", "out", "--keep-going", "--json")
    failed = [event for event in events(out) if event["event"] == "failed"]
    assert code == 1 and [(event["index"], event["error"]) for event in failed] == [(1, "not finite")]
    assert len(list(Path("out").glob("*.png"))) == 2 and Path("out/errors.jsonl").exists()


def test_a_full_disk_is_exit_code_3(run: Run, monkeypatch: pytest.MonkeyPatch):
    def full(*_: object) -> None:
        raise batch.DiskFull(28, "out: No space left on device")

    monkeypatch.setattr(local.Store, "save", full)
    assert run("fox.csv", "-o", "out", "-q") == (3, "", "sdlite: error: out: No space left on device\n")


def test_verify_then_again(run: Run):
    run("fox.csv", "-o", "out", "-q")
    assert run("--verify", "out", "-q") == (0, "", "")
    first, second, _ = sorted(Path("out").glob("*.png"))
    whole = first.read_bytes()
    first.write_bytes(whole[:-20])
    second.unlink()
    assert run("--verify", "out", "-q") == (1, f"missing\t{second}\ncorrupt\t{first}\n", "")
    assert run("fox.csv", "-o", "out", "-q")[0] == 0 and first.read_bytes() == whole
    assert run("--verify", "out", "-q")[0] == 0


def test_dry_run_writes_nothing(run: Run):
    code, out, _ = run("fox.csv", "-o", "out", "--dry-run", "-b", 2)
    assert code == 0 and out.startswith("images   3, of which 0 are done\nbatches  of 2, 1 at a time")
    assert not Path("out").exists()
    before = torch.get_num_threads()
    try:
        out = run("fox.csv", "-o", "out", "--dry-run", "--threads", 4, "--workers", 2, "-b", 2)[1]
    finally:
        torch.set_num_threads(before)
    assert "2 at a time on 2 threads each\n" in out  # workers share the threads
    plan = events(run("fox.csv", "-o", "out", "--dry-run", "--json")[1])[0]
    assert plan["missing"] == 3 and plan["seconds"] > 0 and 3_000 < plan["bytes"] < 100_000 < plan["free"]


def test_a_grid_gets_a_sheet_with_labelled_axes(run: Run):
    Path("grid.json").write_text(json.dumps({"prompt": ["a fox", "an owl"], "steps": [1, 2, 3], "seed": 4}))
    code, out, _ = run("grid.json", "-o", "out", "--contact-sheet", "out/contact-sheet.png", "-q")
    sheet = images.open_picture("out/contact-sheet.png")
    assert code == 0 and out.splitlines()[-1] == "out/contact-sheet.png"
    assert sheet.width > 3 * 64 + 30 and 2 * 64 + 16 < sheet.height < 2 * 64 + 40
    picture = images.open_picture(sorted(Path("out").glob("000004*"))[0])  # row 2, column 2
    margin = sheet.width - 3 * 68 - 4
    assert images.largest_difference(sheet.crop((margin + 72, 88, margin + 136, 152)), picture) == 0
    assert min(sheet.crop((0, 40, margin, 60)).convert("L").tobytes()) < 100  # a row label
    assert min(sheet.crop((margin, 0, sheet.width, 16)).convert("L").tobytes()) < 100  # column labels
    assert run("--verify", "out", "-q")[0] == 0
    assert run("fox.csv", "-o", "other", "--contact-sheet", "sheets/foxes.png", "-q")[0] == 0


def test_labels_of_five_axes(tiny: Pipeline):
    """Each row says what it differs in, and a long prompt comes last, where it may be cut."""
    grid = {
        "prompt": ["a fox " * 50, "an owl"],
        "guidance_scale": [1, 2.5],
        "solver": ["ddim"],
        "seed": [3, 4],
        "steps": [1, 2],
    }
    items = batch.prepare(
        [dict(zip(grid, row, strict=True)) for row in itertools.product(*grid.values())], "o", pipe=tiny
    )
    labels = sheet._labels(grid, items.items)
    assert labels is not None
    corner, down, across = labels
    assert (corner, across, len(down)) == ("steps:", ["1", "2"], 8)
    assert down[0] == f"guidance_scale 1, seed 3, {'a fox ' * 50}" and down[-1] == "guidance_scale 2.5, seed 4, an owl"
    assert [row.split(", a")[0] for row in down[:4]] == [
        f"guidance_scale {g}, seed {s}" for g in (1, 2.5) for s in (3, 4)
    ]


def test_a_sheet_replaces_a_sheet_and_nothing_else(run: Run):
    Path("mine.png").write_bytes(b"somebody's")
    for place, fault in {"mine.png": "exists and is no contact sheet", "sheet": "must be a .png file"}.items():
        code, _, err = run("fox.csv", "-o", "out", "--contact-sheet", place)
        assert code == 2 and fault in err and not Path("out").exists()
    assert run("fox.csv", "-o", "out", "--contact-sheet", "out/all.png", "-q")[0] == 0
    first = Path("out/all.png").read_bytes()
    Path("fox.csv").write_text("prompt,steps,seed\na fox,2,5\nan owl,2,6\na hen,1,7\na dog,1,8\n")
    assert run("fox.csv", "-o", "out", "--contact-sheet", "out/all.png", "-q")[0] == 0
    assert Path("out/all.png").read_bytes() != first and Path("mine.png").read_bytes() == b"somebody's"
    assert run("--verify", "out", "-q") == (0, "", "")
    drawn = sorted(Path("out").glob("00000*.png"))[0]
    assert "is the file of an image" in run("fox.csv", "-o", "out", "--contact-sheet", drawn)[2]


def test_settings_of_rows_that_do_not_say_otherwise(run: Run):
    Path("two.csv").write_text("prompt,steps\na fox,2\nan owl,\n")
    code, _, err = run(
        "two.csv", "-o", "out", "--steps", 1, "--solver", "euler", "--same-seed", "-s", 4, "--strength", 0.5
    )
    drawn = [images.read_metadata(path).request for path in sorted(Path("out").glob("*.png"))]
    assert code == 0 and [(r.steps, r.solver, r.seed) for r in drawn] == [(2, "euler", 4), (1, "euler", 4)]
    assert "sdlite: note: strength has no effect: no row names an image to start from" in err
    Path("marks.txt").write_text("a fox <lora:x:1>\nan owl <lora:x:1>\n")
    assert run("marks.txt", "-o", "marks", "--steps", 1)[2].count("<lora:") == 1


def test_requests_from_stdin(run: Run, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"a fox\nan owl\n")))
    run("-", "-o", "out", "--dry-run")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b'{"prompt": "x", "steps": "y"}')))
    assert "stdin:1: steps='y'" in run("-", "-o", "out")[2]
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"prompt;steps\nx;1")))
    assert "note: stdin is read as CSV, as its first line says: prompt;steps" in run("-", "-o", "out")[2]
    monkeypatch.setattr("sys.stdin", None)  # `sdlite batch - -o out <&-`
    assert run("-", "-o", "out") == (2, "", "sdlite: error: stdin is closed; give a file of requests instead of -\n")


@pytest.mark.skipif(os.name != "posix", reason="signals")
@pytest.mark.parametrize("how", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow), signal.SIGKILL])
def test_interrupted_and_resumed(run: Run, tmp_path: Path, how: signal.Signals):
    (tmp_path / "a.jsonl").write_text("".join(f'{{"prompt": "fox {i}", "steps": 2}}\n' for i in range(40)))
    words = ["a.jsonl", "-o", "out", "-m", "tiny", "-q", "--exact"]
    process = subprocess.Popen(
        [sys.executable, "-m", "sdlite", "batch", *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline().startswith("out/")
    process.send_signal(how)
    process.communicate()
    assert process.returncode == (-9 if how == signal.SIGKILL else 130)
    there = len(list((tmp_path / "out").glob("*.png")))
    assert 0 < there < 40
    if how != signal.SIGKILL:
        assert len((tmp_path / "out/metadata.jsonl").read_text().splitlines()) == there
    code, out, _ = run(*words)
    assert code == 0 and len(out.splitlines()) == 40 - there
    assert len(batch.verify(tmp_path / "out").good) == 40


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_a_second_signal_stops_at_once(tmp_path: Path):
    rows = [{"prompt": f"fox {i}", "steps": 1 if i < 4 else 999} for i in range(8)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = [sys.executable, "-m", "sdlite", "batch", "a.jsonl", "-o", "out", "-m", "tiny"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while len(list((tmp_path / "out").glob("*.png"))) < 4 and process.poll() is None:
        time.sleep(0.01)
    assert process.stderr is not None
    process.send_signal(signal.SIGTERM)
    assert any("finishing the current batch" in line for line in process.stderr)
    process.send_signal(signal.SIGTERM)
    process.communicate()
    assert process.returncode == 130 and not list((tmp_path / "out").glob("*.tmp"))
    assert len(batch.verify(tmp_path / "out").good) == 4  # the batch in hand was given up
    assert len((tmp_path / "out/metadata.jsonl").read_text().splitlines()) == 4


@pytest.mark.skipif(os.name != "posix", reason="limits")
def test_commands_on_one_folder_and_on_a_full_disk(tmp_path: Path, tiny: Pipeline):
    (tmp_path / "a.jsonl").write_text("".join(f'{{"prompt": "fox {i}", "steps": 2}}\n' for i in range(20)))
    command = [sys.executable, "-m", "sdlite", "batch", "a.jsonl", "-m", "tiny", "-q", "--exact", "-o"]
    full = ["sh", "-c", 'ulimit -f 8; exec "$@"', "sh", *command, "full"]  # blocks of a file; a picture has more
    at_once = [
        subprocess.Popen(words, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for words in ([*command, "out"], [*command, "out"], full)
    ]
    note = f"sdlite: note: {UNTRAINED_NOTE}\n"
    told = [process.communicate()[1].removeprefix(note) for process in at_once]
    assert [process.returncode for process in at_once] == [0, 0, 3]
    assert told[:2] == ["", ""] and told[2].startswith("sdlite: error: full: File too large; finished images are kept")
    batch.run(tmp_path / "a.jsonl", tmp_path / "full", pipe=tiny, exact=True)
    batch.run(tmp_path / "a.jsonl", tmp_path / "alone", pipe=tiny, exact=True)
    alone, out, full_then = (
        {path.name: path.read_bytes() for path in (tmp_path / name).glob("*.png")} for name in ("alone", "out", "full")
    )
    assert len(alone) == 20 and alone == out == full_then
