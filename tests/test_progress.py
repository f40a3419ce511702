"""The line with the time left: where it shows, what it says, and that a function is told every step."""

import io
import re
import sys
from types import SimpleNamespace

import pytest

from sdlite.checkpoints.untrained import random_model
from sdlite.config import tiny
from sdlite.diffusion.schedule import Schedule
from sdlite.pipeline import About, Pipeline, progress
from sdlite.request import Request


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    parts = random_model(tiny(), seed=0)
    schedule, about = Schedule(parts.config.schedule), About(sample_size=4)
    return Pipeline(parts.text, parts.denoiser, parts.codec, schedule, about=about)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_function_is_told_every_step_of_all_batches(pipe: Pipeline):
    """3 and 2 evaluations: two requests with equal steps share a batch, the other one cannot."""
    told: list[tuple[int, int]] = []
    requests = [Request(prompt=prompt, steps=steps) for prompt, steps in (("a", 3), ("b", 2), ("c", 3))]
    pipe.generate(requests, progress=lambda done, total: told.append((done, total)))
    assert told == [(done, 5) for done in range(6)]
    told.clear()
    pipe(["a", "b"], steps=[3, 2], progress=lambda done, total: told.append((done, total)))
    assert told == [(done, 5) for done in range(6)]


def test_nothing_is_shown_where_nobody_watches(pipe: Pipeline, capfd: pytest.CaptureFixture[str]):
    pipe("a", steps=2)
    assert capfd.readouterr() == ("", "")


def test_a_terminal_shows_the_time_left_and_is_left_clean(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch):
    for given, shows in ((None, True), (True, True), (False, False)):
        monkeypatch.setattr(sys, "stderr", Terminal())
        monkeypatch.setattr(progress, "MIN_SECONDS", 0)
        pipe("a", steps=2, num_images=2, progress=given)
        written = sys.stderr.getvalue()
        assert bool(written) == shows
        if shows:
            start, *lines, end = written.split("\r\x1b[K")
            assert (start, end) == ("", "")
            assert [re.findall(r"step (\d) of (\d)", line) for line in lines] == [[(str(i), "2")] for i in range(3)]
            assert all(line.startswith("drawing 2 images") for line in lines)
            assert lines[1].count("#") == lines[1].count(".") and lines[2].endswith(" 0 s left")


def test_the_time_left_goes_by_the_pace_so_far(monkeypatch: pytest.MonkeyPatch):
    """6 s for 2 steps of 10: the other 8 take 24 s. A line comes every tenth of a second, and at the end."""
    clock, lines = iter([100.0, 100.0, 106.0, 106.05, 106.06]), []
    monkeypatch.setattr(progress, "monotonic", lambda: next(clock))
    line = progress._Line(lines.append, 1)
    for done in (0, 2, 3, 10):
        line(done, 10)
    assert [text.partition("] ")[2] for text in lines] == [
        "step 0 of 10",
        "step 2 of 10, 24 s left",
        "step 10 of 10, 0 s left",
    ]
    assert lines[0].startswith("drawing 1 image [")


def test_an_error_leaves_the_terminal_clean(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setattr(pipe.codec, "decode", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        pipe("a", steps=2)
    assert sys.stderr.getvalue().endswith("\r\x1b[K")


def test_a_notebook_has_one_output_that_ends_empty(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch):
    shown: list[str] = []
    handle = SimpleNamespace(update=shown.append)
    display = SimpleNamespace(HTML=str, display=lambda html, display_id: shown.append(html) or handle)
    shell = SimpleNamespace(kernel=object())
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell, display=display))
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    monkeypatch.setattr(progress, "MIN_SECONDS", 0)
    pipe("a", steps=2)
    assert (shown[0], shown[-1]) == ("", "") and "step 1 of 2" in shown[2]
    shown.clear()
    pipe("a", steps=2, progress=False)
    assert not shown
    del shell.kernel  # IPython in a terminal
    pipe("a", steps=2)
    assert not shown
