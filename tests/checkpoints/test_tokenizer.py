"""The shipped vocabulary and tokenizer folders, against transformers' own loading of the same files."""

import json
import socket

import pytest
from transformers import CLIPTokenizer

from sdlite.checkpoints.tokenizer import load_tokenizer, save_tokenizer

CORPUS = [
    "a photo of a cat",
    "It's the dog's 3rd bone, isn't it? We'll've should've",
    "Ünïcödé ÇAFÉ naïve e\u0301",
    "日本語のテキスト, नमस्ते, Привет, مرحبا",
    "😀👩\u200d👩\u200d👧 ok 🇫🇷",
    "12345 67.8 ½ ² Ⅷ",
    "  lots \t of\nspace \u00a0 ",
    "ß İ ı ﬁ &amp; <b>bold</b>",
    "“quotes” — dash… 'single' ''double''",
    "a?b.. ,,, (x:1.2) [y] {z} \\",
    "x" * 300,
    "",
]


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer()


def ids(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [  # as published for CLIP ViT-L/14
        ("a photo of a cat", [320, 1125, 539, 320, 2368]),
        ("hello world!", [3306, 1002, 256]),
        (",", [267]),
    ],
)
def test_known_ids(tokenizer, text, expected):
    assert ids(tokenizer, text) == expected


def test_standard_size_and_special_ids(tokenizer):
    assert len(tokenizer) == 49_408
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (49_406, 49_407, 49_407)


@pytest.mark.parametrize("pad", ["<|endoftext|>", "!"])
def test_saved_folder_is_what_transformers_loads(tokenizer, tmp_path, pad):
    mine = load_tokenizer()
    mine.pad_token = pad
    save_tokenizer(mine, tmp_path)
    theirs = CLIPTokenizer.from_pretrained(tmp_path, local_files_only=True)
    again = load_tokenizer(tmp_path)
    assert theirs.pad_token == again.pad_token == pad
    assert theirs.model_max_length == 77
    for text in CORPUS:
        assert ids(tokenizer, text) == ids(theirs, text) == ids(again, text)


def test_folder_with_only_tokenizer_json(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    assert not (tmp_path / "vocab.json").exists()
    again = load_tokenizer(tmp_path)
    for text in CORPUS:
        assert ids(tokenizer, text) == ids(again, text)


def test_pad_token_of_sd2_folders_is_the_special_tokens_map_s(tokenizer, tmp_path):
    save_tokenizer(tokenizer, tmp_path)
    names = {"pad_token": {"content": "!", "lstrip": False, "normalized": False, "rstrip": False, "single_word": False}}
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(names))
    assert load_tokenizer(tmp_path).pad_token_id == CLIPTokenizer.from_pretrained(tmp_path).pad_token_id == 0


def test_settings_cannot_run_or_fetch_anything(tokenizer, tmp_path, monkeypatch):
    def refuse(*_args):
        raise AssertionError("the network was used")

    save_tokenizer(tokenizer, tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "Evil",
                "auto_map": {"AutoTokenizer": ["owner/repo--evil.Evil", None]},
                "vocab": "https://example.org/vocab.json",
                "tokenizer_file": "../elsewhere.json",
            }
        )
    )
    monkeypatch.setattr(socket.socket, "connect", refuse)
    assert ids(load_tokenizer(tmp_path), "a cat") == [320, 2368]


def rewrite(name, change):
    def spoil(folder):
        content = json.loads((folder / name).read_text(encoding="utf-8"))
        (folder / name).write_text(json.dumps(change(content)), encoding="utf-8")

    return spoil


def write(name, text):
    return lambda folder: (folder / name).write_text(text, encoding="utf-8")


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (lambda folder: (folder / "merges.txt").unlink(), FileNotFoundError, "merges.txt is missing"),
        (lambda folder: (folder / "vocab.json").unlink(), FileNotFoundError, "no tokenizer"),
        (write("vocab.json", "{"), ValueError, "vocab.json: not JSON"),
        (write("vocab.json", "[" * 100_000), ValueError, "vocab.json: nested deeper"),
        (write("vocab.json", "[1]"), ValueError, "vocab.json: not a JSON object"),
        (write("tokenizer.json", '{"added_tokens": 5}'), ValueError, "added_tokens=5 must be a list"),
        (write("tokenizer.json", '{"added_tokens": [{"content": ["a"]}]}'), ValueError, "has learned tokens"),
        (rewrite("vocab.json", lambda vocab: vocab | {"a": 2**40}), ValueError, "each id once"),
        (lambda folder: (folder / "merges.txt").write_bytes(b"\xff"), ValueError, "merges.txt: not UTF-8"),
        (rewrite("vocab.json", lambda vocab: vocab | {"a": 1}), ValueError, "each id once"),
        (rewrite("vocab.json", lambda vocab: vocab | {"a": [1]}), ValueError, "each id once"),
        (rewrite("vocab.json", lambda vocab: vocab | {"a": -1}), ValueError, "each id once"),
        (rewrite("vocab.json", lambda vocab: {k: i for k, i in vocab.items() if i < 49_407}), ValueError, "endoftext"),
        (rewrite("tokenizer_config.json", lambda config: config | {"pad_token": "no such"}), ValueError, "'no such'"),
        (write("merges.txt", "#version: 0.2\nnot a pair\n"), ValueError, "must be a pair"),
        (write("merges.txt", "#version: 0.2\nqqqq zzzz\n"), ValueError, "do not fit"),
    ],
)
def test_errors_name_the_file(tokenizer, tmp_path, spoil, error, message):
    save_tokenizer(tokenizer, tmp_path)
    (tmp_path / "special_tokens_map.json").unlink()
    spoil(tmp_path)
    with pytest.raises(error, match=message) as caught:
        load_tokenizer(tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_learned_tokens_are_refused_and_not_read_as_letters(tmp_path):
    save_tokenizer(load_tokenizer(), tmp_path)
    (tmp_path / "added_tokens.json").write_text('{"<cat-toy>": 49408}')
    with pytest.raises(ValueError, match=r"has learned tokens \('<cat-toy>'\)"):
        load_tokenizer(tmp_path)
