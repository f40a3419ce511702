"""What a picture records about itself: there and back, as Automatic1111 reads and writes it, and hostile texts."""

import json
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings, strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngInfo

import sdlite
from sdlite import images
from sdlite.images import recipe
from sdlite.request import SOLVERS, Request
from tests.test_images import PLAIN, noise_picture, saved, texts

PARAMETER = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')  # Automatic1111's re_param


@given(st.text(max_size=200), st.text(max_size=50), st.integers(0, 2**64 - 1), st.sampled_from([*SOLVERS]))
@settings(max_examples=60, deadline=None)
def test_metadata_round_trip(tmp_path_factory: pytest.TempPathFactory, prompt: str, negative: str, seed: int, solver):
    request = Request(prompt=prompt, negative_prompt=negative, seed=seed, solver=solver, guidance_scale=0.1 + 0.2)
    path = tmp_path_factory.mktemp("round") / "a.png"
    found = images.read_metadata(saved(path, request))
    assert found.request == request.replace(width=64, height=48)
    assert (found.model, found.model_hash) == ("toy", "0123456789abcdef")
    assert found.versions["sdlite"] == sdlite.__version__ and found.versions["torch"] == torch.__version__


@pytest.mark.parametrize("prompt", ["a, b: c", "two\nlines", "Ünïcode 猫 🐈", "Steps: 1, Seed: 2, Size: 3x3", ""])
def test_automatic1111_reads_the_parameters(tmp_path: Path, prompt: str):
    request = Request(prompt=prompt, negative_prompt="blurry, bad", seed=7, clip_skip=1, solver="dpmpp_2m_karras")
    with Image.open(saved(tmp_path / "a.png", request, model='odd, "name": x')) as picture:
        *lines, last = picture.text["parameters"].split("\n")
    found = PARAMETER.findall(last)
    values = {key: json.loads(value) if value.startswith('"') else value for key, value in found}
    assert "\n".join(lines) == f"{prompt}\nNegative prompt: blurry, bad"
    assert values == {
        "Steps": "20",
        "Sampler": "DPM++ 2M",
        "Schedule type": "Karras",
        "CFG scale": "5.0",
        "Seed": "7",
        "Size": "64x48",
        "Model hash": "0123456789",
        "Model": 'odd, "name": x',
        "Clip skip": "2",
        "RNG": "CPU",
        "Version": f"sdlite-{sdlite.__version__}",
    }


def test_metadata_names_no_path():
    source = images.digest(noise_picture(4, 4))
    request = PLAIN.replace(image="/home/someone/cat.png", mask=source)
    found = texts(request, model="/home/someone/models/toy/")
    assert "someone" not in str(found) and "Denoising strength: 0.8" in found["parameters"]
    written = json.loads(found["sdlite"])
    assert (written["model"], written["request"]["mask"]) == ("toy", source)
    assert written["request"]["image"] == recipe.UNKNOWN_SOURCE


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "null",
        "[" * 100_000,
        "9" * 10_000,
        '{"request": {"prompt": "x", "code": "import os"}}',
        '{"request": {"prompt": "x", "steps": 1000000000}, "model": "", "model_hash": "", "versions": {}}',
        '{"request": {"prompt": "x", "guidance_scale": NaN}, "model": "", "model_hash": "", "versions": {}}',
        '{"request": {"prompt": "x"}, "model": "", "model_hash": "../..", "versions": {}}',
        '{"request": {"prompt": "x"}, "model": "", "model_hash": "", "versions": {"os": "1"}}',
        '{"request": {"prompt": {"a": 1}}, "model": "", "model_hash": "", "versions": {}}',
        '{"self": 1, "request": {"prompt": "x", "self": 2}}',
        "x" * (recipe.MAX_CHARS + 1),
    ],
    ids=range(13),
)
def test_hostile_metadata_is_one_line_error(tmp_path: Path, text: str):
    info = PngInfo()
    info.add_text("sdlite", text)
    noise_picture(4, 4).save(tmp_path / "a.png", pnginfo=info)
    with pytest.raises(ValueError, match="broken sdlite metadata") as fault:
        images.read_metadata(tmp_path / "a.png")
    assert "\n" not in str(fault.value) and len(str(fault.value)) < 500


A1111 = """a fox, (red:1.2)
in snow
Negative prompt: blurry
Steps: 30, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 6.5, Seed: 123, Size: 512x768, Model hash: 6ce0161689, \
Model: v1-5, Clip skip: 2, Version: v1.10.1"""


def test_automatic1111s_text_is_read():
    found = recipe.parse_a1111(A1111).recipe
    assert found.request == Request(
        prompt="a fox, (red:1.2)\nin snow",
        negative_prompt="blurry",
        steps=30,
        solver="dpmpp_2m_karras",
        guidance_scale=6.5,
        seed=123,
        width=512,
        height=768,
        clip_skip=1,
    )
    assert (found.model, found.model_hash, found.prediction) == ("v1-5", "6ce0161689", None)


@pytest.mark.parametrize(
    ("sampler", "solver"),
    [
        ("Euler a", "euler_a"),
        ("Euler", "euler"),
        ("DPM++ 2M Karras", "dpmpp_2m_karras"),
        ("DPM++ 2M, Schedule type: Uniform", "dpmpp_2m"),
        ("PLMS", "pndm"),
        ("UniPC", "unipc"),
        ("DDIM", "ddim"),
        ("LCM", "lcm"),
        ("DPM++ SDE Karras", "euler_a"),
        ("Heun", "dpmpp_2m"),
    ],
)
def test_automatic1111s_samplers(sampler: str, solver: str):
    found = recipe.parse_a1111(f"x\nSteps: 3, Sampler: {sampler}, Seed: 1")
    assert found.recipe.request.solver == solver
    assert ("--set solver=NAME" in found.notes[0]) == (sampler in ("DPM++ SDE Karras", "Heun"))


def test_automatic1111s_pictures_that_were_started_from_others():
    line = "Steps: 3, Sampler: DDIM, Seed: 1, Denoising strength: 0.6"
    assert recipe.parse_a1111(line).recipe.request == Request(
        prompt="", steps=3, seed=1, strength=0.6, image=recipe.UNKNOWN_SOURCE
    )
    painted = recipe.parse_a1111(f"{line}, Mask blur: 2").recipe.request
    assert (painted.mask, painted.mask_blur) == (recipe.UNKNOWN_SOURCE, 2)
    assert recipe.parse_a1111(f"{line}, Hires upscale: 2").recipe.request.image is None


@pytest.mark.parametrize("solver", SOLVERS)
def test_our_own_text_is_read_as_automatic1111s(solver: str):
    request = Request(prompt="a, b\nc", negative_prompt="d: e", solver=solver, seed=9, width=64, height=48)
    assert recipe.parse_a1111(texts(request)["parameters"]).recipe.request == request


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a fox", "no line of settings"),
        ("", "no line of settings"),
        ("x" * (recipe.MAX_CHARS + 1), "larger than 1 MiB"),
        ("x\nSteps: 0, Sampler: DDIM, Seed: 1", "steps='0'"),
        ("x\nSteps: 9, Sampler: DDIM, Seed: -1", "seed='-1'"),
        ("x\nSteps: 9, Sampler: DDIM, Size: 1e9x64", "width='1e9'"),
        ("x\nSteps: 9, Sampler: DDIM, CFG scale: nan", "guidance_scale="),
    ],
)
def test_hostile_text_of_automatic1111_is_one_line_error(text: str, reason: str):
    with pytest.raises(ValueError, match=re.escape(reason)) as fault:
        recipe.parse_a1111(text)
    assert "\n" not in str(fault.value)


@given(st.text(max_size=300))
@settings(max_examples=50, deadline=None)
def test_any_text_is_a_recipe_or_one_line(text: str):
    for read in (recipe.parse_a1111, recipe.parse_recipe):
        try:
            read(f"{text}\nSteps: {text}, Seed: 1, Clip skip: {text}, Size: {text}, Model: {text}")
        except ValueError as fault:
            assert len(str(fault).splitlines()) <= 1


def test_what_was_drawn_before_pasting_is_still_as_it_was():
    """Its metadata has no word of pasting, and nothing was pasted."""
    source = images.digest(noise_picture(4, 4))
    request = PLAIN.replace(image=source, mask=source)
    old = json.loads(texts(request)["sdlite"])
    assert (old["request"].pop("paste"), old["request"].pop("mask_blur")) == (True, 4)
    assert recipe.parse_recipe(json.dumps(old)).request == request.replace(paste=False, width=64, height=48)
    assert "paste" not in json.loads(texts()["sdlite"])["request"]
