"""The loop against itself: resumed equals straight through, two processes equal one with twice the batch."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from sdlite.train.curves import read_log
from sdlite.train.ema import ema_decay, update_ema
from sdlite.train.loop import TrainConfig, checkpoints, fit, learning_rate, load_average, order

ROOT = Path(__file__).parent.parent


class Line(nn.Module):
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
        path.write_bytes(b"")

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


def test_figures_previews_and_curves_are_drawn_on_the_way(tmp_path):
    ticks = iter(range(10_000))
    fit(Line(), config(show_minutes=0.2, plot=True, report_every=8), tmp_path, clock=lambda: float(next(ticks)))
    assert len(list(tmp_path.glob("preview-*.png"))) > 2
    points = dict(read_log(tmp_path / "log.jsonl")["weight"])
    assert points[96] == pytest.approx(state(tmp_path)["ema.layer.weight"][0, 0].item())
    with Image.open(tmp_path / "curves.png") as curves:
        assert curves.size == (400 * 2, 300)  # loss, weight
    fit(Line(), config(), tmp_path / "straight")
    assert_same(state(tmp_path / "straight"), state(tmp_path))  # looking changes nothing


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


def test_another_config_is_refused(tmp_path):
    fit(Line(), config(samples=8), tmp_path)
    with pytest.raises(ValueError, match=r"batch_size=4, not 8"):
        fit(Line(), config(batch_size=8), tmp_path)


def test_a_damaged_checkpoint_is_refused(tmp_path):
    fit(Line(), config(samples=8), tmp_path)
    file = next(checkpoints(tmp_path)[-1].glob("*.safetensors"))
    file.unlink()
    with pytest.raises(ValueError, match="damaged or of another model"):
        fit(Line(), config(), tmp_path)


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
