"""Model files with hostile changes: safetensors, every kind of JSON, tokenizers, lists of shards."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sdlite.checkpoints import configs, sd_names, single_file
from sdlite.checkpoints.folder import open_part
from sdlite.checkpoints.tokenizer import load_tokenizer, standard_vocabulary
from sdlite.checkpoints.weights import open_safetensors, read_json
from sdlite.config import sd15, tiny, tiny_dit
from tests.fuzz.rule import Choices, changed, edited, fuzz, hold

FILES = configs.to_diffusers(sd15()) | {
    name: content for name, content in configs.to_diffusers(tiny_dit()).items() if name.startswith("transformer")
}
IDS = {"bos_token_id": 49406, "eos_token_id": 49407, "pad_token_id": 49407}
READERS: dict[str, Callable[[dict[str, Any], str], object]] = {
    "model_index.json": configs.check_model_index,
    "unet/config.json": lambda config, where: configs.denoiser_config("unet", config, "v", where),
    "transformer/config.json": lambda config, where: configs.denoiser_config("transformer", config, "v", where),
    "vae/config.json": configs.codec_config,
    "text_encoder/config.json": lambda config, where: configs.text_config(config, IDS, where),
    "scheduler/scheduler_config.json": configs.schedule_config,
}
HEADER: dict[str, Any] = {
    "__metadata__": {"format": "pt", "modelspec.title": "x", single_file.CONFIG_KEY: tiny().model_dump_json()},
    "model.diffusion_model.input_blocks.0.0.weight": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]},
    "first_stage_model.quant_conv.bias": {"dtype": "F16", "shape": [4], "data_offsets": [16, 24]},
    "alphas_cumprod": {"dtype": "F64", "shape": [1], "data_offsets": [24, 32]},
    "ids": {"dtype": "I64", "shape": [], "data_offsets": [32, 40]},
}


def safetensors(header: dict[str, Any], size: int = 40) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(size)


def test_safetensors(folder: Path, examples: int):
    path = folder / "model.safetensors"

    def read() -> None:
        weights = open_safetensors(path)
        weights.read(weights.shapes)
        keys = {sd_names.canonical(key): key for key in weights.shapes}
        config, stated, _ = single_file.find_config(path, weights, keys, None)
        single_file.find_prediction(path, weights, keys, config, stated)

    def check(choices: Choices) -> None:
        path.write_bytes(edited(safetensors(changed(HEADER, choices)), choices))
        hold(read, folder)

    fuzz(check, examples)


def test_configs(folder: Path, examples: int):
    path = folder / "config.json"
    names = sorted(READERS)

    def check(choices: Choices) -> None:
        name = choices.one_of(names)
        path.write_bytes(edited(json.dumps(changed(FILES[name], choices)).encode(), choices))
        hold(lambda: READERS[name](read_json(path), str(path)), folder)

    fuzz(check, examples)


def test_tokenizers(folder: Path, examples: int):
    whole, merges = standard_vocabulary()
    words = [*list(whole)[:40], "".join(merges[0]), *list(whole)[-2:]]
    vocab = {word: i for i, word in enumerate(words)}
    pairs = [" ".join(merges[0])]
    contents: dict[str, Any] = {
        "tokenizer_config.json": {"pad_token": words[-1], "added_tokens_decoder": {"42": {"content": words[-1]}}},
        "special_tokens_map.json": {"pad_token": {"content": words[-1]}},
        "tokenizer.json": {"model": {"vocab": vocab, "merges": pairs}, "added_tokens": [{"content": words[-1]}]},
        "vocab.json": vocab,
        "added_tokens.json": {words[0]: 0},
    }
    texts = {name: json.dumps(content).encode() for name, content in contents.items()}
    texts["merges.txt"] = "\n".join(["#version: 0.2", *pairs, ""]).encode()
    names = sorted(texts)

    def check(choices: Choices) -> None:
        name = choices.one_of(names)
        for other, text in texts.items():
            (folder / other).write_bytes(text)
        if choices.number(2):
            (folder / "vocab.json").unlink()
        text = json.dumps(changed(contents[name], choices)).encode() if name in contents else texts[name]
        (folder / name).write_bytes(edited(text, choices))
        hold(lambda: load_tokenizer(folder), folder)

    fuzz(check, examples)


def test_lists_of_shards(folder: Path, examples: int):
    """And of variants: what lies in a part's folder."""
    index, shard = folder / "model.safetensors.index.json", folder / "model-1.safetensors"
    names = [name for name in HEADER if name != "__metadata__"]
    content = {"metadata": {"total_size": 40}, "weight_map": dict.fromkeys(names, shard.name)}

    def read() -> None:
        weights = open_part(folder, "fp16", stem="model")
        weights.read(weights.shapes)

    def check(choices: Choices) -> None:
        shard.write_bytes(safetensors(changed(HEADER, choices)))
        index.write_bytes(edited(json.dumps(changed(content, choices)).encode(), choices))
        hold(read, folder)

    fuzz(check, examples)
