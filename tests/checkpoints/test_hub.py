"""Models from the hub, without a network."""

import fnmatch
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from sdlite.checkpoints import hub
from sdlite.checkpoints.load import load_model
from sdlite.checkpoints.parts import ModelParts
from sdlite.checkpoints.places import is_hub_id
from tests.checkpoints.cases import (
    PART_FILES,
    fake_hub,
    refused,
)


def test_hub(saved: Path, tmp_path: Path, sd1: ModelParts, monkeypatch: pytest.MonkeyPatch):
    snapshot, calls = fake_hub(saved, tmp_path), []

    def snapshot_download(name: str, **options: Any) -> str:
        calls.append((name, options))
        return str(snapshot)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    loaded = load_model("org/name")
    assert (loaded.hash, loaded.name) == (sd1.hash, "org/name")
    (call,) = calls
    assert call[0] == "org/name"
    assert {pattern.rsplit(".", 1)[1] for pattern in call[1]["allow_patterns"]} == {"json", "txt", "safetensors"}
    monkeypatch.setattr(hub, "UNWANTED", ([], []))
    assert is_hub_id("org/name.v1") and not is_hub_id("org/name.ckpt") and not is_hub_id("./name")
    assert not is_hub_id("../name") and not is_hub_id("a/b/c") and not is_hub_id("folder/x.safetensors")


def test_a_variant_from_the_hub(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Its weights and, of parts that have none such, the plain ones; never both, which would be gigabytes more."""
    hub_files = Path(shutil.copytree(saved, tmp_path / "hub"))
    plain = hub_files / PART_FILES["unet"]
    save_file(load_file(plain), plain.with_name("diffusion_pytorch_model.bf16.safetensors"), {"format": "pt"})
    cache = tmp_path / "cache"

    def snapshot_download(name: str, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
        for file in [file for file in hub_files.rglob("*") if file.is_file()]:
            path = file.relative_to(hub_files)
            chosen = [any(fnmatch.fnmatch(str(path), p) for p in ps) for ps in (allow_patterns, ignore_patterns)]
            if chosen == [True, False]:
                (cache / path).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, cache / path)
        return str(cache)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    load_model("org/name", variant="bf16")
    fetched = {str(path.relative_to(cache)) for path in cache.rglob("*.safetensors")}
    assert fetched == {
        "unet/diffusion_pytorch_model.bf16.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
        "text_encoder/model.safetensors",
    }
    shutil.rmtree(cache)
    refused("org/name", "has no weights of variant 'ema'", variant="ema")
    assert not list(cache.rglob("*.safetensors"))


def test_hub_offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    refused("some-org/some-model-that-is-nowhere", "the hub did not give it")
