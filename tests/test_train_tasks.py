"""The tasks at toy size: every stage from drawings to a picture, and each stage's own promise."""

import json
import os
import re
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.utils.flop_counter import FlopCounterMode

from sdlite.checkpoints.folder import save_folder
from sdlite.checkpoints.load import CheckpointError, load_model
from sdlite.checkpoints.untrained import random_model
from sdlite.cli import main
from sdlite.cli.app import app
from sdlite.config import AutoencoderKLConfig, tiny
from sdlite.contracts import Conditioning
from sdlite.models import network
from sdlite.models.codec import LatentCodec
from sdlite.models.prompt import escaped
from sdlite.models.text import TextEncoder
from sdlite.pipeline import Pipeline
from sdlite.training.codec import (
    ADVERSARIAL_WEIGHT,
    FEATURE_WEIGHT,
    CodecTask,
    Discriminator,
    adversarial_loss,
    emoji_codec,
    load_codec,
    normalized,
    psnr,
    reconstruction_loss,
    sharpness,
)
from sdlite.training.datasets.captions import cut_notes, tokenize
from sdlite.training.datasets.draws import sample_generator
from sdlite.training.datasets.emoji import write
from sdlite.training.datasets.pixels import load_shaped, on_white
from sdlite.training.denoiser import DenoiserTask, emoji_dit, emoji_unet
from sdlite.training.latents import encode, encode_tokens, preview_prompt
from sdlite.training.loop import TrainConfig, fit, load_average, train
from sdlite.training.networks import initialize
from sdlite.training.options import CodecOptions, DenoiserOptions, TextOptions
from sdlite.training.run import checkpoints
from sdlite.training.text import Teacher, TextTask, emoji_text, load_text, save_text, small_vocabulary

CODEC = AutoencoderKLConfig(
    block_out_channels=(8, 8, 8),
    layers_per_block=1,
    latent_channels=4,
    norm_num_groups=4,
    scaling_factor=1.0,
    mid_block_add_attention=False,
)
TEXT = emoji_text(1024).replace(
    hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=16
)
DIT = emoji_dit(4, 32, sample_size=8).replace(width=32, depth=2, num_heads=2)
UNET = emoji_unet(4, 32).replace(block_out_channels=(16, 16, 32), num_heads=(1, 1, 2), num_groups=8)
SHAPES = {
    "disc": "<circle cx='8' cy='8' r='6' fill='{c}'/>",
    "box": "<rect x='3' y='3' width='10' height='10' fill='{c}'/>",
}
COLOURS = {"warm": "#d33", "cold": "#36c", "green": "#3a5"}


def brief(**changes):
    return TrainConfig(**{"batch_size": 2, "lr": 1e-3, "warmup": 4, "half_life": 8, "samples": 8} | changes)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Raw SVGs to a data folder; the green box is held out."""
    from sdlite.training.datasets.emoji import _svg, render_svg

    out = tmp_path_factory.mktemp("data")
    records, pictures = [], []
    for concept, body in SHAPES.items():
        for style, colour in COLOURS.items():
            split = "validation" if (concept, style) == ("box", "green") else "train"
            text = f"{concept}, {style} style"
            records.append({"file_name": f"{concept}-{style}.png", "text": text, "concept": concept, "style": style,
                            "keywords": ["shape"], "split": split})  # fmt: skip
            pictures.append(render_svg(_svg(body.format(c=colour), 16, 16), 32))
    write(out, records, pictures)
    return out


def codec_task(folder):
    return CodecTask(folder, CODEC, CodecOptions(size=32, cropped=4))


def text_task(folder):
    return TextTask(folder, TEXT, small_vocabulary(1024), TextOptions())


@pytest.fixture(scope="module")
def runs(folder, tmp_path_factory):
    """A run of every stage."""
    out = tmp_path_factory.mktemp("runs")
    fit(codec_task(folder), brief(), out / "codec")
    fit(text_task(folder), brief(), out / "text")
    parts = load_codec(out / "codec" / "export"), load_text(out / "text" / "export")
    task = DenoiserTask(
        folder, parts, UNET, DenoiserOptions(size=32, views=3), cache=out / "denoiser" / "cache.safetensors"
    )
    fit(task, brief(), out / "denoiser")
    return out


def test_from_drawings_to_a_picture(runs):
    pipe = Pipeline.load(runs / "denoiser" / "export")
    (picture,) = pipe("a disc, warm style", steps=2, guidance_scale=2.0)
    assert picture.size == (32, 32)
    figures = json.loads((runs / "denoiser" / "log.jsonl").read_text().splitlines()[-1])
    assert figures["samples"] == 8 and 0 < figures["held_out_loss"] < 10
    for stage in ("codec", "text", "denoiser"):
        Image.open(next((runs / stage).glob("preview-*.png"))).verify()


def test_diffusers_draws_the_same_picture_from_the_export(runs):
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(runs / "denoiser" / "export", safety_checker=None)
    theirs.set_progress_bar_config(disable=True)
    image = theirs(
        "a disc, warm style", num_inference_steps=4, guidance_scale=3.0, height=32, width=32,
        generator=[torch.Generator().manual_seed(5)],
    ).images[0]  # fmt: skip
    (ours,) = Pipeline.load(runs / "denoiser" / "export")("a disc, warm style", steps=4, guidance_scale=3.0, seed=5)
    assert np.abs(np.asarray(image, int) - np.asarray(ours, int)).max() <= 1


def test_a_weight_file_that_was_changed_is_noticed(runs, tmp_path):
    copy = shutil.copytree(runs / "denoiser" / "export", tmp_path / "copy")
    file = next((copy / "unet").glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1] + b"\x7f")
    with pytest.raises(ValueError, match=r"is not the file that sha256sums.txt lists"):
        load_model(copy)


@pytest.mark.parametrize("make", [codec_task, text_task])
def test_a_stopped_task_resumes_bit_for_bit(folder, tmp_path, make):
    fit(make(folder), brief(), tmp_path / "straight")
    for samples in (2, 8):
        fit(make(folder), brief(samples=samples), tmp_path / "resumed")
    assert_same(tmp_path / "straight", tmp_path / "resumed")


def assert_same(*runs):
    first, second = (
        {k: v for file in checkpoints(run)[-1].glob("*.safetensors") for k, v in load_file(file).items()}
        for run in runs
    )
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_a_denoiser_resumes_bit_for_bit_from_its_cache(folder, runs, tmp_path):
    parts = load_codec(runs / "codec" / "export"), load_text(runs / "text" / "export")
    for samples in (4, 8):
        cache = tmp_path / "cache.safetensors"
        fit(
            DenoiserTask(folder, parts, UNET, DenoiserOptions(size=32, views=3), cache=cache),
            brief(samples=samples),
            tmp_path / "run",
        )
    assert_same(runs / "denoiser", tmp_path / "run")


LOOP = "batch_size lr optimizer warmup decay samples minutes weight_decay half_life clip precision seed report_every"
LOOP += " save_minutes show_minutes show_samples plot new_data data pictures network"


def test_the_settings_of_a_run_have_the_names_that_older_versions_wrote(runs):
    """So that a run can be resumed, whichever version began it."""
    own = {
        "codec": "size fit cropped adversarial start teacher",
        "text": "fit phrases teacher",
        "denoiser": "size fit views codec text start prediction timesteps min_snr_gamma zero_terminal_snr",
    }
    for stage, names in own.items():
        settings = json.loads((runs / stage / "config.json").read_text())
        assert settings.keys() == set(f"{LOOP} {names}".split())
    assert settings["network"]["kind"] == "UNet"


def settings_of(task):
    return {name: value for name, value in task.settings.items() if name != "network"}


def test_settings_name_what_a_run_is_of_by_content(folder, runs, tmp_path):
    """Whatever changes the weights that come out changes a setting, and nothing else does."""
    copy = shutil.copytree(folder, tmp_path / "copy")
    parts = load_codec(runs / "codec" / "export"), load_text(runs / "text")  # of a run: its export
    other = load_codec(runs / "codec" / "export"), load_text(runs / "text" / "export")
    with torch.no_grad():
        next(other[0].parameters())[0] += 1e-6
        next(other[1].model.parameters())[0] += 1e-6

    def make(data, parts=parts, **changes):
        return DenoiserTask(data, parts, UNET, DenoiserOptions(**{"size": 32, "views": 1} | changes))

    tasks = {
        "": make(copy),
        "codec": make(folder, parts=(other[0], parts[1])),
        "text": make(folder, parts=(parts[0], other[1])),
        "size": make(folder, size=64),
        "fit": make(folder, fit="pad"),
        "views": make(folder, views=2),
        "min_snr_gamma": make(folder, min_snr_gamma=None),
    }
    ours = settings_of(make(folder))
    for name, task in tasks.items():
        changed = {key for key, value in settings_of(task).items() if value != ours[key]}
        assert changed == ({name} if name else set())

    picture = next((copy / "train").glob("*.png"))
    Image.open(picture).rotate(90).save(picture)
    for task in (make, codec_task, text_task):
        before, after = settings_of(task(folder)), settings_of(task(copy))
        assert {key for key in before if before[key] != after[key]} == {"pictures"}


def test_a_cache_is_used_for_what_it_was_made_of_only(folder, runs, tmp_path, monkeypatch):
    parts = load_codec(runs / "codec" / "export"), load_text(runs / "text" / "export")
    calls = []
    monkeypatch.setattr("sdlite.training.denoiser.encode", lambda *a, **k: calls.append(k["views"]) or encode(*a, **k))
    cache = tmp_path / "cache.safetensors"

    def made(views=2, **changes):
        calls.clear()
        options = DenoiserOptions(**{"size": 32, "views": views} | changes)
        task = DenoiserTask(folder, parts, UNET, options, cache=cache)
        return task.latents.x_0, calls.count(views)

    (first, encoded), (second, again) = made(), made()
    assert (encoded, again) == (1, 0) and torch.equal(first, second)
    for change in ({"size": 64}, {"seed": 1}, {"views": 3}):
        assert made(**change)[1] == 1
    assert made()[1] == 1 and made()[1] == 0
    cache.write_bytes(cache.read_bytes()[:-9])
    x_0, encoded = made()
    assert encoded == 1 and torch.equal(x_0, first)


def test_a_refused_run_keeps_its_cache(folder, runs, tmp_path):
    parts = load_codec(runs / "codec" / "export"), load_text(runs / "text" / "export")
    cache = tmp_path / "cache.safetensors"

    def make(size):
        return DenoiserTask(folder, parts, UNET, DenoiserOptions(size=size, views=1), cache=cache)

    fit(make(32), brief(samples=2), tmp_path)
    before = cache.read_bytes()
    with pytest.raises(ValueError, match="is a run with size=32, not 64"):
        fit(make(64), brief(samples=4), tmp_path)
    assert cache.read_bytes() == before


def test_pictures_train_in_their_own_shapes(runs, tmp_path):
    """The loss of a batch of shapes is the mean of the losses of each alone."""
    for name, size in (("a", (48, 32)), ("b", (32, 32)), ("c", (32, 60))):
        Image.new("RGB", size, "red").save(tmp_path / f"{name}.png")
    parts = load_codec(runs / "codec" / "export"), load_text(runs / "text" / "export")
    task = DenoiserTask(tmp_path, parts, UNET, DenoiserOptions(size=64, views=2, fit="bucket", timesteps="uniform"))
    assert task.latents.shapes.tolist() == [[12, 20], [16, 16], [20, 12]] * 2
    x_0 = task.latents.x_0[0, :, :12, :20].float()
    image = on_white(load_shaped(tmp_path, task.records[:1], 64, "bucket", 16)[0][:, :, :48, :80])
    torch.testing.assert_close(x_0, parts[0].encode(image)[0], atol=2e-3, rtol=2e-3)
    with torch.no_grad():
        next(p for name, p in task.denoiser.named_parameters() if name == "conv_out.bias").fill_(0.1)
    indices, numbers = torch.tensor([0, 4, 2, 1]), torch.arange(4)
    each = [task(indices[i : i + 1], numbers[i : i + 1]).item() for i in range(4)]
    assert task(indices, numbers).item() == pytest.approx(sum(each) / 4, rel=1e-5)
    fit(task, brief(samples=4, lr=1e-4), tmp_path / "run")
    assert (tmp_path / "run" / "export" / "model_index.json").is_file()


def cut(path):
    path.write_bytes(path.read_bytes()[:-9])


def poison(path):
    tensors = load_file(path)
    tensors[min(tensors)].view(-1)[0] = float("nan")
    save_file(tensors, path)


@pytest.mark.parametrize(("stage", "load"), [("codec", load_codec), ("text", load_text)])
@pytest.mark.parametrize(
    ("suffix", "damage", "fault"),
    [
        ("safetensors", cut, "truncated"),
        ("safetensors", poison, "has NaN or Inf"),
        ("safetensors", lambda path: save_file({"a": torch.zeros(1)}, path), "is missing"),
        ("json", lambda path: path.write_text("[]"), "not a JSON object"),
        ("json", lambda path: path.write_text("[" * 99_999), "nested deeper"),
        ("json", lambda path: path.write_text('{"layers": "many"}'), "is required"),
    ],
)
def test_a_damaged_export_is_named(runs, tmp_path, stage, load, suffix, damage, fault):
    copy = shutil.copytree(runs / stage / "export", tmp_path / "copy")
    damage(copy / f"{stage}.{suffix}")
    with pytest.raises(ValueError, match=rf"{stage}.{suffix}:? .*{fault}"):
        load(copy)


@torch.no_grad()
def test_normalized_latents_have_unit_variance_and_decode_to_the_same(folder):
    codec = codec_task(folder).codec
    for parameter in codec.model.quant_conv.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    pixels = torch.randint(0, 256, (40, 4, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    other = normalized(codec, pixels)
    z = other.encode(on_white(pixels))
    torch.testing.assert_close(z.mean((0, 2, 3)), torch.zeros(4), atol=1e-4, rtol=0)
    torch.testing.assert_close(z.std((0, 2, 3)), torch.ones(4), atol=1e-4, rtol=0)
    torch.testing.assert_close(other.decode(z), codec.decode(codec.encode(on_white(pixels))), atol=1e-4, rtol=1e-4)


def test_a_decoder_trains_on_under_the_same_latents(folder, runs, tmp_path):
    start = runs / "codec" / "export"
    fit(CodecTask(folder, CODEC, CodecOptions(size=32, codec=start)), brief(), tmp_path)
    before, after = load_codec(start), load_codec(tmp_path / "export")
    images = on_white(codec_task(folder).pixels)
    z = before.encode(images)
    assert torch.equal(after.encode(images), z) and not torch.equal(after.decode(z), before.decode(z))


def test_edges_by_hand():
    """A step of 2 along one of 40 columns: of the strongest 80 of 1,600 pixels half have a gradient of 2."""
    step = torch.ones(1, 3, 41, 41)
    step[..., :20] = -1
    assert sharpness(step).item() == pytest.approx(1)
    assert sharpness(0.5 * step).item() == pytest.approx(0.5)
    assert sharpness(torch.zeros(1, 3, 41, 41)).item() == 0


def test_decoder_and_discriminator_learn_from_their_own_part_of_the_loss():
    generator = torch.Generator().manual_seed(0)
    critic = Discriminator(generator)
    images, output = torch.randn(2, 2, 3, 32, 32, generator=generator)
    output.requires_grad_(True)
    adversarial_loss(critic, output, images).backward()
    ours = [output.grad, *(p.grad for p in critic.parameters())]
    judged, real = critic(output), critic(images)
    hinge = torch.relu(1 - real[-1]).mean() + torch.relu(1 + critic(output.detach())[-1]).mean()
    apart = sum((a - b.detach()).abs().mean() for a, b in zip(judged[:-1], real[:-1], strict=True)) / 4
    decoder = FEATURE_WEIGHT * apart - ADVERSARIAL_WEIGHT * judged[-1].mean()
    theirs = [torch.autograd.grad(decoder, output)[0], *torch.autograd.grad(hinge, list(critic.parameters()))]
    for mine, right in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, right, atol=1e-6, rtol=1e-4)


def test_a_decoder_is_sharpened_under_the_same_latents(folder, runs, tmp_path):
    start = runs / "codec" / "export"
    with pytest.raises(ValueError, match="give that with --codec"):
        CodecTask(folder, CODEC, CodecOptions(size=32, adversarial=True))
    for samples in (2, 8):
        fit(
            CodecTask(folder, CODEC, CodecOptions(size=32, codec=start, adversarial=True)),
            brief(samples=samples),
            tmp_path,
        )
    before, after = load_codec(start), load_codec(tmp_path / "export")
    images = on_white(codec_task(folder).pixels)
    assert torch.equal(after.encode(images), before.encode(images))
    assert json.loads((tmp_path / "log.jsonl").read_text().splitlines()[-1])["held_out_sharpness"] > 0


def test_a_run_with_muon_resumes_bit_for_bit(folder, runs, tmp_path):
    parts = load_codec(runs / "codec" / "export"), load_text(runs / "text" / "export")
    for out, lengths in (("straight", (8,)), ("resumed", (4, 8))):
        for samples in lengths:
            task = DenoiserTask(folder, parts, UNET, DenoiserOptions(size=32, views=1))
            fit(task, brief(samples=samples, optimizer="muon"), tmp_path / out)
    assert_same(tmp_path / "straight", tmp_path / "resumed")
    weights = load_file(next(checkpoints(tmp_path / "straight")[-1].glob("*.safetensors")))
    kinds = {name.rpartition(".")[2] for name in weights if name.startswith("optimizer.")}
    assert kinds == {"momentum", "exp_avg", "exp_avg_sq", "step"}
    averaged = DenoiserTask(folder, parts, UNET, DenoiserOptions(size=32, views=1))
    assert load_average(averaged, tmp_path / "straight") == 8
    assert all(torch.equal(tensor, weights[f"ema.{name}"]) for name, tensor in averaged.state_dict().items())


def test_plain_views_have_new_captions_and_composed_ones_their_own(folder, runs):
    parts = load_codec(runs / "codec" / "export"), load_text(runs / "text" / "export")
    task = DenoiserTask(folder, parts, UNET, DenoiserOptions(size=32, views=3))
    count = len(task.records)
    captions = {task._caption(0, sample_generator(0, i)) for i in range(30)}
    assert len(captions) > 4 and all("disc" in str(caption) for caption in captions)
    assert task._caption(count, sample_generator(0, 0)) is not None and task._caption(2 * count, None) is None
    indices = torch.tensor([0, 2 * count])
    tokens = task._tokens(indices, ["a box", None])
    assert torch.equal(tokens[1], task.latents.tokens[2 * count])
    assert torch.equal(tokens[:1], tokenize(parts[1], ["a box"]))


def test_a_larger_codec_learns_the_latents_of_a_smaller_one(folder, runs):
    """The loss falls by what its latents come nearer, and its decoder reads the teacher's."""
    start = runs / "codec" / "export"
    config = CODEC.replace(block_out_channels=(8, 8, 8, 8))
    task = CodecTask(folder, config, CodecOptions(size=64, cropped=0, teacher=start))
    images = on_white(task.pixels[:2])
    wanted = load_codec(start).encode(torch.nn.functional.avg_pool2d(images, 2))
    assert task.codec.encode(images).shape == wanted.shape
    optimizer = torch.optim.AdamW(task.parameters(), 3e-3)
    before = (task.codec.encode(images) - wanted).square().mean().item()
    for number in range(30):
        optimizer.zero_grad()
        task(torch.arange(2), torch.tensor([number, number])).backward()
        optimizer.step()
    assert (task.codec.encode(images) - wanted).square().mean().item() < 0.5 * before
    with pytest.raises(ValueError, match="has latents of 4 channels, not 8"):
        CodecTask(folder, config.replace(latent_channels=8), CodecOptions(size=64, teacher=start))


def test_whole_pictures_are_decoded_from_noisy_latents_at_both_sizes(folder, monkeypatch):
    task = CodecTask(folder, CODEC, CodecOptions(size=32, cropped=0))
    seen, decode = [], task.codec.decode
    monkeypatch.setattr(task.codec, "decode", lambda z: seen.append(z) or decode(z))
    images = torch.cat([task._sample(i, generator, 32) for i, generator in [(torch.tensor(0), sample_generator(0, 0))]])
    z = task.codec.model.encode(images).latent_dist.mean
    for number, small in ((0, 1), (64, 2), (128, 1)):
        task(torch.tensor([0]), torch.tensor([number]))
        assert seen[-1].shape[-1] == z.shape[-1] // small
    noise = (seen[0] - z) / z.std((0, 2, 3), keepdim=True)
    assert 0.1 < noise.std().item() < 0.2


def test_a_denoiser_goes_on_at_another_size(folder, runs, tmp_path):
    parts = load_codec(runs / "codec" / "export"), load_text(runs / "text" / "export")
    start = runs / "denoiser" / "export"
    task = DenoiserTask(folder, parts, UNET, DenoiserOptions(size=64, views=1))
    model = load_model(start)
    theirs = model.denoiser
    task.start_from(model)
    assert task.latents.x_0.shape[-1] == 16 and task.sample_size == 16
    x, t = torch.randn(1, 4, 16, 16), torch.tensor([500])
    for denoiser in (theirs, task.denoiser):
        denoiser.eval()
    outputs = [d(x, t, d.prepare(Conditioning(*parts[1].encode(["a disc"])))) for d in (theirs, task.denoiser)]
    assert torch.equal(*outputs) and outputs[0].abs().max() > 0
    with pytest.raises(ValueError, match="another shape or prediction"):
        DenoiserTask(folder, parts, UNET.replace(layers_per_block=2), DenoiserOptions(size=32, views=1)).start_from(
            model
        )


@pytest.mark.usefixtures("few_previews")
def test_a_whole_model_is_trained_on(folder, runs, tmp_path):
    """Its codec, text encoder, kind of network, picture size and prediction are its own unless told."""
    model, options = runs / "denoiser" / "export", {"samples": 4, "batch_size": 2}
    train("denoiser", folder, tmp_path / "a", start=model, **options)
    before, after = load_model(model), load_model(tmp_path / "a" / "export")
    assert after.config == before.config
    for part in ("codec", "text"):
        theirs = getattr(before, part).state_dict()
        assert all(torch.equal(tensor, theirs[name]) for name, tensor in getattr(after, part).state_dict().items())
    moved = [
        (a - b).abs().max() for a, b in zip(after.denoiser.parameters(), before.denoiser.parameters(), strict=True)
    ]
    assert 0 < max(moved) < 0.05
    train("denoiser", folder, tmp_path / "tiny", start=Path("tiny"), **options)
    assert load_model(tmp_path / "tiny/export").config == load_model("tiny").config
    with pytest.raises(ValueError, match=r"--arch dit is not what .* holds; leave it out"):
        train("denoiser", folder, tmp_path / "b", start=model, arch="dit", **options)
    with pytest.raises(CheckpointError, match="none does not exist"):
        train("denoiser", folder, tmp_path / "b", start=Path("none"), **options)


def test_codec_figures_by_hand():
    black, white = -torch.ones(1, 3, 8, 8), torch.ones(1, 3, 8, 8)
    assert psnr(white, black).item() == pytest.approx(0)
    assert psnr(black + 0.2, black).item() == pytest.approx(20, abs=1e-4)
    assert reconstruction_loss(white, black).item() == pytest.approx(
        4
    )  # 2 of pixels, 2 of the small; no colour, no edge
    red = black.clone()
    red[:, 0] = 1
    assert reconstruction_loss(red, black).item() > 2 * reconstruction_loss(black + 2 / 3, black).item()


def test_the_shipped_sizes_fit():
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        LatentCodec(emoji_codec()).decode(torch.zeros(1, 8, 16, 16))
    assert counter.get_total_flops() < 10e9
    sizes = [LatentCodec(emoji_codec()), TextEncoder(emoji_text(), small_vocabulary()).model]
    from sdlite.models.unet import UNet

    parameters = sum(p.numel() for module in [*sizes, UNet(emoji_unet())] for p in module.parameters())
    assert 2 * parameters < 54 * 10**6


def encoded(text, captions):
    return encode_tokens(text, tokenize(text, captions))


def test_contexts_are_those_of_the_pipeline(runs):
    """Of captions with brackets, special tokens and BREAK, too, which are plain text in a caption."""
    text = load_text(runs / "text" / "export")
    captions = ["a disc", "", "a very long prompt of words", "a (disc:1.5) [flat] \\ ((", "<|endoftext|> BREAK cat"]
    prompts = [escaped(caption) for caption in captions]
    torch.testing.assert_close(encoded(text, captions), text.encode(prompts).context[:, :16], atol=1e-5, rtol=1e-5)
    weighted = text.encode([captions[3]]).context[:, :16]
    assert (encoded(text, captions[3:4]) - weighted).abs().max() > 0.1

    long = "a disc, " + "very round and warm and cold " * 3  # 14 tokens are learned: up to the comma
    assert torch.equal(encoded(text, [long]), encoded(text, ["a disc,"]))
    assert preview_prompt(text, long) == "a disc ," and preview_prompt(text, "(a)") == r"\(a\)"
    (note,) = cut_notes(text, ["a disc", long])
    assert note == "1 of 2 captions have more than 14 tokens; the rest of each is not learned"
    assert not cut_notes(text, captions[:2])


def test_a_small_vocabulary_spells_everything():
    tokenizer = small_vocabulary(1024)
    text = "a red apple, žluťoučký 苹果!"
    assert len(tokenizer) == 1024
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True).replace(" ", "") == text.replace(
        " ", ""
    )


def test_stages_ask_for_what_they_need(folder, tmp_path):
    with pytest.raises(ValueError, match="needs --codec"):
        train("denoiser", folder, tmp_path, samples=1)
    with pytest.raises(FileNotFoundError, match="holds no codec; run `sdlite train codec`"):
        train("denoiser", folder, tmp_path, codec=tmp_path, text=tmp_path, samples=1)
    for stage, folders, options, flags in (
        ("codec", {}, {"class_weights": [1]}, "--class-weights is for segmentation"),
        (
            "text",
            {"start": tmp_path, "teacher": tmp_path},
            {"size": 64},
            "--from is for denoiser, --size is for codec and denoiser",
        ),
        ("denoiser", {"teacher": tmp_path}, {}, "--teacher is for codec and text"),
        ("denoiser", {}, {"allow_links": [tmp_path]}, "--allow-links is for --from"),
        ("segmentation", {}, {"fit": "pad"}, "--fit is for codec and text and denoiser"),
    ):
        with pytest.raises(ValueError, match=f"{flags}; leave it out"):
            train(stage, folder, tmp_path, samples=1, **folders, **options)


def test_what_cannot_be_trained_on_is_said_in_a_line(folder, runs, tmp_path):
    save_folder(random_model(tiny(in_channels=9), seed=0), tmp_path / "inpainting")
    parts = {name: runs / name for name in ("codec", "text")}
    for folders, fault in (
        ({"start": tmp_path / "inpainting"}, r"inpainting is an inpainting model, .* \(9 channels\)"),
        ({"start": Path("tiny"), "text": write_text(tmp_path / "wide")}, "reads text of width 32 and --text gives 16"),
        ({"start": Path("emoji-128"), "codec": parts["codec"]}, "latents of 8 channels and --codec has 4"),
    ):
        with pytest.raises(ValueError, match=fault):
            train("denoiser", folder, tmp_path / "run", samples=1, **folders)
    assert not (tmp_path / "run").exists()


def test_links_in_a_model_are_followed_as_the_error_advises(folder, tmp_path, monkeypatch, capsys):
    save_folder(random_model(tiny(), seed=0), tmp_path / "model")
    (tmp_path / "model" / "unet").rename(tmp_path / "elsewhere")
    (tmp_path / "model" / "unet").symlink_to(tmp_path / "elsewhere")

    def reached(*_):
        raise ValueError("the model is loaded")

    monkeypatch.setattr("sdlite.training.loop.fit", reached)
    monkeypatch.setattr("sdlite.training.evaluation.report.JudgeTask", reached)
    for words in (("train", "denoiser", "--samples", 1, "--from"), ("evaluate",)):
        call = (*words, tmp_path / "model", "--data", folder, "-o", tmp_path / "out")
        assert command(*call) == 2
        advice = re.search("--allow-links [^ ]+", capsys.readouterr().err)
        assert command(*call, *advice[0].split()) == 2
        assert "the model is loaded" in capsys.readouterr().err


def test_the_former_name_of_images_still_works(folder, tmp_path, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr("sdlite.training.evaluation.report.evaluate", lambda *given, **_: asked.append(given[3]) or "")
    for flag in ("--pictures", "--images"):
        assert not command("evaluate", "tiny", "--data", folder, "-o", tmp_path / "out", flag, 9, "--steps", 3)
    assert [(options.images, options.steps) for options in asked] == [(9, 3)] * 2
    assert command("evaluate", "--help") == 0 and "--pictures" not in capsys.readouterr().out


def write_text(folder):
    """An untrained text encoder of width 16."""
    save_text(TextEncoder(TEXT.replace(hidden_size=16), small_vocabulary(1024)), folder)
    return folder


def command(*arguments):
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    return ended.value.code


@pytest.fixture
def few_previews(monkeypatch):
    monkeypatch.setattr("sdlite.training.denoiser.SHOWN", 2)
    monkeypatch.setattr("sdlite.training.denoiser.PREVIEW_STEPS", 1)


@pytest.mark.usefixtures("few_previews")
def test_commands_train_on_a_folder_of_pictures_and_draw_with_the_run(tmp_path, capfd):
    for name, colour in (("red_apple", "red"), ("pear", "green")):
        Image.new("RGB", (24, 32), colour).save(tmp_path / f"{name}.png")
    (tmp_path / "pear.txt").write_text("a (green) pear")
    run = ["train", "denoiser", "--data", tmp_path, "-o", tmp_path / "run", "--batch-size", 2, "--samples", 2]
    assert command(*run, "--from", "tiny") == 0
    out, err = capfd.readouterr()
    assert "1 of 2 images have no caption" in out and "2 of 2 images are not square" in out
    lines = [line.split(",")[0] for line in out.splitlines()]
    assert lines.count("drawing 2 previews") == 2 and "encoding 2 images and captions" in lines  # before and after
    assert err.startswith(f"sdlite: reading {tmp_path}\n")
    assert len(list((tmp_path / "run").glob("preview-*.png"))) == 2
    assert command("generate", "a pear", "-m", tmp_path / "run", "--steps", 1, "-o", tmp_path / "drawn" / "a.png") == 0

    (tmp_path / "pear.txt").write_text("a pear")
    assert command(*run[:-1], 4, "--start", "tiny") == 2  # the old name of --from
    assert "other captions or file names; --new-data goes on with them" in capfd.readouterr().err
    assert command(*run, "--decay", "cosine", "--data", tmp_path / "none") == 2
    assert "none is no folder; give one with images" in capfd.readouterr().err


def test_help_of_training_shows_its_defaults(capsys):
    assert command("train", "--help") == 0
    text = " ".join(capsys.readouterr().out.split())
    for defaults in ("codec 12, segmentation 8, others 32", "text 0.0005, denoiser 0.003, others 0.002"):
        assert f"[default: ({defaults})]" in text
    fields = TrainConfig(minutes=1)
    for flag in ("decay", "precision", "seed", "save_minutes", "show_minutes"):
        value = getattr(fields, flag)
        shown = f"{value:g}" if isinstance(value, float) else value
        assert re.search(rf"--{flag.replace('_', '-')} .{{0,120}}?\[default: \({shown}\)\]", text), flag


def test_torchrun_leaves_our_flags_alone():
    """It takes every flag that is the start of one of its own for itself, wherever it stands."""
    from torch.distributed.run import get_args_parser

    parser = get_args_parser()
    theirs = [option for action in parser._actions for option in action.option_strings]
    trained = next(entry for entry in app.registered_commands if entry.callback.__name__ == "train").callback
    flags = {"--from", "--data", "--output"} | {f"--{name.replace('_', '-')}" for name in trained.__annotations__}
    flags -= {"--stage", "--folder", "--start"}  # arguments, and the old name of --from
    assert "--size" in flags and not [f for f in flags for t in theirs if t.startswith(f)]
    given = ["--nproc-per-node", "2", "-m", "sdlite", "train", "denoiser", "--from", "half", "--data", "d"]
    assert parser.parse_args(given).training_script_args == given[4:]


@pytest.mark.slow
def test_the_command_of_the_card_runs_on_two_processes(folder, runs, tmp_path):
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    run = ["-m", "sdlite", "train", "denoiser", "--data", str(folder), "-o", str(tmp_path / "run")]
    run += ["--from", str(runs / "denoiser"), "--batch-size", "2", "--samples", "8", "--decay", "cosine"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run([*launch, *run], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert load_model(tmp_path / "run").config == load_model(runs / "denoiser").config


def test_a_dit_trains_and_draws(folder, runs, tmp_path):
    parts = load_codec(runs / "codec" / "export"), load_text(runs / "text" / "export")
    fit(DenoiserTask(folder, parts, DIT, DenoiserOptions(size=32, views=3)), brief(), tmp_path)
    assert json.loads((tmp_path / "export" / "model_index.json").read_text())["_class_name"] == "SdlitePipeline"
    (picture,) = Pipeline.load(tmp_path / "export")("a disc, warm style", steps=2, guidance_scale=2.0)
    assert picture.size == (32, 32)
    with pytest.raises(ValueError, match="sample_size=16 must be 8"):
        DenoiserTask(folder, parts, DIT.replace(sample_size=16), DenoiserOptions(size=32))


def test_a_fresh_network_predicts_zero_and_all_of_it_learns():
    """Zeros that are multiplied with zeros would never learn: after a few steps every weight must have moved."""
    for config in (UNET, DIT):
        net = network(config)
        initialize(net, torch.Generator().manual_seed(0))
        before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
        optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
        x, context = (
            torch.randn(shape, generator=torch.Generator().manual_seed(1)) for shape in ((2, 4, 8, 8), (2, 7, 32))
        )
        for step in range(8):
            output = net(x, torch.tensor([10, 900]), net.prepare(Conditioning(context)))
            assert step or not output.any()
            (output - x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        still = [name for name, tensor in net.state_dict().items() if torch.equal(tensor, before[name])]
        assert not [name for name in still if "to_k.bias" not in name]  # which softmax does not see


def test_the_dit_has_the_parameters_of_the_unet_that_it_is_compared_with():
    unet = emoji_unet(8)
    with torch.device("meta"):
        counts = [sum(p.numel() for p in network(config).parameters()) for config in (unet, emoji_dit(8))]
    assert counts[1] == pytest.approx(counts[0], rel=0.002)


def test_timesteps_are_uniform_also_within_a_batch(folder, runs):
    parts = load_codec(runs / "codec" / "export"), load_text(runs / "text" / "export")
    task = DenoiserTask(folder, parts, UNET, DenoiserOptions(size=32, views=1, timesteps="uniform"))
    for start in (0, 10_000_000):
        t = task._timesteps(torch.arange(start, start + 32))
        assert torch.histc(t.float(), bins=8, min=0, max=1000).sub(4).abs().max() <= 1
    every = task._timesteps(torch.arange(100_000))
    assert torch.histc(every.float(), bins=1000, min=0, max=1000).sub(100).abs().max() <= 3


def test_more_timesteps_of_the_middle(folder, runs):
    """logit(t / 1000) is normal: 50 % of t below 500, and as the normal distribution's table has it, 13.6 % below 250
    (logit -1.0986) and 1.39 % below 100 (-2.1972); but for one sample of eight, which is uniform."""
    parts = load_codec(runs / "codec" / "export"), load_text(runs / "text" / "export")
    task = DenoiserTask(folder, parts, UNET, DenoiserOptions(size=32, views=1, timesteps="logit_normal"))
    t = task._timesteps(torch.arange(100_000)).float()
    for bound, part in ((100, 0.0139), (250, 0.136), (500, 0.5), (750, 0.864), (900, 0.9861)):
        assert (t < bound).float().mean().item() == pytest.approx(7 / 8 * part + bound / 8000, abs=5e-4)
    assert t.min() >= 0 and t.max() <= 999


def test_objectives(folder, runs, tmp_path, monkeypatch):
    """A fresh network predicts zero, so that its unweighted loss is the mean square of what it should predict."""
    parts = load_codec(runs / "codec" / "export"), load_text(runs / "text" / "export")
    plain = {"min_snr_gamma": None, "zero_terminal_snr": False}
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    for prediction in ("epsilon", "v"):
        task = DenoiserTask(folder, parts, UNET, DenoiserOptions(size=32, views=1, prediction=prediction, **plain))
        x_0, contexts = task.latents.x_0[:2].float(), encode_tokens(parts[1], task.latents.tokens[:2])
        loss = task._loss(x_0, contexts, torch.tensor([300, 300]), noise, torch.tensor([[8, 8], [8, 8]]))
        abar = task.schedule.abar(torch.tensor(300)).item()
        target = noise if prediction == "epsilon" else abar**0.5 * noise - (1 - abar) ** 0.5 * x_0
        assert loss.item() == pytest.approx(target.square().mean().item(), rel=1e-5)
    monkeypatch.setattr("sdlite.training.denoiser.SIZE", 32)
    monkeypatch.setattr("sdlite.training.denoiser.emoji_unet", lambda *_: UNET)
    fields = {"prediction": "epsilon", "min_snr_gamma": 0, "zero_terminal_snr": False}
    exports = {name: runs / name / "export" for name in ("codec", "text")}
    run = partial(train, "denoiser", folder, tmp_path, **exports)
    run(samples=2, batch_size=2, **fields)
    made = load_model(tmp_path / "export").config
    assert made.denoiser.prediction == "epsilon" and not made.schedule.zero_terminal_snr
    with pytest.raises(ValueError, match="is a run with prediction=epsilon, not v"):
        run(samples=4, batch_size=2, **fields | {"prediction": "v"})
    with pytest.raises(ValueError, match="is a run with size=32, not 64"):
        run(samples=4, batch_size=2, size=64, **fields)
    with (
        monkeypatch.context() as other,
        pytest.raises(ValueError, match=r"is a run with data=\w{12}, not \w{12}: other captions"),
    ):
        one = {"file_name": "train/box-warm.png", "text": "another"}
        other.setattr("sdlite.training.denoiser.read_records", lambda *_: [one])
        run(samples=4, batch_size=2, **fields)
    with pytest.raises(ValueError, match="has no answer to pure noise; use v, or"):
        run(samples=4, batch_size=2, prediction="epsilon")
    with pytest.raises(ValueError, match="--min-snr-gamma is for denoiser; leave it out"):
        train("text", folder, tmp_path, samples=1, min_snr_gamma=5.0)


def test_architectures_by_name(folder, runs, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"arch='gan' must be 'unet' or 'dit'"):
        train("denoiser", folder, tmp_path, arch="gan")
    with pytest.raises(ValueError, match="--arch is for denoiser and segmentation; leave it out"):
        train("codec", folder, tmp_path, arch="dit")
    parts = {name: runs / name / "export" for name in ("codec", "text")}
    monkeypatch.setattr("sdlite.training.denoiser.SIZE", 32)
    monkeypatch.setattr(
        "sdlite.training.denoiser.emoji_dit", lambda *_, sample_size: DIT.replace(sample_size=sample_size)
    )
    train("denoiser", folder, tmp_path, **parts, arch="dit", samples=2, batch_size=2)
    assert load_model(tmp_path / "export").config.denoiser == DIT
    with pytest.raises(ValueError, match=r"is a run with network.kind=DiT, not UNet"):
        train("denoiser", folder, tmp_path, **parts, samples=4, batch_size=2)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "bert", "auto_map": {"AutoModel": "evil.Evil"}}, "auto_map.* asks for code"),
        ({"model_type": "bert", "_attn_implementation": "evil/kernels"}, "asks for code"),
        ({"model_type": "evil", "auto_map": {"AutoModel": "evil.Evil"}}, "model_type='evil' must be one of bert"),
    ],
)
def test_a_teacher_runs_no_code_and_asks_nobody(config, message, tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    with pytest.raises(ValueError, match=message):
        Teacher(tmp_path)
    assert not (tmp_path / "ran").exists()
