"""Contact sheets: many images in one, with their labels."""

from collections.abc import Sequence
from math import ceil, sqrt

from PIL import Image, ImageDraw, ImageFont

MAX_LABEL = 240  # pixels of row labels
MAX_LINES = 4  # of a label
LINE = 13  # pixels


def contact_sheet(
    images: Sequence[Image.Image | None],
    labels: Sequence[str] | None = None,
    columns: int | None = None,
    axes: tuple[str, Sequence[str], Sequence[str]] | None = None,
) -> Image.Image:
    """All images in one, on a near-square grid unless columns is given, each with its label below.

    None leaves a cell empty. Labels wrap. axes: (corner, row labels, column labels), written around the grid.
    """
    corner, down, across = axes or ("", (), ())
    columns = len(across) or columns or ceil(sqrt(len(images)))
    gap, font = 4, ImageFont.load_default(11)
    shown = [image for image in images if image is not None]
    width = max(image.width for image in shown)
    below = [_wrapped(label, font, width) for label in labels or ()]
    left = [_wrapped(label, font, MAX_LABEL) for label in (corner, *down)]
    above = [left[0], *(_wrapped(label, font, width) for label in across)]
    height = max(max(image.height for image in shown) + _height(below), _height(left[1:]))
    margin = gap + ceil(max(font.getlength(line) for text in left for line in text.split("\n"))) if axes else 0
    top, rows = _height(above) if axes else 0, ceil(len(images) / columns)
    size = (margin + columns * (width + gap) + gap, top + rows * (height + gap) + gap)
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)

    def write(x: int, y: int, text: str) -> None:
        for i, line in enumerate(text.split("\n")):
            draw.text((x, y + i * LINE), line, "black", font)

    for i, image in enumerate(images):
        x, y = margin + gap + i % columns * (width + gap), top + gap + i // columns * (height + gap)
        if image is not None:
            sheet.paste(image, (x, y))
        if labels:
            write(x, y + (image.height if image else 0) + 2, below[i])
    write(gap, 2, left[0])
    for j, text in enumerate(above[1:]):
        write(margin + gap + j * (width + gap), 2, text)
    for j, text in enumerate(left[1:]):
        write(gap, top + gap + j * (height + gap) + height // 2 - LINE * (1 + text.count("\n")) // 2, text)
    return sheet


def _height(texts: Sequence[str]) -> int:
    """Of the tallest of the wrapped texts in pixels, with room around it; 0 if there are none."""
    return max((3 + LINE * (1 + text.count("\n")) for text in texts), default=0)


def _wrapped(label: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: float) -> str:
    """A label in lines of that many pixels, broken between words where they fit; what is beyond MAX_LINES is cut."""
    lines = [""]
    for word in label[:500].split():
        if lines[-1] and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
            continue
        lines.append("")
        for letter in word:
            if lines[-1] and font.getlength(lines[-1] + letter) > width:
                lines.append("")
            lines[-1] += letter
    lines = lines[1:] or [""]
    if len(lines) > MAX_LINES:
        lines[MAX_LINES - 1 :] = [lines[MAX_LINES - 1][:-1] + "…"]
    return "\n".join(lines)
