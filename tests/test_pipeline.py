"""Whole images against diffusers' pipelines on the same weights, pixel by pixel, and what must not change them."""

import json
import math
import socket
from collections import Counter
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image

import sdlite
from sdlite.checkpoints.load import convert, load_model
from sdlite.checkpoints.untrained import random_model
from sdlite.config import AutoencoderKLConfig, AutoencoderTinyConfig, ScheduleConfig, sd21, tiny, tiny_dit
from sdlite.contracts import Wrapper
from sdlite.diffusion.schedule import Schedule
from sdlite.images.files import open_picture
from sdlite.images.pixels import Opened
from sdlite.pipeline import About, Finished, Pipeline, Step
from sdlite.pipeline.run import conditioning
from sdlite.request import Request
from tests.references.diffusers_pipeline import SCHEDULERS, generators, reference_pipeline, reference_scheduler

GREY_LEVEL = 1  # pixels may differ by the rounding of one level
THEIRS = 7.5  # the guidance scale that diffusers takes when it is not told


def make(config) -> Pipeline:
    parts = random_model(config, seed=0)
    schedule = Schedule(config.schedule)
    about = About("random", "0" * 64, sample_size=8)
    return Pipeline(parts.text, parts.denoiser, parts.codec, schedule, about=about)


def sd2_like():
    """SD2's structure at toy size: linear projection, own head widths, v, gelu, its pad token."""
    small, large = tiny(prediction="v"), sd21()
    text = large.text.replace(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    denoiser = small.denoiser.replace(use_linear_projection=True, num_heads=(1, 2), layers_per_block=2)
    return small.replace(text=text, denoiser=denoiser)


@pytest.fixture(scope="module")
def sd1():
    return make(tiny())


@pytest.fixture(scope="module")
def sd2():
    return make(sd2_like())


@pytest.fixture(scope="module")
def inpainting():
    return make(tiny(in_channels=9))


@pytest.fixture(scope="module")
def dit():
    return make(tiny_dit(prediction="v"))


@pytest.fixture(scope="module")
def dit_inpainting():
    return make(tiny_dit(in_channels=9))


@pytest.fixture
def pipe(family, request):
    return request.getfixturevalue(family)


def picture(seed: int, size: tuple[int, int] = (80, 64)) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


def mask(size: tuple[int, int] = (80, 64)) -> Image.Image:
    cells = np.zeros((4, 5), dtype=np.uint8)
    cells[1:3, 2:] = 255
    return Image.fromarray(cells).resize(size, Image.Resampling.NEAREST)


def difference(ours: Image.Image, theirs: Image.Image) -> int:
    assert ours.size == theirs.size
    assert np.asarray(theirs).std() > 2, "a flat picture would hide differences"
    return int(np.abs(np.asarray(ours).astype(int) - np.asarray(theirs).astype(int)).max())


@pytest.mark.parametrize("family", ["sd1", "sd2", "dit"])
@pytest.mark.parametrize("scale", [7.5, 1.0])
def test_text_to_image_equals_diffusers(pipe, scale):
    height = 72 // pipe.size_unit * pipe.size_unit
    prompts, negatives, seeds = ["a red apple", "two cats"], ["blurry", "text"], (3, 4)
    requests = [
        Request(prompt=p, negative_prompt=n, seed=s, steps=10, guidance_scale=scale, width=80, height=height)
        for p, n, s in zip(prompts, negatives, seeds, strict=True)
    ]
    theirs = reference_pipeline(pipe)(
        prompts,
        negative_prompt=negatives,
        width=80,
        height=height,
        num_inference_steps=10,
        guidance_scale=scale,
        generator=generators(*seeds),
    ).images
    for ours, expected in zip(pipe.generate(requests), theirs, strict=True):
        assert difference(ours, expected) <= GREY_LEVEL


@pytest.mark.parametrize("family", ["sd1", "dit"])
@pytest.mark.parametrize("solver", ["ddpm", *SCHEDULERS])
def test_every_solver_equals_diffusers(pipe, solver):
    scheduler, options = SCHEDULERS.get(solver, ("DDPMScheduler", {}))
    theirs = reference_pipeline(pipe, "txt2img", scheduler, **options)
    expected = theirs("a cat", num_inference_steps=9, width=64, height=64, generator=generators(5)).images[0]
    assert difference(pipe("a cat", seed=5, steps=9, solver=solver, guidance_scale=THEIRS)[0], expected) <= GREY_LEVEL


def test_eta_and_guidance_rescale_equal_diffusers(sd2):
    expected = reference_pipeline(sd2)(
        "a cat", num_inference_steps=10, width=64, height=64, eta=0.7, guidance_rescale=0.7, generator=generators(5)
    ).images[0]
    assert (
        difference(sd2("a cat", seed=5, steps=10, eta=0.7, guidance_rescale=0.7, guidance_scale=THEIRS)[0], expected)
        <= GREY_LEVEL
    )


@pytest.mark.parametrize("family", ["sd1", "sd2", "dit"])
@pytest.mark.parametrize(("solver", "strength"), [("ddim", 0.6), ("ddim", 1.0), ("euler_a", 0.45), ("dpmpp_2m", 0.8)])
def test_image_to_image_equals_diffusers(pipe, solver, strength):
    scheduler, options = SCHEDULERS.get(solver, ("DDIMScheduler", {}))
    expected = reference_pipeline(pipe, "img2img", scheduler, **options)(
        ["a dog", "a hat"],
        image=[picture(0), picture(0)],
        strength=strength,
        num_inference_steps=10,
        generator=generators(8, 9),
    ).images
    fields = {"steps": 10, "solver": solver, "strength": strength, "width": 80, "height": 64, "guidance_scale": THEIRS}
    found = pipe(["a dog", "a hat"], seed=[8, 9], image=picture(0), **fields)
    assert max(map(difference, found, expected)) <= GREY_LEVEL


@pytest.mark.parametrize("family", ["sd1", "sd2", "inpainting", "dit", "dit_inpainting"])
@pytest.mark.parametrize(("solver", "strength"), [("ddim", 1.0), ("ddim", 0.7), ("euler_a", 1.0), ("ddpm", 0.7)])
def test_inpainting_equals_diffusers(pipe, solver, strength):
    default = ("DDPMScheduler" if solver == "ddpm" else "DDIMScheduler", {})
    scheduler, options = SCHEDULERS.get(solver, default)
    expected = reference_pipeline(pipe, "inpaint", scheduler, **options)(
        "a dog",
        image=picture(1, (90, 70)),
        mask_image=mask((90, 70)),
        strength=strength,
        width=80,
        height=64,
        num_inference_steps=10,
        generator=generators(8),
    ).images[0]
    fields = {"steps": 10, "solver": solver, "strength": strength, "width": 80, "height": 64, "guidance_scale": THEIRS}
    found = pipe("a dog", seed=8, image=picture(1, (90, 70)), mask=mask((90, 70)), paste=False, **fields)[0]
    assert difference(found, expected) <= GREY_LEVEL


GRID = {  # schedule and prediction of a model
    "Stable Diffusion": (ScheduleConfig(), "epsilon"),
    "zero terminal SNR": (ScheduleConfig(spacing="trailing", zero_terminal_snr=True, final_abar_one=True), "v"),
    "cosine": (ScheduleConfig(beta_schedule="cosine", spacing="trailing"), "v"),
}
MODES = {
    "txt2img": {},
    "img2img": {"image": "start", "strength": 0.7},
    "inpaint": {"image": "start", "mask": "mask", "strength": 0.7},
}
ONE_TOO_MANY = (61, 103, 121, 122)  # steps for which diffusers' trailing grid ends in -1, which it takes for the last
DIFFERENT = {  # by design: see zero_snr_karras, and test_sdlite_is_right_where_diffusers_previous_timestep_is_not
    ("dpmpp_2m_karras", "zero terminal SNR"): lambda steps: True,
    ("ddim", "zero terminal SNR"): lambda steps: 1000 % steps > 0,
    ("ddim", "cosine"): lambda steps: 1000 % steps > 0,
    ("ddpm", "zero terminal SNR"): ONE_TOO_MANY.__contains__,
    ("ddpm", "cosine"): ONE_TOO_MANY.__contains__,
    ("pndm", "cosine"): ONE_TOO_MANY.__contains__,
}


@pytest.fixture(scope="module", params=GRID)
def compared(request):
    """A schedule's name, our pipeline with it, and diffusers' for every mode."""
    schedule, prediction = GRID[request.param]
    pipe = make(tiny(prediction=prediction).replace(schedule=schedule))
    return request.param, pipe, {mode: reference_pipeline(pipe, mode) for mode in MODES}


def check_run(compared, solver: str, mode: str, steps: int) -> None:
    """A picture or one line beforehand, and diffusers' picture where it draws one."""
    name, pipe, references = compared
    pictures = {"start": picture(1, (32, 32)), "mask": mask((32, 32))}
    given = {key: pictures.get(value, value) for key, value in MODES[mode].items()}
    asked = {"seed": 8, "steps": steps, "solver": solver, "width": 32, "height": 32, "guidance_scale": 1}
    try:
        pipe.jobs(Request(prompt="a", **asked | MODES[mode]), [given.get("image")], [given.get("mask")])
    except ValueError as refusal:
        assert "\n" not in str(refusal)
        return
    found = pipe("a", paste=False, **asked, **given)[0]
    default = "DDPMScheduler" if solver == "ddpm" else "DDIMScheduler"
    scheduler, options = SCHEDULERS.get(solver, (default, {}))
    references[mode].scheduler = reference_scheduler(pipe, scheduler, **options)
    sources = {"mask_image" if key == "mask" else key: value for key, value in given.items()}
    size = {} if mode == "img2img" else {"width": 32, "height": 32}
    expected = drawn_or_none(references[mode], num_inference_steps=steps, guidance_scale=1, **sources, **size)
    if expected is not None and not DIFFERENT.get((solver, name), lambda steps: False)(steps):
        decoded = pipe.decode(expected, Request(prompt="a"))[0]
        assert difference(found, decoded) <= GREY_LEVEL, (mode, steps)


def drawn_or_none(theirs, **options) -> torch.Tensor | None:
    """Final latents of diffusers, None where it ends in an error or in numbers that are none."""
    try:
        latents = theirs("a", generator=generators(8), output_type="latent", **options).images
    except (IndexError, ValueError, NotImplementedError):
        return None
    return latents if latents.isfinite().all() else None


@pytest.mark.parametrize("turn", range(3))
def test_every_solver_draws_what_diffusers_draws(compared, turn):
    """A sample of the grid below."""
    for i, solver in enumerate(("ddim", "ddpm", *SCHEDULERS)):
        if i % 3 == turn:
            check_run(compared, solver, [*MODES][(i // 3 + turn) % 3], (2, 5, 10)[turn])


@pytest.mark.slow
@pytest.mark.parametrize("solver", ["ddim", "ddpm", *SCHEDULERS])
@pytest.mark.parametrize("mode", MODES)
def test_every_number_of_steps_draws_what_diffusers_draws(compared, solver, mode):
    for steps in range(1, 151):
        check_run(compared, solver, mode, steps)


@pytest.mark.parametrize("family", ["sd1", "dit"])
@pytest.mark.parametrize(
    "fields", [{}, {"eta": 1.0}, {"guidance_scale": 1.0}, {"image": "a"}, {"image": "a", "mask": "b"}]
)
def test_an_image_does_not_depend_on_its_batch(pipe, fields):
    prompts, seeds = ("a red apple", "cat", "two (blue:1.3) hats", ""), (9, 1, 5, 9)
    negatives = ("", "blurry, text", "x", "")
    requests = [
        Request(prompt=p, negative_prompt=n, seed=s, steps=5, width=64, height=64, **fields)
        for p, n, s in zip(prompts, negatives, seeds, strict=True)
    ]
    images = [picture(i) if "image" in fields else None for i in range(4)]
    masks = [mask() if "mask" in fields else None for _ in range(4)]
    assert len({job.batch_key for job in pipe.jobs(requests, images, masks)}) == 1
    together = pipe.generate(requests, images=images, masks=masks)
    for i, request in enumerate(requests):
        alone = pipe.generate(request, images=images[i : i + 1], masks=masks[i : i + 1])[0]
        assert difference(alone, together[i]) <= GREY_LEVEL


def test_a_negative_prompt_that_is_not_used_does_not_join_batches(sd1):
    """Without guidance it is not encoded, so its length must not pad the prompt either."""
    long = ", ".join(["red apple"] * 60)
    requests = [
        Request(prompt="a cat", negative_prompt=long, guidance_scale=1, steps=2, seed=1),
        Request(prompt=long, guidance_scale=1, steps=2, seed=2),
    ]
    assert len({job.batch_key for job in sd1.jobs(requests)}) == 2


def test_clip_skip_holds_for_the_negative_prompt_too(sd1):
    jobs = sd1.jobs(Request(prompt="a cat", negative_prompt="blurry", clip_skip=1))
    negative, positive = conditioning(sd1, jobs).context
    for prompt, found in (("blurry", negative), ("a cat", positive)):
        skipped, whole = (sd1.text.encode([prompt], clip_skip=skip).context[0] for skip in (1, 0))
        assert torch.equal(found, skipped) and not torch.equal(found, whole)


def test_latents_are_float32_where_weights_are_not():
    pipe = Pipeline.load("tiny", dtype="bfloat16", device="cpu")
    assert next(pipe.denoiser.parameters()).dtype == torch.bfloat16
    assert all(x.dtype == torch.float32 for x in pipe.sample_latents(Request(prompt="a cat", steps=2)))


def test_requests_that_cannot_share_a_batch_come_back_in_order(sd1):
    long = ", ".join(["a very long prompt"] * 30)
    variants = [
        {},
        {"width": 80},
        {"steps": 3},
        {"guidance_scale": 1.0},
        {"solver": "euler"},
        {"prompt": long},
        {"clip_skip": 1},
    ]
    requests = [Request(**{"prompt": "a", "steps": 2, "seed": i} | fields) for i, fields in enumerate(variants * 2)]
    assert list(Counter(job.batch_key for job in sd1.jobs(requests)).values()) == [2] * 7
    for request, image in zip(requests, sd1.generate(requests), strict=True):
        assert difference(image, sd1.generate(request)[0]) <= GREY_LEVEL
    with pytest.raises(ValueError, match="cannot share a batch"):
        next(sd1.sample_latents(requests[:2]))


def test_guidance_scales_may_differ_within_a_batch(sd1):
    requests = [Request(prompt="a", seed=1, steps=4, guidance_scale=scale) for scale in (2.0, 9.0)]
    assert len({job.batch_key for job in sd1.jobs(requests)}) == 1
    for request, image in zip(requests, sd1.generate(requests), strict=True):
        assert difference(image, sd1.generate(request)[0]) <= GREY_LEVEL


def test_call_counts_seeds_up_and_keeps_the_order_of_prompts(sd1):
    images = sd1(["a", "b"], seed=[10, 20], num_images=2, steps=1)
    recipes = [sdlite.Request(**json.loads(image.info["sdlite"])["request"]) for image in images]
    assert [(r.prompt, r.seed) for r in recipes] == [("a", 10), ("a", 11), ("b", 20), ("b", 21)]
    with pytest.raises(ValueError, match="seed has 3 entries for 2 prompts"):
        sd1(["a", "b"], seed=[1, 2, 3])
    with pytest.raises(ValueError, match="num_images=0"):
        sd1("a", num_images=0)


def test_steps_are_yielded_as_they_are_made(sd1):
    request = Request(prompt="a", steps=6)
    latents = list(sd1.sample_latents([request]))
    assert len(latents) == sd1.jobs(request)[0].evaluations == 6
    assert difference(sd1.decode(latents[-1], [request])[0], sd1.generate(request)[0]) == 0
    assert sd1.jobs(request.replace(solver="pndm"))[0].evaluations == 7
    assert sd1.jobs(request.replace(image="x", strength=0.5), [picture(0)])[0].evaluations == 3


def test_draw_gives_steps_and_images_in_batches_of_a_size(sd1):
    """Two groups of 2 and 3 steps; the larger one in batches of up to two."""
    requests = [Request(prompt="a", seed=i, steps=2 if i == 1 else 3) for i in range(4)]
    jobs = sd1.jobs(requests)
    assert [(job.evaluations, job.start, job.guided, job.chunks, job.size) for job in jobs[:2]] == [
        (3, 0, True, 1, (64, 64)),
        (2, 0, True, 1, (64, 64)),
    ]
    events = list(sd1.draw(jobs, batch_size=2))
    told = [(e.batch, e.step, e.of, e.done) if isinstance(e, Step) else e.index for e in events]
    assert told == [
        *[([0, 2], i, 3, i) for i in range(4)], 0, 2,
        *[([3], i, 3, 3 + i) for i in range(4)], 3,
        *[([1], i, 2, 6 + i) for i in range(3)], 1,
    ]  # fmt: skip
    assert {e.total for e in events if isinstance(e, Step)} == {8} and events[0].latents is None
    assert events[1].latents.shape == (2, 4, 8, 8)
    for event, alone in zip((events[4], events[5]), sd1.generate([requests[0], requests[2]]), strict=True):
        assert event.picture.tobytes() == alone.tobytes() and event.picture.info == alone.info


def test_draw_stops_between_batches(sd1):
    drawn = []
    for event in sd1.draw(sd1.jobs([Request(prompt="a", seed=i, steps=2) for i in range(3)]), batch_size=1):
        if isinstance(event, Finished):
            drawn.append(event.index)
        elif event.step == 0 and len(drawn) == 2:
            break
    assert drawn == [0, 1]


@pytest.mark.parametrize("family", ["sd1", "dit"])
def test_a_denoiser_can_be_wrapped(pipe):
    calls = []

    class Counted(Wrapper):
        def __call__(self, x, t, memory):
            calls.append(len(x))
            return self.denoiser(x, t, memory)

    class Bare:
        """Says nothing of its inputs: they are those of the denoiser that it wraps."""

        def __init__(self, denoiser):
            self.denoiser, self.prediction, self.prepare = denoiser, denoiser.prediction, denoiser.prepare

        def __call__(self, x, t, memory):
            return self.denoiser(x, t, memory)

    for wrap in (Bare, lambda denoiser: Counted(Bare(denoiser))):
        bare = pipe.with_denoiser(wrap).with_denoiser(Bare)
        assert (bare.size_unit, bare.inpainting) == (pipe.size_unit, False)
        assert difference(bare("a", steps=3)[0], pipe("a", steps=3)[0]) == 0
    calls.clear()
    wrapped = pipe.with_denoiser(Counted)
    assert difference(wrapped("a", steps=3)[0], pipe("a", steps=3)[0]) == 0
    assert calls == [1, 1, 1]
    assert wrapped.about is pipe.about and pipe.with_denoiser(Counted, about=About("counted")).name == "counted"
    with pytest.raises(ValueError, match="a Counted cannot be saved; save the pipeline whose denoiser sdlite loaded"):
        wrapped.save("nowhere")


def test_another_denoiser_brings_its_own_limits(sd1, dit, inpainting):
    """A DiT's patches of 2 by 2 cells of 8 pixels do not divide 72; an inpainting model needs a mask."""
    patched, painting = (sd1.with_denoiser(lambda _, pipe=pipe: pipe.denoiser) for pipe in (dit, inpainting))
    assert (sd1.size_unit, patched.size_unit) == (8, 16)
    with pytest.raises(ValueError, match="width=72 must be a multiple of 16"):
        patched.jobs(Request(prompt="a", width=72, height=64))
    with pytest.raises(ValueError, match="is an inpainting model"):
        painting.jobs(Request(prompt="a"))


def test_each_file_and_image_is_opened_once(sd1, tmp_path, monkeypatch):
    count = []
    monkeypatch.setattr(
        "sdlite.pipeline.job.open_picture", lambda *args, **more: count.append(1) or open_picture(*args, **more)
    )
    for name in "ab":
        picture(0).save(tmp_path / f"{name}.png")
    paths = [f"{tmp_path}/{name}.png" for name in "aaba"]
    requests, same = [Request(prompt="a", seed=seed) for seed in range(4)], picture(1)
    for sources, opens in ((paths, 2), ([Path(path).read_bytes() for path in paths], 1),
                           ([same] * 4, 1), ([same, same.copy(), None, same], 2)):  # fmt: skip
        count.clear()
        jobs = sd1.jobs(requests, sources)
        assert len(count) == opens and [job.image is None for job in jobs] == [source is None for source in sources]
    ready = Opened.of(same.convert("RGB"))
    count.clear()
    assert len(sd1(["a", "b"], image=ready, steps=2, num_images=2, width=80, height=64)) == 4 and not count


def test_latents_decoded_alone_record_the_checksums_of_their_images(sd1):
    fields = {"steps": 4, "seed": 2, "width": 80, "height": 64}
    drawn = sd1("a", image=picture(1), mask=mask(), **fields)[0]
    for request in (Request(prompt="a", **fields), Request(prompt="a", image="x.png", mask="y.png", **fields)):
        given = {"images": [picture(1)], "masks": [mask()]}
        *_, latents = sd1.sample_latents(request, **given)
        decoded = sd1.decode(latents, request, **given)[0]
        assert decoded.info == drawn.info and decoded.tobytes() == drawn.tobytes()
    assert "unknown" not in drawn.info["sdlite"]


@pytest.mark.parametrize("size", [0, -1])
def test_batches_have_at_least_one_image(sd1, size):
    with pytest.raises(ValueError, match=f"^batch_size={size} must be at least 1$"):
        next(sd1.draw(sd1.jobs(Request(prompt="a")), batch_size=size))


def test_only_an_inpainting_model_sees_the_masked_image(sd1, inpainting, monkeypatch):
    for pipe, expected in ((sd1, 1), (inpainting, 2)):
        encoded, encode = [], pipe.codec.encode
        encode = lambda *args, own=encode, seen=encoded: seen.append(1) or own(*args)  # noqa: E731
        monkeypatch.setattr(pipe.codec, "encode", encode)
        pipe("a", image=picture(1), mask=mask(), steps=4, width=80, height=64)
        assert len(encoded) == expected


def test_plain_parts_compute_where_the_model_was_loaded(monkeypatch):
    class Plain:
        def __init__(self, part):
            self.part = part

        def __getattr__(self, name):
            return getattr(self.part, name)

    monkeypatch.setattr("sdlite.pipeline.pipeline.find_device", lambda _: torch.device("meta"))
    pipe = Pipeline.load("tiny", dtype="float32")
    assert (pipe.about.device, pipe.device.type) == ("meta", "meta")
    plain = pipe.with_parts(text=Plain(pipe.text), denoiser=Plain(pipe.denoiser), codec=Plain(pipe.codec))
    assert plain.device.type == "meta"


def test_pictures_must_fit_the_requests(sd1):
    plain, started = Request(prompt="a", steps=2), Request(prompt="a", steps=2, image="photo.png")
    for requests, images, message in [
        ([started, started], [picture(0)], "images has 1 entries for 2 prompts"),
        ([started, started], [picture(0), None], "image='photo.png': open the image"),
        (started, None, "image='photo.png': open the image"),
        ([], None, "there are no requests"),
    ]:
        for draw in (sd1.generate, sd1.sample_latents):
            with pytest.raises(ValueError, match=message):
                draw(requests, images=images)
    with_picture, without = (list(sd1.sample_latents(plain, images=images)) for images in ([picture(0)], None))
    assert len(with_picture) < len(without), "a picture that is given is used"


@pytest.mark.parametrize(
    ("given", "sides", "expected"),
    [
        ((60, 44), {}, (56, 40)),  # smaller than the model's 64x64: cut to multiples of 8
        ((4032, 3024), {}, (72, 56)),  # the same shape on the same area
        ((3024, 4032), {}, (56, 72)),
        ((4000, 10), {}, (1280, 8)),
        ((4032, 3024), {"width": 128}, (128, 96)),
        ((4032, 3024), {"height": 48}, (64, 48)),
        ((4032, 3024), {"width": 80, "height": 32}, (80, 32)),
    ],
)
def test_a_picture_to_start_from_is_fitted_into_the_model(sd1, given, sides, expected):
    large = Image.new("RGB", given)
    (job,) = sd1.jobs(Request(prompt="a", image="x", **sides), [large])
    assert (job.request.width, job.request.height) == job.size == expected
    assert [f"is made {expected[0]}x{expected[1]}" in note for note in job.remarks] == [True] * (
        given[0] > 64 and not sides
    )


def test_pictures_are_read_alike_wherever_they_come_from(sd1, tmp_path):
    """From a file, its bytes and a PIL image: transparent is white, and is kept where it is a mask."""
    start, area = picture(0, (64, 64)).convert("RGBA"), Image.new("RGBA", (64, 64), (255, 255, 255, 0))
    start.paste((9, 9, 9, 0), (0, 0, 32, 64))
    area.paste("white", (16, 16, 40, 48))
    drawn = []
    for i, kind in enumerate(("file", "bytes", "PIL")):
        given = []
        for name, image in (("image", start), ("mask", area)):
            image.save(path := tmp_path / f"{name}{i}.png")
            given.append({"file": str(path), "bytes": path.read_bytes(), "PIL": image}[kind])
        drawn += sd1("a", image=given[0], mask=given[1], steps=3)
    assert drawn[0].tobytes() == drawn[1].tobytes() == drawn[2].tobytes()
    assert drawn[0].getpixel((2, 2)) == (255, 255, 255)
    speck = Image.new("L", (512, 512))
    speck.paste(255, (5, 5, 8, 8))
    for nothing, reason in (
        (Image.new("L", (64, 64)), "has nothing white"),
        (speck, "too small to be redrawn at 64x64"),
    ):
        with pytest.raises(ValueError, match=reason):
            sd1("a", image=start, mask=nothing)


def test_inpainting_leaves_the_rest_alone(sd1):
    start, area = picture(1, (128, 128)), Image.new("L", (128, 128))
    area.paste(255, (64, 0, 128, 128))
    fields = {"image": start, "mask": area, "steps": 4, "width": 128, "height": 128}
    pasted, soft, raw = (sd1("a", **fields, **more)[0] for more in ({}, {"mask_blur": 1}, {"paste": False}))
    kept = (0, 0, 64 - 24, 128)
    assert difference(pasted.crop(kept), start.crop(kept)) == 0 < difference(raw.crop(kept), start.crop(kept))
    inside = (64 + 24, 0, 128, 128)
    assert difference(pasted.crop(inside), raw.crop(inside)) == 0
    assert difference(soft.crop((0, 0, 64 - 6, 128)), start.crop((0, 0, 64 - 6, 128))) == 0
    recipes = [json.loads(image.info["sdlite"])["request"] for image in (pasted, raw)]
    assert recipes[0]["paste"] is True and "paste" not in recipes[1]
    latents = torch.zeros(1, 4, 16, 16)
    alone = sd1.decode(latents, Request(prompt="a", image="x", mask="y"))[0]
    assert "paste" not in json.loads(alone.info["sdlite"])["request"], "without the picture nothing was pasted"


def test_python_warns_of_what_is_read_otherwise(sd1):
    with pytest.warns(UserWarning, match="'<lora:a:1>' is read as plain text") as caught:
        sd1("x <lora:a:1>", steps=1, num_images=2)
    assert len(caught) == 1


def test_a_model_with_two_sides_draws_what_diffusers_draws(tmp_path):
    """[height, width] in latent cells, as in UNet2DConditionModel's config."""
    parts = random_model(tiny().replace(sample_size=(6, 10)), seed=0)
    schedule = Schedule(parts.config.schedule)
    pipe = Pipeline(parts.text, parts.denoiser, parts.codec, schedule, about=About("x", sample_size=(6, 10)))
    pipe.save(tmp_path / "wide")
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "wide", local_files_only=True)
    expected = theirs("a cat", num_inference_steps=2, generator=generators(5)).images[0]
    found = Pipeline.load(tmp_path / "wide")("a cat", seed=5, steps=2, guidance_scale=THEIRS)[0]
    assert found.size == (80, 48) and difference(found, expected) <= GREY_LEVEL


@pytest.mark.parametrize("solver", ["ddim", "ddpm", *SCHEDULERS])
@pytest.mark.parametrize("steps", [1, 2, 51, 999, 1000])
def test_every_number_of_steps_gives_an_image_or_one_line(sd1, solver, steps):
    request = Request(prompt="a", solver=solver, steps=steps)
    if steps > {"lcm": 50, "pndm": 999, "dpmpp_2m": 999, "unipc": 999}.get(solver, 1000):
        with pytest.raises(ValueError, match=f"steps={steps} must be up to .* with solver={solver!r}"):
            sd1.jobs(request)
    else:
        assert sd1.jobs(request)[0].evaluations >= steps


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"seed": None}, "seed=None must be a whole number"),
        ({"seed": 1.5}, "seed=1.5 must be a whole number"),
        ({"num_images": "2"}, "num_images='2' must be a whole number"),
        ({"image": 3}, "image must be a PIL image, a file or its bytes, not int"),
        ({"image": b"x"}, "the image is not a PNG"),
        ({"negative_prompt": ["a", "b"]}, "negative_prompt has 2 entries for 1 prompts"),
        ({"num_inference_steps": 3}, "unknown field 'num_inference_steps'; did you mean 'steps'"),
        ({"solver": "lcm", "steps": 60}, "steps=60 must be up to 50 with solver='lcm'"),
        ({"width": 500}, "width=500 must be a multiple of 8.*use 496 or 504"),
        ({"height": 12}, "height=12 must be a multiple of 8.*use 8 or 16"),
        ({"width": 10**6}, "width=1000000 must be less than or equal to 4096"),
        ({"steps": 0}, "steps=0 must be greater"),
        ({"steps": 10**9}, "steps=1000000000 must be less"),
        ({"seed": -1}, "seed=-1 must be greater"),
        ({"seed": 2**64}, "seed=18446744073709551616 must be less"),
        ({"guidance_scale": math.nan}, "guidance_scale=nan must be a finite number"),
        ({"guidance": 3}, "unknown field 'guidance'; did you mean 'guidance_scale'"),
        ({"eta": 0.5, "solver": "euler"}, "eta=0.5 has no effect with solver='euler'"),
        ({"clip_skip": 3}, "clip_skip=3 must be 0 to 2"),
        ({"strength": 0.01, "image": picture(0), "steps": 10}, "strength=0.01 of 10 steps runs none; use strength 0.1"),
        ({"mask": mask()}, "mask needs an image"),
    ],
)
def test_bad_requests_are_one_line_errors(sd1, fields, message):
    with pytest.raises(ValueError, match=message) as caught:
        sd1("a", **fields)
    assert "\n" not in str(caught.value)


def test_an_inpainting_model_needs_a_mask(inpainting):
    for fields in ({}, {"image": picture(0)}):
        with pytest.raises(ValueError, match=r"inpainting model.*give image and mask"):
            inpainting("a", **fields)


def test_values_that_are_not_finite_are_an_error_and_not_a_black_image(sd1):
    latents = torch.full((1, 4, 8, 8), math.nan)
    with pytest.raises(FloatingPointError, match="seed=7: the image is not finite"):
        sd1.decode(latents, [Request(prompt="a", seed=7)])


def test_drawing_opens_no_socket(sd1, monkeypatch):
    monkeypatch.setattr(socket.socket, "connect", lambda *args: pytest.fail("network"))
    sd1("a", steps=1)


@pytest.mark.parametrize(
    ("codec", "size"),
    [
        (AutoencoderKLConfig(block_out_channels=(4, 4, 4, 4), layers_per_block=1, norm_num_groups=4), (1280, 896)),
        (AutoencoderTinyConfig(decoder_block_out_channels=(4,) * 4, num_decoder_blocks=(1,) * 4), (1032, 1024)),
    ],
)
def test_large_images_are_decoded_in_one_piece(codec, size):
    """In tiles, each normalised by itself, they had seams and blocks of another colour (diffusers' tiled decode)."""
    pipe = make(tiny().replace(codec=codec))
    latents = torch.randn(1, 4, size[1] // 8, size[0] // 8, generator=generators(0)[0])
    latents[..., : size[0] // 16] *= 3  # two halves of different contrast, which tiles would level out
    with torch.no_grad():
        images = pipe.codec.model.decode(latents / codec.scaling_factor).sample
    expected = VaeImageProcessor().postprocess(images, output_type="pil")[0]
    assert difference(pipe.decode(latents, Request(prompt="a"))[0], expected) <= GREY_LEVEL


def test_what_no_memory_can_decode_is_refused_beforehand(sd1, monkeypatch):
    monkeypatch.setattr("sdlite.pipeline.job.total_memory", lambda _: 2**20)
    with pytest.raises(ValueError, match=r"width=512, height=256: to decode .* 0\.0 GiB .* smaller"):
        sd1.jobs(Request(prompt="a", width=512, height=256))
    assert sd1.jobs(Request(prompt="a"))[0].size == (64, 64)


@pytest.mark.parametrize("family", ["sd1", "sd2"])
def test_saved_folder_and_single_file_draw_what_diffusers_draws_from_them(family, request, tmp_path):
    """Saved and loaded again in both layouts, and in diffusers through its own loaders of each."""
    pipe = request.getfixturevalue(family)
    folder, file = tmp_path / "folder", tmp_path / "single.safetensors"
    pipe.save(folder)
    convert(folder, file)
    drawing = {"width": 64, "height": 64, "num_inference_steps": 10}
    reference = diffusers.StableDiffusionPipeline.from_pretrained(folder, local_files_only=True)
    single = diffusers.StableDiffusionPipeline.from_single_file(file, config=str(folder), local_files_only=True)
    expected = [each("a cat", generator=generators(5), **drawing).images[0] for each in (reference, single)]
    assert difference(*expected) <= GREY_LEVEL
    convert(folder, tmp_path / "half", dtype=torch.float16)
    rounded = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "half", local_files_only=True)
    from_half = rounded("a cat", generator=generators(5), **drawing).images[0]
    ours = Pipeline.load(tmp_path / "half")("a cat", seed=5, steps=10, width=64, height=64, guidance_scale=THEIRS)[0]
    assert difference(ours, from_half) <= GREY_LEVEL
    for path in (folder, file):
        loaded = Pipeline.load(path)
        assert loaded.model_hash == load_model(folder).hash
        assert (
            difference(loaded("a cat", seed=5, steps=10, width=64, height=64, guidance_scale=THEIRS)[0], expected[0])
            <= GREY_LEVEL
        )


def test_a_saved_dit_draws_the_same(tmp_path):
    pipe = Pipeline.load("tiny-dit")
    drawn = pipe("a cat", seed=5, steps=4, guidance_scale=THEIRS)[0]
    expected = reference_pipeline(pipe)("a cat", num_inference_steps=4, width=64, height=64, generator=generators(5))
    assert difference(drawn, expected.images[0]) <= GREY_LEVEL
    pipe.save(tmp_path / "dit")
    loaded = Pipeline.load(tmp_path / "dit")
    assert loaded.model_hash == pipe.model_hash and loaded.size_unit == 16
    assert difference(loaded("a cat", seed=5, steps=4, guidance_scale=THEIRS)[0], drawn) <= GREY_LEVEL


def test_sizes_that_the_patches_of_a_dit_do_not_divide_are_cut_or_refused(dit):
    for sides in ({"height": 72}, {"width": 72}):
        with pytest.raises(ValueError, match=r"=72 must be a multiple of 16, .* by 8 .*patches.* 2 cells.* 64 or 80$"):
            dit("a", **sides)
    assert dit("a", image=picture(0, (60, 60)), steps=2)[0].size == (48, 48)


@pytest.mark.parametrize(
    ("device", "message"), [("bogus", "must be one of auto, cpu"), ("cuda:99", "is not there"), ("auto:0", "one of")]
)
def test_devices_that_are_not_there_are_one_line_errors(device, message):
    with pytest.raises(ValueError, match=message):
        Pipeline.load("tiny", device=device)


def test_prediction_overrides_an_untrained_model_too():
    assert Pipeline.load("tiny", prediction="v").denoiser.prediction == "v"
    assert Pipeline.load("tiny").denoiser.prediction == "epsilon"
