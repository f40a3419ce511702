"""The text encoder against transformers and diffusers on the same weights, and the properties of its context."""

import json
from functools import cache
from types import SimpleNamespace

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import save_file
from transformers import CLIPTextModel, CLIPTokenizer

from sdlite.checkpoints.tokenizer import load_tokenizer, save_tokenizer
from sdlite.config import TextConfig
from sdlite.models import text as text_module
from sdlite.models.text import MAX_CHUNKS, TextEncoder, emphasize, saved_text_state_dict, text_state_dict

CONFIGS = {
    "sd1": TextConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2),
    "sd2": TextConfig(
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=3,
        hidden_act="gelu",
        pad_token_id=0,
    ),
}
PROMPTS = ["", "a photo of a cat", "Ünïcödé 😀, it's 3 o'clock: fine", "cat " * 75]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """On tensors this small a second thread only waits, above all on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@cache
def tokenizer_for(pad_token_id):
    """A tokenizer of its own for each pad token, which the encoder sets; loading one is most of a test's time."""
    return load_tokenizer()


def make_encoder(config):
    torch.manual_seed(0)
    encoder = TextEncoder(config, tokenizer_for(config.pad_token_id))
    with torch.no_grad():
        for weight in encoder.parameters():  # norms too, else every mean is 0
            weight.add_(torch.randn_like(weight) * 0.2)
    return encoder


@pytest.fixture(scope="module", params=CONFIGS)
def encoder(request):
    return make_encoder(CONFIGS[request.param])


@pytest.fixture(scope="module")
def sd1():
    return make_encoder(CONFIGS["sd1"])


@pytest.fixture(scope="module")
def reference(encoder, tmp_path_factory):
    """What diffusers would load from a model folder: weights under the old names, the config of real folders."""
    folder = tmp_path_factory.mktemp("model")
    fields = encoder.config.model_dump() | {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1}
    (folder / "config.json").write_text(json.dumps(fields | {"model_type": "clip_text_model"}))
    weights = saved_text_state_dict(encoder.model.state_dict())
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    save_tokenizer(encoder.tokenizer, folder / "tokenizer")
    model = CLIPTextModel.from_pretrained(folder, local_files_only=True).eval()
    model.__dict__["text_model"] = model  # where diffusers 0.42 looks for the final norm that transformers 5.6 moved
    return SimpleNamespace(
        text_encoder=model,
        tokenizer=CLIPTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True),
        unet=None,
    )


@torch.no_grad()
def diffusers_context(reference, prompts, clip_skip=None):
    encode = StableDiffusionPipeline.encode_prompt
    return encode(reference, prompts, torch.device("cpu"), 1, False, clip_skip=clip_skip)[0]


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("clip_skip", [None, 0, 1, 2])
def test_context_equals_diffusers(encoder, reference, prompt, clip_skip):
    mine = encoder.encode([prompt], clip_skip=clip_skip or 0).context
    assert mine.shape == (1, 77, encoder.config.hidden_size)
    assert torch.equal(mine, diffusers_context(reference, prompt, clip_skip))


@pytest.mark.parametrize("prompt", PROMPTS)
def test_tokens_equal_diffusers(encoder, reference, prompt):
    expected = reference.tokenizer(prompt, padding="max_length", max_length=77, truncation=True)["input_ids"]
    seen = seen_tokens(encoder, prompt)
    assert seen == [expected]


def seen_tokens(encoder, prompt):
    """Ids of each chunk that reaches the model."""
    rows = []
    forget(encoder)
    hook = encoder.model.register_forward_pre_hook(lambda _model, inputs: rows.extend(inputs[0].tolist()))
    encoder.encode([prompt])
    hook.remove()
    return rows


def forget(encoder):
    encoder.train().eval()


def test_clip_skip_equals_a_model_without_these_layers(sd1):
    shallow = make_encoder(sd1.config.replace(num_hidden_layers=1))
    shallow.model.load_state_dict({name: sd1.model.state_dict()[name] for name in shallow.model.state_dict()})
    assert torch.equal(sd1.encode(["a cat"], clip_skip=2).context, shallow.encode(["a cat"]).context)


def test_long_prompt_is_the_contexts_of_its_chunks(sd1):
    context = sd1.encode(["cat " * 160]).context
    assert context.shape == (1, 231, 32)
    assert torch.equal(context[:, :77], sd1.encode(["cat " * 75]).context)
    assert torch.equal(context[:, 77:154], sd1.encode(["cat " * 75]).context)
    assert torch.equal(context[:, 154:], sd1.encode(["cat " * 10]).context)


def test_tokens_of_a_long_prompt(encoder):
    cat, dog, comma, bos, eos = 2368, 1929, 267, 49_406, 49_407
    pad = encoder.config.pad_token_id
    rows = seen_tokens(encoder, "cat " * 60 + ", " + "dog " * 20)  # 81 tokens, 14 dogs move with the overflow
    assert rows == [
        [bos, *[cat] * 60, comma, eos, *[pad] * 14],
        [bos, *[dog] * 20, eos, *[pad] * 55],
    ]
    assert seen_tokens(encoder, "cat BREAK dog") == [
        [bos, cat, eos, *[pad] * 74],
        [bos, dog, eos, *[pad] * 74],
    ]


def test_num_chunks(sd1):
    counts = {"": 1, "cat " * 75: 1, "cat " * 76: 2, "a BREAK b": 2, "a BREAK BREAK b": 3, "(cat:1.2) " * 76: 2}
    assert {prompt: sd1.num_chunks(prompt) for prompt in counts} == counts


def test_short_prompts_are_followed_by_empty_chunks(sd1):
    context = sd1.encode(["a cat", "cat " * 100]).context
    assert context.shape == (2, 154, 32)
    assert torch.equal(context[:1], torch.cat([sd1.encode(["a cat"]).context, sd1.encode([""]).context], dim=1))


def test_models_with_shorter_texts():
    small = make_encoder(CONFIGS["sd1"].replace(max_position_embeddings=16))
    assert small.encode(["cat " * 14]).context.shape == (1, 16, 32)
    assert small.encode(["cat " * 15]).context.shape == (1, 32, 32)


def test_context_does_not_depend_on_neighbours(encoder):
    prompts = ["a (cat:1.4)", "", "[fog], a dog", "a cat"]
    together = encoder.encode(prompts).context
    for i, prompt in enumerate(prompts):
        forget(encoder)
        assert torch.equal(together[i : i + 1], encoder.encode([prompt]).context)


def test_weights_scale_tokens_and_keep_the_mean(encoder):
    plain, weighted = encoder.encode(["a red cat"]).context[0], encoder.encode(["a (red:1.5) cat"]).context[0]
    ratio = weighted / plain
    common = ratio[0, 0]
    expected = common * torch.tensor([1, 1, 1.5, *[1] * 74])[:, None]  # BOS, a, red, cat, EOS, pads
    torch.testing.assert_close(ratio, expected.expand_as(ratio), rtol=1e-4, atol=0)
    torch.testing.assert_close(weighted.mean(), plain.mean(), rtol=1e-4, atol=0)


def test_each_chunk_keeps_its_own_mean(sd1):
    context = sd1.encode(["a (red:1.5) cat BREAK a dog"]).context
    assert torch.equal(context[:, :77], sd1.encode(["a (red:1.5) cat"]).context)
    assert torch.equal(context[:, 77:], sd1.encode(["a dog"]).context)


def test_brackets_of_weight_one_change_nothing(encoder):
    assert torch.equal(encoder.encode(["a (red:1.0) cat"]).context, encoder.encode(["a red cat"]).context)
    assert torch.equal(encoder.encode(["a ([red]) cat"]).context, encoder.encode(["a red cat"]).context)


def test_emphasis_by_hand():
    z = torch.tensor([[1.0, 2.0], [3.0, 4.0]])  # mean 2.5; weighted (1 + 2 + 6 + 8) / 4 = 4.25
    expected = torch.tensor([[1.0, 2.0], [6.0, 8.0]]) * (2.5 / 4.25)
    torch.testing.assert_close(emphasize(z, torch.tensor([1.0, 2.0])), expected)


@pytest.mark.parametrize(
    "z",
    [
        [[1.0, -1.0], [1.0, -1.0]],  # mean 0
        [[1.0, -1.0001], [1.0, -1.0]],  # mean of the size of rounding noise
        [[2.0, 2.0], [-1.5, -1.5]],  # mean 0.25, weighted -0.5
    ],
)
def test_emphasis_without_a_usable_mean_only_multiplies(z):
    z, weights = torch.tensor(z), torch.tensor([1.0, 2.0])
    assert torch.equal(emphasize(z, weights), z * torch.tensor([[1.0], [2.0]]))


def test_weight_zero_and_negative_weights_stay_finite(encoder):
    assert encoder.encode(["(a cat:0)", "(a cat:-2)", "(" * 100 + "a cat"]).context.isfinite().all()


@pytest.mark.parametrize("prompt", ["a <|endoftext|> cat", "<|startoftext|>", "wow! what a day!"])
def test_special_token_text_is_plain_text(encoder, prompt):
    (row,) = seen_tokens(encoder, prompt)
    text = row[1 : row.index(encoder.config.eos_token_id)]
    assert not {49_406, 49_407, 0} & set(text)
    assert encoder.tokenizer.decode(text).replace(" ", "") == prompt.replace(" ", "")


def count_calls(encoder):
    calls = []
    encoder.model.register_forward_hook(lambda *_: calls.append(1))
    return calls


def test_contexts_are_remembered():
    encoder = make_encoder(CONFIGS["sd1"])
    calls = count_calls(encoder)
    first = encoder.encode(["a cat", "", ""]).context
    assert len(calls) == 2
    again = encoder.encode(["a cat", "", ""]).context
    assert len(calls) == 2
    assert torch.equal(first, again)
    encoder.encode([""], clip_skip=1)
    assert len(calls) == 3
    first.zero_()
    assert encoder.encode([""]).context.any()


def test_memory_is_bounded(monkeypatch):
    encoder = make_encoder(CONFIGS["sd1"])
    monkeypatch.setattr(text_module, "CACHED_CHUNKS", 2)
    calls = count_calls(encoder)
    encoder.encode(["a"])
    encoder.encode(["b"])
    encoder.encode(["a"])
    encoder.encode(["c"])  # drops b, the least recently used
    encoder.encode(["a"])
    assert len(calls) == 3
    encoder.encode(["b"])
    assert len(calls) == 4


@pytest.mark.parametrize(
    "change",
    [
        lambda encoder: encoder.to(torch.float64),
        lambda encoder: encoder.half().float(),
        lambda encoder: (next(encoder.parameters()).data.mul_(2), encoder.train().eval()),
        lambda encoder: encoder.model.final_layer_norm.bias.add_(1),
        lambda encoder: encoder.model.load_state_dict(make_encoder(CONFIGS["sd1"]).model.state_dict()),
        lambda encoder: encoder.model.load_state_dict(make_encoder(CONFIGS["sd1"]).model.state_dict(), assign=True),
    ],
)
@torch.no_grad()
def test_contexts_are_forgotten_when_weights_change(change):
    encoder = make_encoder(CONFIGS["sd1"])
    calls = count_calls(encoder)
    encoder.encode(["a cat"])
    change(encoder)
    context = encoder.encode(["a cat"]).context
    assert len(calls) == 2
    assert context.dtype == encoder.model.dtype


def test_training_mode_remembers_nothing():
    encoder = make_encoder(CONFIGS["sd1"]).train()
    calls = count_calls(encoder)
    assert torch.equal(encoder.encode(["a cat"]).context, encoder.encode(["a cat"]).context)
    assert len(calls) == 2


def test_half_precision(sd1):
    half = make_encoder(CONFIGS["sd1"]).to(torch.bfloat16)
    context = half.encode(["a (cat:1.3)"]).context
    assert context.dtype == torch.bfloat16
    torch.testing.assert_close(context.float(), sd1.encode(["a (cat:1.3)"]).context, rtol=0.1, atol=0.1)


def test_built_on_the_meta_device(sd1):
    with torch.device("meta"):
        empty = TextEncoder(sd1.config, sd1.tokenizer)
    assert all(weight.is_meta for weight in empty.parameters())
    empty.model.load_state_dict(text_state_dict(sd1.model.state_dict()), assign=True)
    assert torch.equal(empty.to("cpu").encode(["a (cat:1.3)"]).context, sd1.encode(["a (cat:1.3)"]).context)


def test_both_layouts_of_names_are_read(sd1):
    flat = sd1.model.state_dict()
    nested = saved_text_state_dict(flat) | {"text_model.embeddings.position_ids": torch.zeros(1, 77)}
    assert all(name.startswith("text_model.") for name in nested)
    for weights in (flat, nested, flat | {"embeddings.position_ids": torch.zeros(1, 77)}):
        assert text_state_dict(weights).keys() == flat.keys()
    name = "final_layer_norm.bias"
    with pytest.raises(ValueError, match=r"final_layer_norm\.bias twice"):
        text_state_dict(nested | {name: flat[name]})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompts": "a cat"}, "prompts='a cat' must be a list"),
        ({"prompts": []}, "prompts=.* must be a list"),
        ({"prompts": ["a"], "clip_skip": 4}, "clip_skip=4 must be 0 to 3"),
        ({"prompts": ["a"], "clip_skip": -1}, "clip_skip=-1 must be"),
        ({"prompts": ["a\ud800"]}, "character 1 is half of a surrogate pair"),
        ({"prompts": ["a BREAK " * 100]}, f"at most {MAX_CHUNKS}"),
    ],
)
def test_errors(sd1, arguments, message):
    with pytest.raises(ValueError, match=message) as caught:
        sd1.encode(**arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bos_token_id": 0}, "bos_token_id=0 must be the tokenizer's, 49406"),
        ({"eos_token_id": 2}, "eos_token_id=2 must be the tokenizer's, 49407"),
        ({"vocab_size": 1000}, "vocab_size=1000 must be above 49407"),
        ({"vocab_size": 60_000, "pad_token_id": 50_000}, "pad_token_id=50000 must be one"),
        ({"num_attention_heads": 5}, "hidden_size=32 must be a multiple of num_attention_heads=5"),
    ],
)
def test_config_and_tokenizer_must_fit(sd1, changes, message):
    with pytest.raises(ValueError, match=message):
        TextEncoder(sd1.config.replace(**changes), sd1.tokenizer)
