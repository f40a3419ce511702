"""Pictures in, masks out: tiles, folders on disk and every kind of picture."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load as load_bytes, save_file

from sdlite.cli import main
from sdlite.segmentation.pixels import pixels_of
from sdlite.segmentation.segmenter import (
    FCNPlan,
    Segmenter,
    SegmenterConfig,
    UNetPlan,
    build,
    mirrored,
)

PLANS = [
    UNetPlan(depth=2, base_width=4, padding="valid"),
    UNetPlan(depth=2, base_width=4, padding="same", upsample="interpolate", batch_norm=True),
    FCNPlan(base_width=2),
]


def segmenter(plan=PLANS[1], tile=32):
    torch.manual_seed(0)
    return Segmenter(build(plan).eval(), SegmenterConfig(network=plan, tile=tile))


def picture(width, height, mode="RGB", seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(pixels).convert(mode)


@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: plan.kind)
@pytest.mark.parametrize("size", [(1, 1), (32, 32), (20, 100), (75, 41)])
def test_mask_has_the_pictures_size(plan, size):
    mask = segmenter(plan)(picture(*size))
    assert mask.size == size
    assert mask.mode == "P"
    assert set(mask.tobytes()) <= {0, 1}


def test_tiles_make_what_one_large_tile_makes():
    image = pixels_of(picture(150, 130), 3)
    valid = [segmenter(PLANS[0], tile).probabilities(image) for tile in (20, 200)]
    assert torch.allclose(*valid, atol=1e-5)  # no padding inside: exact, but for the pooling grid, which 20 + 44 keeps
    same = [segmenter(UNetPlan(depth=1, base_width=4, padding="same"), tile).probabilities(image) for tile in (80, 200)]
    assert torch.allclose(same[0][:, 20:-20, 20:-20], same[1][:, 20:-20, 20:-20], atol=1e-5)


def test_mirror_is_numpys_reflection():
    for size in (1, 2, 5):
        expected = np.pad(np.arange(size), 7, mode="reflect") if size > 1 else np.zeros(15)
        assert mirrored(-7, size + 7, size).tolist() == expected.tolist()


def test_what_is_saved_is_what_is_loaded(tmp_path):
    for plan in PLANS:
        ours = segmenter(plan)
        ours.save(tmp_path)
        theirs = Segmenter.load(tmp_path)
        assert theirs.config == ours.config
        image = pixels_of(picture(40, 50), 3)
        assert torch.equal(ours.probabilities(image), theirs.probabilities(image))


def test_the_folder_of_a_run_is_its_export(tmp_path):
    segmenter().save(tmp_path / "run/export")
    (tmp_path / "run/config.json").write_text("{}")  # the run's own
    assert Segmenter.load(tmp_path / "run").config == segmenter().config


def test_half_precision_weights_load(tmp_path):
    segmenter().save(tmp_path)
    file = tmp_path / "model.safetensors"
    save_file({k: v.half() if v.is_floating_point() else v for k, v in load_bytes(file.read_bytes()).items()}, file)
    assert Segmenter.load(tmp_path)(picture(20, 20)).size == (20, 20)


def test_a_model_can_be_saved_where_it_was_loaded_from(tmp_path):
    segmenter().save(tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    Segmenter.load(tmp_path).save(tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    umask = os.umask(0)
    os.umask(umask)
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o666 & ~umask}  # others may read it


def one_line(folder, pattern, error=ValueError):
    with pytest.raises(error, match=pattern) as raised:
        Segmenter.load(folder)
    assert "\n" not in str(raised.value)


def test_damaged_folders_are_one_line_errors(tmp_path):
    one_line(tmp_path, r"holds no config\.json", FileNotFoundError)
    segmenter().save(tmp_path)
    config, weights = tmp_path / "config.json", tmp_path / "model.safetensors"
    good, data = config.read_text(), weights.read_bytes()
    tensors = load_bytes(data)
    plan = json.loads(good)["network"]
    for text in ("", "[]", "{}", "[" * 100_000, '{"network": 3}', '{"network": {"kind": "resnet"}}'):
        config.write_text(text)
        one_line(tmp_path, "is no segmentation model")
    config.write_text(json.dumps({"network": plan | {"base_width": 1024, "depth": 8}, "tile": 64}))
    one_line(tmp_path, "not of one model")
    config.write_text(good)
    for broken in (data[:100], data[:-8], b""):
        weights.write_bytes(broken)
        one_line(tmp_path, "is no segmentation model")
    save_file({k: v for k, v in tensors.items() if k != "score.bias"}, weights)
    one_line(tmp_path, r"score\.bias is absent")
    save_file(tensors | {"extra": torch.zeros(1)}, weights)
    one_line(tmp_path, r"extra is \(1,\) .* and absent")
    save_file(tensors | {"score.bias": torch.full((2,), torch.nan)}, weights)
    one_line(tmp_path, r"score\.bias has values that are not finite")


def test_every_kind_of_picture():
    for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "I", "I;16", "F"):
        image = picture(20, 12, "L").convert(mode) if mode == "I;16" else picture(20, 12, mode)
        for channels in (1, 3):
            assert pixels_of(image, channels).shape == (channels, 12, 20)
        assert segmenter()(image).size == (20, 12)
    with pytest.raises(ValueError, match="0 x 3"):
        pixels_of(Image.new("L", (0, 3)), 1)
    with pytest.raises(ValueError, match="not a number"):
        pixels_of(Image.fromarray(np.full((2, 2), np.nan, np.float32)), 1)


@pytest.fixture
def run(tmp_path, monkeypatch, capfd):
    """`sdlite segment` in a folder with a model and a picture: (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    segmenter().save("model")
    picture(50, 30).save("a.png")

    def command(*arguments):
        with pytest.raises(SystemExit) as ended:
            main(["segment", "-m", "model", *map(str, arguments)])
        return ended.value.code or 0, *capfd.readouterr()

    return command


def mask_of(path):
    return Segmenter.load("model")(Image.open(path)).tobytes()


def test_command_line_writes_mask_overlay_and_cutout(run):
    Image.fromarray(np.arange(600, dtype=np.uint16).reshape(20, 30)).save("deep.png")
    assert run("a.png") == (0, "mask.png\n", "")
    with Image.open("mask.png") as mask:
        assert (mask.mode, mask.size) == ("P", (50, 30))
        assert mask.tobytes() == mask_of("a.png")
    code, _, err = run("a.png")
    assert code == 2 and "--force replaces it" in err
    assert run("deep.png", "--force", "--cutout")[0] == 0
    with Image.open("mask.png") as cut:
        assert (cut.mode, cut.size) == ("RGBA", (30, 20))
    assert run("a.png", "--force", "--overlay")[0] == 0
    assert run("a.png", "--force", "--overlay", "--cutout")[0] == 2
    assert run("a.png", "-o", "o.jpg")[0] == 2
    Path("model/model.safetensors").write_bytes(b"")
    code, _, err = run("a.png", "--force")
    assert code == 2 and len(err.splitlines()) == 1


def test_a_folder_of_pictures_whatever_pillow_opens(run):
    Path("in").mkdir()
    grey, deep = picture(20, 12, "L"), np.arange(240, dtype=np.uint16).reshape(12, 20) * 200
    saved = {"b.jpg": grey, "c.tif": grey, "d.TIFF": Image.fromarray(deep), "e.bmp": grey, "f.webp": picture(20, 12)}
    for name, image in saved.items():
        image.save(Path("in", name))
    Path("in/broken.png").write_bytes(b"no picture")
    Path("in/notes.txt").write_text("not looked at")
    code, out, err = run("in", "a.png", "-o", "out")
    assert code == 1 and "in/broken.png is not a PNG, " in err and "1 of 7 failed" in err
    assert out.split() == [f"out/{name}.png" for name in "bcdefa"]
    for name in saved:
        assert Image.open(Path("out", f"{name[0]}.png")).tobytes() == mask_of(Path("in", name)), name
    Path("out/c.png").unlink()
    Path("in/broken.png").unlink()
    assert run("in", "a.png", "-o", "out") == (
        0,
        "out/c.png\n",
        "sdlite: note: 5 of 6 are there already; --force makes them again\n",
    )
    assert run("in", "-o", "out", "--force", "-q")[1].split() == [f"out/{name}.png" for name in "bcdef"]


def test_a_stack_of_pages_is_labelled_by_its_first_and_said(run):
    picture(20, 12, "L").save("stack.tif", save_all=True, append_images=[picture(20, 12, "L", seed=i) for i in (1, 2)])
    code, _, err = run("stack.tif")
    assert code == 0 and err == "sdlite: note: stack.tif has several pages; the first is labelled\n"
    assert Image.open("mask.png").tobytes() == mask_of("stack.tif")


def test_what_is_refused_before_anything_is_labelled(run):
    Path("in").mkdir()
    picture(20, 12).save("in/a.png")
    Path("empty").mkdir()
    picture(20, 12).save("in/a.jpg")
    before = {path: path.read_bytes() for path in Path().rglob("*.png")}
    for words, fault in {
        ("in", "-o", "out"): "out/a.png would be made of in/a.png and is also of in/a.jpg",
        ("in/a.png", "-o", "in", "--force"): "in/a.png would be made of in/a.png and is also of in/a.png",
        ("a.png", "-o", "a.png", "--force"): "a.png would be made of a.png",
        ("a.png", "in/a.jpg"): "several images need a folder; give one with --output",
        ("empty", "-o", "out"): "empty holds 0 names and no image",
        ("none.png",): "none.png does not exist",
    }.items():
        code, out, err = run(*words)
        assert (code, out) == (2, "") and fault in err and len(err.splitlines()) == 1
    assert {path: path.read_bytes() for path in Path().rglob("*.png")} == before


def test_force_replaces_a_link_and_not_what_it_leads_to(run):
    Path("target.png").write_bytes(b"somebody else's")
    Path("mask.png").symlink_to("target.png")
    assert run("a.png")[0] == 2
    assert run("a.png", "--force")[0] == 0
    assert not Path("mask.png").is_symlink() and Path("target.png").read_bytes() == b"somebody else's"


def test_an_error_that_nobody_foresaw_fails_one_picture(run, monkeypatch):
    whole = Segmenter.__call__

    def breaks(self, image, *rest):
        if image.width == 21:
            raise KeyError("layer")
        return whole(self, image, *rest)

    monkeypatch.setattr(Segmenter, "__call__", breaks)
    picture(21, 12).save("b.png")
    picture(20, 12).save("c.png")
    code, out, err = run("b.png", "c.png", "-o", "out", "-q")
    assert (code, out, err) == (1, "out/c.png\n", "sdlite: error: b.png: KeyError: 'layer'\n")


def test_a_shape_that_would_take_hours_is_refused():
    with pytest.raises(
        ValueError, match=r"1 x 16777216 pixels is cut into 699,051 tiles of 32 x 32, and more than 524,288"
    ):
        segmenter()(Image.new("L", (1, 1 << 24)))


def test_a_tile_that_would_fill_the_memory_is_refused(tmp_path):
    Segmenter(build(PLANS[1]), SegmenterConfig(network=PLANS[1], tile=4096)).save(tmp_path)
    assert Segmenter.load(tmp_path).tiles.side == 4096  # 4 channels of float32: 256 MiB
    plan = UNetPlan(depth=1, base_width=64, padding="same")
    Segmenter(build(plan), SegmenterConfig(network=plan, tile=4096)).save(tmp_path)
    one_line(tmp_path, "tile=4096 needs 4096 MiB a feature map, and at most 512 are given")
