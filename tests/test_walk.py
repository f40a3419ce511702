"""Walks the real calls of a drawn image: the README's list of files is the truth, and short enough to read."""

import re
import sys
from pathlib import Path
from types import CodeType, FrameType

import sdlite
from sdlite.pipeline import Pipeline

PACKAGE = Path(sdlite.__file__).parent
README = PACKAGE.parent / "README.md"
MOST_FILES, MOST_LINES = 10, 1700


def walked() -> dict[str, set[CodeType]]:
    """File of ours -> its functions that ran between a prompt and its image."""
    pipe = Pipeline.load("tiny", device="cpu")
    pipe("a red apple", steps=2)  # so that nothing is imported any more
    ran: dict[str, set[CodeType]] = {}

    def called(frame: FrameType, event: str, _: object) -> None:
        path = Path(frame.f_code.co_filename)
        if event == "call" and path.is_relative_to(PACKAGE):
            ran.setdefault(path.relative_to(PACKAGE).as_posix(), set()).add(frame.f_code)

    sys.setprofile(called)
    try:
        pipe("a red apple", steps=2)
    finally:
        sys.setprofile(None)
    return ran


def listed(start: str) -> list[str]:
    """The files of the README's paragraph that starts so."""
    (paragraph,) = re.findall(rf"^{start}.*?\n\n", README.read_text(), re.MULTILINE | re.DOTALL)
    return re.findall(r"`([\w/]+\.py)`", paragraph)


def lines(code: CodeType) -> set[int]:
    numbers = [number for *_, number in code.co_lines() if number]
    return set(range(min(numbers), max(numbers) + 1))


def test_the_files_that_an_image_passes_are_those_of_the_readme():
    ran = walked()
    path, called = listed("An image passes these files"), listed("They call")
    assert sorted([*path, *called]) == sorted(ran)
    assert len(path) <= MOST_FILES
    assert sum(len((PACKAGE / name).read_text().splitlines()) for name in path) <= MOST_LINES
    # functions within functions lie within the lines of the outer one
    assert sum(len(set().union(*map(lines, codes))) for codes in ran.values()) <= MOST_LINES
