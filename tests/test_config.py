"""Options for loading a model: what they accept, and that they fit the functions that take them."""

import inspect
from pathlib import Path

import pytest

from sdlite.checkpoints.load import load_model
from sdlite.config import LoadOptions
from sdlite.pipeline import Pipeline


def test_load_options_are_the_keywords_of_the_loaders():
    options = LoadOptions(model="tiny", device="cpu", vae="tiny", variant="fp16", prediction="v")
    wanted = inspect.signature(Pipeline.load).parameters
    assert set(options.keywords()) == set(wanted) - {"path"}
    assert {name: wanted[name].default for name in options.keywords()} == LoadOptions().keywords()
    assert set(options.file_keywords()) < set(inspect.signature(load_model).parameters)
    assert Pipeline.load("tiny", **LoadOptions(prediction="v").keywords()).denoiser.prediction == "v"


def test_load_options_keep_paths_as_text():
    options = LoadOptions(model=Path("a/b"), vae=Path("c"), allow_links=[Path("/d"), "/e"])
    assert (options.model, options.vae, options.allow_links) == ("a/b", "c", ("/d", "/e"))
    assert LoadOptions(**options.model_dump(mode="json")) == options
    with pytest.raises(ValueError, match=r"^dtype='float8' must be 'auto', 'float32', 'float16' or 'bfloat16'$"):
        LoadOptions(dtype="float8")
    with pytest.raises(ValueError, match="unknown field 'varient'; did you mean 'variant'"):
        LoadOptions(varient="fp16")
