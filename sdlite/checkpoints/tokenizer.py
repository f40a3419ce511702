"""CLIP's tokenizer, a byte-level BPE: from files as data, and to files. Nothing that a file names is run or fetched."""

import gzip
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import CLIPTokenizer

from sdlite.files import read_json, read_text

BOS, EOS = "<|startoftext|>", "<|endoftext|>"
MAX_FILE_BYTES = 16 * 2**20  # of one tokenizer file; CLIP's largest has 2 MB
MAX_ID = 2**31  # of a token; the tokenizers library counts in 32 bits
# The 48,894 merges of OpenAI's bpe_simple_vocab_16e6.txt that CLIP uses, from open_clip_torch 3.3.0 (MIT).
MERGES_FILE = Path(__file__).with_name("clip_merges.txt.gz")


def load_tokenizer(folder: Path | None = None) -> CLIPTokenizer:
    """CLIP's tokenizer from a folder, or with None the standard one, built from the merges that ship with the package.

    Reads vocab.json and merges.txt, or tokenizer.json, and of the settings only the name of the pad token. Raises
    FileNotFoundError or a ValueError that names the file.
    """
    if folder is None:
        vocab, merges = standard_vocabulary()
        return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=77)
    vocab, merges = read_vocabulary(folder)
    pad = _pad_token(folder)
    if missing := [name for name in (BOS, EOS, pad) if name not in vocab]:
        raise ValueError(f"{folder}: the tokenizer's vocabulary has no {missing[0]!r:.80}, so it is not CLIP's")
    try:
        return CLIPTokenizer(vocab=vocab, merges=merges, pad_token=pad, model_max_length=77)
    except Exception as error:  # the tokenizers package raises bare Exception
        raise ValueError(f"{folder}: merges and vocabulary do not fit: {' '.join(str(error).split()):.200}") from None


def standard_vocabulary() -> tuple[dict[str, int], list[tuple[str, ...]]]:
    """CLIP's 49,408 tokens: 256 bytes, the same at the end of a word, one per merge, BOS and EOS.

    A byte is written as its own character where that is printable and not a space, else as the next from chr(256) on.
    Source: github.com/openai/CLIP, clip/simple_tokenizer.py.
    """
    merges = _parse_merges(gzip.decompress(MERGES_FILE.read_bytes()).decode())
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    symbols = [chr(code) for code in (*printable, *range(256, 512 - len(printable)))]
    words = [*symbols, *(f"{symbol}</w>" for symbol in symbols), *("".join(pair) for pair in merges), BOS, EOS]
    return {word: i for i, word in enumerate(words)}, merges


def _parse_merges(text: str) -> list[tuple[str, ...]]:
    """Pairs of merges.txt, one a line after an optional version line."""
    lines = text.split("\n")
    return [tuple(line.split()) for line in lines[lines[0].startswith("#version") :] if line.strip()]


def read_vocabulary(folder: Path) -> tuple[dict[str, int], list[tuple[str, ...]]]:
    """Ids of tokens, and merges in order, from vocab.json and merges.txt, or else from tokenizer.json."""
    if (folder / "vocab.json").is_file():
        source = folder / "vocab.json"
        vocab: Any = read_json(source, MAX_FILE_BYTES)
        merges: Any = _parse_merges(read_text(folder / "merges.txt", MAX_FILE_BYTES))
    else:
        if not (source := folder / "tokenizer.json").is_file():
            raise FileNotFoundError(f"{folder}: no tokenizer; it needs vocab.json and merges.txt, or tokenizer.json")
        model = read_json(source, MAX_FILE_BYTES).get("model")
        if not isinstance(model, dict) or not isinstance(model.get("merges"), list):
            raise ValueError(f"{source}: no BPE model in it")
        vocab = model.get("vocab")
        merges = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
    ids = list(vocab.values()) if isinstance(vocab, dict) else []
    if not ids or not all(type(i) is int and 0 <= i < MAX_ID for i in ids) or len(set(ids)) < len(ids):
        raise ValueError(f"{source}: must map tokens to ids, each id once")
    for pair in merges:
        if not isinstance(pair, list | tuple) or len(pair) != 2 or not all(isinstance(part, str) for part in pair):
            raise ValueError(f"{source}: merge {pair!r:.80} must be a pair of tokens")
    _refuse_learned_tokens(folder, vocab)
    return vocab, [tuple(pair) for pair in merges]


def _refuse_learned_tokens(folder: Path, vocab: Mapping[str, int]) -> None:
    """Raises ValueError for added tokens (textual inversion): the BPE would split their names into letters."""
    added, settings, whole = _settings(folder, "added_tokens.json", "tokenizer_config.json", "tokenizer.json")
    decoder = settings.get("added_tokens_decoder")
    if not isinstance(more := whole.get("added_tokens") or [], list):
        raise ValueError(f"{folder / 'tokenizer.json'}: added_tokens={more!r:.80} must be a list")
    entries = [*(decoder.values() if isinstance(decoder, dict) else ()), *more]
    names = [*added, *(str(entry.get("content")) for entry in entries if isinstance(entry, dict))]
    if learned := [name for name in names if name not in vocab]:
        advice = "which sdlite does not read; give the tokenizer of the model that they were added to"
        raise ValueError(f"{folder}: has learned tokens ({learned[0]!r:.40}), {advice}")


def _pad_token(folder: Path) -> str:
    """special_tokens_map.json wins without added_tokens_decoder, as in transformers; SD2 needs that."""
    settings, names = _settings(folder, "tokenizer_config.json", "special_tokens_map.json")
    pad = (settings if "added_tokens_decoder" in settings else settings | names).get("pad_token") or EOS
    return str(pad.get("content") if isinstance(pad, dict) else pad)


def _settings(folder: Path, *names: str) -> list[dict[str, Any]]:
    """The JSON object of each file, an empty one for a file that is missing."""
    return [read_json(folder / name, MAX_FILE_BYTES) if (folder / name).is_file() else {} for name in names]


def save_tokenizer(tokenizer: CLIPTokenizer, folder: Path) -> None:
    """Writes the four files that CLIPTokenizer.from_pretrained reads, in any release of transformers."""
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    names = {f"{name}_token": getattr(tokenizer, f"{name}_token") for name in ("bos", "eos", "unk", "pad")}
    settings = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": tokenizer.model_max_length,
        "do_lower_case": True,
        "add_prefix_space": False,
        "errors": "replace",
    }
    files = {
        "vocab.json": json.dumps(model["vocab"], ensure_ascii=False),
        "merges.txt": "\n".join(["#version: 0.2", *(" ".join(pair) for pair in model["merges"]), ""]),
        "tokenizer_config.json": json.dumps(settings | names, indent=2),
        "special_tokens_map.json": json.dumps(names, indent=2),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8", newline="\n")
