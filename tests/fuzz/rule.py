"""The rule for every reader of what comes from outside, and hostile changes to good files.

Whatever the bytes, a reader gives a value or raises ValueError or OSError with a text of one line, within two seconds
and a gigabyte; it writes nothing and warns of nothing.

A case is a string of bytes that decides what is changed, so that hypothesis can make it smaller, and atheris can search
by coverage: `atheris.Setup(sys.argv, lambda data: check(Choices(data)))`.
"""

import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from hypothesis import HealthCheck, given, settings, strategies as st

T = TypeVar("T")
SECONDS = 2.0
MAX_TEXT = 2_000  # characters of an error
CASE_BYTES = 40

TOKENS = [b"{", b"}", b"[", b"]", b'"', b"\\", b",", b":", b"null", b"true", b"NaN", b"-", b"1e999", b"9" * 5000]
TOKENS += [b"[" * 10_000, b'{"a":' * 100, b"\0", b"\n", b"\xff", b"\xed\xa0\x80", b"\\ud800", b"\xef\xbb\xbf", b"../"]
VALUES: list[Any] = [None, True, False, 0, -1, 1, 2, 77, 2**31, 2**63, 2**64, 10**30, 0.5, -0.0, 1e308, float("inf")]
VALUES += ["", "x", "1", "1_0", "a\nb", "\u2028", "\ud800", "x" * 10_000, "../a", "/etc/passwd", "猫", "auto_map"]
VALUES += [[], [1], [1, "a"], [None], [True], [[1]], [16, "24"], [-1], [2**63], [10**7] * 4, ["a"] * 1000]
VALUES += [list(range(1000)), [[[[[]]]] * 50], {}, {"a": 1}, {"": {}}, {"a": [{}]}, {"content": ["a"]}, {"content": 5}]


class Choices:
    """Numbers out of a string of bytes; zeros when it has come to its end."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def number(self, below: int) -> int:
        taken = self.data[self.at : self.at + 2]
        self.at += 2
        return int.from_bytes(taken, "little") % below

    def one_of(self, values: Sequence[T]) -> T:
        return values[self.number(len(values))]


def edited(data: bytes, choices: Choices) -> bytes:
    """Bytes with up to three flipped bits, parts cut out or doubled, and pieces of JSON put in."""
    for _ in range(choices.number(4)):
        at, number = choices.number(len(data) + 1), choices.number(256)
        kind = choices.one_of(("flip", "cut", "repeat", "insert"))
        if kind == "flip":
            data = data[:at] + bytes(byte ^ (1 << number % 8) for byte in data[at : at + 1]) + data[at + 1 :]
        elif kind == "cut":
            data = data[:at] + data[at + number :]
        elif kind == "repeat":
            data = data[: at + number] + data[at:]
        else:
            data = data[:at] + TOKENS[number % len(TOKENS)] + data[at:]
    return data


def changed(content: dict[str, Any], choices: Choices) -> dict[str, Any]:
    """An object of which up to three keys have another value or name, or are gone, at the top or further down."""
    content = dict(content)
    for _ in range(choices.number(4)):
        _change(content, choices)
    return content


def _change(content: dict[str, Any], choices: Choices) -> None:
    if not content:
        return
    key = choices.one_of(list(content))
    inner, kind = content[key], choices.one_of(("set", "set", "inside", "inside", "drop", "rename"))
    if kind == "inside" and isinstance(inner, dict):
        content[key] = dict(inner)
        _change(content[key], choices)
    elif kind == "drop":
        del content[key]
    elif kind == "rename":
        content[str(choices.one_of(VALUES))[:100]] = content.pop(key)
    else:
        content[key] = choices.one_of(VALUES)


def hold(read: Callable[[], object], folder: Path, lines: int = 1) -> None:
    """Holds one reading to the rule. folder: all that it could write to. lines: how many its error may have."""
    before = sorted(folder.rglob("*"))
    start = time.process_time()
    try:
        with warnings.catch_warnings(action="error"):
            read()
    except (ValueError, OSError) as error:
        text = str(error)
        assert 1 <= len(text.splitlines()) <= lines, repr(text)
        assert all(len(line) < MAX_TEXT for line in text.splitlines()), f"{len(text)} characters: {text[:200]!r}"
    assert time.process_time() - start < SECONDS, "too slow"
    assert sorted(folder.rglob("*")) == before


def fuzz(check: Callable[[Choices], None], examples: int) -> None:
    """check for that many cases; the same ones in every run of the default tests, others in the long runs."""

    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=examples <= 2_000,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.binary(min_size=CASE_BYTES, max_size=CASE_BYTES))
    def run(data: bytes) -> None:
        check(Choices(data))

    run()
