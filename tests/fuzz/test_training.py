"""Data folders and training runs with hostile changes."""

import json
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import save

from sdlite.config import AutoencoderKLConfig
from sdlite.models.codec import LatentCodec
from sdlite.training import run
from sdlite.training.codec import emoji_codec
from sdlite.training.datasets.folder import caption_notes, fingerprints, read_records
from sdlite.training.datasets.pixels import fit_notes, load_pixels
from sdlite.training.exports import built, read_config
from tests.fuzz.rule import Choices, changed, edited, fuzz, hold

RECORD = {"file_name": "a.png", "text": "a disc", "concept": "disc", "style": "flat", "keywords": ["round"], "n": 1}
TENSORS = {f"{part}.w": torch.arange(4.0) for part in ("model", "ema", "optimizer.0")}
SHAPES: dict[str, tuple[int, ...]] = {"model.w": (4,), "ema.w": (4,)}


def test_data_folders(folder: Path, examples: int):
    Image.new("RGB", (4, 3)).save(folder / "a.png")

    def read() -> None:
        records = read_records(folder)
        fingerprints(folder, records)
        load_pixels(folder, records[:2], 8)
        caption_notes(folder), fit_notes(folder, records[:2], "crop")

    def check(choices: Choices) -> None:
        record = changed(RECORD, choices)
        for path in (folder / "metadata.jsonl", folder / "metadata.csv", folder / "a.txt"):
            path.unlink(missing_ok=True)
        kind = choices.one_of(("metadata.jsonl", "metadata.csv", "a.txt"))
        lines = [json.dumps(RECORD), "", json.dumps(record)]
        if kind == "metadata.csv":
            lines = [",".join(RECORD), *(",".join(map(str, fields.values())) for fields in (RECORD, record))]
        text = "\n".join(lines).encode(errors="surrogatepass")
        (folder / kind).write_bytes(edited(text, choices))
        hold(read, folder)

    fuzz(check, examples)


def test_runs(folder: Path, examples: int):
    settings: dict[str, Any] = {"lr": 0.1, "seed": 0, "data": "a", "network": {"depth": 2, "widths": [8, 8]}}
    checkpoint = folder / "state-0000000008"
    checkpoint.mkdir()
    shard = save(TENSORS)
    stated = {"samples": 8, "tensors": 3}

    def check(choices: Choices) -> None:
        contents = {
            folder / "config.json": json.dumps(changed(settings, choices)).encode(),
            checkpoint / "state.json": json.dumps(changed(stated, choices)).encode(),
            checkpoint / "state-00000.safetensors": shard,
        }
        damaged = choices.one_of(list(contents))
        for path, content in contents.items():
            path.write_bytes(edited(content, choices) if path == damaged else content)
        hold(lambda: run.changes(folder, settings, new_data=False), folder)
        hold(lambda: run.read_checkpoint(checkpoint, SHAPES), folder)

    fuzz(check, examples)


def test_exports(folder: Path, examples: int):
    config = emoji_codec(64).model_dump(mode="json")
    path = folder / "codec.json"

    def read() -> None:
        found = read_config(AutoencoderKLConfig, path)
        if found != emoji_codec(64):
            built(lambda: LatentCodec(found), path)

    def check(choices: Choices) -> None:
        path.write_bytes(edited(json.dumps(changed(config, choices)).encode(), choices))
        hold(read, folder)

    fuzz(check, examples)
