"""CLIP's tokenizer from files and to files."""

import json
from pathlib import Path

from transformers import CLIPTokenizer

from sdlite.checkpoints.vocabulary import BOS, EOS, read_pad_token, read_vocabulary, standard_vocabulary


def load_tokenizer(folder: Path | None = None) -> CLIPTokenizer:
    """CLIP's byte-level BPE tokenizer from a folder, or with None the standard one, which ships with the package.

    Reads vocab.json and merges.txt, or tokenizer.json, as data, and of the settings the name of the pad token alone:
    nothing that a file names is run or fetched. Raises FileNotFoundError or a ValueError that names the file.
    """
    if folder is None:
        vocab, merges = standard_vocabulary()
        return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=77)
    vocab, merges = read_vocabulary(folder)
    pad = read_pad_token(folder)
    if missing := [name for name in (BOS, EOS, pad) if name not in vocab]:
        raise ValueError(f"{folder}: the tokenizer's vocabulary has no {missing[0]!r:.80}, so it is not CLIP's")
    try:
        return CLIPTokenizer(vocab=vocab, merges=merges, pad_token=pad, model_max_length=77)
    except Exception as error:  # the tokenizers package raises bare Exception
        cause = " ".join(str(error).split())
        raise ValueError(f"{folder}: merges and vocabulary do not fit: {cause:.200}") from None


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
