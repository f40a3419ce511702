"""The command line: names, events, exit codes and one-line errors on a stand-in model; a few real runs at the end."""

import hashlib
import json
import multiprocessing
import os
import random
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from PIL import Image

from sdlite import cli, images
from sdlite.checkpoints.folder import save_folder
from sdlite.checkpoints.places import SHIPPED, shipped_folder
from sdlite.checkpoints.untrained import random_model
from sdlite.cli.app import _explained, app
from sdlite.cli.threads import use_threads
from sdlite.config import UNTRAINED_NOTE, tiny
from sdlite.files import HOST, sweep
from sdlite.images import files, recipe
from sdlite.images.pixels import Opened
from sdlite.pipeline import Finished, Job, Pipeline, Step
from sdlite.request import Request
from sdlite.segmentation.segmenter import Segmenter, SegmenterConfig, UNetPlan, build

Run = Callable[..., tuple[int, str, str]]


class StandIn:
    """Draws one flat colour per seed, prompt and source; interrupts itself where a test asks for it."""

    name, model_hash, notes = "stand-in", "ab" * 32, ("drawn by no model",)

    def __init__(self) -> None:
        self.batches: list[list[Request]] = []
        self.interrupt_in: int | None = None  # batch
        self.interrupts = 1

    def jobs(
        self, requests: Sequence[Request], images: Sequence[Opened] = (), masks: Sequence[Opened] = ()
    ) -> list[Job]:
        jobs = []
        for i, request in enumerate(requests):
            if (request.width or 64) % 8:
                raise ValueError(f"width={request.width} must be a multiple of 8; use 496 or 504")
            size = (request.width or 64, request.height or 64)
            image, mask = (column[i] if column else None for column in (images, masks))
            request = request.replace(
                width=size[0], height=size[1], image=image and image.checksum, mask=mask and mask.checksum
            )
            remarks = ("a remark on it",) if "<lora" in request.prompt else ()
            jobs.append(Job(request, size, image, mask, 0, request.steps, guided=True, chunks=1, remarks=remarks))
        return jobs

    def draw(self, jobs: Sequence[Job], batch_size: int) -> Iterator[Step | Finished]:
        total = sum(job.evaluations for job in jobs[::batch_size])
        for first in range(0, len(jobs), batch_size):
            batch = list(range(len(jobs)))[first : first + batch_size]
            steps, done = jobs[0].evaluations, first // batch_size * jobs[0].evaluations
            yield Step(batch, 0, steps, done, total, None)
            self.batches.append([jobs[i].request for i in batch])
            for step in range(1, steps + 1):
                if step == 2 and self.interrupt_in == len(self.batches) - 1:
                    for _ in range(self.interrupts):
                        os.kill(os.getpid(), signal.SIGINT)
                        time.sleep(0.01)
                yield Step(batch, step, steps, done + step, total, torch.zeros(len(batch), 4, 8, 8))
            for i in batch:
                yield Finished(i, self.decode(jobs[i].request))

    def decode(self, request: Request) -> Image.Image:
        colour = hashlib.sha256(f"{request.seed}{request.prompt}{request.image}{request.steps}".encode()).digest()
        picture = Image.new("RGB", (request.width or 0, request.height or 0), tuple(colour[:3]))
        model = {"model": self.name, "model_hash": self.model_hash, "prediction": "epsilon"}
        picture.info.update(recipe.metadata(request, **model))
        return picture


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    stand_in = StandIn()

    monkeypatch.setattr(Pipeline, "load", lambda *_, **__: stand_in)
    return stand_in


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    """Runs the command in an empty folder: (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def command(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as exit_:
            cli.main([str(argument) for argument in arguments])
        out, err = capfd.readouterr()
        return int(exit_.value.code or 0), out, err

    return command


def names(folder: str | Path = ".") -> list[str]:
    return sorted(entry.name for entry in Path(folder).iterdir())


def events(out: str) -> list[dict]:
    return [json.loads(line) for line in out.splitlines()]


def test_default_names_count_up(run: Run, model: StandIn):
    assert run("generate", "a cat", "--seed", 7)[:2] == (0, "000000-7.png\n")
    assert run("generate", "a cat", "--num-images", 2)[:2] == (0, "000001-0.png\n000002-1.png\n")
    assert images.read_metadata("000002-1.png").request == Request(prompt="a cat", seed=1, width=64, height=64)


def test_named_output(run: Run, model: StandIn):
    assert run("generate", "x", "-o", "cat.png", "-q") == (0, "cat.png\n", "")
    assert run("generate", "x", "-o", "cat.png", "--num-images", 2)[1] == "cat-1.png\ncat-2.png\n"
    assert run("generate", "x", "-o", "new/er", "-s", 3)[1] == "new/er/000000-3.png\n"
    assert run("generate", "x", "-o", "new")[1] == "new/000000-0.png\n"
    Path("v1.5").mkdir()
    assert run("generate", "x", "-o", "v1.5")[1] == "v1.5/000000-0.png\n"
    before = Path("cat.png").read_bytes()
    code, out, err = run("generate", "y", "-o", "cat.png")
    assert (code, out, err) == (2, "", "sdlite: error: cat.png exists; --force replaces it\n")
    assert Path("cat.png").read_bytes() == before
    assert run("generate", "y", "-o", "cat.png", "--force")[0] == 0
    assert Path("cat.png").read_bytes() != before


def test_every_flag_reaches_the_request(run: Run, model: StandIn):
    Image.new("RGB", (9, 9), "red").save("in.png")
    Image.new("L", (9, 9), "white").save("mask.png")
    flags = "-n bad -s 5 --steps 3 --guidance-scale 2 --guidance-rescale 0.5 --solver ddim --eta 0.25 -W 72 -H 80"
    more = "--image in.png --mask mask.png --mask-blur 2 --strength 0.5 --clip-skip 1 --num-images 3 -b 2"
    assert run("generate", "a cat", *flags.split(), *more.split())[0] == 0
    assert [[request.seed for request in batch] for batch in model.batches] == [[5, 6], [7]]
    assert model.batches[0][0] == Request(
        prompt="a cat",
        negative_prompt="bad",
        seed=5,
        steps=3,
        guidance_scale=2,
        guidance_rescale=0.5,
        solver="ddim",
        eta=0.25,
        width=72,
        height=80,
        image=images.digest(images.open_picture("in.png")),
        mask=images.digest(images.open_picture("mask.png")),
        strength=0.5,
        clip_skip=1,
        mask_blur=2,
    )
    run("generate", "a cat", *flags.split(), *more.split(), "--no-paste")
    assert not model.batches[-1][0].paste
    run("generate", "a cat", "--cfg-scale", 3)
    assert model.batches[-1][0] == Request(prompt="a cat", guidance_scale=3, width=64, height=64)


def test_json_events(run: Run, model: StandIn):
    code, out, err = run("generate", "x", "--steps", 2, "--num-images", 2, "--json")
    first, *middle, last = events(out)
    assert (code, err) == (0, "sdlite: note: drawn by no model\n")
    assert (first["event"], first["images"], first["request"]["steps"]) == ("start", 2, 2)
    assert [event["event"] for event in middle] == ["step", "step", "image"] * 2
    assert middle[1] == {"event": "step", "image": 0, "step": 2, "of": 2}
    data = Path(middle[-1]["path"]).read_bytes()
    assert (middle[-1]["seed"], middle[-1]["sha256"]) == (1, hashlib.sha256(data).hexdigest())
    assert last == {"event": "done", "images": 2, "interrupted": False}


def test_contact_sheet_and_no_metadata(run: Run, model: StandIn):
    arguments = ("generate", "x", "--num-images", 3, "--contact-sheet", "all.png", "--no-metadata")
    assert run(*arguments)[1].splitlines()[-1] == "all.png"
    with Image.open("all.png") as sheet:
        assert sheet.width > 128
    with Image.open("000001-1.png") as picture:
        assert picture.text == {}
    assert "all.png exists" in run(*arguments)[2] and len(names()) == 4


BAD = {
    "no prompt": (["generate"], "Missing argument"),
    "no such command": (["paint"], "No such command"),
    "no such flag": (["generate", "x", "--stepz", "3"], "No such option: --stepz"),
    "steps not a number": (["generate", "x", "--steps", "many"], "--steps"),
    "steps 0": (["generate", "x", "--steps", "0"], "steps=0"),
    "steps too many": (["generate", "x", "--steps", "1000000000"], "steps=1000000000"),
    "seed negative": (["generate", "x", "--seed", "-2"], "seed=-2"),
    "seed not a number": (["generate", "x", "--seed", "x"], "--seed=x must be a whole number, or random"),
    "seed too large": (["generate", "x", "--seed", str(2**64)], "seed=18446744073709551616"),
    "last seed too large": (["generate", "x", "--seed", str(2**64 - 1), "--num-images", "2"], "seed=1844"),
    "guidance nan": (["generate", "x", "--guidance-scale", "nan"], "guidance_scale=nan"),
    "size huge": (["generate", "x", "--width", "1000000"], "width=1000000"),
    "width 500": (["generate", "x", "--width", "500"], "use 496 or 504"),
    "images negative": (["generate", "x", "--num-images", "-1"], "--num-images"),
    "images too many": (["generate", "x", "--num-images", "1000000000"], "--num-images"),
    "solver": (["generate", "x", "--solver", "magic"], "'dpmpp_2m_karras'"),
    "mask alone": (["generate", "x", "--mask", "ok.png"], "mask needs an image"),
    "image missing": (["generate", "x", "--image", "none.png"], "none.png does not exist"),
    "image broken": (["generate", "x", "--image", "bad.png"], "bad.png is not a PNG, JPEG or WebP"),
    "output empty": (["generate", "x", "-o", ""], "--output is empty"),
    "other format": (["generate", "x", "-o", "a.gif"], "use a.gif.png, or a.gif/ for a folder"),
    "a version for a name": (["generate", "x", "-o", "v1.5"], "use v1.5.png, or v1.5/ for a folder"),
    "mask black": (["generate", "x", "-i", "ok.png", "--mask", "ok.png"], "ok.png has nothing white"),
    "no room in a JPEG": (["generate", "猫" * 9_000, "-o", "a.jpg"], "write .png or add --no-metadata"),
    "attention is the picture": (["generate", "x", "-o", "a.png", "--attention", "a.png"], "choose another name"),
    "contact sheet no file": (["generate", "x", "--contact-sheet", "new"], "e.g. new/sheet.png"),
    "folder is a file": (["generate", "x", "-o", "bad.png/a.png"], "cannot write into"),
    "folder read-only": (["generate", "x", "-o", "/proc/new/a.png"], "cannot write into /proc"),
    "name too long": (["generate", "x", "-o", "n" * 300 + ".png"], "File name too long"),
    "regen without metadata": (["regen", "ok.png"], "holds no sdlite metadata"),
    "regen of nothing": (["regen", "none.png"], "does not exist"),
    "info of nothing": (["info", "none.png"], "does not exist"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_writes_nothing(run: Run, model: StandIn, case: str):
    arguments, reason = BAD[case]
    Path("bad.png").write_bytes(b"not a picture")
    Image.new("RGB", (8, 8)).save("ok.png")
    code, out, err = run(*arguments)
    error = err.removeprefix("sdlite: note: drawn by no model\n")
    assert (code, out, error.count("\n")) == (2, "", 1), err
    assert error.startswith("sdlite: error: ") and reason in error
    assert names() == ["bad.png", "ok.png"] and not model.batches


HINTS = {
    "generate a red apple": 'put quotes around the prompt: sdlite generate "a red apple"',
    "generate -s 7 a red apple": 'put quotes around the prompt: sdlite generate "a red apple"',
    "generate x --num-inference-steps 5": "--num-inference-steps is called --steps here",
    "generate x --num-images-per-prompt 5": "--num-images-per-prompt is called --num-images here",
    "generate x --sampler euler": "--sampler is called --solver here",
    "generate x --sampler-name euler": "--sampler-name is called --solver here",
    "generate x --mask-image m.png": "--mask-image is called --mask here",
    "generate x --denoising-strength 1": "--denoising-strength is called --strength here",
    "generate x --n-iter 4": "--n-iter is called --num-images here",
    "generate x --init-img a.png": "--init-img is called --image here",
    "generate x --outdir out": "--outdir is called --output here",
    "generate --prompt x": '--prompt is not needed: the prompt comes first, sdlite generate "a red apple"',
    "batch a.txt -o o --num-inference-steps 5": "--num-inference-steps is called --steps here",
    "info x y": "Got unexpected extra argument(s) (y) (see --help)",
    "generate x --solver dpm": "Invalid value for '--solver': 'dpm' is not one of 'ddim', 'ddpm'",
}


@pytest.mark.parametrize("typed", HINTS)
def test_what_to_type_instead(run: Run, typed: str):
    code, out, err = run(*typed.split())
    assert (code, out) == (2, "") and err.startswith(f"sdlite: error: {HINTS[typed]}") and len(err.splitlines()) == 1


@pytest.mark.parametrize("name", typer.main.get_command(app).commands)
def test_help_ends_in_two_examples_that_parse(run: Run, name: str, monkeypatch: pytest.MonkeyPatch):
    for method in ("exists", "is_file"):  # of the files that the examples name
        monkeypatch.setattr(Path, method, lambda _: True)
    command = typer.main.get_command(app).commands[name]
    code, out, _ = run(name, "--help")
    shown = [line.strip() for line in out.split("Examples:")[-1].splitlines() if line.strip()]
    assert code == 0 and len(shown) == 2
    for line in shown:
        sdlite, first, *words = shlex.split(line)
        assert (sdlite, first) == ("sdlite", name)
        assert command.make_context(name, words).params


def test_strength_without_a_picture_is_said(run: Run, model: StandIn):
    note = "sdlite: note: --strength has no effect without --image\n"
    assert note in run("generate", "x", "--strength", 0.5)[2] and note not in run("generate", "x")[2]


def test_disk_that_fills_up(run: Run, model: StandIn, monkeypatch: pytest.MonkeyPatch):
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    code, out, err = run("generate", "x", "-q")
    assert (code, out, err.count("\n")) == (3, "", 1) and "000000-0.png: No space left on device" in err
    code, out, err = run("convert", "tiny", "new/model")
    assert (code, out) == (3, "") and "new/model: No space left on device" in err
    assert names() == []


def test_what_a_killed_process_left_is_swept(run: Run, model: StandIn):
    left = Path(f".{HOST}-999999999.{'0' * 16}.tmp")
    left.mkdir()
    (left / "000000-0.png").write_bytes(b"half")
    assert run("generate", "x", "-q")[0] == 0 and names() == ["000000-0.png"]


def test_memory_that_runs_out(run: Run, model: StandIn, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(StandIn, "decode", lambda *_: torch.empty(2**50))
    code, out, err = run("generate", "x", "-q")
    assert (code, out) == (2, "") and err.endswith(
        "memory; try a smaller --width and --height, or a smaller --batch-size\n"
    )


@pytest.mark.parametrize(
    ("command", "advice"),
    [
        ("train", "try a smaller --batch-size"),
        ("bench", "try a smaller --width and --height"),
        ("info", "close other programs, or use a machine with more"),
    ],
)
def test_memory_advice_names_flags_of_the_command(command: str, advice: str):
    error = RuntimeError("CUDA out of memory. Tried to allocate 9 GiB")
    assert _explained(error, [command, "x"]) == (2, f"out of memory; {advice}")


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize(
    ("own", "limits", "expected"),
    [
        ("0::/", {"cpu.max": "max 100000"}, 4),
        ("0::/", {"cpu.max": "900000 100000"}, 4),
        ("0::/", {"cpu.max": "150000 100000"}, 2),
        ("0::/", {"cpu.max": "1 100000"}, 1),
        ("0::/a/b", {"cpu.max": "max 100000", "a/cpu.max": "300000 100000", "a/b/cpu.max": "350000 100000"}, 3),
        ("0::/only/on/the/host", {"cpu.max": "200000 100000"}, 2),
        ("3:cpu,cpuacct:/a\n0::/", {"cpu,cpuacct/a/cpu.cfs_quota_us": "-1", "cpu,cpuacct/a/cpu.cfs_period_us": "9"}, 4),
        ("3:cpu,cpuacct:/a", {"cpu/a/cpu.cfs_quota_us": "50000", "cpu/a/cpu.cfs_period_us": "25000"}, 2),
        ("5:cpuset:/a", {"cpuset/a/cpu.cfs_quota_us": "1", "cpuset/a/cpu.cfs_period_us": "1"}, 4),
        ("", {}, 4),
    ],
)
def test_threads_stay_within_the_share_of_a_container(
    own: str, limits: dict[str, str], expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The documents of the kernel: cpu.max is "quota period", version 1 has a file of each, and each level limits."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    for name, text in limits.items():
        (tmp_path / "groups" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "groups" / name).write_text(f"{text}\n")
    (tmp_path / "own").write_text(f"{own}\n" if own else "")
    torch.set_num_threads(4)
    use_threads(None, tmp_path / "groups", tmp_path / "own")
    assert torch.get_num_threads() == expected
    use_threads(5, tmp_path / "groups", tmp_path / "own")
    assert torch.get_num_threads() == 5


@pytest.mark.usefixtures("threads")
def test_threads_are_as_the_user_says(run: Run, model: StandIn, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3}, raising=False)
    torch.set_num_threads(4)
    assert run("generate", "x", "-q")[0] == 0 and torch.get_num_threads() == 1
    assert run("generate", "x", "-q", "--threads", 3)[0] == 0 and torch.get_num_threads() == 3
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    torch.set_num_threads(2)  # as PyTorch does at its start
    assert run("generate", "x", "-q")[0] == 0 and torch.get_num_threads() == 2
    assert run("generate", "x", "-q", "--threads", 0)[0] == 2


def test_commands_that_compute_take_threads():
    commands = typer.main.get_command(app).commands
    have = {name for name, command in commands.items() if any("--threads" in p.opts for p in command.params)}
    assert have == set(commands) - {"info", "convert", "data"}


def test_threads_that_wait_sleep_soon(monkeypatch: pytest.MonkeyPatch, run: Run):
    """What OpenMP reads when it is loaded; what the user has set stays."""
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.setenv(name, "")  # so that it is as before after the test
        monkeypatch.delenv(name)
    assert run("--version")[0] == 0 and os.environ["GOMP_SPINCOUNT"] == "10000"
    monkeypatch.setenv("GOMP_SPINCOUNT", "7")
    assert run("--version")[0] == 0 and os.environ["GOMP_SPINCOUNT"] == "7"
    monkeypatch.delenv("GOMP_SPINCOUNT")
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    assert run("--version")[0] == 0 and "GOMP_SPINCOUNT" not in os.environ


def test_info_lists_and_searches_the_names_of_the_shipped_model(run: Run):
    names_ = (shipped_folder() / "concepts.txt").read_text().split("\n")
    code, out, _ = run("info", SHIPPED)
    card = (shipped_folder() / "README.md").read_text()
    styles = re.findall("`([^`]*)`", card.partition("Styles, named at the end of the prompt: ")[2].partition(".\n")[0])
    assert len(styles) >= 4 and ", ".join(styles[:4]) in out
    assert code == 0 and "airplane, alarm clock, alien" in out and all(name in out for name in names_)
    assert run("info", SHIPPED, "--search", "lock")[:2] == (0, out := run("info", SHIPPED, "--search", "Lock")[1])
    assert out.splitlines()[0] == "locked" and "alarm clock" in out.splitlines()[:3] and len(out.splitlines()) == 10
    assert json.loads(run("info", SHIPPED, "--search", "ladybug", "--json")[1])["names"][0] == "lady beetle"
    code, out, err = run("info", "tiny", "--search", "x")
    assert (code, out) == (2, "") and "tiny has no concepts.txt" in err


def test_a_prompt_of_unknown_words_gets_the_nearest_names(run: Run, model: StandIn):
    assert "nearest" not in run("generate", "a ladybug")[2]  # of another model
    model.name = SHIPPED
    _, _, err = run("generate", "a ladybug, noto style")
    assert err.count("note: emoji-128 was trained on") == 1 and "spelling: lady beetle, " in err
    for prompt in ("a red apple", "Airplanes", "a sad robot", "CAT"):
        assert "was trained on" not in run("generate", prompt)[2]


def read_all(terminal: int) -> str:
    """What processes write to a terminal, until the last one has closed it."""
    shown = b""
    with os.fdopen(terminal, "rb", buffering=0) as stream, suppress(OSError):  # Linux reports the end as an error
        while part := stream.read(4096):
            shown += part
    return shown.decode(errors="replace")


NO_TORCH = """
import json, shlex, sys
sys.modules["torch"] = None  # an import of it fails
from sdlite import cli
for line in json.loads(sys.argv[1]):
    try:
        cli.main(shlex.split(line))
    except SystemExit as end:
        print(end.code, file=sys.stderr, flush=True)
"""


def test_wrong_names_are_said_before_torch_is_loaded(tmp_path: Path):
    (tmp_path / "there.png").touch()
    lines = [
        *(f"{command} -m nosuch" for command in ("generate x", "regen there.png", "bench", "batch there.png -o o")),
        *(f"{command} nosuch" for command in ("info", "convert", "evaluate --data . -o o", "generate x --vae")),
        "convert nosuch new",
        *(
            f"{command} nosuch.png"
            for command in ("info", "regen", "segment -m .", "generate x -i", "generate x --mask")
        ),
        *(f"regen there.png --set {name}=nosuch.png" for name in ("image", "mask")),
        "segment there.png -m nosuch",
        "batch nosuch.txt -o o",
        "batch --verify nosuch",
        *(f"train denoiser --data . -o o {option} nosuch" for option in ("--from", "--codec", "--text", "--teacher")),
        "train codec --data nosuch -o o",
        "evaluate tiny --data nosuch -o o",
    ]
    wrong_devices = ["generate x --device gpu", "batch there.png -o o --device nosuch"]
    code = [sys.executable, "-c", NO_TORCH, json.dumps(lines + wrong_devices)]
    done = subprocess.run(code, cwd=tmp_path, capture_output=True, text=True)
    said = [line for line in done.stderr.splitlines() if not line.startswith("sdlite: reading ")]
    assert len(said) == 2 * len(lines + wrong_devices), done.stderr
    for line, error, number in zip(lines, said[::2], said[1::2], strict=False):
        assert number == "2" and "nosuch" in error and re.search("does not exist|is no folder", error), (line, error)
    for line, error, number in zip(wrong_devices, said[-4::2], said[-3::2], strict=True):
        assert number == "2" and "must be one of auto, cpu, cuda, mps" in error, (line, error)


def test_a_terminal_shows_what_is_loaded_before_torch_is(tmp_path: Path):
    pty = pytest.importorskip("pty")
    (tmp_path / "a.png").touch()
    said = {
        "generate x -m tiny": "loading tiny",
        "generate x -i a.png": "reading a.png",
        "batch a.png -o o": "loading emoji-128",
        "convert tiny new": "converting tiny",
        "info tiny": "loading tiny",
        "bench": "measuring how busy",
        "segment a.png -m .": "loading",
        "evaluate tiny --data . -o o": "loading tiny",
    }
    ours, theirs = pty.openpty()
    code = [sys.executable, "-c", NO_TORCH, json.dumps(list(said))]
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "200"}
    with subprocess.Popen(code, cwd=tmp_path, stderr=theirs, stdout=subprocess.DEVNULL, env=environment):
        os.close(theirs)
        shown = read_all(ours)
    parts = re.split(r"\r\n\d+\r\n", shown)
    assert len(parts) == len(said) + 1, shown
    for part, (line, words) in zip(parts, said.items(), strict=False):
        assert words in part, (line, part)


def test_what_nobody_foresaw_is_one_line(run: Run, model: StandIn, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(StandIn, "decode", lambda *_: 1 / 0)
    code, out, err = run("generate", "a cat", "-q")
    assert (code, out, err.count("\n")) == (70, "", 1), err
    assert err.startswith("sdlite: error: sdlite generate 'a cat' -q: ZeroDivisionError: division by zero;")
    assert "SDLITE_DEBUG=1" in err
    monkeypatch.setenv("SDLITE_DEBUG", "1")
    code, _, err = run("generate", "a cat", "-q")
    assert code == 70 and "Traceback" in err and "in <lambda>" in err


def test_sigterm_and_a_closed_terminal_end_a_command_in_order(run: Run, monkeypatch: pytest.MonkeyPatch):
    """They raise KeyboardInterrupt where the command is, so that what it was making goes again."""
    numbers = [signal.SIGTERM, signal.SIGHUP]

    def save_file(tensors: object, path: Path, metadata: object) -> None:
        assert path.is_file()
        os.kill(os.getpid(), numbers[0])
        time.sleep(1)

    monkeypatch.setattr("sdlite.checkpoints.weights.save_file", save_file)
    while numbers:
        assert run("convert", "tiny", "new/one.safetensors", "-q")[:2] == (130, "")
        assert names() == [] and signal.getsignal(numbers.pop(0)) is signal.SIG_DFL


def test_output_that_a_terminal_cannot_encode_is_escaped():
    """A Windows console of 1252 has no such letters, and the picture is there by the time its name is printed."""
    code = "\n".join(
        [
            "from sdlite.cli import main, app",
            "@app.app.command()",
            "def show():",
            "    print('猫.png')",
            "    raise ValueError('猫.png is wrong')",
            "main(['show'])",
        ]
    )
    environment = os.environ | {"PYTHONIOENCODING": "cp1252"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True)
    assert (done.returncode, done.stdout.strip()) == (2, rb"\u732b.png"), done.stderr
    assert done.stderr.strip() == rb"sdlite: error: \u732b.png is wrong"


def test_first_interrupt_finishes_the_picture_in_hand(run: Run, model: StandIn):
    model.interrupt_in = 1
    before = signal.getsignal(signal.SIGINT)  # a shell's background jobs ignore it
    code, out, err = run("generate", "x", "--num-images", 5, "--steps", 3, "--json")
    assert code == 130 and "finishing the current image" in err
    assert names() == ["000000-0.png", "000001-1.png"]
    assert events(out)[-1] == {"event": "done", "images": 2, "interrupted": True}
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize("command", [("generate", "x"), ("regen", "a.png")], ids=["generate", "regen"])
def test_an_interrupt_before_the_first_step_draws_nothing(
    run: Run, model: StandIn, monkeypatch: pytest.MonkeyPatch, command: tuple[str, ...]
):
    run("generate", "x", "-o", "a.png")
    whole = model.draw

    def draw(*given: Any) -> Iterator[Step | Finished]:
        os.kill(os.getpid(), signal.SIGINT)
        yield from whole(*given)

    monkeypatch.setattr(model, "draw", draw)
    code, out, _ = run(*command, "--json", "-o", "b.png")
    assert code == 130 and events(out)[-1] == {"event": "done", "images": 0, "interrupted": True}
    assert names() == ["a.png"]


def test_second_interrupt_stops_at_once(run: Run, model: StandIn):
    model.interrupt_in, model.interrupts = 1, 2
    assert run("generate", "x", "--num-images", 5, "--steps", 3)[:2] == (130, "000000-0.png\n")
    assert names() == ["000000-0.png"]


def test_regen_draws_the_same(run: Run, model: StandIn):
    run("generate", "a, b\n(c:1.2) 猫", "-n", "bad", "-s", 9, "--steps", 4, "-o", "first.png")
    code, out, err = run("regen", "first.png", "-o", "again.png")
    assert (code, out) == (0, "again.png\n") and "same as first.png" in err
    assert Path("again.png").read_bytes() == Path("first.png").read_bytes()
    assert "first.png" not in run("regen", "first.png", "--set", "guidance_scale=1")[2]  # nothing to compare with
    changed = model.batches[0][0].replace(steps=2, prompt="x=y", width=None)
    assert run("regen", "first.png", "--set", "steps=2", "--set", "prompt=x=y", "--set", "width=none")[0] == 0
    assert model.batches[-1][0] == changed.replace(width=64)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("stepz=3", "did you mean 'steps'?"),
        ("steps", "must be KEY=VALUE"),
        ("steps=x", "steps='x'"),
        ("image=none.png", "none.png does not exist"),
        ("self=1", "unknown field 'self'"),
        ("steps=1_0", "steps='1_0' must be a number"),
    ],
)
def test_regen_refuses_wrong_changes(run: Run, model: StandIn, change: str, reason: str):
    run("generate", "x", "-o", "first.png")
    code, out, err = run("regen", "first.png", "--set", change)
    assert (code, out) == (2, "") and reason in err and names() == ["first.png"]


def test_regen_holds_model_and_sources_against_the_record(run: Run, model: StandIn):
    for name, colour in (("in.png", "red"), ("other.png", "blue")):
        Image.new("RGB", (8, 8), colour).save(name)
    run("generate", "x", "--image", "in.png", "-o", "first.png")
    assert "give it with --set image=FILE" in run("regen", "first.png")[2]
    assert "not the recorded one" in run("regen", "first.png", "--set", "image=other.png")[2]
    assert run("regen", "first.png", "--set", "image=other.png", "--anyway", "-o", "other")[0] == 0
    assert "same as first.png" in run("regen", "first.png", "--set", "image=in.png")[2]
    model.model_hash = "cd" * 32
    code, out, err = run("regen", "first.png", "--set", "image=in.png", "-q")
    assert (code, out) == (2, "") and "was drawn by model 'stand-in' (ababababab)" in err and "--anyway" in err
    assert run("regen", "first.png", "--set", "image=in.png", "--anyway")[0] == 0


def test_info_of_a_picture(run: Run, model: StandIn):
    run("generate", "two\nlines \x1b[31m", "--steps", 3, "-o", "a.png")
    code, out, _ = run("info", "a.png")
    assert code == 0 and "\x1b" not in out and "steps" in out and "lines" in out
    facts = json.loads(run("info", "a.png", "--json")[1])
    assert facts["request"]["prompt"] == "two\nlines \x1b[31m" and facts["model"]["model"] == "stand-in"


def test_attention_shows_every_word(run: Run):
    code, out, err = run("generate", "a red apple", "-m", "tiny", "--steps", 2, "--attention", "maps/heat.png", "-q")
    assert (code, out) == (0, "000000-0.png\nmaps/heat.png\n")
    assert err == f"sdlite: note: {UNTRAINED_NOTE}\n"  # even with -q, or a typing error in -m would pass unseen
    with Image.open("maps/heat.png") as sheet, Image.open("000000-0.png") as picture:
        assert sheet.width > 4 * picture.width  # the picture and three words in a row
        assert images.largest_difference(sheet.crop((4, 4, 68, 68)), picture) == 0


def test_version_and_bare_command(run: Run):
    assert run("--version")[:2] == (0, "sdlite 0.1.0\n")
    code, out, err = run()
    assert (code, err) == (0, "") and "generate" in out


def test_a_shell_completes_commands(run: Run, monkeypatch: pytest.MonkeyPatch):
    for name, value in (("_SDLITE_COMPLETE", "complete_bash"), ("COMP_WORDS", "sdlite gen"), ("COMP_CWORD", "1")):
        monkeypatch.setenv(name, value)
    assert run()[:2] == (0, "generate\n")


def test_help_is_immediate():
    code = (
        "import sys, time; start = time.perf_counter()\n"
        "from sdlite import cli\n"
        "try: cli.main(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'PIL', 'diffusers', 'transformers'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "assert time.process_time() < 1, time.process_time()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=30, stdout=subprocess.DEVNULL)


def start(*arguments: object, stderr: int = subprocess.PIPE) -> subprocess.Popen[str]:
    """The real command in a process of its own."""
    command = [sys.executable, "-m", "sdlite", *map(str, arguments)]
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True, env=one_thread)


def test_real_model_draws_and_draws_again(run: Run, monkeypatch: pytest.MonkeyPatch):
    def no_network(*_: object) -> None:
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket.socket, "connect", no_network)
    code, out, err = run("generate", "a (red:1.2) apple, 猫", "--model", "tiny", "--steps", 3, "-s", 5)
    assert (code, out) == (0, "000000-5.png\n") and "untrained" in err
    assert images.open_picture("000000-5.png").size == (64, 64)
    code, out, err = run("regen", "000000-5.png", "--model", "tiny", "-o", "again.png")
    assert (code, out) == (0, "again.png\n") and "same as 000000-5.png" in err
    assert Path("again.png").read_bytes() == Path("000000-5.png").read_bytes()


def test_real_model_paints_from_a_picture(run: Run):
    Image.new("RGB", (100, 80), "red").save("in.png")
    Image.linear_gradient("L").save("mask.png")
    arguments = ("generate", "x", "--model", "tiny", "--steps", 4, "--image", "in.png", "-W", 72, "-H", 56)
    assert run(*arguments, "-o", "a.png", "--strength", 0.5)[:2] == (0, "a.png\n")
    assert run(*arguments, "-o", "b.png", "--mask", "mask.png")[:2] == (0, "b.png\n")
    assert images.open_picture("b.png").size == (72, 56)
    err = run("regen", "b.png", "-m", "tiny", "--set", "image=in.png", "--set", "mask=mask.png")[2]
    assert "same as b.png" in err


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        ("--model tiny -W 500", "use 496 or 504"),
        ("--model tiny --clip-skip 9", "clip_skip=9"),
        ("--model empty", "model_index.json is missing"),
        ("--model none", "none does not exist"),
        ("--model none.safetensors", "none.safetensors does not exist"),
        ("--model junk.safetensors", "is not a safetensors file"),
        ("--model tiny --device warp", "device='warp' must be one of auto, cpu, cuda, mps"),
        ("--model tiny --device cuda:99", "device='cuda:99' is not there"),
        ("--model tiny --device cpu:x", "device='cpu:x' is not there"),
        ("--model tiny --device cpu:", "device='cpu:' is not there"),
        ("--model tiny --device cpu:\u0663", "device='cpu:\u0663' is not there"),
        ("--model tiny --vae none", "vae='none' does not exist"),
        ("--model tiny --variant fp16", "variant='fp16' is for folders"),
        ("--model tiny --dtype int8", "--dtype"),
    ],
)
def test_what_a_real_model_refuses(run: Run, flags: str, reason: str):
    Path("empty").mkdir()
    Path("junk.safetensors").write_bytes(b"junk")
    code, out, err = run("generate", "x", *flags.split(), "-q")
    error = err.removeprefix(f"sdlite: note: {UNTRAINED_NOTE}\n")
    assert (code, out, error.count("\n")) == (2, "", 1) and reason in error, err
    assert names() == ["empty", "junk.safetensors"]


def test_info_of_a_model(run: Run):
    facts = json.loads(run("info", "tiny", "--json")[1])
    assert facts["parts"]["prediction"] == "epsilon" and facts["schedule"]["num_train_steps"] == 1000
    assert facts["parts"]["parameters of denoiser"] > 100_000
    code, out, _ = run("info", "tiny")
    assert code == 0 and "64x64" in out


def test_convert_there_and_back(run: Run):
    assert run("convert", "tiny", "folder")[:2] == (0, "folder\n")
    assert run("convert", "folder", "half", "--dtype", "float16", "-q")[:2] == (0, "half\n")
    hashes = [json.loads(run("info", model, "--json")[1])["model"]["model_hash"] for model in ("tiny", "folder")]
    assert hashes[0] == hashes[1]
    sizes = [sum(file.stat().st_size for file in Path(folder).rglob("*.safetensors")) for folder in ("half", "folder")]
    assert sizes[0] < 0.6 * sizes[1]
    code, out, err = run("convert", "tiny", "folder")
    assert (code, out, err.count("\n")) == (2, "", 1) and err.startswith("sdlite: error: folder ")
    torch.save({"state_dict": {}}, "old.ckpt")
    code, out, err = run("convert", "old.ckpt", "new")
    assert (code, out, err.count("\n")) == (2, "", 1) and "--trust-pickle" in err
    code, out, err = run("convert", "old.ckpt", "new", "--trust-pickle")
    assert (code, out, err.count("\n")) == (2, "", 1) and not Path("new").exists()


def test_another_vae_in_every_command_that_draws(run: Run):
    """The same latents through another decoder: another picture, drawn again only with the same VAE."""
    for seed, name in ((0, "a"), (7, "b")):
        save_folder(random_model(tiny(), seed=seed), name)
    draw = ("generate", "x", "--steps", 1, "-q", "-m")
    for name, flags in {"own.png": (), "other.png": ("--vae", "b"), "same.png": ("--vae", "a/vae")}.items():
        assert run(*draw, "a", *flags, "-o", name)[0] == 0
    own, other, same = (images.open_picture(name) for name in ("own.png", "other.png", "same.png"))
    assert images.largest_difference(own, same) == 0 and images.largest_difference(own, other) > 8
    assert run("convert", "a", "c", "--vae", "b/vae", "-q")[0] == 0
    assert run(*draw, "c", "-o", "c.png")[0] == 0
    assert images.largest_difference(images.open_picture("c.png"), other) == 0
    assert "same as other.png" in run("regen", "other.png", "-m", "a", "--vae", "b")[2]
    assert run("regen", "other.png", "-m", "a")[0] == 2
    Path("x.jsonl").write_text('{"prompt": "x", "steps": 1, "seed": 0}')
    assert run("batch", "x.jsonl", "-m", "a", "--vae", "b", "-o", "out", "-q")[0] == 0
    assert images.largest_difference(images.open_picture(next(Path("out").glob("*.png"))), other) <= 1


def test_bench_passes_on_what_was_asked(run: Run, model: StandIn, monkeypatch: pytest.MonkeyPatch):
    from sdlite import bench

    asked: list[object] = []

    def measure(pipe: object, request: Request, **options: object) -> dict:
        asked.extend((pipe, request, options))
        row = {"what": "one image", "unit": "s", "median": {"sdlite": 1.5}, "ratio": None}
        return {"rows": [row], "setting": {}, "machine": {"publishable": True}}

    monkeypatch.setattr(bench, "measure", measure)
    code, out, _ = run("bench", "--vs", "diffusers", "--runs", 3, "--steps", 2, "-W", 72, "-o", "a.json")
    assert code == 0 and "| one image | 1.5 s |" in out
    assert asked.pop(2).items() >= {"versus": "diffusers", "runs": 3}.items()
    assert asked == [model, Request(prompt="a red apple", steps=2, width=72)]
    assert json.loads(Path("a.json").read_text())["rows"][0]["median"] == {"sdlite": 1.5}
    assert run("bench", "-o", "a.json")[2].startswith("sdlite: error: a.json exists") and len(asked) == 2
    assert json.loads(run("bench", "--json")[1]) == json.loads(Path("a.json").read_text())
    assert run("bench", "--json", "b.json")[2].endswith("to write one, use -o b.json\n") and len(asked) == 5


@pytest.mark.slow  # 20 s; CI runs it
def test_real_interrupts(tmp_path: Path):
    """One Ctrl-C, and two, while a picture is drawn, in processes of their own."""
    flags = ("--model", "tiny", "--steps", 200, "--num-images", 50, "--json", "-q")
    runs = [start("generate", "x", *flags, "-o", tmp_path / str(presses)) for presses in (1, 2)]
    for presses, process in enumerate(runs, 1):
        assert process.stdout is not None
        for line in process.stdout:  # until the second picture is in hand
            event = json.loads(line)
            if event["event"] == "step" and event["image"] == 1:
                break
        process.send_signal(signal.SIGINT)
        if presses == 2:
            assert process.stderr is not None
            while "finishing the current image" not in (said := process.stderr.readline()):
                assert said  # signals that come together count once
            process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
        assert process.returncode == 130, err
        assert "Traceback" not in err
        finished = names(tmp_path / str(presses))  # the second process drew on while the first was watched
        assert finished == [f"{i:06d}-{i}.png" for i in range(len(finished))] and 1 <= len(finished) < 50
        assert all(images.open_picture(tmp_path / str(presses) / name).size == (64, 64) for name in finished)
        assert ('"interrupted": true' in out) == (presses == 1)


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="needs a pseudo-terminal")
def test_bar_is_for_terminals_and_paths_for_pipes(tmp_path: Path):
    terminal, end = os.openpty()
    process = start("generate", "x", "--model", "tiny", "--steps", 3, "-o", tmp_path / "a.png", stderr=end)
    os.close(end)
    shown = read_all(terminal)
    out, _ = process.communicate(timeout=60)
    assert (process.returncode, out) == (0, f"{tmp_path / 'a.png'}\n")
    assert "image 1/1" in shown and "a.png" not in shown


@pytest.mark.parametrize("word", ["random", "-1"])
def test_a_seed_is_drawn_printed_and_recorded(run: Run, model: StandIn, word: str):
    code, out, err = run("generate", "x", "--seed", word, "-o", "a.png", "--num-images", 2)
    seeds = [images.read_metadata(path).request.seed for path in out.split()]
    assert (code, seeds[1]) == (0, seeds[0] + 1) and f"note: seed {seeds[0]}\n" in err
    run("generate", "x", "--seed", word, "-o", "b.png")
    assert images.read_metadata("b.png").request.seed not in seeds
    err = run("regen", "b.png", "--set", f"seed={word}", "-o", "c.png")[2]
    assert f"note: seed {images.read_metadata('c.png').request.seed}\n" in err


def test_remarks_are_said_once(run: Run, model: StandIn):
    assert run("generate", "<lora:a:1>", "--num-images", 3)[2].count("note: a remark on it") == 1


@pytest.mark.parametrize("suffix", [".jpg", ".jpeg", ".webp"])
def test_other_formats_hold_what_regen_needs(run: Run, model: StandIn, suffix: str):
    name = f"a{suffix}"
    assert run("generate", "two\nlines 猫", "-s", 3, "-o", name)[:2] == (0, f"{name}\n")
    assert images.read_metadata(name).request == Request(prompt="two\nlines 猫", seed=3, width=64, height=64)
    assert json.loads(run("info", name, "--json")[1])["request"]["seed"] == 3
    assert run("regen", name, "-o", f"b{suffix}")[0] == 0
    assert Path(f"b{suffix}").read_bytes() == Path(name).read_bytes()


def test_regen_of_a_picture_that_automatic1111_drew(run: Run, model: StandIn):
    picture, exif = Image.new("RGB", (8, 8)), Image.Exif()
    text = "a fox\nNegative prompt: blur\nSteps: 9, Sampler: Euler a, CFG scale: 7, Seed: 5, Size: 72x80, Model: v1"
    exif.get_ifd(0x8769)[0x9286] = b"UNICODE\0" + text.encode("utf-16-be")
    picture.save("theirs.jpg", exif=exif)
    code, out, err = run("regen", "theirs.jpg", "-o", "ours.png")
    assert (code, out) == (0, "ours.png\n") and "the image will be another" in err
    assert "it was drawn by model 'v1', which --model gives" in err
    assert model.batches[0][0] == Request(
        prompt="a fox", negative_prompt="blur", steps=9, solver="euler_a", guidance_scale=7, seed=5, width=72, height=80
    )


# ------------------------------------------------------------------------------- ended at random times


LEFT_OVER = re.compile(r"\.[\w-]+-\d+\.[0-9a-f]{16}\.tmp")  # what `files.sweep` removes
ENDS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)


def run_in_child(words: Sequence[str], name: str, stand_in: Callable[..., object]) -> BaseProcess:
    """A fork that runs the command; signals but SIGKILL are held back until the command loads its model."""

    def load(*_: object, **__: object) -> object:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDS)
        return stand_in()

    def child() -> None:
        home = {"Pipeline": Pipeline, "Segmenter": Segmenter}[name]
        home.load = load  # type: ignore[method-assign]
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(1, 2)
        cli.main(words)

    signal.pthread_sigmask(signal.SIG_BLOCK, ENDS)
    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDS)
    return process


def end_often(command: Callable[[Path], BaseProcess], folder: Path, count: int, chance: random.Random) -> int:
    """Runs ended at random times; how many were. After each, every picture is whole and none that was there is lost."""
    hits, whole = 0, dict[Path, bytes]()
    longest = 0.5  # seconds
    for number in range(count):
        process = command(folder)
        start = time.monotonic()
        process.join(chance.uniform(0.0, longest))
        if process.is_alive():
            os.kill(process.pid or 0, ENDS[number % len(ENDS)])
            process.join()
        hits += process.exitcode != 0
        longest = max(0.05, time.monotonic() - start) if process.exitcode == 0 else longest
        assert process.exitcode in (0, 130, -signal.SIGKILL)
        there = {path for path in folder.iterdir() if path.is_file() or not LEFT_OVER.fullmatch(path.name)}
        assert all(path.suffix == ".png" or LEFT_OVER.fullmatch(path.name) for path in there)
        assert not (whole.keys() - there), "a finished picture is gone"
        for path in (path for path in there if path.suffix == ".png"):
            data = path.read_bytes()
            if data != whole.get(path):
                assert files.decoded(path).tobytes()
                assert path not in whole or "force" in folder.name
            whole[path] = data
    sweep(folder)
    assert not list(folder.glob(".*"))
    return hits


def generating(folder: Path) -> BaseProcess:
    words = ["generate", "a fox", "-o", f"{folder}/", "--num-images", "30", "--steps", "1", "-W", "512", "-H", "512"]
    return run_in_child(words, "Pipeline", StandIn)


def generating_one(folder: Path) -> BaseProcess:
    words = ["generate", "a fox", "-o", f"{folder}/a.png", "--force", "--steps", "1", "-W", "1024", "-H", "1024"]
    return run_in_child([*words, "-s", str(time.time_ns() % 2**32)], "Pipeline", StandIn)


def segmenting(folder: Path) -> BaseProcess:
    source = folder.with_name("source")
    if not source.exists():
        source.mkdir()
        for i in range(30):
            Image.effect_noise((300, 300), 90).save(source / f"{i}.png")
    force = ["--force"] if "force" in folder.name else []
    words = ["segment", str(source), "-m", str(source), "-o", f"{folder}/", "--cutout", *force]
    plan = UNetPlan(depth=1, base_width=1, padding="same")
    return run_in_child(words, "Segmenter", lambda: Segmenter(build(plan), SegmenterConfig(network=plan)))


@pytest.mark.skipif(os.name != "posix", reason="forks and signals")
@pytest.mark.parametrize("count", [6, pytest.param(200, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("command", "name"),
    [(generating, "out"), (generating_one, "force"), (segmenting, "out"), (segmenting, "force")],
    ids=["generate", "generate --force", "segment", "segment --force"],
)
def test_ended_at_random_times(tmp_path: Path, command: Callable[[Path], BaseProcess], name: str, count: int):
    folder = tmp_path / name
    folder.mkdir()
    assert end_often(command, folder, count, random.Random(count)) > count // 4
