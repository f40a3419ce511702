"""Models and files that the tests of checkpoints share. None of them may use the network."""

import shutil
import socket
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sdlite.checkpoints import folder as folder_module, single_file, untrained
from sdlite.checkpoints.folder import save_folder
from sdlite.checkpoints.parts import ModelParts
from sdlite.checkpoints.single_file import save_single_file
from sdlite.checkpoints.tokenizer import load_tokenizer
from sdlite.checkpoints.untrained import random_model
from sdlite.config import tiny, tiny_dit
from tests.checkpoints.cases import SD2_LIKE

CONFIGS = {"sd1": tiny(), "sd2": SD2_LIKE}


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: object) -> None:
        raise AssertionError("loading must not use the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture(scope="session")
def sd1() -> ModelParts:
    return random_model(tiny(), seed=0)


@pytest.fixture(scope="session")
def saved(sd1: ModelParts, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "model"
    save_folder(sd1, path)
    return path


@pytest.fixture(scope="session")
def original(sd1: ModelParts, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("original") / "model.safetensors"
    save_single_file(sd1, path)
    return path


@pytest.fixture
def one_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reads the vocabulary once, where a test loads the same model many times."""
    tokenizer = load_tokenizer()
    for module in (folder_module, single_file, untrained):
        monkeypatch.setattr(module, "load_tokenizer", lambda folder=None: tokenizer)


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "model"))


@pytest.fixture
def holder(part: str, folder: Path, tmp_path: Path) -> Path:
    """A folder that has the part of the test."""
    if part != "transformer":
        return folder
    save_folder(random_model(tiny_dit(), seed=0), tmp_path / "dit")
    return tmp_path / "dit"


@pytest.fixture(scope="session", params=CONFIGS)
def parts(request: pytest.FixtureRequest) -> ModelParts:
    return random_model(CONFIGS[request.param], seed=3)


@pytest.fixture(scope="session")
def parts_folder(parts: ModelParts, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("folder") / "model"
    save_folder(parts, path)
    return path


@pytest.fixture(scope="session")
def parts_file(parts: ModelParts, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("single") / "model.safetensors"
    save_single_file(parts, path)
    return path


@pytest.fixture
def original_tensors(sd1: ModelParts, tmp_path: Path) -> dict[str, torch.Tensor]:
    save_single_file(sd1, tmp_path / "original.safetensors")
    tensors = load_file(tmp_path / "original.safetensors")
    (tmp_path / "original.safetensors").unlink()
    return tensors
