"""The loop against itself: resumed equals straight through, two processes equal one with twice the batch."""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

from sdlite.files import DiskFull
from sdlite.training import curves
from sdlite.training.curves import read_log
from sdlite.training.loop import State, TrainConfig, Trainer, fit, learning_rate, load_average, order
from sdlite.training.run import checkpoints, write_checkpoint
from sdlite.training.state import Task, ema_decay, update_ema
from sdlite.training.stop import Stop

ROOT = Path(__file__).parent.parent


class Line(Task):
    """y = 3 x + noise of the sample's own; enough of a task to move every part of the loop."""

    size = 40

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 1)
        with torch.no_grad():
            self.layer.weight.fill_(0.1)
            self.layer.bias.fill_(0.0)

    def forward(self, indices, numbers):
        x = torch.stack([indices / 40.0, numbers % 7 / 7.0], dim=1)
        noise = torch.tensor([np.random.default_rng(int(n)).standard_normal() for n in numbers]).float()
        return (self.layer(x)[:, 0] - 3 * x[:, 0] - 0.1 * noise).square().mean()

    def evaluate(self):
        return {"weight": self.layer.weight[0, 0].item()}

    def preview(self, path):
        Image.new("RGB", (8, 8)).save(path)

    def export(self, folder):
        folder.mkdir(exist_ok=True)


def config(**changes):
    return TrainConfig(**{"batch_size": 4, "lr": 0.05, "warmup": 20, "half_life": 40, "samples": 96} | changes)


def state(out):
    tensors = {}
    for file in sorted(checkpoints(out)[-1].glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def assert_same(first, second):
    assert first.keys() == second.keys() and first
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


def test_stopped_and_resumed_equals_straight_through(tmp_path):
    fit(Line(), config(), tmp_path / "straight")
    for samples in (20, 52, 96):
        fit(Line(), config(samples=samples), tmp_path / "resumed")
    assert_same(state(tmp_path / "straight"), state(tmp_path / "resumed"))


def test_making_a_trainer_writes_nothing(tmp_path):
    fit(Line(), config(samples=8, report_every=4), tmp_path)
    log = tmp_path / "log.jsonl"
    log.write_text(log.read_text() + '{"samples": 99}\n')  # of a killed process: a run drops it
    before = log.read_bytes()
    with Stop("") as stop:
        trainer = Trainer(Line(), config(), stop, time.monotonic)
        assert log.read_bytes() == before and trainer.state.samples == 0
        trainer.run(tmp_path)
    assert b'"samples": 99' not in log.read_bytes() and trainer.state.samples == 96


def test_figures_previews_and_curves_are_drawn_on_the_way(tmp_path):
    ticks = iter(range(10_000))
    fit(Line(), config(show_minutes=0.2, plot=True, report_every=8), tmp_path, clock=lambda: float(next(ticks)))
    assert len(list(tmp_path.glob("preview-*.png"))) > 2
    points = dict(read_log(tmp_path / "log.jsonl")["weight"])
    assert points[96] == pytest.approx(state(tmp_path)["ema.layer.weight"][0, 0].item())
    with Image.open(tmp_path / "curves.png") as curves:
        assert curves.size == (400 * 2, 300)  # loss, weight
    page = (tmp_path / "progress.html").read_text()
    frames = json.loads(page.partition("const frames = ")[2].partition("\n")[0])
    assert [samples for samples, _ in frames] == [int(p.stem[8:]) for p in sorted(tmp_path.glob("preview-*.png"))]
    assert all(picture.startswith("data:image/jpeg;base64,") for _, picture in frames)
    assert "http" not in page  # one file, nothing from elsewhere
    fit(Line(), config(), tmp_path / "straight")
    assert_same(state(tmp_path / "straight"), state(tmp_path))  # looking changes nothing


def test_the_film_encodes_each_preview_once(tmp_path, monkeypatch):
    (tmp_path / "log.jsonl").write_text('{"samples": 8, "loss": 1.0}\n')
    opened, open_image = [], Image.open
    monkeypatch.setattr(curves.Image, "open", lambda path: opened.append(path.name) or open_image(path))
    for samples, colour in ((8, "red"), (16, "blue"), (16, "green")):
        Image.new("RGB", (8, 8), colour).save(tmp_path / f"preview-{samples:010}.png")
        curves.draw_progress(tmp_path)
    assert opened == ["preview-0000000008.png", "preview-0000000016.png", "preview-0000000016.png"]  # one was changed
    page = (tmp_path / "progress.html").read_text()
    assert page.count("data:image/jpeg") == 2 and page.count("data:image/png") == 1 and "{{" not in page


def test_previews_come_by_samples(tmp_path):
    fit(Line(), config(show_minutes=0, show_samples=40), tmp_path)
    shown = [int(path.stem[8:]) for path in sorted(tmp_path.glob("preview-*.png"))]
    batch = config().batch_size
    assert shown == [-(-40 // batch) * batch, -(-80 // batch) * batch, 96]


def test_a_budget_of_minutes_stops_and_is_resumed_exactly(tmp_path):
    ticks = iter(range(10_000))
    fit(Line(), config(samples=None, minutes=0.5), tmp_path / "run", clock=lambda: float(next(ticks)))
    seen = json.loads((checkpoints(tmp_path / "run")[-1] / "state.json").read_text())["samples"]
    assert 0 < seen < 96
    fit(Line(), config(), tmp_path / "run")
    fit(Line(), config(), tmp_path / "straight")
    assert_same(state(tmp_path / "straight"), state(tmp_path / "run"))


SCRIPT = """
import sys; sys.path.insert(0, {root!r})
from tests.test_train_loop import Line, config, fit
from pathlib import Path
fit(Line(), config(batch_size={batch}), Path({out!r}))
"""


def test_two_processes_equal_one_with_twice_the_batch(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(SCRIPT.format(root=str(ROOT), batch=2, out=str(tmp_path / "two")))
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(
        [*launch, str(script)], env=environment, capture_output=True, text=True, timeout=120, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr[-2000:]
    fit(Line(), config(batch_size=4), tmp_path / "one")
    one, two = state(tmp_path / "one"), state(tmp_path / "two")
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-5, atol=1e-6)


class Broken(Line):
    def forward(self, indices, numbers):
        loss = super().forward(indices, numbers)
        return loss * float("nan") if numbers[0] >= 40 else loss


def test_a_loss_that_is_not_finite_stops_with_what_is_needed(tmp_path):
    fit(Broken(), config(samples=20), tmp_path)
    with pytest.raises(FloatingPointError, match=r"nan after 40 samples, items \[.*last checkpoint: state-0000000020"):
        fit(Broken(), config(), tmp_path)
    assert len(checkpoints(tmp_path)) == 1


def test_a_failed_first_try_leaves_the_folder_free(tmp_path):
    with pytest.raises(ValueError, match="decay=cosine needs samples"):
        config(decay="cosine", samples=None, minutes=1)
    with pytest.raises(FloatingPointError, match="last checkpoint: none; try a lower --lr"):
        fit(Broken(), config(lr=1.0, seed=3, report_every=4), tmp_path)
    fit(Line(), config(report_every=4), tmp_path)
    fit(Line(), config(), tmp_path / "straight")
    assert_same(state(tmp_path / "straight"), state(tmp_path))
    samples = [json.loads(line)["samples"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert samples == [*range(4, 97, 4), 96]  # none of the first try


class Stated(Line):
    """With settings as the real tasks have them."""

    def __init__(self, **settings):
        super().__init__()
        self.settings = {"data": "a", "pictures": "b", "codec": "c", "size": 8, "network": {"depth": 2}} | settings


def test_how_to_learn_may_change_and_is_logged(tmp_path, capsys):
    fit(Stated(), config(samples=8), tmp_path)
    fit(Stated(), config(samples=16, lr=0.01, batch_size=8, decay="cosine", report_every=4), tmp_path)
    change = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[1])
    changes = {"lr": [0.05, 0.01], "batch_size": [4, 8], "decay": ["constant", "cosine"], "samples": [8, 16]}
    assert change == {"samples": 8, "changed": changes}
    assert "after 8 samples with changes: batch_size 4 is now 8, lr 0.05 is now 0.01" in capsys.readouterr().out
    assert json.loads((tmp_path / "config.json").read_text())["lr"] == 0.01


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"codec": "x"}, "codec=c, not x: another codec; resume it with that, or give another folder"),
        ({"size": 16}, "size=8, not 16; resume"),
        ({"network": {"depth": 3}}, "network.depth=2, not 3"),
        ({"data": "x"}, "data=a, not x: other captions or file names; --new-data goes on with them"),
        ({"pictures": "x"}, "pictures=b, not x: other images; --new-data goes on with them"),
    ],
)
def test_what_a_run_is_of_may_not_change_unasked(tmp_path, change, fault):
    fit(Stated(), config(samples=8), tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.*") if path.is_file()}
    with pytest.raises(ValueError, match=f"is a run with {fault}"):
        fit(Stated(**change), config(), tmp_path)
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*.*") if path.is_file()}
    with pytest.raises(ValueError, match="seed=0, not 1"):
        fit(Stated(), config(seed=1), tmp_path)
    if "--new-data" in fault:
        fit(Stated(**change), config(samples=12, new_data=True), tmp_path)
        (name,) = change
        line = next(line for line in (tmp_path / "log.jsonl").read_text().splitlines() if "changed" in line)
        assert json.loads(line)["changed"][name] == [Stated().settings[name], "x"]


OLD_RUNS = Path(__file__).parent / "old_runs"  # 16 samples of `Line`, written by version 0.1 before its records


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_run_folder_of_an_older_version_resumes_bit_for_bit(tmp_path, optimizer, capsys):
    old = json.loads((OLD_RUNS / optimizer / "config.json").read_text())
    task = Line()
    task.settings = {name: value for name, value in old.items() if name not in TrainConfig.model_fields}
    settings = config(optimizer=optimizer, report_every=8)
    assert settings.model_dump(mode="json").keys() == old.keys() - task.settings.keys()
    out = shutil.copytree(OLD_RUNS / optimizer, tmp_path / "run")
    fit(task, settings, out)
    assert "going on after 16 samples with changes: samples 16 is now 96" in capsys.readouterr().out
    fit(Line(), settings, tmp_path / "straight")
    assert_same(state(tmp_path / "straight"), state(out))
    assert json.loads((out / "config.json").read_text()) == old | {"samples": 96}
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert lines[:3] == [json.loads(line) for line in (OLD_RUNS / optimizer / "log.jsonl").read_text().splitlines()]
    assert lines[3] == {"samples": 16, "changed": {"samples": [16, 96]}} and lines[4].keys() == lines[0].keys()


DAMAGES = {
    "half a shard": lambda folder: cut_in_half(next(folder.glob("*.safetensors"))),
    "no shard": lambda folder: next(folder.glob("*.safetensors")).unlink(),
    "a list": lambda folder: (folder / "state.json").write_text("[]"),
    "deep JSON": lambda folder: (folder / "state.json").write_text("[" * 99_999),
    "text": lambda folder: (folder / "state.json").write_text('{"samples": "many", "tensors": 8}'),
    "text of a number": lambda folder: (folder / "state.json").write_text('{"samples": "16", "tensors": 8}'),
    "another number": lambda folder: edit(folder, samples=99),
    "a bit": lambda folder: flip(next(folder.glob("*.safetensors"))),
    "NaN": lambda folder: rewrite(folder, "optimizer.0.exp_avg", lambda t: t * float("nan")),
    "infinity": lambda folder: rewrite(folder, "model.layer.bias", lambda t: t / 0),
    "another shape": lambda folder: rewrite(folder, "ema.layer.bias", lambda t: t.repeat(2)),
    "another optimizer": lambda folder: rewrite(folder, "optimizer.0.exp_avg", lambda t: t.repeat(2, 1)),
}


def cut_in_half(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flip(file):
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def edit(folder, **changes):
    """Changes state.json, without sums, as older versions wrote it."""
    stated = json.loads((folder / "state.json").read_text()) | changes
    stated.pop("sums", None)
    (folder / "state.json").write_text(json.dumps(stated))


def rewrite(folder, name, change):
    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    save_file(tensors | {name: change(tensors[name])}, file)
    edit(folder)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(tmp_path, capsys, damage):
    for samples in (8, 16):
        fit(Line(), config(samples=samples), tmp_path / "run")
    DAMAGES[damage](tmp_path / "run" / "state-0000000016")
    fit(Line(), config(), tmp_path / "run")
    out = capsys.readouterr().out
    assert "state-0000000016 is damaged" in out and "going on from state-0000000008" in out
    fit(Line(), config(), tmp_path / "straight")
    assert_same(state(tmp_path / "straight"), state(tmp_path / "run"))

    fit(Line(), config(samples=8), tmp_path / "only")
    DAMAGES[damage](tmp_path / "only" / "state-0000000008")
    with pytest.raises(ValueError, match=r"state-0000000008 is damaged.*"):
        fit(Line(), config(), tmp_path / "only")
    if damage == "another optimizer":
        assert load_average(Line(), tmp_path / "only") == 8  # reads the average alone
        return
    with pytest.raises(ValueError, match=r"state-0000000008 is damaged.*"):
        load_average(Line(), tmp_path / "only")


class Poisoned(Line):
    """Its loss is finite and its gradient is not."""

    def forward(self, indices, numbers):
        loss = super().forward(indices, numbers)
        return loss + (self.layer.weight[0, 0] - self.layer.weight[0, 0].detach()).abs().sqrt()


def test_weights_that_are_not_finite_are_neither_kept_nor_exported(tmp_path):
    with pytest.raises(FloatingPointError, match=r"model.layer.weight has values that are not finite after 4 samples"):
        fit(Poisoned(), config(samples=4), tmp_path)
    assert not checkpoints(tmp_path) and not (tmp_path / "export").exists()


class Interrupted(Line):
    """Gets a signal while it computes the loss of some sample, or at work that is not learning."""

    def __init__(self, at, numbers=(signal.SIGINT,)):
        super().__init__()
        self.at, self.numbers = at, list(numbers)

    def strike(self, at):
        while self.at == at and self.numbers:
            os.kill(os.getpid(), self.numbers.pop(0))

    def forward(self, indices, numbers):
        self.strike(int(numbers[0]))
        return super().forward(indices, numbers)

    def evaluate(self):
        self.strike("evaluate")
        return super().evaluate()

    def export(self, folder):
        (folder / "weights").write_text(str(self.layer.weight.tolist()))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_first_signal_saves_and_exports_and_the_run_goes_on_exactly(tmp_path, number, capfd):
    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt):
        fit(Interrupted(40, [number]), config(), tmp_path / "run")
    assert signal.getsignal(number) is before
    out, err = capfd.readouterr()
    assert "is saved and exported" in err and "stopped after 44 samples" in out
    assert [path.name for path in checkpoints(tmp_path / "run")] == ["state-0000000044"]  # the step in hand counts
    weights = state(tmp_path / "run")["ema.layer.weight"].tolist()
    assert (tmp_path / "run" / "export" / "weights").read_text() == str(weights)
    assert not list((tmp_path / "run").glob("preview*"))
    fit(Line(), config(), tmp_path / "run")
    fit(Line(), config(), tmp_path / "straight")
    assert_same(state(tmp_path / "straight"), state(tmp_path / "run"))


def test_a_second_signal_stops_at_once(tmp_path):
    fit(Line(), config(samples=8), tmp_path)
    with pytest.raises(KeyboardInterrupt):
        fit(Interrupted(40, [signal.SIGINT, signal.SIGTERM]), config(), tmp_path)
    assert [path.name for path in checkpoints(tmp_path)] == ["state-0000000008"]


def test_a_signal_while_pictures_are_drawn_waits_for_nothing(tmp_path):
    ticks = iter(range(10_000))
    with pytest.raises(KeyboardInterrupt):
        fit(Interrupted("evaluate"), config(show_minutes=0.2), tmp_path / "run", clock=lambda: float(next(ticks)))
    (kept,) = checkpoints(tmp_path / "run")
    assert int(kept.name[6:]) < 96 and (tmp_path / "run" / "export" / "weights").is_file()
    fit(Line(), config(), tmp_path / "run")
    fit(Line(), config(), tmp_path / "straight")
    assert_same(state(tmp_path / "straight"), state(tmp_path / "run"))


def test_a_signal_before_the_first_step_leaves_nothing_half_done(tmp_path):
    task = Interrupted("evaluate")
    task.begun = True  # shows what it can do before it learns
    with pytest.raises(KeyboardInterrupt):
        fit(task, config(), tmp_path)
    assert not checkpoints(tmp_path) and not (tmp_path / "export").exists()


class Exporting(Line):
    """Exports what can be told from half of it."""

    def export(self, folder):
        for name in ("first", "second"):
            (folder / name).write_text(str(self.layer.weight.tolist()))


ENDLESS = {"samples": 4_000, "save_minutes": 1e-9, "show_minutes": 2e-5, "report_every": 40}


def killed(out, number, seconds):
    """The exit code of a process that trains and gets a signal after some time."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            signal.signal(signal.SIGTERM, signal.default_int_handler)  # as the command line does
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            os.dup2(1, 2)
            fit(Exporting(), config(**ENDLESS), out)
            code = 0
        except KeyboardInterrupt:
            code = 130
        finally:
            os._exit(code)
    time.sleep(seconds)
    os.kill(pid, number)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def assert_whole(out):
    """Every name in the folder of a run is known, and every file is whole; the samples of its last checkpoint."""
    known = r"config.json|log.jsonl|export|preview-\d{10}.png|state-\d{10}"
    unknown = [path.name for path in out.glob("*") if not re.fullmatch(known, path.name)]
    assert all(re.fullmatch(r"\.[\w-]+-\d+\.[0-9a-f]{16}\.(tmp|old)", name) for name in unknown), unknown
    for folder in checkpoints(out):
        State(Line(), config()).load(folder)
    if (out / "export").exists():
        first, second = ((out / "export" / name).read_text() for name in ("first", "second"))
        assert first == second
    if checkpoints(out):
        assert json.loads((out / "config.json").read_text())["batch_size"] == 4
    return max((int(folder.name[6:]) for folder in checkpoints(out)), default=0)


@pytest.mark.parametrize("count", [6, pytest.param(600, marks=pytest.mark.slow)])
def test_killed_at_any_time_a_run_loses_no_checkpoint_and_tears_no_file(tmp_path, count):
    random = np.random.default_rng(count)
    out, kept = tmp_path / "run", 0
    for i in range(count):
        number = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)[i % 3]
        code = killed(out, number, random.uniform(0, 0.5))
        assert code in ((-signal.SIGKILL, 0) if number == signal.SIGKILL else (130, 0))
        samples = assert_whole(out)
        assert samples >= kept
        kept = samples if samples < 4_000 else shutil.rmtree(out) or 0
    fit(Line(), config(samples=kept + 40), out)
    fit(Line(), config(samples=kept + 40), tmp_path / "straight")
    assert_same(state(tmp_path / "straight"), state(out))
    assert not [path for path in out.iterdir() if path.name.startswith(".")]


class Full(Line):
    """Its export meets a full disk."""

    def export(self, folder):
        (folder / "half").write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")


def test_the_old_export_stays_until_the_new_one_is_whole(tmp_path):
    fit(Interrupted(None), config(samples=8), tmp_path)
    with pytest.raises(DiskFull, match="it was not written: make space and try again"):
        fit(Full(), config(samples=16), tmp_path)
    assert [file.name for file in (tmp_path / "export").iterdir()] == ["weights"]
    names = {path.name.split("-")[0] for path in tmp_path.iterdir()}
    assert names == {"config.json", "log.jsonl", "state", "export", "preview"}


class Slow(Line):
    """A minute a step."""

    minutes = 0

    def forward(self, indices, numbers):
        self.minutes += 1
        return super().forward(indices, numbers)


@pytest.mark.parametrize(("budget", "left"), [({"samples": 96}, 6), ({"samples": 96, "minutes": 10}, 4)])
def test_lines_say_samples_loss_and_time_left(tmp_path, capsys, budget, left):
    task = Slow()
    fit(task, config(report_every=48, batch_size=8, **budget), tmp_path, clock=lambda: 60.0 * task.minutes)
    lines = capsys.readouterr().out.splitlines()
    line = next(line for line in lines if "samples/s" in line)
    assert re.fullmatch(rf"16 samples, loss \d\.\d{{4}}, {left + 4} min left", lines[0])  # where no bar is drawn
    assert re.fullmatch(rf"48 samples, loss \d\.\d{{4}}, {left} min left, 0\.1 samples/s", line.strip())


def test_the_scale_of_the_loss_is_kept(tmp_path):
    """Of fp16, which needs a GPU; here the scaler alone."""
    states = [State(Line(), config()) for _ in range(3)]
    for kept, scale in zip(states[:2], (2.0**9, 2.0**16), strict=True):
        kept.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        kept.scaler.scale(torch.ones(1))
    states[0].scaler.update(2.0**8)
    write_checkpoint(tmp_path, 0, states[0].tensors())
    assert states[1].resume(tmp_path) == states[2].resume(tmp_path) == []
    assert states[1].scaler.state_dict() == states[0].scaler.state_dict() and states[1].scaler.get_scale() == 2.0**8


def test_only_the_last_checkpoints_are_kept_and_the_average_loads(tmp_path):
    for samples in (8, 16, 24):
        fit(Line(), config(samples=samples), tmp_path)
    assert [path.name for path in checkpoints(tmp_path)] == ["state-0000000016", "state-0000000024"]
    task = Line()
    assert load_average(task, tmp_path) == 24
    assert torch.equal(task.layer.weight, state(tmp_path)["ema.layer.weight"])


def test_every_epoch_visits_every_item_once_whatever_the_batches():
    numbers = np.arange(120)
    items = order(40, 3, numbers)
    assert all(sorted(items[e : e + 40]) == list(range(40)) for e in (0, 40, 80))
    assert not np.array_equal(items[:40], items[40:80])
    pieces = [order(40, 3, part) for part in np.split(numbers, [7, 39, 41])]
    np.testing.assert_array_equal(np.concatenate(pieces), items)


def test_rate_and_average_by_hand():
    settings = config(lr=1.0, warmup=10, decay="cosine", samples=100)
    rates = [learning_rate(n, settings) for n in (0, 4, 50, 100)]
    np.testing.assert_allclose(rates, [0.1, 0.5 * 0.996057, 0.5, 0.0], rtol=1e-5, atol=1e-12)
    assert ema_decay(10**9, 100, 100) == pytest.approx(0.5)
    mean = {"w": torch.tensor([1.0]), "n": torch.tensor([1])}
    update_ema(mean, {"w": torch.tensor([3.0]), "n": torch.tensor([2])}, 0.75)
    assert mean["w"].item() == 1.5 and mean["n"].item() == 2


def test_a_run_without_an_end_is_refused(tmp_path):
    with pytest.raises(ValueError, match="give minutes or samples"):
        fit(Line(), config(samples=None), tmp_path)
