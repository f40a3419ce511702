"""The records of options: what a resumed run may change, what becomes a flag, and that no torch is needed for it."""

import subprocess
import sys

import pytest

from sdlite.request import Request
from sdlite.training.options import (
    INTERNAL,
    OPTIONS,
    CodecOptions,
    DenoiserOptions,
    EvaluationOptions,
    TrainConfig,
    options_of,
)
from sdlite.training.run import FORGOTTEN, LOGGED


def test_what_a_resumed_run_may_change_is_as_in_older_versions():
    free = {"minutes", "report_every", "save_minutes", "show_minutes", "show_samples", "plot", "new_data"}
    logged = {"batch_size", "lr", "warmup", "decay", "samples", "weight_decay", "half_life", "clip", "precision"}
    assert (free, logged) == (FORGOTTEN, LOGGED)
    assert TrainConfig.model_fields.keys() - FORGOTTEN - LOGGED == {"optimizer", "seed"}
    for record in OPTIONS.values():
        assert record().settings().keys() == TrainConfig.model_fields.keys()  # parts and data are the task's to state


def test_fields_with_a_description_are_the_flags():
    assert {
        *("report_every", "warmup", "weight_decay", "half_life", "clip"),
        *("cropped", "phrases", "views", "terms"),
    } == INTERNAL


def test_a_flag_of_another_stage_and_a_wrong_value_are_refused_in_a_line():
    for stage, fields, fault in (
        (
            "codec",
            {"text": "a", "arch": "dit"},
            "--text is for denoiser, --arch is for denoiser and segmentation; leave",
        ),
        ("codec", {"fit": "bucket"}, "fit='bucket' must be 'crop' or 'pad'"),
        ("denoiser", {"learning_rate": 1}, "unknown field 'learning_rate'"),
        ("segmentation", {"class_weights": "1,a"}, "class_weights='1,a' must be numbers with commas between them"),
    ):
        with pytest.raises(ValueError, match=fault):
            options_of(stage, fields)
    assert options_of("segmentation", {"class_weights": "1,2.5"}).class_weights == (1, 2.5)
    assert options_of("codec", {"lr": None}) == CodecOptions()
    assert DenoiserOptions(min_snr_gamma=0).min_snr_gamma is None


def test_an_evaluation_has_the_bounds_of_a_request():
    for name, wrong in {"steps": 0, "guidance_scale": -1}.items():
        with pytest.raises(ValueError, match=f"{name}={wrong} must be"):
            EvaluationOptions(**{name: wrong})
    for name in ("steps", "guidance_scale"):
        assert EvaluationOptions.model_fields[name].metadata == Request.model_fields[name].metadata


def test_options_load_no_torch():
    code = "import sys, sdlite.training.options; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"


def test_the_name_of_version_0_1_still_works():
    import sdlite

    assert sdlite.train is sdlite.training and sdlite.train.options is sys.modules["sdlite.training.options"]
