"""One table of solvers: the names that requests take, Automatic1111's names, and the README's table agree with it."""

import re
import subprocess
import sys
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from torch import Tensor

from sdlite.contracts import Noise
from sdlite.diffusion.solver_names import SOLVERS, SolverEntry
from sdlite.pipeline import Pipeline
from sdlite.request import Request, SolverName
from tests.references.diffusers_pipeline import SCHEDULERS

README = Path(__file__).parent.parent / "README.md"


def test_the_names_for_type_checkers_are_those_of_the_table():
    assert get_args(SolverName) == tuple(SOLVERS)
    assert {name: (entry.make, dict(entry.options)) for name, entry in SOLVERS.items() if name in SCHEDULERS} == (
        SCHEDULERS
    )
    with pytest.raises(ValueError, match=r"solver='eular' must be 'ddim', .*, 'pndm' or 'lcm'"):
        Request(prompt="a", solver="eular")


def test_the_readme_has_the_table():
    """| solver | Automatic1111 | source |"""
    rows = re.findall(r"^\| `(\w+)` \| (.+?) \| (.+?) \|$", README.read_text(), re.MULTILINE)
    expected = {
        name: (f"{e.sampler}, {e.schedule_type}" if e.schedule_type else e.sampler, e.source)
        for name, e in SOLVERS.items()
    }
    assert {name: (sampler, source) for name, sampler, source in rows if name in SOLVERS} == expected


def test_the_table_loads_nothing_heavy():
    code = "import sys, sdlite.request; print(*{m.split('.')[0] for m in sys.modules} & {'torch', 'diffusers'})"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "\n"


class Straight:
    """From pure noise to the clean latents along v, in equal steps of the angle: one solver in one file."""

    initial_scale = 1.0

    def __init__(self, schedule, steps: int, prediction: str) -> None:
        self.timesteps = schedule.timesteps(steps)
        self.abars = [*schedule.abar(self.timesteps), torch.tensor(1.0, dtype=torch.float64)]
        self.prediction = prediction

    def scale_input(self, x: Tensor, i: int) -> Tensor:
        return x

    def step(self, i: int, x: Tensor, output: Tensor, noise: Noise) -> Tensor:
        now, after = self.abars[i], self.abars[i + 1]
        x_0 = (x - (1 - now).sqrt() * output) / now.sqrt()
        return (after.sqrt() * x_0 + (1 - after).sqrt() * output).float()

    def noised(self, x_0: Tensor, noise: Tensor, i: int) -> Tensor:
        return (self.abars[i].sqrt() * x_0 + (1 - self.abars[i]).sqrt() * noise).float()


def test_a_solver_from_outside_is_one_line(monkeypatch):
    """It is DDIM for epsilon, with another last step."""
    monkeypatch.setitem(SOLVERS, "straight", SolverEntry("this test", "Straight", None, Straight))
    pipe = Pipeline.load("tiny")
    new, old = (pipe("a cat", steps=4, solver=solver)[0] for solver in ("straight", "ddim"))
    pixels = [np.asarray(picture).astype(int) for picture in (new, old)]
    assert 0 < np.abs(pixels[0] - pixels[1]).max() < 0.1 * np.ptp(pixels[1])
    assert "Sampler: Straight" in new.info["parameters"]
