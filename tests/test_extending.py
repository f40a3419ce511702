"""New parts from outside the package: plain Python objects, one file and one line each.

The denoiser here knows the answer: a prompt is a colour, and x_0 is that colour everywhere. So what is drawn is known.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from sdlite.config import ScheduleConfig
from sdlite.contracts import Conditioning, Noise, TextFeatures, Wrapper
from sdlite.diffusion.schedule import Schedule
from sdlite.diffusion.solvers import DDIM
from sdlite.images import from_pil
from sdlite.inspect import clean_latents, word_maps
from sdlite.pipeline import About, Pipeline
from sdlite.request import SOLVERS, Request, SolverEntry

COLOURS = {"red": (204, 51, 51), "blue": (51, 51, 204), "": (102, 102, 102)}


class Colours:
    """A text model: a prompt's features are its colour in [-1, 1]."""

    def num_chunks(self, prompt: str) -> int:
        return 1

    def words(self, prompt: str) -> list[tuple[str, list[int]]]:
        return [(prompt, [0])]

    def encode(self, prompts, *, clip_skip: int = 0) -> TextFeatures:
        if clip_skip:
            raise ValueError(f"clip_skip={clip_skip} must be 0, as colours have no layers")
        return TextFeatures(torch.tensor([[COLOURS[prompt]] for prompt in prompts]) / 127.5 - 1)  # (B, 1, 3)


class Painter:
    """A denoiser: eps of latents whose clean image is the prompt's colour."""

    prediction, in_channels, patch_size = "epsilon", 3, 1

    def __init__(self, schedule: Schedule) -> None:
        self.abars = schedule.abars

    def prepare(self, conditioning: Conditioning) -> Tensor:
        return conditioning.context[:, 0, :, None, None]  # (R, 3, 1, 1)

    def __call__(self, x: Tensor, t: Tensor, memory: Tensor) -> Tensor:
        rows = len(memory) // len(x)
        abar = self.abars[t.long()].float().view(-1, 1, 1, 1).repeat(rows, 1, 1, 1)
        return (x.repeat(rows, 1, 1, 1) - abar.sqrt() * memory) / (1 - abar).sqrt()


class Blocks:
    """A codec: a latent cell is the mean of 4 by 4 pixels."""

    factor, latent_channels, deterministic = 4, 3, True

    def encode(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        return F.avg_pool2d(images, 4)

    def decode(self, latents: Tensor) -> Tensor:
        return F.interpolate(latents, scale_factor=4)

    def decode_bytes(self, width: int, height: int) -> int:
        return 12 * width * height


@pytest.fixture
def pipe() -> Pipeline:
    schedule = Schedule(ScheduleConfig(final_abar_one=True))
    return Pipeline(Colours(), Painter(schedule), Blocks(), schedule, about=About("colours", sample_size=(8, 12)))


def colours(picture: Image.Image) -> np.ndarray:
    return np.unique(np.asarray(picture).reshape(-1, 3), axis=0)


@pytest.mark.parametrize("solver", ["ddim", "ddpm", "euler", "dpmpp_2m"])
def test_three_plain_objects_draw_what_they_know(pipe, solver):
    pictures = pipe(["red", "blue"], seed=[1, 2], steps=7, solver=solver, guidance_scale=1)
    assert [picture.size for picture in pictures] == [(48, 32)] * 2
    for picture, name in zip(pictures, ("red", "blue"), strict=True):
        assert np.abs(colours(picture).astype(int) - COLOURS[name]).max() <= 1
    assert "Model: colours" in pictures[0].info["parameters"] and "colours" in repr(pipe)


def test_plain_objects_are_guided_and_start_from_images(pipe):
    """By hand: 102 + 1.5 (204 - 102) = 255 and 102 + 1.5 (51 - 102) = 25.5."""
    picture = pipe("red", steps=7, guidance_scale=1.5)[0]
    assert np.abs(colours(picture) - [255, 25.5, 25.5]).max() <= 1
    start, area = Image.new("RGB", (64, 32), (0, 153, 0)), Image.new("L", (64, 32))
    area.paste(255, (0, 0, 32, 32))
    half = pipe("blue", image=start, mask=area, steps=7, guidance_scale=1, mask_blur=0)[0]
    left, right = (
        colours(half.crop((0, 0, half.width // 2, half.height))),
        colours(half.crop((half.width // 2, 0, *half.size))),
    )
    assert np.abs(left.astype(int) - COLOURS["blue"]).max() <= 1 and right.tolist() == [[0, 153, 0]]


def test_plain_objects_are_inspected_where_that_makes_sense(pipe):
    request = Request(prompt="red", steps=4, guidance_scale=1)
    expected = torch.tensor(COLOURS["red"]).view(1, 3, 1, 1) / 127.5 - 1
    for x_0 in clean_latents(pipe, request):
        torch.testing.assert_close(x_0, expected.expand_as(x_0), atol=1e-3, rtol=0)
    with pytest.raises(ValueError, match="attention of a Painter cannot be recorded"):
        word_maps(pipe, request)
    with pytest.raises(ValueError, match="a Painter cannot be saved"):
        pipe.save("nowhere")
    with pytest.raises(ValueError, match="as colours have no layers"):
        pipe("red", clip_skip=1)


# ------------------------------------------------------------------- one file and one line each, into a real model


class Straight:
    """A solver: DDIM for epsilon, to the very end of the schedule."""

    initial_scale = 1.0

    def __init__(self, schedule: Schedule, steps: int, prediction: str) -> None:
        self.timesteps = schedule.timesteps(steps)
        self.abars = [*schedule.abar(self.timesteps), torch.tensor(1.0, dtype=torch.float64)]

    def scale_input(self, x: Tensor, i: int) -> Tensor:
        return x

    def step(self, i: int, x: Tensor, output: Tensor, noise: Noise) -> Tensor:
        x_0 = (x - (1 - self.abars[i]).sqrt() * output) / self.abars[i].sqrt()
        return self.abars[i + 1].sqrt() * x_0 + (1 - self.abars[i + 1]).sqrt() * output

    def noised(self, x_0: Tensor, noise: Tensor, i: int) -> Tensor:
        return self.abars[i].sqrt() * x_0 + (1 - self.abars[i]).sqrt() * noise


def test_a_new_solver(pipe, monkeypatch):
    monkeypatch.setitem(SOLVERS, "straight", SolverEntry("this file", "Straight", None, Straight))
    drawn = {solver: pipe("red", steps=5, guidance_scale=1, solver=solver)[0] for solver in ("straight", "ddim")}
    assert np.abs(colours(drawn["straight"]).astype(int) - COLOURS["red"]).max() <= 1
    assert drawn["straight"].tobytes() == drawn["ddim"].tobytes()
    assert "Sampler: Straight" in drawn["straight"].info["parameters"]
    with pytest.raises(ValueError, match=r"eta=0\.5 has no effect with solver='straight'"):
        Request(prompt="red", solver="straight", eta=0.5)


def test_a_solver_gets_its_eta_and_may_be_replaced(pipe, monkeypatch):
    """eta 1 of a solver of one's own is that of DDIM; the number of steps is that of the entry of now."""
    made = []

    def noisy(schedule: Schedule, steps: int, prediction: str, eta: float) -> DDIM:
        made.append(eta)
        return DDIM(schedule, steps, eta, prediction)

    monkeypatch.setitem(SOLVERS, "own", SolverEntry("this file", "Own", None, noisy, takes_eta=True))
    fields = {"seed": 3, "steps": 5, "guidance_scale": 1}
    (*_, own), (*_, ddim), (*_, still) = (
        pipe.sample_latents(Request(prompt="red", solver=solver, eta=eta, **fields))
        for solver, eta in (("own", 1), ("ddim", 1), ("own", 0))
    )
    assert torch.equal(own, ddim) and not torch.equal(own, still) and {0, 1} == set(made)
    request = Request(prompt="red", solver="own", **fields)
    twice = SolverEntry("this file", "Own", None, lambda schedule, steps, _: Straight(schedule, 2 * steps, "epsilon"))
    counts = [pipe.jobs(request)[0].evaluations]
    monkeypatch.setitem(SOLVERS, "own", twice)
    assert [*counts, pipe.jobs(request)[0].evaluations] == [5, 10]


class Cached(Wrapper):
    """A denoiser that runs the other one at every second step only."""

    def prepare(self, conditioning: Conditioning) -> dict:
        return {"memory": self.denoiser.prepare(conditioning), "calls": 0}

    def __call__(self, x: Tensor, t: Tensor, memory: dict) -> Tensor:
        if memory["calls"] % 2 == 0:
            memory["last"] = self.denoiser(x, t, memory["memory"])
        memory["calls"] += 1
        return memory["last"]


class Nearest:
    """A faster codec for a real model: encodes as it does, but decodes three of four latent channels as colours."""

    def __init__(self, codec) -> None:
        self.codec, self.factor, self.latent_channels = codec, codec.factor, codec.latent_channels
        self.deterministic, self.encode = codec.deterministic, codec.encode

    def decode(self, latents: Tensor) -> Tensor:
        return F.interpolate(latents[:, :3], scale_factor=self.factor).clamp(-1, 1)

    def decode_bytes(self, width: int, height: int) -> int:
        return 12 * width * height


def test_a_new_denoiser_and_a_faster_codec():
    model = Pipeline.load("tiny")
    calls = []
    hook = model.denoiser.register_forward_hook(lambda *_: calls.append(1))
    slow, fast = (pipe("a cat", steps=6, solver="ddim")[0] for pipe in (model, model.with_denoiser(Cached)))
    hook.remove()
    assert len(calls) == 6 + 3 and slow.tobytes() != fast.tobytes()
    quick = model.with_parts(codec=Nearest(model.codec), about=replace(model.about, backend="nearest"))
    (*_, latents), picture = model.sample_latents(Request(prompt="a cat", steps=3)), quick("a cat", steps=3)[0]
    cells = from_pil(picture.resize((8, 8), Image.Resampling.NEAREST), (8, 8))
    torch.testing.assert_close(cells, latents[:, :3].clamp(-1, 1), atol=1 / 127, rtol=0)
    assert '"backend":"nearest"' in picture.info["sdlite"] and "backend" not in slow.info["sdlite"]
    assert quick.about.bits == {"backend": "nearest"} and model.about.bits == {}
