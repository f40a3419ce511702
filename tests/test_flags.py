"""Flags from records: what typer is given, and what the command gets."""

import json
from typing import Annotated, Any, Literal

import pytest
import typer
from pydantic import Field
from typer.testing import CliRunner

from sdlite.cli.flags import Flags, options
from sdlite.config import Fraction, LoadOptions, Record, Size
from sdlite.request import Request


class First(Record):
    size: Size | None = Field(None, description="Side of an image.")
    rate: float = Field(0.5, gt=0, le=2, description="How fast.")
    kind: Literal["a", "b"] = Field("a", description="Which.")
    roots: tuple[str, ...] = Field((), description="Where to look.")
    slow: bool = Field(False, description="Take your time.")
    safe: bool = Field(True, description="Take care.")


class Second(Record):
    kind: Literal["b", "c"] = Field("b", description="Which.")
    rate: float = Field(0.1, gt=0, le=2, description="How fast.")
    part: Fraction = Field(0, description="How much.")


SEVEN, HALF = Request(prompt="x", steps=7, seed=3), LoadOptions(device="cpu", dtype="float16")


def run(command: Any, line: str) -> tuple[int, Any]:
    """Exit code and what the command printed as JSON, or its help."""
    app = typer.Typer(rich_markup_mode=None)
    app.command()(command)
    result = CliRunner(env={"COLUMNS": "200"}).invoke(app, line.split())
    if isinstance(result.exception, ValueError):
        return 2, str(result.exception)
    return result.exit_code, json.loads(result.stdout) if result.stdout.startswith("{") else " ".join(
        result.output.split()
    )


@options
def one(first: First) -> None:
    """One record."""
    typer.echo(first.model_dump_json())


@options
def some(
    request: Annotated[Request, Flags(only=("steps", "prompt"))] = SEVEN,
    load_options: Annotated[LoadOptions, Flags(without=("model", "dtype"))] = HALF,
    times: int = 1,
) -> None:
    typer.echo(json.dumps(request.model_dump() | load_options.model_dump() | {"times": times}))


@options
def given(
    values: Annotated[
        dict[str, Any],
        Flags(records={"first": First, "second": Second}, words={"part": typer.Option("--portion", "-p", metavar="P")}),
    ],
) -> None:
    typer.echo(json.dumps(values))


def test_a_command_gets_the_record():
    assert run(one, "") == (0, First().model_dump(mode="json"))
    line = "--size 64 --rate 2 --kind b --roots x --roots y --slow --no-safe"
    expected = First(size=64, rate=2, kind="b", roots=("x", "y"), slow=True, safe=False)
    assert run(one, line) == (0, expected.model_dump(mode="json"))


def test_the_record_checks_its_bounds():
    assert run(one, "--rate 0") == (2, "rate=0.0 must be greater than 0")
    assert run(one, "--kind c")[0] == 2


def test_help_shows_what_the_record_says():
    lines = run(one, "--help")[1]
    for part in (
        "--size <int>",
        "Side of an image (8 to 4096).",
        "How fast (above 0, up to 2). [default: 0.5]",
        "<a|b>",
        "--roots <list[str]>",
        "--safe / --no-safe",
    ):
        assert part in lines, lines
    assert "--no-slow" not in lines and "One record." in lines


def test_some_fields_with_other_defaults():
    code, values = run(some, "y --steps 9 --vae tiny --times 2")
    expected = Request(prompt="y", steps=9, seed=3), LoadOptions(device="cpu", dtype="float16", vae="tiny")
    assert (code, values) == (
        0,
        json.loads(json.dumps(expected[0].model_dump() | expected[1].model_dump() | {"times": 2})),
    )
    assert run(some, "")[1]["prompt"] == "x" and run(some, "")[1]["steps"] == 7
    assert run(some, "--seed 1")[0] == 2 and run(some, "--model m")[0] == 2


def test_short_names_and_checks_come_from_the_table():
    @options
    def both(request: Request, load_options: LoadOptions) -> None:
        typer.echo(json.dumps([request.width, request.guidance_scale, request.paste, load_options.model]))

    assert run(both, "x -W 64 --cfg-scale 2 --no-paste -m tiny")[1].strip() == '[64, 2.0, false, "tiny"]'
    assert run(both, "x")[1].strip() == "[null, 5.0, true, null]"
    assert "No such option: --paste" in run(both, "x --paste")[1]  # so it is not suggested for --past


def test_what_was_given_for_one_of_several_records():
    assert run(given, "") == (0, {})
    assert run(given, "--rate 1 -p 0 --safe") == (0, {"rate": 1.0, "part": 0.0, "safe": True})
    lines = run(given, "--help")[1]
    assert "How fast (above 0, up to 2). [default: (first 0.5, second 0.1)]" in lines, lines
    assert "--kind <a|b|c> Which. [default: (first a, second b)]" in lines, lines
    assert "-p, --portion P" in lines and "Second: How much (0 to 1). [default: (0)]" in lines
    assert "First: Take care. [default: (on)]" in lines


def test_one_flag_cannot_stand_for_two_fields():
    with pytest.raises(ValueError, match="duplicate parameter name"):

        @options
        def both(a: First, b: Second) -> None: ...
