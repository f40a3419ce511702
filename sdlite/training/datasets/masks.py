"""Data folders with masks, out of packages: nuclei under the microscope, and drawings in front of photos.

    stardist --> one fluorescence image --cut in two with a gap--> train/, test/
    emoji with transparency + scikit-image's photos, or patterns --composed--> train/, test/

Backgrounds, (size, size, 3) uint8, are crops of photos, patterns, and heaps of shapes made of both. The same packages
give the same images each time. For the layout see `sdlite.training.datasets.pairs`.
"""

import io
import zipfile
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from sdlite.files import atomic_folder
from sdlite.images.files import decoded
from sdlite.training.datasets.draws import Generator, sample_generator
from sdlite.training.datasets.folder import read_records, write_records
from sdlite.training.datasets.packages import NUCLEI, PHOTOS, Source, archive, damaged, downloads_of, fetch

TRAIN_END, TEST_START = 320, 352  # columns of the 512; a nucleus is up to 30 wide, so that none is in both
# Each is CC0 or public domain by its docstring in skimage/data/_fetchers.py; what is tested on is not trained on.
BACKGROUNDS = {
    "train": ("brick.png", "gravel.png", "chelsea.png", "rocket.jpg", "hubble_deep_field.jpg", "camera.png"),
    "test": ("coffee.png", "grass.png", "retina.jpg"),
}
MORE_BACKGROUNDS = ("astronaut.png", "clock_motion.png", "text.png", "cell.png")  # in training, if varied
PHOTO_SHARE = 0.5  # of the images; the others have a pattern behind
VARIED = {"photo": 0.45, "leaves": 0.3, "pattern": 0.25}  # shares
SMALLEST, LARGEST = 0.45, 1.0  # side of the drawing over that of the image
AMOUNTS = {"train": 1_500, "test": 200}  # drawings
TURN = 25.0  # degrees, at most, either way
GAMMA = 0.7  # at most, up or down, in log2, of each channel
MOST_LEAVES = 200
SMALLEST_LEAF, LARGEST_LEAF = 0.06, 0.8  # radius over the image's side
LAYERS = 3


def _member(package: Path, name: str) -> Image.Image:
    try:
        with zipfile.ZipFile(package) as wheel:
            image = Image.open(io.BytesIO(wheel.read(name)))
            image.load()
            return image
    except Exception as error:  # zip, zlib and the image's decoder each raise their own
        raise ValueError(f"{package} {damaged(error)} the package that holds {name}") from None


def make_nuclei(folder: Path, *, sources: Path | None = None) -> Counter[str]:
    """Writes the nuclei (class 1) of stardist's fluorescence image. Returns the number of images per split.

    The folder is made whole or not at all. sources: folder that has the package; None downloads it into `downloads_of`
    the folder. Raises FileExistsError for a folder that is not empty.
    """
    record = {"text": "nuclei, fluorescence microscopy", "source": NUCLEI.package, "licence": "CC0-1.0"}
    with atomic_folder(folder) as temporary:
        package = _package(folder, NUCLEI, sources)
        image = np.asarray(_member(package, "stardist/data/images/img2d.tif")).clip(0, 255).astype(np.uint8)
        mask = (np.asarray(_member(package, "stardist/data/images/mask2d.tif")) > 0).astype(np.uint8)
        columns = {"train": slice(0, TRAIN_END), "test": slice(TEST_START, None)}
        rows = {split: [(image[:, part], mask[:, part], record)] for split, part in columns.items()}
        return Counter({split: _write(temporary / split, row) for split, row in rows.items()})


def make_foreground(
    folder: Path,
    emoji: Path,
    *,
    sources: Path | None = None,
    size: int = 96,
    amounts: Mapping[str, int] = AMOUNTS,
    varied: int = 0,
) -> Counter[str]:
    """Writes emoji (class 1) in front of photos and patterns. Returns the number of images per split.

    The folder is made whole or not at all. sources: as for `make_nuclei`.
    emoji: folder that `sdlite data emoji` wrote; its test concepts, and photos that training does not use, make the
    test split. varied: if not 0, number of images per training drawing, on more photos, photos in other colours and
    heaps of shapes; it does not change the test split. Raises FileExistsError for a folder that is not empty.
    """
    with atomic_folder(folder) as temporary:
        package, counts = _package(folder, PHOTOS, sources), Counter[str]()
        for number, (split, amount) in enumerate(amounts.items()):
            records = read_records(emoji, split)
            vary = split == "train" and varied > 0
            names = BACKGROUNDS[split] + (MORE_BACKGROUNDS if vary else ())
            photos = [_member(package, f"skimage/data/{name}").convert("RGB") for name in names]
            chosen = np.random.default_rng(number).permutation(len(records))[:amount]
            rows = (
                _composed(emoji, records[i], photos, size, sample_generator(number + 2 * copy, int(i)), vary)
                for copy in range(varied if vary else 1)
                for i in chosen
            )
            counts[split] = _write(temporary / split, rows)
        return counts


def _package(folder: Path, source: Source, sources: Path | None) -> Path:
    return archive(fetch(downloads_of(folder), [source]) if sources is None else sources, source)


Row = tuple[np.ndarray, np.ndarray, dict[str, Any]]


def _write(folder: Path, rows: Iterable[Row]) -> int:
    """Returns the number of rows."""
    (folder / "masks").mkdir(parents=True)
    records = []
    for i, (image, mask, record) in enumerate(rows):
        names = {"file_name": f"{i:05}.png", "mask_file_name": f"masks/{i:05}.png"}
        Image.fromarray(image).save(folder / names["file_name"])
        Image.fromarray(mask).save(folder / names["mask_file_name"])
        records.append(names | record)
    write_records(folder, records)
    return len(records)


def _background(photos: list[Image.Image], size: int, generator: Generator, vary: bool) -> tuple[str, np.ndarray]:
    """Kind of a background, and the background."""
    if vary:
        kind = str(generator.choice(list(VARIED), p=list(VARIED.values())))
    else:
        kind = "photo" if generator.random() < PHOTO_SHARE else "pattern"
    if kind == "pattern":
        return kind, pattern(size, generator)
    make = leaves if kind == "leaves" else altered if vary else crop
    return kind, make(photos, size, generator)


def _composed(
    emoji: Path, record: Mapping[str, Any], photos: list[Image.Image], size: int, generator: Generator, vary: bool
) -> Row:
    """A drawing of random size, turn and place on a random background; the mask is where it covers half or more."""
    drawing = decoded(emoji / record["file_name"]).convert("RGBA")
    side = round(size * generator.uniform(SMALLEST, LARGEST))
    drawing = drawing.resize((side, side), Image.Resampling.LANCZOS)
    drawing = drawing.rotate(generator.uniform(-TURN, TURN), Image.Resampling.BICUBIC)
    layer = Image.new("RGBA", (size, size))
    left, top = generator.integers(0, size - side + 1, 2)
    layer.paste(drawing, (int(left), int(top)))
    kind, background = _background(photos, size, generator, vary)
    composed = Image.alpha_composite(Image.fromarray(background).convert("RGBA"), layer).convert("RGB")
    mask = (np.asarray(layer)[..., 3] >= 128).astype(np.uint8)
    kept = {key: record[key] for key in ("text", "concept", "style", "source", "licence") if key in record}
    return np.asarray(composed), mask, kept | {"background": kind}


def crop(photos: list[Image.Image], size: int, generator: Generator, *, smallest: int | None = None) -> np.ndarray:
    """A square of a random photo of random scale, mirrored or not. smallest: its side in the photo, else `size`."""
    photo = photos[generator.integers(len(photos))]
    side = int(generator.integers(size if smallest is None else smallest, min(photo.size) + 1))
    left, top = (int(generator.integers(0, whole - side + 1)) for whole in photo.size)
    method = Image.Resampling.BOX if side >= size else Image.Resampling.BILINEAR
    pixels = np.asarray(photo.resize((size, size), method, (left, top, left + side, top + side)))
    return np.ascontiguousarray(pixels[:, ::-1]) if generator.random() < 0.5 else pixels


def pattern(size: int, generator: Generator) -> np.ndarray:
    """Two random colours mixed by a gradient, by stripes or by noise of random grain."""
    kind = generator.integers(3)
    angle, wave = generator.uniform(0, 2 * np.pi), generator.uniform(6, 40)
    y, x = np.mgrid[:size, :size]
    along = x * np.cos(angle) + y * np.sin(angle)
    if kind == 0:
        mix = (along - along.min()) / np.ptp(along)
    elif kind == 1:
        mix = (np.sin(2 * np.pi * along / wave) > 0).astype(float)
    else:
        cells = int(generator.integers(3, size // 2))
        grain = Image.fromarray(generator.random((cells, cells)).astype(np.float32))
        mix = np.asarray(grain.resize((size, size), Image.Resampling.BICUBIC)).clip(0, 1)
    colours = generator.integers(0, 256, (2, 3))
    return (colours[0] + (colours[1] - colours[0]) * mix[..., None]).round().astype(np.uint8)


def altered(photos: list[Image.Image], size: int, generator: Generator) -> np.ndarray:
    """A crop in other colours: channels swapped, each with its own gamma, some negative, some grey; turned."""
    pixels = np.rot90(crop(photos, size, generator, smallest=size // 2), int(generator.integers(4))) / 255
    pixels = pixels[..., generator.permutation(3)] ** 2 ** generator.uniform(-GAMMA, GAMMA, 3)
    if generator.random() < 0.2:
        pixels = np.broadcast_to(pixels.mean(-1, keepdims=True), pixels.shape)
    if generator.random() < 0.2:
        pixels = 1 - pixels
    return (pixels * 255).round().astype(np.uint8)


def leaves(photos: list[Image.Image], size: int, generator: Generator) -> np.ndarray:
    """Shapes that hide one another, filled with photos, patterns and plain colours: objects that are no drawing.

    The dead leaves model of natural scenes: radii with density r^-3. Source: Lee, Mumford and Huang 2001, section 3.
    """
    count = round(2 ** generator.uniform(1, np.log2(MOST_LEAVES)))
    heap = Image.new("I", (size, size))
    draw = ImageDraw.Draw(heap)
    ratio = (SMALLEST_LEAF / LARGEST_LEAF) ** 2
    radii = size * SMALLEST_LEAF / np.sqrt(1 - generator.random(count) * (1 - ratio))
    for label, radius in enumerate(radii, start=1):
        corners = int(generator.integers(3, 24))  # from triangles to what looks round
        angles = np.sort(generator.uniform(0, 2 * np.pi, corners))
        x, y = generator.uniform(0, size, 2)[:, None] + radius * np.stack([np.cos(angles), np.sin(angles)])
        draw.polygon([*zip(x.tolist(), y.tolist(), strict=True)], fill=label)
    labels = np.asarray(heap)
    layers = np.stack(
        [
            altered(photos, size, generator) if generator.random() < 0.5 else pattern(size, generator)
            for _ in range(LAYERS)
        ]
    )
    layer = generator.integers(LAYERS, size=count + 1)[labels]
    contrast = (generator.random(count + 1) * (generator.random(count + 1) < 0.5))[labels][..., None]  # half are plain
    colours = generator.uniform(0, 255, (count + 1, 3))[labels]
    texture = np.take_along_axis(layers, layer[None, ..., None], axis=0)[0]
    return (colours + (texture - colours) * contrast).round().astype(np.uint8)
