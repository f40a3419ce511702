"""The output folder: what is there is whole, nothing is replaced, the index can be lost, no link is followed."""

import contextlib
import errno
import json
import os
import re
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from sdlite import images
from sdlite.batch import DiskFull, store as store_module, verify
from sdlite.batch.manifest import append, sha256
from sdlite.batch.plan import Item, Options, Resolved, make_plan
from sdlite.batch.store import Store
from sdlite.files import HOST
from sdlite.images import recipe

MODEL = {"model": "m", "model_hash": "ab" * 32}
ITEMS = make_plan(
    [{"prompt": f"a fox {i}", "author": "me"} for i in range(4)],
    resolve=lambda request, *_: Resolved(request.replace(width=8, height=8)),
    model=MODEL,
).items


def png(item: Item) -> bytes:
    picture = Image.new("RGB", (8, 8), (item.index, 0, 0))
    picture.info.update(recipe.metadata(item.request, **MODEL, prediction="v"))
    return images.png_bytes(picture)


def filled(root: Path, count: int = 4) -> Store:
    store = Store(root)
    store.open(MODEL)
    for item in ITEMS[:count]:
        store.save(item, png(item), 0.5)
    return store


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir() if not path.name.startswith(".manifest"))


def test_a_picture_is_saved_once(tmp_path: Path):
    store = filled(tmp_path)
    before = [(tmp_path / item.file_name).stat().st_ino for item in ITEMS]
    store.save(ITEMS[0], png(ITEMS[0]), 9.0)  # the same bytes, from another process
    assert [(tmp_path / item.file_name).stat().st_ino for item in ITEMS] == before
    with pytest.raises(ValueError, match=r"000000-.*\.png is not the image that goes there"):
        store.save(ITEMS[0], png(ITEMS[1]), 0.5)
    assert (tmp_path / ITEMS[0].file_name).read_bytes() == png(ITEMS[0])
    assert names(tmp_path) == sorted([*(item.file_name for item in ITEMS), "run.json"])
    assert sorted(store.done(ITEMS)) == [0, 1, 2, 3]


def test_without_exact_the_first_picture_of_a_request_stays(tmp_path: Path):
    filled(tmp_path, 1)
    there = (tmp_path / ITEMS[0].file_name).read_bytes()
    last_bits = Image.new("RGB", (8, 8), (1, 0, 0))
    last_bits.info.update(recipe.metadata(ITEMS[0].request, **MODEL, prediction="v"))
    with pytest.raises(ValueError, match="is not the image that goes there"):
        Store(tmp_path, "1").save(ITEMS[0], images.png_bytes(last_bits), 0.5)
    entry = Store(tmp_path, "1", exact=False).save(ITEMS[0], images.png_bytes(last_bits), 0.5)
    assert entry.sha256 == sha256(there) and (tmp_path / ITEMS[0].file_name).read_bytes() == there
    other = replace(ITEMS[1], file_name=ITEMS[0].file_name)
    with pytest.raises(ValueError, match="is not the image that goes there"):
        Store(tmp_path, "1", exact=False).save(other, png(other), 0.5)


@pytest.mark.parametrize("call", ["save", "done"])
def test_a_picture_may_be_packed_between_two_looks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str):
    """Another process packs the shard, and removes the file, after this one saw its name and before it reads it."""
    failed = dict.fromkeys(range(1, len(ITEMS)), "not drawn")
    ours, theirs = (Store(tmp_path, worker, packs=True) for worker in "01")
    ours.open(MODEL)
    first = ours.save(ITEMS[0], png(ITEMS[0]), 0.5)
    read = {"save": "read_file", "done": "read_metadata"}[call]
    real = getattr(store_module, read)

    def packed_first(path: Path) -> object:
        monkeypatch.setattr(store_module, read, real)
        theirs.finish(ITEMS, failed)
        assert not path.exists()
        return real(path)

    if call == "done":
        next(ours.folder.glob(".manifest-*")).unlink()  # so that it is read back
    monkeypatch.setattr(store_module, read, packed_first)
    if call == "save":
        assert ours.save(ITEMS[0], png(ITEMS[0]), 0.5) == first
    else:
        assert {i: entry.sha256 for i, entry in ours.done(ITEMS).items()} == {0: first.sha256}
    assert getattr(store_module, read) is real, "it was not read"
    assert list(ours.finish(ITEMS, failed)) == [0]
    assert ours.shards is not None and [row["sha256"] for row in ours.shards.rows().values()] == [first.sha256]
    assert not list(ours.folder.glob("*.png"))


def test_a_torn_line_is_ignored_and_its_picture_read_back(tmp_path: Path):
    store = filled(tmp_path)
    manifest = next(tmp_path.glob(".manifest-*"))
    whole = manifest.read_bytes()
    for size in range(len(whole)):
        manifest.write_bytes(whole[:size])
        assert len(store.manifest.entries()) == whole[:size].count(b"}")
    manifest.write_bytes(whole[: len(whole) // 2])
    assert {i: entry.sha256 for i, entry in store.done(ITEMS).items()} == {
        item.index: sha256(png(item)) for item in ITEMS
    }
    assert len(store.manifest.entries()) == 4  # what was read back is listed again, after the torn line


def test_a_changed_line_is_not_believed(tmp_path: Path):
    store = filled(tmp_path, 1)
    manifest = next(tmp_path.glob(".manifest-*"))
    manifest.write_text(manifest.read_text().replace('"seconds": 0.5', '"seconds": 0.6'))
    assert store.manifest.entries() == {}


def test_metadata_is_in_order_whoever_drew(tmp_path: Path):
    store = Store(tmp_path, "7")
    store.open(MODEL)
    for item in (ITEMS[2], ITEMS[0]):
        store.save(item, png(item), 0.5)
    Store(tmp_path, "8").save(ITEMS[3], png(ITEMS[3]), 0.25)
    store.finish(ITEMS, {1: "not finite"})
    rows = [json.loads(line) for line in (tmp_path / "metadata.jsonl").read_text().splitlines()]
    assert [row["file_name"] for row in rows] == [ITEMS[i].file_name for i in (0, 2, 3)]
    assert rows[2] | {"prompt": "a fox 3", "author": "me", "seconds": 0.25, "width": 8, "init_image": None} == rows[2]
    errors = json.loads((tmp_path / "errors.jsonl").read_text())
    assert errors == {"index": 1, "key": ITEMS[1].sample_key, "error": "not finite"}
    store.save(ITEMS[1], png(ITEMS[1]), 0.5)
    store.finish(ITEMS, {})
    assert not (tmp_path / "errors.jsonl").exists()
    assert len((tmp_path / "metadata.jsonl").read_text().splitlines()) == 4


def test_other_settings_are_refused_by_name(tmp_path: Path):
    filled(tmp_path)
    with pytest.raises(ValueError, match=r"other settings: model_hash='abab.*' there, 'cd' now; seed=None there, 3"):
        Store(tmp_path).open(MODEL | {"model_hash": "cd", "seed": 3})
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(ValueError, match=r"run\.json is damaged"):
        Store(tmp_path).open(MODEL)


def test_another_request_under_the_same_name_is_refused(tmp_path: Path):
    def plan(prompt: str) -> list[Item]:
        resolved = lambda request, *_: Resolved(request.replace(width=8, height=8))  # noqa: E731
        return make_plan([prompt], Options(name="a.png"), resolve=resolved, model={}).items

    store = Store(tmp_path)
    store.open(MODEL)
    store.save(plan("fox")[0], png(plan("fox")[0]), 0.5)
    with pytest.raises(ValueError, match="was drawn from another request"):
        store.done(plan("owl"))
    next(tmp_path.glob(".manifest-*")).unlink()
    with pytest.raises(ValueError, match="is not the image that goes there"):
        store.done(plan("owl"))
    assert list(store.done(plan("fox"))) == [0]


def test_temporary_files_of_the_dead_are_removed(tmp_path: Path):
    filled(tmp_path, 1)
    dead, living, elsewhere, foreign = (
        tmp_path / f".{HOST}-999999999.{'0' * 16}.tmp",
        tmp_path / f".{HOST}-{os.getpid()}.{'0' * 16}.tmp",
        tmp_path / f".other-1.{'0' * 16}.tmp",
        tmp_path / ".mine.tmp",
    )
    for path in (dead, living, elsewhere, foreign):
        path.write_bytes(b"half")
    Store(tmp_path).open(MODEL)
    assert [path.exists() for path in (dead, living, elsewhere, foreign)] == [False, True, True, True]
    dead.write_bytes(b"half")  # of a worker killed in the meantime
    Store(tmp_path).finish(ITEMS, {})
    assert [path.exists() for path in (dead, living, elsewhere, foreign)] == [False, True, True, True]


def test_verify_puts_the_damaged_aside(tmp_path: Path):
    filled(tmp_path)
    damaged, gone, cut, good = (tmp_path / item.file_name for item in ITEMS)
    data = bytearray(damaged.read_bytes())
    data[len(data) // 2] ^= 1
    damaged.write_bytes(data)
    gone.unlink()
    cut.write_bytes(b"")
    (tmp_path / "holiday.png").write_bytes(images.png_bytes(Image.new("RGB", (8, 8))))
    check = verify(tmp_path)
    assert check.corrupt == sorted([damaged.name, cut.name]) and check.missing == [gone.name]
    assert check.good == [good.name] and check.extra == ["holiday.png"]
    assert (tmp_path / f"{damaged.name}.corrupt").read_bytes() == data and not damaged.exists()
    store = filled(tmp_path)  # the same batch again
    assert len(store.done(ITEMS)) == 4 and len(verify(tmp_path).good) == 4
    with pytest.raises(ValueError, match="holds no batch"):
        verify(tmp_path / "nowhere")


def test_the_manifest_can_be_lost(tmp_path: Path):
    store = filled(tmp_path)
    next(tmp_path.glob(".manifest-*")).unlink()
    assert verify(tmp_path).good == sorted(item.file_name for item in ITEMS)
    assert len(store.done(ITEMS)) == 4 and len(store.manifest.entries()) == 4


def listed(row: object) -> str:
    """A manifest's line with the right checksum, whatever it holds."""
    text = json.dumps(row)
    return (
        f'{text[:-1]}, "crc32": "{zlib.crc32(text.encode()):08x}"}}\n' if isinstance(row, dict) and row else text + "\n"
    )


GOOD = {"file_name": "a.png", "key": "k", "sha256": "s", "seconds": 1.0}
FOREIGN = [
    [],
    3,
    None,
    {},
    {"file_name": "a.png"},
    GOOD | {"file_name": ["a"]},
    GOOD | {"key": None},
    GOOD | {"more": 1},
]
FOREIGN += [GOOD | {"seconds": "soon"}, GOOD | {"sha256": {"a": {}}}]


def test_lines_of_a_foreign_manifest_are_left_out(tmp_path: Path):
    store = filled(tmp_path, 1)
    lines = [listed(row).encode() for row in FOREIGN]
    lines += [
        b"[" * 50_000 + b"\n",
        b'{"index": 1' + b"0" * 5000 + b"}\n",
        b"\xff\xfe\n",
        b"{" + b" " * 200_000 + b"}\n",
    ]
    (tmp_path / ".manifest-other-0.jsonl").write_bytes(b"".join(lines) + listed(GOOD).encode())
    assert store.manifest.entries().keys() == {ITEMS[0].file_name, "a.png"}
    assert list(store.done(ITEMS)) == [0]


def test_lines_of_foreign_errors_are_left_out(tmp_path: Path):
    store = filled(tmp_path, 1)
    rows = [
        {"index": [1], "key": "", "error": ""},
        {"index": 1},
        {"error": "x"},
        {"index": 1, "key": "", "error": None},
        5,
    ]
    ours = {"index": 2, "key": ITEMS[2].sample_key, "error": "not finite"}
    (tmp_path / "errors.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows, ours]))
    store.finish(ITEMS, {})
    assert (tmp_path / "errors.jsonl").read_text() == json.dumps(ours) + "\n"


@pytest.mark.skipif(os.name != "posix", reason="named pipes")
@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo], ids=["folder", "pipe"])
@pytest.mark.parametrize("name", [ITEMS[0].file_name, "run.json", "errors.jsonl", f".manifest-{HOST}-0.jsonl"])
def test_what_is_no_file_in_a_files_place_is_one_line(tmp_path: Path, make: Callable[[Path], None], name: str):
    store = filled(tmp_path, 0)
    (tmp_path / name).unlink(missing_ok=True)
    make(tmp_path / name)
    with pytest.raises((ValueError, OSError)) as caught:
        store.open(MODEL)
        store.done(ITEMS)
        store.save(ITEMS[1], png(ITEMS[1]), 0.5)
        store.finish(ITEMS, {1: "failed"})
    assert name in str(caught.value) and "\n" not in str(caught.value)
    verify_says = verify if name != "run.json" else (lambda root: None)
    with contextlib.suppress(ValueError, OSError):
        verify_says(tmp_path)


@pytest.mark.skipif(os.name != "posix", reason="links")
def test_links_inside_are_not_followed(tmp_path: Path):
    real, outside = tmp_path / "real", tmp_path / "outside"
    real.mkdir()
    outside.write_bytes(b"untouched")
    (tmp_path / "out").symlink_to(real)  # the folder itself may be one
    (real / ITEMS[0].file_name).symlink_to(outside)
    store = Store(tmp_path / "out")
    store.open(MODEL)
    with pytest.raises(OSError, match="symbolic"):
        store.save(ITEMS[0], png(ITEMS[0]), 0.5)
    (real / f".manifest-{HOST}-0.jsonl").symlink_to(outside)
    with pytest.raises(OSError, match="symbolic"):
        store.save(ITEMS[1], png(ITEMS[1]), 0.5)
    (real / "metadata.jsonl").symlink_to(outside)
    (real / f".manifest-{HOST}-0.jsonl").unlink()
    store.finish(ITEMS[1:], {})
    assert outside.read_bytes() == b"untouched" and not (real / "metadata.jsonl").is_symlink()
    (real / ITEMS[2].file_name).symlink_to(outside)
    with pytest.raises(ValueError, match="is not the image"):
        store.done(ITEMS)


@pytest.mark.parametrize("fault", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS])
def test_a_full_disk_is_said_and_leaves_no_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: int):
    store = filled(tmp_path, 1)

    def fail(*_: object) -> None:
        raise OSError(fault, os.strerror(fault))

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", fail)
        with pytest.raises(DiskFull, match="finished images are kept"):
            store.save(ITEMS[1], png(ITEMS[1]), 0.5)
    assert names(tmp_path) == [ITEMS[0].file_name, "run.json"]


def test_half_a_line_written_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("os.write", lambda handle, data: len(data) // 2)
    with pytest.raises(OSError, match="half a line"):
        append(tmp_path / "a", b"\n{}\n")


def test_points_of_a_commit(tmp_path: Path):
    reached: list[tuple[str, bool, int]] = []
    store = Store(tmp_path)
    store.open(MODEL)
    final = tmp_path / ITEMS[0].file_name
    store.reached = lambda point: reached.append((point, final.exists(), len(list(tmp_path.glob(".*.tmp")))))
    store.save(ITEMS[0], png(ITEMS[0]), 0.5)
    assert reached == [("written", False, 1), ("synced", False, 1), ("linked", True, 1)]
    assert re.fullmatch(r"[0-9a-f]{64}", store.done(ITEMS)[0].sha256)
