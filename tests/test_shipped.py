"""The model that ships: found without a name, whole, small, and the same to diffusers."""

import hashlib

import numpy as np
import pytest
import torch

from sdlite.checkpoints.places import SHIPPED, shipped_folder
from sdlite.images.pixels import largest_difference
from sdlite.pipeline import Pipeline
from sdlite.training.evaluation.probes import drawing

LIMIT = 48_000_000  # bytes of all its files
FILE_LIMIT = 16_000_000


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    return Pipeline.load()


def test_it_is_small_and_its_sums_are_right():
    files = [path for path in shipped_folder().rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < LIMIT
    assert max(path.stat().st_size for path in files) < FILE_LIMIT
    lines = (shipped_folder() / "sha256sums.txt").read_text().splitlines()
    assert len(lines) == sum(path.suffix == ".safetensors" for path in files)
    for line in lines:
        digest, name = line.split("  ")
        assert hashlib.sha256((shipped_folder() / name).read_bytes()).hexdigest() == digest


def test_its_card_names_data_licences_and_command():
    card = (shipped_folder() / "README.md").read_text()
    for word in ("CC-BY-4.0", "Apache-2.0", "MIT", "Twemoji", "Noto", "Fluent", "sdlite train"):
        assert word in card


def test_it_is_the_default_and_has_a_name(pipe: Pipeline):
    assert pipe.name == SHIPPED and pipe.default_size == (128, 128)
    assert Pipeline.load(SHIPPED).model_hash == pipe.model_hash
    assert not pipe.notes


def test_a_red_apple_is_red_and_on_white(pipe: Pipeline):
    for picture in pipe("a red apple", num_images=3, steps=20, guidance_scale=3.0):
        pixels = np.asarray(picture, dtype=int)
        inside = pixels[40:88, 40:88].reshape(-1, 3).mean(0)
        assert inside[0] > inside[1:].max() + 60
        assert drawing(pixels.astype(np.uint8)).mean() < 0.8
        assert np.concatenate([pixels[0], pixels[-1]]).mean() > 230


def test_diffusers_draws_the_same(pipe: Pipeline):
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(
        shipped_folder(), safety_checker=None, dtype=torch.float32
    )
    theirs.set_progress_bar_config(disable=True)
    for prompt, seed in (("a red apple, fluent 3d style", 1), ("a blue car", 2)):
        image = theirs(
            prompt, num_inference_steps=8, guidance_scale=4.0, generator=torch.Generator().manual_seed(seed)
        ).images[0]
        (ours,) = pipe(prompt, steps=8, guidance_scale=4.0, seed=seed)
        assert largest_difference(image, ours) <= 1
