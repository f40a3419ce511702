"""File names that are safe on every system, and templates that cannot name anything else."""

import pytest

from sdlite.batch.names import DEFAULT, checked, fill, parse_template
from sdlite.request import Request
from tests.test_batch_plan import plan

NAMES = ["../a.png", "/a.png", "a/b.png", "a\\b.png", "C:a.png", "CON.png", "com1.x.png", ".a.png", " a.png", "a\0.png"]
NAMES += ["a\u202e.png", "a\u200b.png", "a\n.png", "é" * 150 + ".png", "a\u2028.png", "", "a?.png", "nul.png"]


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_unsafe_names_are_refused(name: str):
    with pytest.raises(ValueError, match="file name"):
        checked(name)


TEMPLATES = ["{0.__class__}.png", "{request.prompt}.png", "{seed[0]}.png", "{prompt!r}.png", "{}.png", "{0}.png"]
TEMPLATES += ["{seed:>99999999}.png", "{seed:{steps}}.png", "{index", "{index}.jpg", "{model}.png", "{key:8d}.png"]


@pytest.mark.parametrize("template", TEMPLATES)
def test_templates_name_fixed_fields_only(template: str):
    with pytest.raises(ValueError, match="name="):
        parse_template(template)


@pytest.mark.parametrize(
    "template",
    ["../{index}.png", "/tmp/{index}.png", "{index}/x.png", "a\0{index}.png", "{index}\u202e.png", "CON.png"],
)
def test_a_template_cannot_leave_the_folder(template: str):
    with pytest.raises(ValueError, match="file name") as caught:
        plan(["a", "b"], name=template)
    assert "\n" not in str(caught.value)  # the template's fault, so told once


@pytest.mark.parametrize(
    ("prompt", "name"),
    [
        ("../../etc/passwd", "etc-passwd.png"),
        ("C:\\x\0\u202ey", "C-x-y.png"),
        ("狐 и лиса", "狐-и-лиса.png"),
        ("?!", "empty.png"),
        ("é" * 150, "é" * 60 + ".png"),
    ],
)
def test_a_prompt_in_a_name_is_its_words(prompt: str, name: str):
    request = Request(prompt=prompt, width=64, height=64)
    assert fill(parse_template("{prompt}.png"), request, index=0) == name


def test_a_template_filled():
    request = Request(prompt="a fox", width=64, height=32, seed=7, steps=2, guidance_scale=1.5)
    template = "{index:04d}_{seed}_{steps:3}_{guidance_scale}_{width}x{height}_{solver}_{key:8}_{row}.png"
    assert (
        fill(parse_template(template), request, index=1, row=5, key="ab" * 32)
        == "0001_7_002_1.5_64x32_ddim_abababab_5.png"
    )
    assert fill(parse_template(DEFAULT), request, index=1, row=5, key="ab" * 32) == "000001-abababababababab.png"
