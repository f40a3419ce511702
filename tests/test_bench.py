"""sdlite.bench: what is timed in which order, the arithmetic of ratios, and one real run against diffusers."""

import json

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from sdlite.bench import machine, measure, speed, table, timing
from sdlite.contracts import Conditioning
from sdlite.pipeline import Pipeline
from sdlite.request import Request


def test_sides_take_turns(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(timing, "MIN_SECONDS", 0)
    calls: list[str] = []
    sides = {side: lambda number, side=side: calls.append(f"{side}{number}") for side in "ab"}
    timings = timing.alternate(sides, 3)
    assert " ".join(calls) == "a0 b0 a1 b1 b2 a2 a3 b3"  # one call each to warm up, then who is first changes
    assert {side: len(values) for side, values in timings.items()} == {"a": 3, "b": 3}


def test_short_calls_are_repeated(monkeypatch: pytest.MonkeyPatch):
    clock = iter(range(100))  # each call of a side lies between two readings, one second apart
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(timing, "MIN_SECONDS", 4)
    numbers: list[int] = []
    assert timing.alternate({"a": numbers.append}, 2) == {"a": [1 / 4, 1 / 4]}
    assert numbers == list(range(9))  # never the same number, so never the same prompt


def test_ratio_is_taken_within_pairs():
    row = timing.row("x", "s", {"sdlite": [1.0, 4.0, 9.0], "diffusers": [2.0, 4.0, 3.0]})
    assert row["ratio"] == {"median": 1.0, "least": 0.5, "most": 3.0}
    assert row["median"] == {"sdlite": 4.0, "diffusers": 3.0}
    assert timing.row("x", "s", {"sdlite": [1.0]})["ratio"] is None


def test_table():
    rows = [
        timing.row("one image", "s", {"sdlite": [0.0021], "diffusers": [2.5]}),
        timing.row("peak memory", "bytes", {"sdlite": [2.0**30], "diffusers": [2.0**31]}),
    ]
    result = {"rows": rows, "setting": {"runs": 1}, "machine": {"load": 0.1, "publishable": True}}
    assert table(result).splitlines() == [
        "|  | sdlite | diffusers | ratio: median (least to most) |",
        "|---|---|---|---|",
        "| one image | 2.1 ms | 2.5 s | 0.001 (0.001 to 0.001) |",
        "| peak memory | 1024 MiB | 2048 MiB | 0.500 (0.500 to 0.500) |",
        "",
        "runs: 1, load: 0.1",
    ]
    result["machine"]["publishable"] = False
    assert table(result).endswith("run it again when it is idle.")


def test_child_reports_its_own_memory():
    seconds, small = machine.run_python("-c", "import time; time.sleep(0.2)")
    _, large = machine.run_python("-c", "b'x' * (200 << 20)")
    assert seconds >= 0.2 and 190 << 20 < large - small < 220 << 20
    with pytest.raises(RuntimeError, match="what went wrong"):
        machine.run_python("-c", "raise SystemExit('what went wrong')")


@pytest.mark.slow
def test_tiny_model_against_diffusers(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(speed, "COLD_RUNS", 1)
    monkeypatch.setattr(timing, "MIN_SECONDS", 0)
    request = Request(prompt="a red apple", steps=3)
    result = json.loads(json.dumps(measure(Pipeline.load("tiny"), request, load=99.0, versus="diffusers", runs=2)))
    assert [row["what"].split(",")[0] for row in result["rows"]] == [
        "one UNet evaluation",
        "one image",
        "peak memory of a process",
        "cold start to the first PNG",
    ]
    for row in result["rows"]:
        assert row["ratio"]["least"] <= row["ratio"]["median"] <= row["ratio"]["most"]
        assert all(value > 0 for value in row["median"].values())
    assert result["setting"]["largest difference of 255"] <= 1
    assert "NOT TO BE QUOTED" in table(result)


def test_a_dit_is_measured_alone(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(speed, "_cold_rows", lambda *_: [])
    monkeypatch.setattr(timing, "MIN_SECONDS", 0)
    pipe, request = Pipeline.load("tiny-dit"), Request(prompt="a red apple", steps=2)
    rows = measure(pipe, request, load=0.0, runs=1)["rows"]
    assert [row["what"] for row in rows] == ["one DiT evaluation, batch 2", "one image, 2 steps"]
    with pytest.raises(ValueError, match="no pipeline for this DiT with CLIP; measure it alone"):
        measure(pipe, request, load=0.0, versus="diffusers")


class Flat:
    """Parts that know nothing of PyTorch modules: a denoiser that predicts zeros, a codec without a network."""

    prediction, in_channels, patch_size = "epsilon", 4, 1
    factor, latent_channels, deterministic = 8, 4, True

    def prepare(self, conditioning: Conditioning) -> int:
        return len(conditioning.context)

    def __call__(self, x: Tensor, t: Tensor, memory: int) -> Tensor:
        return torch.zeros(memory, *x.shape[1:])

    def encode(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        return functional.avg_pool2d(images, 8)

    def decode(self, latents: Tensor) -> Tensor:
        return functional.interpolate(latents[:, :3], scale_factor=8).clamp(-1, 1)

    def decode_bytes(self, width: int, height: int) -> int:
        return 0


def test_parts_of_any_kind_are_measured(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(timing, "MIN_SECONDS", 0)
    flat = Flat()
    pipe = Pipeline.load("tiny").with_parts(denoiser=flat, codec=flat)
    rows = measure(pipe, Request(prompt="a red apple", steps=2), load=0.0, runs=1)["rows"]
    assert [row["what"] for row in rows] == ["one Flat evaluation, batch 2", "one image, 2 steps"]
    with pytest.raises(ValueError):
        measure(pipe, Request(prompt="a red apple", steps=2), load=0.0, runs=1, versus="diffusers")
