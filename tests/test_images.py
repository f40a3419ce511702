"""sdlite.images against diffusers' image processor, Automatic1111's reading rule, hostile files and failing disks."""

import errno
import json
import os
import re
import resource
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
import torch
from diffusers.image_processor import VaeImageProcessor
from hypothesis import given, settings, strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngInfo

import sdlite
from sdlite import images
from sdlite.config import Request

PARAMETER = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')  # Automatic1111's re_param
PLAIN = Request(prompt="a red apple", seed=42)


def noise_picture(width: int, height: int, mode: str = "RGB", seed: int = 0) -> Image.Image:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (height, width, 3), dtype=torch.uint8, generator=generator)
    return Image.fromarray(pixels.numpy()).convert(mode)


def texts(request: Request = PLAIN, **changes: object) -> dict[str, str]:
    fields = {"model": "toy", "model_hash": "0123456789abcdef", "prediction": "v", "width": 64, "height": 48} | changes
    return images.metadata(request, **fields)


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def saved(path: Path, request: Request = PLAIN, **changes: object) -> Path:
    picture = noise_picture(8, 8)
    picture.info.update(texts(request, **changes))
    images.save_png(picture, path)
    return path


def test_to_pil_equals_diffusers():
    tensors = torch.randn(2, 3, 9, 11, generator=torch.Generator().manual_seed(0)) * 1.2
    tensors[0, 0, 0, :4] = torch.tensor([-1.0, 1.0, 1 / 255, -1 / 255])  # ends, and two exact halves
    expected = VaeImageProcessor().postprocess(tensors, output_type="pil")
    assert [ours.tobytes() for ours in images.to_pil(tensors)] == [theirs.tobytes() for theirs in expected]


@pytest.mark.parametrize("size", [(64, 48), (40, 40), (24, 88)])
def test_from_pil_equals_diffusers(size: tuple[int, int]):
    picture = noise_picture(64, 48)
    expected = VaeImageProcessor(vae_scale_factor=8).preprocess(picture, height=size[1], width=size[0])
    assert torch.equal(images.from_pil(picture, size), expected)


@pytest.mark.parametrize("mode", ["RGB", "L", "1"])
@pytest.mark.parametrize("size", [(64, 48), (40, 40)])
def test_mask_equals_diffusers(size: tuple[int, int], mode: str):
    mask = noise_picture(64, 48, mode)
    processor = VaeImageProcessor(vae_scale_factor=8, do_normalize=False, do_binarize=True, do_convert_grayscale=True)
    expected = processor.preprocess(mask, height=size[1], width=size[0])
    assert torch.equal(images.mask_from_pil(mask, size), expected)
    assert set(expected.unique().tolist()) == {0.0, 1.0}


def test_pixels_survive_the_round_trip():
    picture = noise_picture(16, 8)
    assert images.to_pil(images.from_pil(picture, picture.size))[0].tobytes() == picture.tobytes()


@given(
    st.text(max_size=200), st.text(max_size=50), st.integers(0, 2**64 - 1), st.sampled_from([*images.A1111_SAMPLERS])
)
@settings(max_examples=60, deadline=None)
def test_metadata_round_trip(tmp_path_factory: pytest.TempPathFactory, prompt: str, negative: str, seed: int, solver):
    request = Request(prompt=prompt, negative_prompt=negative, seed=seed, solver=solver, guidance_scale=0.1 + 0.2)
    path = tmp_path_factory.mktemp("round") / "a.png"
    recipe = images.read_metadata(saved(path, request))
    assert recipe.request == request.replace(width=64, height=48)
    assert (recipe.model, recipe.model_hash) == ("toy", "0123456789abcdef")
    assert recipe.versions["sdlite"] == sdlite.__version__ and recipe.versions["torch"] == torch.__version__


@pytest.mark.parametrize("prompt", ["a, b: c", "two\nlines", "Ünïcode 猫 🐈", "Steps: 1, Seed: 2, Size: 3x3", ""])
def test_automatic1111_reads_the_parameters(tmp_path: Path, prompt: str):
    request = Request(prompt=prompt, negative_prompt="blurry, bad", seed=7, clip_skip=1, solver="dpmpp_2m_karras")
    with Image.open(saved(tmp_path / "a.png", request, model='odd, "name": x')) as picture:
        *lines, last = picture.text["parameters"].split("\n")
    found = PARAMETER.findall(last)
    values = {key: json.loads(value) if value.startswith('"') else value for key, value in found}
    assert "\n".join(lines) == f"{prompt}\nNegative prompt: blurry, bad"
    assert values == {
        "Steps": "20",
        "Sampler": "DPM++ 2M",
        "Schedule type": "Karras",
        "CFG scale": "5.0",
        "Seed": "7",
        "Size": "64x48",
        "Model hash": "0123456789",
        "Model": 'odd, "name": x',
        "Clip skip": "2",
        "RNG": "CPU",
        "Version": f"sdlite-{sdlite.__version__}",
    }


def test_metadata_names_no_path():
    source = images.digest(noise_picture(4, 4))
    request = PLAIN.replace(image="/home/someone/cat.png", mask=source)
    found = texts(request, model="/home/someone/models/toy/")
    assert "someone" not in str(found) and "Denoising strength: 0.8" in found["parameters"]
    recipe = json.loads(found["sdlite"])
    assert (recipe["model"], recipe["request"]["mask"]) == ("toy", source)
    assert recipe["request"]["image"] == images.UNKNOWN_SOURCE


def test_metadata_can_be_left_out(tmp_path: Path):
    picture = noise_picture(8, 8)
    picture.info.update(texts())
    images.save_png(picture, tmp_path / "a.png", with_metadata=False)
    with Image.open(tmp_path / "a.png") as bare:
        assert bare.text == {}
    with pytest.raises(ValueError, match="holds no sdlite metadata"):
        images.read_metadata(tmp_path / "a.png")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "null",
        "[" * 100_000,
        "9" * 10_000,
        '{"request": {"prompt": "x", "code": "import os"}}',
        '{"request": {"prompt": "x", "steps": 1000000000}, "model": "", "model_hash": "", "versions": {}}',
        '{"request": {"prompt": "x", "guidance_scale": NaN}, "model": "", "model_hash": "", "versions": {}}',
        '{"request": {"prompt": "x"}, "model": "", "model_hash": "../..", "versions": {}}',
        '{"request": {"prompt": "x"}, "model": "", "model_hash": "", "versions": {"os": "1"}}',
        '{"request": {"prompt": {"a": 1}}, "model": "", "model_hash": "", "versions": {}}',
        '{"self": 1, "request": {"prompt": "x", "self": 2}}',
        "x" * (images.MAX_RECIPE_CHARS + 1),
    ],
    ids=range(13),
)
def test_hostile_metadata_is_one_line_error(tmp_path: Path, text: str):
    info = PngInfo()
    info.add_text("sdlite", text)
    noise_picture(4, 4).save(tmp_path / "a.png", pnginfo=info)
    with pytest.raises(ValueError, match="broken sdlite metadata") as fault:
        images.read_metadata(tmp_path / "a.png")
    assert "\n" not in str(fault.value) and len(str(fault.value)) < 500


def png(width: int, height: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG by hand: 1-bit gray of any declared size, and whatever chunks."""
    header = (b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0))
    blocks = [struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in (header, *chunks)]
    return b"\x89PNG\r\n\x1a\n" + b"".join(blocks)


BOMBS = {
    "huge": (png(50_000, 50_000, (b"IDAT", zlib.compress(bytes(1000))), (b"IEND", b"")), "16 megapixels"),
    "over the limit": (png(4097, 4097, (b"IDAT", b""), (b"IEND", b"")), "16 megapixels"),
    "zip bomb in a text": (
        png(8, 8, (b"zTXt", b"sdlite\0\0" + zlib.compress(bytes(64 << 20))), (b"IDAT", b""), (b"IEND", b"")),
        "is damaged",
    ),
    "no pixels": (png(8, 8, (b"IDAT", b""), (b"IEND", b"")), "is damaged"),
    "many frames": (
        png(8, 8, (b"acTL", struct.pack(">II", 10**6, 0)), (b"IDAT", zlib.compress(bytes(16))), (b"IEND", b"")),
        "is an animation",
    ),
    "empty": (b"", "not a PNG, JPEG or WebP"),
    "other": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not a PNG, JPEG or WebP"),
    "gif": (
        b"GIF89a\x01\x00\x01\x00\x80\x00\x00\xff\xff\xff\x00\x00\x00,\x00\x00\x00\x00\x01\x00\x01\x00\x00;",
        "not a",
    ),
}


@pytest.mark.parametrize("name", BOMBS)
def test_hostile_picture_is_one_line_error(tmp_path: Path, name: str):
    data, reason = BOMBS[name]
    (tmp_path / "a.png").write_bytes(data)
    with pytest.raises(ValueError, match=reason) as fault:
        images.open_image(tmp_path / "a.png")
    assert "\n" not in str(fault.value)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_broken_bytes_never_escape(tmp_path: Path, kind: str):
    noise_picture(32, 32).save(tmp_path / "whole", kind, exif=Image.Exif(), icc_profile=b"junk" * 9)
    whole = (tmp_path / "whole").read_bytes()
    generator = torch.Generator().manual_seed(1)
    for _ in range(150):
        data = bytearray(whole)
        for place in torch.randint(0, len(data), (4,), generator=generator).tolist():
            data[place] ^= 1 + place % 255
        (tmp_path / "a").write_bytes(data[: int(torch.randint(8, len(data), (1,), generator=generator))])
        try:
            assert images.open_image(tmp_path / "a").mode == "RGB"
        except ValueError as fault:
            assert "\n" not in str(fault)


def test_not_a_file(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        images.open_image(tmp_path / "none.png")
    for odd in (tmp_path, Path("/dev/zero")):
        with pytest.raises(FileNotFoundError, match="is not a file"):
            images.open_image(odd)


def test_pictures_of_every_kind_become_rgb(tmp_path: Path):
    path = tmp_path / "a.png"
    for mode in ("RGB", "RGBA", "LA", "L", "P", "1"):
        noise_picture(8, 8, mode).save(path)
        assert images.open_image(path).mode == "RGB"
    Image.new("RGBA", (2, 1), (255, 0, 0, 0)).save(path)
    assert images.open_image(path).getpixel((0, 0)) == (255, 255, 255)  # transparent is white, not what lies under it
    Image.new("I;16", (2, 1), 0x8080).save(path)
    assert images.open_image(path).getpixel((0, 0)) == (128, 128, 128)  # 16 bits are scaled, not clipped


def test_photo_of_a_phone_is_no_animation(tmp_path: Path):
    """Phones append a preview to a JPEG, which Pillow then reads as two frames."""
    noise_picture(8, 8).save(tmp_path / "a.jpg", "MPO", save_all=True, append_images=[noise_picture(4, 4)])
    assert images.open_image(tmp_path / "a.jpg").size == (8, 8)
    noise_picture(8, 8).save(tmp_path / "b.webp", save_all=True, append_images=[noise_picture(8, 8, seed=1)])
    with pytest.raises(ValueError, match="is an animation"):
        images.open_image(tmp_path / "b.webp")


def test_largest_difference():
    first, second = noise_picture(8, 8), noise_picture(8, 8)
    assert images.largest_difference(first, second) == 0
    r, g, b = second.getpixel((3, 3))
    second.putpixel((3, 3), (r, g, b + 7 if b < 128 else b - 7))
    assert images.largest_difference(first, second) == 7
    assert images.largest_difference(first, first.resize((4, 4))) == 255


def test_orientation_is_applied(tmp_path: Path):
    picture, exif = Image.new("RGB", (4, 2)), Image.Exif()
    picture.putpixel((0, 0), (255, 255, 255))
    exif[0x0112] = 6  # to be turned clockwise
    picture.save(tmp_path / "a.png", exif=exif)
    upright = images.open_image(tmp_path / "a.png")
    assert upright.size == (2, 4) and upright.getpixel((1, 0)) == (255, 255, 255)


def test_digest_is_of_the_pixels(tmp_path: Path):
    picture = noise_picture(8, 8)
    picture.save(tmp_path / "a.png", compress_level=0)
    picture.save(tmp_path / "b.png", compress_level=9)
    first, second = (images.digest(images.open_image(tmp_path / name)) for name in ("a.png", "b.png"))
    assert first == second == images.digest(picture) != images.digest(noise_picture(8, 8, seed=1))
    assert images.digest(Image.new("RGB", (2, 3))) != images.digest(Image.new("RGB", (3, 2)))


def test_save_never_replaces_without_force(tmp_path: Path):
    (tmp_path / "a.png").write_bytes(b"mine")
    with pytest.raises(FileExistsError, match=r"a\.png exists; --force"):
        images.save_png(noise_picture(8, 8), tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes() == b"mine"
    images.save_png(noise_picture(8, 8), tmp_path / "a.png", force=True)
    assert images.open_image(tmp_path / "a.png").size == (8, 8)
    assert names(tmp_path) == ["a.png"]


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("step", ["os.fsync", "pathlib.Path.replace", "pathlib.Path.hardlink_to", "KeyboardInterrupt"])
def test_failing_save_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, force: bool):
    fault = KeyboardInterrupt() if step == "KeyboardInterrupt" else OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def fail(*_: object) -> None:
        raise fault

    monkeypatch.setattr("os.fsync" if step == "KeyboardInterrupt" else step, fail)
    if (step.endswith("replace") and not force) or (step.endswith("hardlink_to") and force):
        images.save_png(noise_picture(8, 8), tmp_path / "a.png", force=force)  # this way does not take that step
    elif step.endswith("hardlink_to"):
        images.save_png(noise_picture(8, 8), tmp_path / "a.png")  # a disk without links: claimed, then moved
        with pytest.raises(FileExistsError):
            images.save_png(noise_picture(8, 8), tmp_path / "a.png")
    else:
        with pytest.raises(type(fault)):
            images.save_png(noise_picture(8, 8), tmp_path / "a.png", force=force)
        assert names(tmp_path) == []
        return
    assert names(tmp_path) == ["a.png"] and images.open_image(tmp_path / "a.png").size == (8, 8)


def test_full_disk_leaves_nothing(tmp_path: Path):
    """A real limit of the system: the write itself fails part-way."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            images.save_png(noise_picture(64, 64), tmp_path / "a.png")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert names(tmp_path) == []


def test_folder_that_cannot_be_written(tmp_path: Path):
    (tmp_path / "file").write_text("")
    for folder in ("/proc/self", tmp_path / "file"):
        with pytest.raises(OSError):
            images.save_png(noise_picture(8, 8), Path(folder) / "a.png")


def test_killed_writer_leaves_no_half_picture(tmp_path: Path):
    code = (
        "import os, sys; from PIL import Image; from sdlite import images\n"
        "os.fsync = lambda _: os.kill(os.getpid(), 9)\n"
        "images.save_png(Image.new('RGB', (8, 8)), sys.argv[1])"
    )
    assert subprocess.run([sys.executable, "-c", code, tmp_path / "a.png"], timeout=60).returncode == -9
    assert not (tmp_path / "a.png").exists()


def test_next_free_name(tmp_path: Path):
    assert images.next_free_name(tmp_path, 7).name == "000000-7.png"
    for name in ("000000-7.png", "000041-1.png", "000050.png", "x-000099-1.png"):
        (tmp_path / name).touch()
    assert images.next_free_name(tmp_path, 7).name == "000042-7.png"
    assert images.next_free_name(tmp_path / "missing", 7).name == "000000-7.png"


def test_contact_sheet():
    pictures = [Image.new("RGB", (20, 10), colour) for colour in ("red", "lime", "blue")]
    sheet = images.contact_sheet(pictures)
    assert sheet.size == (2 * 24 + 4, 2 * 14 + 4)
    assert [sheet.getpixel(place) for place in ((5, 5), (29, 5), (5, 19))] == [
        (255, 0, 0),
        (0, 255, 0),
        (0, 0, 255),
    ]
    labelled = images.contact_sheet(pictures, labels=["seed 1", "a\nb" * 90, "猫"], columns=3)
    assert labelled.size == (3 * 24 + 4, 30 + 4)
    assert labelled.crop((4, 14, 24, 30)).getextrema()[0][0] < 128  # there is ink in the caption
