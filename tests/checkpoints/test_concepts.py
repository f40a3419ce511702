"""Names of things: read from a model's folder, and the nearest to a word."""

from pathlib import Path

import pytest

from sdlite.checkpoints import concepts

NAMES = ["alarm clock", "black cat", "ear of corn", "glasses", "lady beetle", "locked", "red apple", "ship"]


def test_names_are_lines_of_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert concepts.read_names(tmp_path) == []
    (tmp_path / "concepts.txt").write_text("black cat\n\n  ship \n", encoding="utf-8")
    assert concepts.read_names(tmp_path) == ["black cat", "ship"]
    monkeypatch.setattr(concepts, "MAX_BYTES", 5)
    with pytest.raises(ValueError, match=r"concepts.txt: has more than 5 bytes"):
        concepts.read_names(tmp_path)


@pytest.mark.parametrize(
    ("text", "first"),
    [
        ("locked", ["locked"]),
        ("lock", ["locked", "alarm clock"]),
        ("Clock", ["alarm clock"]),
        ("a ladybug", ["lady beetle"]),
        ("spaceship", ["ship"]),
        ("appel", ["red apple"]),
        ("x", []),
        ("", []),
    ],
)
def test_the_nearest_name_comes_first(text: str, first: list[str]):
    found = concepts.nearest(text, NAMES, 3)
    assert found[: len(first)] == first and len(found) == 3


def test_a_word_is_known_where_a_name_has_it():
    for prompt in ("a cat", "CATS, noto style", "two red cars", "glass and glasses", "corn"):
        assert not concepts.knows_none(prompt, NAMES)
    for prompt in ("a lock", "an ear-ring of gold in style", "", "!"):
        assert concepts.knows_none(prompt, NAMES) == (prompt != "an ear-ring of gold in style")
