"""One table of solvers: names that requests take, and Automatic1111's, as the docstring of the package shows them."""

import re
import subprocess
import sys
from pathlib import Path
from typing import get_args

import diffusers
import pytest

from sdlite.diffusion.solvers import OWN
from sdlite.request import SOLVERS, Request, SolverName
from tests.references.diffusers_pipeline import SCHEDULERS

PACKAGE = Path(__file__).parent.parent / "sdlite/diffusion/__init__.py"


def test_the_names_for_type_checkers_are_those_of_the_table():
    assert get_args(SolverName) == tuple(SOLVERS)
    assert {name: (entry.make, dict(entry.options)) for name, entry in SOLVERS.items() if name in SCHEDULERS} == (
        SCHEDULERS
    )
    assert {entry.make for entry in SOLVERS.values() if isinstance(entry.make, str)} <= {*OWN, *dir(diffusers)}
    with pytest.raises(ValueError, match=r"solver='eular' must be 'ddim', .*, 'pndm' or 'lcm'"):
        Request(prompt="a", solver="eular")


def test_the_package_shows_the_table():
    """| solver | Automatic1111 | source |"""
    rows = re.findall(r"^\| `(\w+)` \| (.+?) \| (.+?) \|$", PACKAGE.read_text(), re.MULTILINE)
    expected = {
        name: (f"{e.sampler}, {e.schedule_type}" if e.schedule_type else e.sampler, e.source)
        for name, e in SOLVERS.items()
    }
    assert {name: (sampler, source) for name, sampler, source in rows if name in SOLVERS} == expected


def test_the_table_loads_nothing_heavy():
    code = "import sys, sdlite.request; print(*{m.split('.')[0] for m in sys.modules} & {'torch', 'diffusers'})"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "\n"
