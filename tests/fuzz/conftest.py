"""Limits the memory of the fuzz tests, and says how many inputs each tries and where it writes them."""

import resource
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import sdlite.pipeline  # noqa: F401  the first reading does not pay for this import


@pytest.fixture(params=[2_000, pytest.param(100_000, marks=pytest.mark.slow)])
def examples(request: pytest.FixtureRequest) -> int:
    return request.param


@pytest.fixture
def folder() -> Iterator[Path]:
    """In memory where the system has a place for it: a disk takes milliseconds for a file that is written again."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as name:
        yield Path(name)


@pytest.fixture(autouse=True)
def one_gigabyte() -> Iterator[None]:
    """Lets the process grow by no more than that."""
    if sys.platform != "linux":
        yield
        return
    before = resource.getrlimit(resource.RLIMIT_AS)
    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + 2**30, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)
