"""The prompt grammar and the chunks, on cases worked out by hand from Automatic1111's rules."""

import math
import time
from itertools import pairwise

import pytest
from hypothesis import given, settings, strategies as st

from sdlite.models.prompt import MAX_WEIGHT, Token, escaped, foreign_marks, parse_prompt, split_chunks

COMMA = 267


def pieces(prompt):
    """The only section of a prompt, weights rounded to what the hand-written cases say."""
    (section,) = parse_prompt(prompt)
    return [(text, round(weight, 6)) for text, weight in section]


# The examples in the docstring of Automatic1111's parse_prompt_attention.
@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("normal text", [("normal text", 1)]),
        ("an (important) word", [("an ", 1), ("important", 1.1), (" word", 1)]),
        ("(unbalanced", [("unbalanced", 1.1)]),
        (r"\(literal\]", [("(literal]", 1)]),
        ("(unnecessary)(parens)", [("unnecessaryparens", 1.1)]),
        (
            "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).",
            [
                ("a ", 1),
                ("house", 1.573),
                (" ", 1.1),
                ("on", 1),
                (" a ", 1.1),
                ("hill", 0.55),
                (", sun, ", 1.1),
                ("sky", 1.4641),
                (".", 1.1),
            ],
        ),
    ],
)
def test_examples_of_automatic1111(prompt, expected):
    assert pieces(prompt) == expected


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("[fog]", [("fog", 0.909091)]),
        ("[[fog]]", [("fog", 0.826446)]),
        ("(red:1.3)", [("red", 1.3)]),
        ("(red: 1.3 )", [("red", 1.3)]),
        ("(red:.5)", [("red", 0.5)]),
        ("(red:2.)", [("red", 2)]),
        ("(red:-1)", [("red", -1)]),
        ("(red:+1.5)", [("red", 1.5)]),
        ("(red:0)", [("red", 0)]),
        ("((a:2) b:3)", [("a", 6), (" b", 3)]),
        ("(a [b] c)", [("a ", 1.1), ("b", 1), (" c", 1.1)]),
        ("(a [b) c]", [("a ", 1.1), ("b", 1), (" c", 0.909091)]),  # the two kinds may cross
        ("a:b (c:d:1.2)", [("a:b ", 1), ("c:d", 1.2)]),
        ("(red:1.3.4)", [("red:1.3.4", 1.1)]),
        ("(red:high)", [("red:high", 1.1)]),
        ("red:1.3)", [("red:1.3)", 1)]),  # nothing is open: text
        ("[red:0.5]", [("red:0.5", 0.909091)]),
        ("a) b] c", [("a) b] c", 1)]),
        ("a (b (c", [("a ", 1), ("b ", 1.1), ("c", 1.21)]),
        ("a [b (c", [("a ", 1), ("b ", 0.909091), ("c", 1)]),
        (r"\\ \[x\] (y\))", [("\\ [x] ", 1), ("y)", 1.1)]),
        (r"a\b", [("ab", 1)]),  # a lone backslash vanishes
        ("()", []),
        ("", []),
        ("a () b", [("a  b", 1)]),
    ],
)
def test_weights(prompt, expected):
    assert pieces(prompt) == expected


def test_text_without_markup_has_weight_one_exactly():
    for prompt in ("a red apple, on a table: 5 o'clock", "[[((a))]]", "([[(a)]])"):
        assert [weight for _, weight in parse_prompt(prompt)[0]] == [1.0]


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a BREAK b", [[("a", 1)], [("b", 1)]]),
        ("a\n BREAK \nb BREAKS BREAKb", [[("a", 1)], [("b BREAKS BREAKb", 1)]]),
        ("a BREAK BREAK b", [[("a", 1)], [], [("b", 1)]]),
        ("BREAK", [[], []]),
        ("a break", [[("a break", 1)]]),
        ("(a BREAK b:2) c", [[("a", 2)], [("b", 2), (" c", 1)]]),  # text to Automatic1111, a break here
    ],
)
def test_break_separates_sections(prompt, expected):
    assert parse_prompt(prompt) == expected


@pytest.mark.parametrize("prompt", ["(" * 60 + "a", "((a:9):9)", "(a:" + "9" * 400 + ")", "(" * 20_000 + "a"])
def test_weights_have_an_upper_bound(prompt):
    assert [weight for _, weight in parse_prompt(prompt)[0]] == [MAX_WEIGHT]


def test_weights_have_a_lower_bound():
    assert parse_prompt("(a:-99)")[0][0].weight == -MAX_WEIGHT
    assert parse_prompt("[" * 19_999 + "a")[0][0].weight == pytest.approx(0, abs=1e-30)


@settings(deadline=None)
@given(st.text(alphabet="ab ()[]:\\.,-019BREAK\n", max_size=60))
def test_any_text_gives_bounded_weights_and_merged_pieces(prompt):
    for section in parse_prompt(prompt):
        assert all(text and math.isfinite(weight) and abs(weight) <= MAX_WEIGHT for text, weight in section)
        assert all(left.weight != right.weight for left, right in pairwise(section))


@given(st.text().filter(lambda text: not set(text) & set("()[]\\") and "BREAK" not in text))
def test_text_without_markup_is_itself(prompt):
    assert parse_prompt(prompt) == [[(prompt, 1.0)] if prompt else []]


@pytest.mark.parametrize(
    "unit", ["(", "[", "([", "(a", "(a:1.1)", ":", ":1", " ", "BREAK ", "\\", "a BREAK", "(a BREAK:.9)"]
)
def test_hostile_prompts_take_linear_time(unit):
    prompt = (unit * 20_000)[:20_000]
    start = time.process_time()
    parse_prompt(prompt)
    parse_prompt(":" + prompt[1:] + ")" * 10)
    assert time.process_time() - start < 2


def tokens(*ids):
    return [Token(i, 1.0) for i in ids]


def chunk_ids(*sections, length=75):
    return [[token.id for token in chunk] for chunk in split_chunks(sections, length, COMMA)]


def test_chunks_fill_up_without_commas():
    words = list(range(1000, 1200))
    assert chunk_ids(tokens(*words)) == [words[:75], words[75:150], words[150:]]
    assert chunk_ids(tokens(*words[:75])) == [words[:75]]
    assert chunk_ids(tokens(*words[:76])) == [words[:75], words[75:76]]


@pytest.mark.parametrize(
    ("comma_at", "first_chunk"),
    [
        (54, 75),  # 20 tokens after the comma in the chunk: too far back
        (55, 56),  # 19 after it: the chunk ends with the comma
        (60, 61),
        (73, 74),
        (74, 75),  # the comma is the last of the chunk
        (75, 75),  # the comma itself overflows: it opens the next chunk
    ],
)
def test_an_overflowing_chunk_ends_after_a_near_comma(comma_at, first_chunk):
    ids = list(range(1000, 1090))
    ids[comma_at] = COMMA
    assert chunk_ids(tokens(*ids)) == [ids[:first_chunk], ids[first_chunk:]]


def test_a_chunk_that_does_not_overflow_keeps_its_words():
    ids = [*range(1000, 1070), COMMA, 1, 2, 3, 4]  # 75 tokens
    assert chunk_ids(tokens(*ids)) == [ids]


def test_moved_tokens_count_in_the_next_chunk():
    ids = [*range(60), COMMA, *range(100, 189), COMMA, 7, 8]  # 61 stay; 89 words and a comma follow
    assert chunk_ids(tokens(*ids)) == [ids[:61], ids[61:136], ids[136:]]


def test_the_last_of_several_commas_counts():
    ids = [*range(1000, 1090)]
    ids[58] = ids[66] = COMMA
    assert chunk_ids(tokens(*ids)) == [ids[:67], ids[67:]]


def test_an_overflowing_comma_moves_nothing():
    ids = [*range(1000, 1090)]
    ids[60] = ids[75] = COMMA
    assert chunk_ids(tokens(*ids)) == [ids[:75], ids[75:]]


def test_sections_start_chunks():
    assert chunk_ids(tokens(1, 2), tokens(3)) == [[1, 2], [3]]
    assert chunk_ids(tokens(1, COMMA), tokens(*range(76))) == [[1, COMMA], list(range(75)), [75]]
    assert chunk_ids(tokens(1), [], tokens(2)) == [[1], [], [2]]
    assert chunk_ids(tokens(*range(75)), tokens(80)) == [list(range(75)), [80]]  # full, then BREAK: no empty chunk
    assert chunk_ids(tokens(1), []) == [[1]]
    assert chunk_ids([], []) == [[]]
    assert chunk_ids([]) == [[]]


def test_weights_travel_with_their_tokens():
    ids = [*range(1000, 1070), COMMA, *range(2000, 2010)]
    weighted = [Token(i, i / 1000) for i in ids]
    assert [token for chunk in split_chunks([weighted], 75, COMMA) for token in chunk] == weighted


def test_chunks_shorter_than_the_backtrack():
    ids = [1, COMMA, *range(10, 30)]
    assert chunk_ids(tokens(*ids), length=6) == [[1, COMMA], ids[2:8], ids[8:14], ids[14:20], ids[20:]]


@pytest.mark.parametrize(
    ("prompt", "marks"),
    [
        ("a fox <lora:snow:0.8>", ["<lora:snow:0.8>"]),
        ("<hypernet:x:1> a <lyco:y>", ["<hypernet:x:1>"]),
        ("a [cat:dog:0.5]", ["[cat:dog:0.5]"]),
        ("a [cat:10] and [dog:.5]", ["[cat:10]"]),
        ("a [cat|dog]", ["[cat|dog]"]),
        ("a cat AND a dog", ["AND"]),
        ("a (cat:1.2) [dog] BREAK time 10:30, a < b, AND, [a: b], BRAND", []),
        ("<lora:a:1> [x:1] AND y", ["<lora:a:1>", "[x:1]", "AND"]),
    ],
)
def test_markup_that_is_read_as_text_is_found(prompt, marks):
    notes = foreign_marks(prompt)
    assert [note.startswith(f"{mark!r} is read as plain text: ") for note, mark in zip(notes, marks, strict=True)] == [
        True
    ] * len(marks)


@given(st.text(alphabet="ab \\\\()[]:1.BREAK", max_size=40))
def test_an_escaped_text_is_plain(text):
    pieces = [piece for section in parse_prompt(escaped(text)) for piece in section]
    assert "".join(piece.text for piece in pieces).lower() == text.lower()
    assert all(piece.weight == 1 for piece in pieces) and len(pieces) <= 1
