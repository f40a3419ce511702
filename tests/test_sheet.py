"""Contact sheets: where pictures and labels go."""

from PIL import Image

from sdlite.sheet import contact_sheet


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
