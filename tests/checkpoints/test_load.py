"""What a name means, and models that go from one form to another: whole or not at all."""

import multiprocessing
import os
import random
import shutil
import signal
import stat
import time
from pathlib import Path

import pytest
import torch

from sdlite import cli
from sdlite.checkpoints import load, weights
from sdlite.checkpoints.folder import save_folder
from sdlite.checkpoints.load import convert, load_model
from sdlite.checkpoints.parts import ModelParts
from sdlite.checkpoints.places import CheckpointError
from sdlite.checkpoints.single_file import save_single_file
from sdlite.checkpoints.untrained import random_model
from sdlite.checkpoints.weights import read_json
from sdlite.config import tiny
from sdlite.files import sweep
from tests.checkpoints.cases import (
    assert_same,
    fake_hub,
    refused,
)


def test_not_a_model(tmp_path: Path, original: Path):
    refused(tmp_path, "not a model folder: model_index.json is missing")
    refused(tmp_path / "nothing" / "here" / "at all", "does not exist")
    refused("", "model is empty")
    shutil.copy(original, tmp_path / "sd.safetensors")
    refused(tmp_path, "did you mean .*sd.safetensors")
    refused(tmp_path, "for single files", ema=True)
    with pytest.raises(CheckpointError, match="is missing"):
        read_json(tmp_path / "none.json")


def test_loading_leaves_no_trace(saved: Path, original: Path):
    state = torch.get_rng_state()
    before = sorted(saved.rglob("*")), sorted(original.parent.iterdir())
    for path in (saved, original):
        load_model(path)
    assert (sorted(saved.rglob("*")), sorted(original.parent.iterdir())) == before
    assert torch.equal(torch.get_rng_state(), state)


def test_a_folder_of_the_name_of_a_preset_comes_first(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    other = random_model(tiny(), seed=5)
    save_folder(other, tmp_path / "tiny")
    monkeypatch.chdir(tmp_path)
    assert load_model("tiny").hash == other.hash


def test_what_to_give_instead(saved: Path, tmp_path: Path):
    refused(saved / "unet", f"it is a part of {saved}, give that")
    snapshot = fake_hub(saved, tmp_path)
    refused(tmp_path / "models--org--name", f"did you mean {snapshot}?")
    with pytest.raises(CheckpointError) as error:
        load_model(tmp_path / "models--org--name" / "snapshots")
    assert "did you mean" not in str(error.value)


def test_a_mistyped_path_does_not_ask_the_hub(saved: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(saved.parent)
    refused("model/unnet", "does not exist; give a model folder")
    refused("models.d/model.ckpt", "does not exist; give a model folder")


def test_we_load_both(parts: ModelParts, parts_folder: Path, parts_file: Path):
    for path in (parts_folder, parts_file):
        loaded = load_model(path)
        assert_same(loaded, parts)
        assert loaded.notes == parts.notes and "untrained" in loaded.notes[0]
        assert not any(p.is_meta for m in (loaded.text, loaded.denoiser, loaded.codec) for p in m.parameters())


def test_both_ways(parts: ModelParts, parts_folder: Path, tmp_path: Path):
    convert(parts_folder, tmp_path / "one.safetensors")
    convert(tmp_path / "one.safetensors", tmp_path / "two")
    assert_same(load_model(tmp_path / "two"), parts)
    before = {file.relative_to(parts_folder): file.read_bytes() for file in parts_folder.rglob("*") if file.is_file()}
    after = {file.relative_to(tmp_path / "two"): file.read_bytes() for file in (tmp_path / "two").rglob("*.*")}
    assert after == before


def test_never_overwrites(sd1: ModelParts, tmp_path: Path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "precious.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="model exists and is not empty; give a new folder"):
        save_folder(sd1, tmp_path / "model")
    (tmp_path / "one.safetensors").write_text("mine")
    with pytest.raises(FileExistsError, match="exists"):
        save_single_file(sd1, tmp_path / "one.safetensors")
    assert (tmp_path / "one.safetensors").read_text() == "mine"
    assert sorted(file.name for file in tmp_path.rglob("*")) == ["model", "one.safetensors", "precious.txt"]
    (tmp_path / "empty").mkdir()
    save_folder(sd1, tmp_path / "empty")
    save_single_file(sd1, tmp_path / "two.safetensors")
    umask = os.umask(0)
    os.umask(umask)
    written = [tmp_path / "two.safetensors", *(path for path in (tmp_path / "empty").rglob("*") if path.is_file())]
    assert {stat.S_IMODE(path.stat().st_mode) for path in written} == {0o666 & ~umask}


def test_convert_leaves_what_is_there_alone(sd1: ModelParts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Also what appears while the model is read, and what a link leads to; known before the model is read."""
    save_folder(sd1, tmp_path / "model")
    (tmp_path / "theirs").write_text("theirs")
    (tmp_path / "link.safetensors").symlink_to(tmp_path / "theirs")
    with pytest.raises(FileExistsError):
        convert(tmp_path / "missing", tmp_path / "link.safetensors")
    with pytest.raises(FileExistsError):
        convert(tmp_path / "missing", tmp_path / "theirs")
    target = tmp_path / "late.safetensors"
    monkeypatch.setattr(load, "read_model", lambda *_, **__: [sd1, target.write_text("theirs")][0])
    with pytest.raises(FileExistsError):
        convert(tmp_path / "model", target)
    assert target.read_text() == (tmp_path / "theirs").read_text() == "theirs"
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "late.safetensors",
        "link.safetensors",
        "model",
        "theirs",
    ]


def test_whole_or_not_at_all(sd1: ModelParts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    calls = []

    def fails_later(tensors: object, path: Path, metadata: object) -> None:
        calls.append(path)
        path.write_bytes(b"half")
        if len(calls) != 1:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(weights, "save_file", fails_later)
    for write, name in ((save_folder, "model"), (save_single_file, "one.safetensors")):
        with pytest.raises(OSError, match="No space left"):
            write(sd1, tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def convert_in_child(parts: ModelParts, target: Path) -> None:
    """The command, with a model that is loaded already: all its time goes into writing."""
    load.read_model = lambda *_, **__: parts  # type: ignore[assignment]
    cli.main(["convert", "tiny", str(target), "-q"])


@pytest.mark.skipif(os.name != "posix", reason="forks")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
@pytest.mark.parametrize("times", [1, pytest.param(100, marks=pytest.mark.slow)])
def test_ended_at_any_time_convert_leaves_all_or_nothing(sd1: ModelParts, tmp_path: Path, number: int, times: int):
    """And nothing beside it, but for a process that was killed: one name, which the next command sweeps away."""
    chance = random.Random(number)
    save_folder(sd1, tmp_path / "whole" / "model")
    save_single_file(sd1, tmp_path / "whole" / "model.safetensors")
    whole = contents(tmp_path / "whole")
    for name in ("model", "model.safetensors"):
        expected = {path: content for path, content in whole.items() if path.parts[0] == name}
        seconds = 0.2
        for i in range(times):
            folder = tmp_path / name / str(i)
            folder.mkdir(parents=True)
            start = time.monotonic()
            child = multiprocessing.get_context("fork").Process(target=convert_in_child, args=(sd1, folder / name))
            child.start()
            if i:  # the first tells how long it takes
                time.sleep(chance.random() * seconds)
                os.kill(child.pid or 0, number)
            child.join()
            seconds = seconds if i else time.monotonic() - start
            assert child.exitcode in (0, 130, -number), child.exitcode
            if number == signal.SIGKILL:
                assert len(list(folder.iterdir())) <= 2
                sweep(folder)
            found = contents(folder)
            assert found in ({}, expected) and (i or found), sorted(found)


def contents(folder: Path) -> dict[Path, tuple[int, bytes]]:
    """Sizes and contents of all files; of safetensors without the header, whose metadata come in any order."""
    found = {}
    for path in [path for path in folder.rglob("*") if path.is_file()]:
        content = path.read_bytes()
        start = 8 + int.from_bytes(content[:8], "little") if path.suffix == ".safetensors" else 0
        found[path.relative_to(folder)] = len(content), content[start:]
    return found
