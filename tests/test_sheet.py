"""Contact sheets: where pictures and labels go."""

from PIL import Image

from sdlite.images.sheet import contact_sheet


def test_contact_sheet():
    pictures = [Image.new("RGB", (20, 10), colour) for colour in ("red", "lime", "blue")]
    sheet = contact_sheet(pictures)
    assert sheet.size == (2 * 24 + 4, 2 * 14 + 4)
    assert [sheet.getpixel(place) for place in ((5, 5), (29, 5), (5, 19))] == [
        (255, 0, 0),
        (0, 255, 0),
        (0, 0, 255),
    ]
    labelled = contact_sheet(pictures, labels=["1", "a", "猫"], columns=3)
    assert labelled.size == (3 * 24 + 4, 30 + 4)
    assert labelled.crop((4, 14, 24, 30)).getextrema()[0][0] < 128  # there is ink in the caption


def test_long_labels_wrap():
    picture = Image.new("RGB", (60, 10), "red")

    def ink(sheet: Image.Image, top: int) -> bool:
        return sheet.crop((4, top, 64, top + 11)).convert("L").getextrema()[0] < 128

    for label, lines in (("two words here", 2), ("a\nb", 1), ("w" * 20, 4), ("many words " * 90, 4)):
        sheet = contact_sheet([picture], labels=[label])
        assert sheet.size == (68, 4 + 10 + 3 + 13 * lines + 4)
        assert all(ink(sheet, 4 + 10 + 2 + 13 * line) for line in range(lines))
    grid = contact_sheet(
        [picture] * 2, axes=("", ["a row with a label of many words, longer than its room"], ["b", "c d " * 9])
    )
    assert grid.width <= 4 + 240 + 2 * 64 + 4 and grid.height > 3 + 2 * 13


def test_labels_of_small_pictures_do_not_run_into_each_other():
    """Four lines of text beside a picture of 8 pixels: each row is as high as its label."""
    pictures = [Image.new("RGB", (8, 8), "red")] * 6
    label = "guidance_scale 7.5, solver dpmpp_2m_karras, strength 0.75, clip_skip 2, eta 0.5, a prompt of several words"
    sheet = contact_sheet(pictures, axes=("steps:", [label] * 3, ["1", "2"]))
    grey, width = sheet.convert("L"), sheet.width
    inked = [min(grey.crop((0, y, 200, y + 1)).tobytes()) < 128 for y in range(sheet.height)]
    blocks = "".join("x" if ink else " " for ink in inked).split("    ")  # between rows, more than between lines
    assert len([block for block in blocks if block.strip()]) == 4, blocks  # the corner and three labels
    assert width < 300
