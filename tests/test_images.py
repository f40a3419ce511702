"""sdlite.images against diffusers' image processor, Automatic1111's reading rule, hostile files and failing disks."""

import errno
import os
import resource
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image

from sdlite import images
from sdlite.images import files, pixels, recipe
from sdlite.request import Request

PLAIN = Request(prompt="a red apple", seed=42)


def noise_picture(width: int, height: int, mode: str = "RGB", seed: int = 0) -> Image.Image:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (height, width, 3), dtype=torch.uint8, generator=generator)
    return Image.fromarray(pixels.numpy()).convert(mode)


def texts(request: Request = PLAIN, **changes: object) -> dict[str, str]:
    fields = {"model": "toy", "model_hash": "0123456789abcdef", "prediction": "v"} | changes
    return recipe.metadata(request.replace(width=64, height=48), **fields)


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def saved(path: Path, request: Request = PLAIN, **changes: object) -> Path:
    picture = noise_picture(8, 8)
    picture.info.update(texts(request, **changes))
    images.save_picture(picture, path)
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


def test_metadata_can_be_left_out(tmp_path: Path):
    picture = noise_picture(8, 8)
    picture.info.update(texts())
    images.save_picture(picture, tmp_path / "a.png", with_metadata=False)
    with Image.open(tmp_path / "a.png") as bare:
        assert bare.text == {}
    with pytest.raises(ValueError, match="holds no sdlite metadata"):
        images.read_metadata(tmp_path / "a.png")


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
        "a text that is larger than 1 MiB",
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
        images.open_picture(tmp_path / "a.png")
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
            assert images.open_picture(tmp_path / "a").mode == "RGB"
        except ValueError as fault:
            assert "\n" not in str(fault)


@pytest.mark.filterwarnings("error")
def test_damaged_exif_costs_no_pixels(tmp_path: Path):
    """What a JPEG's texts are in may be torn, and Pillow raises SyntaxError; its pixels are as good as before."""
    picture = noise_picture(16, 16)
    picture.info.update(texts())
    whole = images.picture_bytes(picture, "JPEG")
    start, generator = whole.index(b"Exif") + 6, torch.Generator().manual_seed(1)
    pixels = images.open_picture(whole).tobytes()
    for place in torch.randint(0, 120, (100,), generator=generator).tolist():
        data = bytearray(whole)
        data[start + place] ^= 0xA5
        (tmp_path / "a.jpg").write_bytes(data)
        assert images.open_picture(tmp_path / "a.jpg").tobytes() == pixels
        files.read_texts(tmp_path / "a.jpg")
    data = whole.replace(b"MM\0*", b"MM\0x")
    (tmp_path / "a.jpg").write_bytes(data)
    assert files.read_texts(tmp_path / "a.jpg") == {}


def test_not_a_file(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        images.open_picture(tmp_path / "none.png")
    for odd in (tmp_path, Path("/dev/zero")):
        with pytest.raises(FileNotFoundError, match="is not a file"):
            images.open_picture(odd)


def test_pictures_of_every_kind_become_rgb(tmp_path: Path):
    path = tmp_path / "a.png"
    for mode in ("RGB", "RGBA", "LA", "L", "P", "1"):
        noise_picture(8, 8, mode).save(path)
        assert images.open_picture(path).mode == "RGB"
    Image.new("RGBA", (2, 1), (255, 0, 0, 0)).save(path)
    assert images.open_picture(path).getpixel((0, 0)) == (255, 255, 255)  # transparent is white, not what lies under it
    Image.new("I;16", (2, 1), 0x8080).save(path)
    assert images.open_picture(path).getpixel((0, 0)) == (128, 128, 128)  # 16 bits are scaled, not clipped


def test_photo_of_a_phone_is_no_animation(tmp_path: Path):
    """Phones append a preview to a JPEG, which Pillow then reads as two frames."""
    noise_picture(8, 8).save(tmp_path / "a.jpg", "MPO", save_all=True, append_images=[noise_picture(4, 4)])
    assert images.open_picture(tmp_path / "a.jpg").size == (8, 8)
    noise_picture(8, 8).save(tmp_path / "b.webp", save_all=True, append_images=[noise_picture(8, 8, seed=1)])
    with pytest.raises(ValueError, match="is an animation"):
        images.open_picture(tmp_path / "b.webp")


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
    upright = images.open_picture(tmp_path / "a.png")
    assert upright.size == (2, 4) and upright.getpixel((1, 0)) == (255, 255, 255)


def test_digest_is_of_the_pixels(tmp_path: Path):
    picture = noise_picture(8, 8)
    picture.save(tmp_path / "a.png", compress_level=0)
    picture.save(tmp_path / "b.png", compress_level=9)
    first, second = (images.digest(images.open_picture(tmp_path / name)) for name in ("a.png", "b.png"))
    assert first == second == images.digest(picture) != images.digest(noise_picture(8, 8, seed=1))
    assert images.digest(Image.new("RGB", (2, 3))) != images.digest(Image.new("RGB", (3, 2)))


def test_save_never_replaces_without_force(tmp_path: Path):
    (tmp_path / "a.png").write_bytes(b"mine")
    with pytest.raises(FileExistsError, match=r"a\.png exists; --force"):
        images.save_picture(noise_picture(8, 8), tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes() == b"mine"
    images.save_picture(noise_picture(8, 8), tmp_path / "a.png", force=True)
    assert images.open_picture(tmp_path / "a.png").size == (8, 8)
    assert names(tmp_path) == ["a.png"]


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("step", ["os.fsync", "pathlib.Path.replace", "pathlib.Path.hardlink_to", "KeyboardInterrupt"])
def test_failing_save_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, force: bool):
    fault = KeyboardInterrupt() if step == "KeyboardInterrupt" else OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def fail(*_: object) -> None:
        raise fault

    monkeypatch.setattr("os.fsync" if step == "KeyboardInterrupt" else step, fail)
    if (step.endswith("replace") and not force) or (step.endswith("hardlink_to") and force):
        images.save_picture(noise_picture(8, 8), tmp_path / "a.png", force=force)  # this way does not take that step
    elif step.endswith("hardlink_to"):
        images.save_picture(noise_picture(8, 8), tmp_path / "a.png")  # a disk without links: claimed, then moved
        with pytest.raises(FileExistsError):
            images.save_picture(noise_picture(8, 8), tmp_path / "a.png")
    else:
        with pytest.raises(type(fault)):
            images.save_picture(noise_picture(8, 8), tmp_path / "a.png", force=force)
        assert names(tmp_path) == []
        return
    assert names(tmp_path) == ["a.png"] and images.open_picture(tmp_path / "a.png").size == (8, 8)


def test_full_disk_leaves_nothing(tmp_path: Path):
    """A real limit of the system: the write itself fails part-way."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            images.save_picture(noise_picture(64, 64), tmp_path / "a.png")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert names(tmp_path) == []


def test_folder_that_cannot_be_written(tmp_path: Path):
    (tmp_path / "file").write_text("")
    for folder in ("/proc/self", tmp_path / "file"):
        with pytest.raises(OSError):
            images.save_picture(noise_picture(8, 8), Path(folder) / "a.png")


def test_killed_writer_leaves_no_half_picture(tmp_path: Path):
    code = (
        "import os, sys; from PIL import Image; from sdlite import images\n"
        "os.fsync = lambda _: os.kill(os.getpid(), 9)\n"
        "images.save_picture(Image.new('RGB', (8, 8)), sys.argv[1])"
    )
    assert subprocess.run([sys.executable, "-c", code, tmp_path / "a.png"], timeout=60).returncode == -9
    assert not (tmp_path / "a.png").exists()


def test_next_free_name(tmp_path: Path):
    assert files.next_free_name(tmp_path, 7).name == "000000-7.png"
    for name in ("000000-7.png", "000041-1.png", "000050.png", "x-000099-1.png"):
        (tmp_path / name).touch()
    assert files.next_free_name(tmp_path, 7).name == "000042-7.png"
    assert files.next_free_name(tmp_path / "missing", 7).name == "000000-7.png"


def test_every_source_of_a_picture_is_read_alike(tmp_path: Path):
    turned = Image.Exif()
    turned[0x0112] = 6
    for image, options in (
        (Image.new("I;16", (3, 2), 0x8080), {}),
        (noise_picture(3, 2, "RGBA"), {}),
        (noise_picture(3, 2), {"exif": turned}),
    ):
        image.save(tmp_path / "a.png", **options)
        with Image.open(tmp_path / "a.png") as opened:
            opened.load()
        sources = (tmp_path / "a.png", str(tmp_path / "a.png"), (tmp_path / "a.png").read_bytes(), opened)
        pictures = [images.open_picture(source) for source in sources]
        assert len({(picture.size, picture.tobytes()) for picture in pictures}) == 1
        assert pictures[0].mode == "RGB"
    assert images.open_picture(Image.new("I;16", (2, 1), 0x8080)).getpixel((0, 0)) == (128, 128, 128)
    assert images.open_picture(opened).size == (2, 3)


def test_pictures_given_in_python_have_limits_too(tmp_path: Path):
    noise_picture(64, 64).save(tmp_path / "a.png")
    (tmp_path / "half.png").write_bytes((tmp_path / "a.png").read_bytes()[:5000])
    for image, reason in (
        (Image.open(tmp_path / "half.png"), "the image is damaged"),
        (Image.new("RGB", (0, 5)), "the image is 0x5, without a pixel"),
        (Image.new("1", (4097, 4097)), "the image has more than 16 megapixels"),
        (Image.new("F", (2, 2)), "the image has floating-point pixels"),
        (b"", "the image is not a PNG"),
    ):
        with pytest.raises(ValueError, match=reason):
            images.open_picture(image)


def test_masks_keep_what_is_transparent_and_must_repaint_something():
    mask = Image.new("RGBA", (4, 1), (255, 255, 255, 0))
    mask.putpixel((1, 0), (255, 255, 255, 255))
    mask.putpixel((2, 0), (0, 0, 0, 255))
    opened = images.open_picture(mask, for_mask=True)
    assert [opened.getpixel((x, 0))[0] for x in range(4)] == [0, 255, 0, 0]
    for nothing in (
        Image.new("L", (4, 4), 127),
        Image.new("RGBA", (4, 4), (255, 255, 255, 100)),
        Image.new("1", (4, 4)),
    ):
        with pytest.raises(ValueError, match="the mask has nothing white"):
            images.open_picture(nothing, for_mask=True)


def test_what_is_said_of_a_mask():
    start, clear = Image.new("RGB", (64, 64)), Image.new("RGB", (64, 64))
    clear.paste("white", (0, 0, 32, 64))
    clear.putpixel((32, 0), (128, 128, 128))  # the soft rim of a brush
    assert (pixels.has_grey(start), pixels.has_grey(clear)) == (False, False)
    assert pixels.has_grey(Image.linear_gradient("L").resize((64, 64)))
    assert pixels.mask_notes((64, 64), False, (64, 64)) == []
    assert "cut at half" in pixels.mask_notes((64, 64), True, (64, 64))[0]
    assert "64x64 pixels and the image 32x16" in pixels.mask_notes((64, 64), False, (32, 16))[0]


@pytest.mark.parametrize("blur", [0, 4])
def test_pasting_equals_diffusers(blur: int):
    start, drawn, mask = noise_picture(64, 48), noise_picture(64, 48, seed=1), Image.new("L", (64, 48))
    mask.paste(255, (20, 10, 50, 40))
    processor = VaeImageProcessor()
    soft = processor.blur(mask, blur) if blur else mask
    expected = processor.apply_overlay(soft, start, drawn)
    assert images.largest_difference(images.pasted(drawn, start, mask, blur), expected) <= 2  # theirs rounds twice


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp"])
def test_metadata_survives_pillows_own_save(tmp_path: Path, suffix: str):
    (picture,) = images.to_pil(torch.zeros(1, 3, 8, 8))
    picture.info.update(texts())
    picture.save(tmp_path / f"a{suffix}")
    assert files.read_texts(tmp_path / f"a{suffix}") == texts()
    picture.copy().convert("L").save(tmp_path / f"b{suffix}")  # an edited picture does not claim to be the drawn one
    images.save_picture(picture, tmp_path / f"c{suffix}", with_metadata=False)
    assert files.read_texts(tmp_path / f"b{suffix}") == files.read_texts(tmp_path / f"c{suffix}") == {}


def test_a_list_of_pictures_is_saved_into_a_folder(tmp_path: Path):
    drawn = images.Images(images.to_pil(torch.zeros(2, 3, 8, 8)))
    for seed, picture in enumerate(drawn, 5):
        picture.info.update(texts(PLAIN.replace(seed=seed)))
    paths = drawn.save(tmp_path / "new")
    assert [path.name for path in paths] == ["000000-5.png", "000001-6.png"]
    assert [images.read_metadata(path).request.seed for path in drawn.save(tmp_path / "new")] == [5, 6]
    assert len(names(tmp_path / "new")) == 4


@pytest.mark.parametrize("order", ["utf-16-be", "utf-16-le"])
def test_what_automatic1111_writes_into_a_jpeg_is_read(tmp_path: Path, order: str):
    """piexif writes UTF-16 with its high byte first, other programs the other way round, and neither says so."""
    exif, text = Image.Exif(), "a fox, 猫\nSteps: 9, Sampler: Euler, Seed: 5"
    exif.get_ifd(0x8769)[0x9286] = b"UNICODE\0" + text.encode(order)
    noise_picture(8, 8).save(tmp_path / "a.jpg", exif=exif)
    assert files.read_texts(tmp_path / "a.jpg") == {"parameters": text}


@pytest.mark.parametrize("name", ["999999999-x", "999999999-7.png"])
def test_a_folder_with_the_last_number_takes_more_pictures(tmp_path: Path, name: str):
    (tmp_path / name).touch()
    (tmp_path / "1000000000-7.png").symlink_to("nowhere")
    saved_as = [images.save_numbered(noise_picture(8, 8), tmp_path, 7).name for _ in range(2)]
    assert saved_as == ["1000000001-7.png", "1000000002-7.png"]
