"""Images in and masks out: bit depths, statistics, transparency, overlays and cut-outs."""

import numpy as np
import pytest
import torch
from PIL import Image

from sdlite.segmentation.pixels import cutout, mask_image, overlay, pixels_of, standardized, statistics
from tests.test_segmenter import picture


def test_bit_depth_and_exposure_do_not_matter():
    grey = picture(20, 12, "L")
    deep = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    dim = Image.fromarray(np.asarray(grey) // 2 * 2)
    half = Image.fromarray(np.asarray(grey) // 2)
    for a, b in ((grey, deep), (dim, half)):
        assert torch.allclose(*(standardized(pixels_of(x, 3)) for x in (a, b)), atol=1e-5)
    assert (standardized(pixels_of(Image.new("L", (4, 4), 200), 1)) == 0).all()


def test_statistics_of_a_whole_picture_hold_for_its_parts(monkeypatch):
    monkeypatch.setattr("sdlite.segmentation.pixels.BLOCK", 100)  # two rows at a time
    for image in (picture(50, 31), Image.fromarray(np.arange(1550, dtype=np.uint16).reshape(31, 50) * 40)):
        pixels = pixels_of(image, 3)
        values = pixels.numpy().astype(np.float64)
        assert np.allclose(statistics(pixels), (values.mean(), values.std()), rtol=1e-12)
        part = standardized(pixels[:, 5:9, 7:20], statistics(pixels))
        assert torch.equal(part, standardized(pixels)[:, 5:9, 7:20])


def test_transparency_is_white():
    clear = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    assert (pixels_of(clear, 3) == 255).all()
    assert (np.asarray(overlay(clear, mask_image(torch.zeros(4, 4, dtype=torch.int64)))) == 255).all()


def test_overlay_tints_the_foreground_only():
    for image in (picture(6, 4), Image.fromarray(np.arange(24, dtype=np.uint16).reshape(4, 6) * 900)):
        classes = torch.zeros(4, 6, dtype=torch.int64)
        classes[2:] = torch.arange(6)
        result = np.asarray(overlay(image, mask_image(classes))).astype(int)
        plain = np.asarray(overlay(image, mask_image(classes * 0))).astype(int)
        assert ((result != plain).any(-1) == (classes.numpy() > 0)).all()
        if image.mode == "RGB":
            assert np.array_equal(plain, np.asarray(image))
        assert cutout(image, mask_image(classes)).mode == "RGBA"
    with pytest.raises(ValueError, match="must have one size"):
        overlay(image, Image.new("P", (5, 4)))


def test_cutout_keeps_the_foreground():
    image = picture(6, 4)
    classes = torch.zeros(4, 6, dtype=torch.int64)
    classes[1:3] = 1
    result = cutout(image, mask_image(classes))
    assert np.array_equal(np.asarray(result)[..., 3], classes.numpy() * 255)
    assert np.array_equal(np.asarray(result)[..., :3], np.asarray(image))
    soft = Image.new("L", (6, 4), 100)
    assert set(cutout(image, soft).getchannel("A").tobytes()) == {100}
    clear = image.convert("RGBA")
    clear.putalpha(0)
    assert set(cutout(clear, soft).getchannel("A").tobytes()) == {0}
    with pytest.raises(ValueError, match="must have one size"):
        cutout(image, Image.new("L", (5, 4)))
