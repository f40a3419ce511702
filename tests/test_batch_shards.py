"""WebDataset shards: what the packages read, the same bytes however a run went, damage found."""

import functools
import itertools
import json
import multiprocessing
import os
import random
import signal
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sdlite import batch
from sdlite.batch import local, shards
from sdlite.batch.manifest import sha256
from sdlite.batch.store import LOOSE, Store
from sdlite.pipeline import Pipeline
from tests.test_batch import poison

ROWS = [{"prompt": f"a fox, number {i}", "steps": 1, "author": f"me {i}"} for i in range(10)]


@functools.cache
def tiny() -> Pipeline:
    return Pipeline.load("tiny", device="cpu")


def run(output: Path, rows: Any = None, **options: Any) -> batch.BatchReport:
    options = {"format": "webdataset", "batch_size": 2} | options
    return batch.run(ROWS if rows is None else rows, output, pipe=tiny(), **options)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "SHARD", 4)


def files(folder: Path) -> dict[str, bytes]:
    """Everything that a user sees."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.startswith(".")}


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("reference")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "SHARD", 4)
        assert run(folder).done == 10
    return files(folder)


def complete(folder: Path, reference: dict[str, bytes]) -> None:
    assert files(folder) == reference
    assert not list((folder / LOOSE).glob("*.png")) and not list(folder.rglob("*.tmp"))
    check = batch.verify(folder)
    assert len(check.good) == 10 and not (check.missing or check.corrupt or check.extra)


def test_layout(tmp_path: Path, reference: dict[str, bytes]):
    assert sorted(reference) == sorted(
        ["run.json", *(f"0000{i}{end}" for i in range(3) for end in (".tar", "_stats.json"))]
    )
    (tmp_path / "a.tar").write_bytes(reference["00002.tar"])
    with tarfile.open(tmp_path / "a.tar") as tar:
        members = tar.getmembers()
    assert [member.name for member in members] == [
        f"00002000{i}.{end}" for i in range(2) for end in ("json", "png", "txt")
    ]
    assert {(member.mtime, member.uid, member.gid, member.mode) for member in members} == {(0, 0, 0, 0o644)}
    assert json.loads(reference["00002_stats.json"]) == {"count": 2, "sha256": sha256(reference["00002.tar"])}
    assert shards.stem_of(9) == "000020001"


def test_webdataset_reads_them(tmp_path: Path, reference: dict[str, bytes]):
    webdataset = pytest.importorskip("webdataset")
    run(tmp_path / "folder", format="folder")
    run(tmp_path / "shards")
    rows = [json.loads(line) for line in (tmp_path / "folder/metadata.jsonl").read_text().splitlines()]
    raw = list(webdataset.WebDataset(str(tmp_path / "shards/{00000..00002}.tar"), shardshuffle=False))
    assert [sample["__key__"] for sample in raw] == [shards.stem_of(i) for i in range(10)]
    for sample, row in zip(raw, rows, strict=True):
        assert sample["png"] == (tmp_path / "folder" / row["file_name"]).read_bytes()
        assert sample["txt"].decode() == row["prompt"]
        told = json.loads(sample["json"])
        del row["seconds"]
        assert told == row | {"key": sample["__key__"]}
    decoded = webdataset.WebDataset(str(tmp_path / "shards/00000.tar"), shardshuffle=False).decode("pil")
    picture, text, told = next(iter(decoded.to_tuple("png", "txt", "json")))
    assert picture.size == (64, 64) and text == ROWS[0]["prompt"] and told["author"] == "me 0"


def test_datasets_reads_them(tmp_path: Path):
    datasets = pytest.importorskip("datasets")
    run(tmp_path / "out")
    loaded = datasets.load_dataset(
        "webdataset", data_files=str(tmp_path / "out/*.tar"), split="train", cache_dir=str(tmp_path / "cache")
    )
    assert [row["txt"] for row in loaded] == [row["prompt"] for row in ROWS] and loaded[0]["png"].size == (64, 64)


def test_again_draws_nothing(tmp_path: Path, reference: dict[str, bytes]):
    run(tmp_path)
    before = {path: path.stat().st_ino for path in tmp_path.glob("*.tar")}
    assert (report := run(tmp_path)).done == 0 and report.skipped == 10
    assert {path: path.stat().st_ino for path in tmp_path.glob("*.tar")} == before
    complete(tmp_path, reference)


def test_parts_workers_and_more_rows_give_the_same_shards(tmp_path: Path, reference: dict[str, bytes]):
    run(tmp_path / "rows", ROWS[:5])
    assert json.loads((tmp_path / "rows/00001_stats.json").read_text())["count"] == 1
    run(tmp_path / "rows")
    complete(tmp_path / "rows", reference)
    for part in (2, 1, 3):
        run(tmp_path / "parts", part=f"{part}/3")
    complete(tmp_path / "parts", reference)


def test_a_shard_is_packed_as_soon_as_it_is_whole(tmp_path: Path, reference: dict[str, bytes]):
    seen: list[set[str]] = []
    run(tmp_path, progress=lambda event: seen.append({path.name for path in tmp_path.glob("*.tar")}))
    assert seen[0] == set() and "00000.tar" in seen[-1]
    stopped = itertools.count()
    report = run(tmp_path / "half", stop=lambda: next(stopped) >= 3)
    assert report.interrupted and [path.name for path in (tmp_path / "half").glob("*.tar")] == ["00000.tar"]
    run(tmp_path / "half")
    complete(tmp_path / "half", reference)


def test_a_failed_picture_is_left_out_and_added_later(
    tmp_path: Path, reference: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
):
    with monkeypatch.context() as patch:
        poison(patch, tiny(), lambda request: request.prompt == ROWS[2]["prompt"], "not finite")
        assert run(tmp_path, keep_going=True).failed == {2: "not finite"}
    assert json.loads((tmp_path / "00000_stats.json").read_text())["count"] == 3
    assert run(tmp_path).done == 1
    complete(tmp_path, reference)


def test_another_request_is_refused(tmp_path: Path):
    run(tmp_path)
    with pytest.raises(ValueError, match=r"image 3, .* was drawn from another request than it has now"):
        run(tmp_path, [*ROWS[:3], {"prompt": "another", "steps": 1}])
    with pytest.raises(ValueError, match="other settings: format='webdataset' there, 'folder' now"):
        run(tmp_path, format="folder")


def test_verify_unpacks_a_damaged_shard(tmp_path: Path, reference: dict[str, bytes]):
    run(tmp_path)
    path = tmp_path / "00001.tar"
    data = bytearray(reference["00001.tar"])
    at = data.index(b"IDAT") + 50
    data[at] ^= 1
    path.write_bytes(data)
    check = batch.verify(tmp_path)
    assert len(check.good) == 9 and len(check.corrupt) == 2 and check.corrupt[0].startswith("000004")
    assert check.corrupt[1] == path.name and not path.exists() and path.with_name("00001.tar.corrupt").exists()
    assert run(tmp_path).done == 1
    path.with_name("00001.tar.corrupt").unlink()
    complete(tmp_path, reference)
    path.write_bytes(reference["00001.tar"][:9000])  # cut
    check = batch.verify(tmp_path)
    assert len(check.good) + len(check.missing) == 10 and check.corrupt == ["00001.tar"]
    run(tmp_path)
    path.with_name("00001.tar.corrupt").unlink()
    complete(tmp_path, reference)
    path.write_bytes(b"?" * 1000)
    with pytest.raises(ValueError, match=r"00001\.tar is damaged; `sdlite batch --verify"):
        run(tmp_path)


def member(name: str, data: bytes = b"", size: int | None = None, kind: bytes = tarfile.REGTYPE) -> bytes:
    """A file of a tar: its header, which may say another size, and its bytes."""
    info = tarfile.TarInfo(name)
    info.size, info.type = len(data) if size is None else size, kind
    info.linkname = "/etc/passwd" if kind in (tarfile.SYMTYPE, tarfile.LNKTYPE) else ""
    return info.tobuf(tarfile.GNU_FORMAT) + data + b"\0" * (-len(data) % 512)


def sparse(name: str, size: int) -> bytes:
    """A file of no bytes that unpacks to `size` zeros, in GNU's old form."""
    header = bytearray(member(name, kind=tarfile.GNUTYPE_SPARSE)[:512])
    header[483:495] = f"{size:011o}\0".encode()
    header[148:156] = b" " * 8
    header[148:156] = f"{sum(header):06o}\0 ".encode()
    return bytes(header)


ROW = {"key": "000000000", "file_name": "a.png", "sha256": "s", "prompt": "a"}
FOREIGN = {
    "sparse": sparse("000000000.png", 7 << 30),
    "size": member("000000000.png", size=7 << 30),
    "link": member("000000000.json", kind=tarfile.SYMTYPE),
    "hard link": member("000000000.json", kind=tarfile.LNKTYPE),
    "deep": member("000000000.json", b"[" * 100_000),
    "list": member("000000000.json", b"[1]"),
    "number": member("000000000.json", b"1"),
    "names": member("000000000.json", json.dumps(ROW | {"file_name": 5}).encode()) + member("000000000.png", b"x"),
    "key": member("x.json", json.dumps(ROW | {"key": "../../x"}).encode()),
    "path": member("0.json", json.dumps(ROW | {"file_name": "../a.png"}).encode()) + member("000000000.png", b"x"),
    "many": member("a") * 20,
}


@pytest.mark.parametrize("name", FOREIGN)
def test_foreign_members_are_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str):
    """One line, nothing outside the folder, and no memory for what a header only claims."""
    run(tmp_path / "out", ROWS[:1])
    monkeypatch.setattr(shards, "MEMBERS", 12)
    shard = tmp_path / "out/00000.tar"
    shard.write_bytes(FOREIGN[name] + b"\0" * 1024)
    if name != "path":
        with pytest.raises(ValueError, match=r"00000\.tar is damaged") as caught:
            Store(tmp_path / "out", packs=True).done([])
        assert "\n" not in str(caught.value)
    check = batch.verify(tmp_path / "out")
    assert check.corrupt == [shard.name] and not shard.exists()
    assert {path.name for path in tmp_path.iterdir()} == {"out"}


def test_a_row_without_its_picture_is_damage(tmp_path: Path):
    run(tmp_path, ROWS[:1])
    row = json.dumps(ROW | {"key": "000000003"}).encode()
    (tmp_path / "00000.tar").write_bytes(member("000000003.json", row) + b"\0" * 1024)
    with pytest.raises(ValueError, match=r"00000\.tar is damaged"):
        run(tmp_path, ROWS[:1])


# -------------------------------------------------------------------------------------------- kill -9


def fork(task: Callable[[], object]) -> int | None:
    process = multiprocessing.get_context("fork").Process(target=task)
    process.start()
    process.join()
    return process.exitcode


def die_in_pack(folder: Path, point: str) -> None:
    """Runs, and is killed when the second shard is packed: in its middle, before its name, before its files go."""
    calls = itertools.count()
    target, name = {
        "member": (shards, "_add"),
        "named": (shards, "write_file"),
        "stats": (Path, "unlink"),
    }[point]
    whole = getattr(target, name)
    first = {"member": 17, "named": 1, "stats": 0}[point]

    def dying(*arguments: Any, **options: Any) -> Any:
        hit = point != "stats" or arguments[0].name.endswith(".png")
        if hit and next(calls) == first:
            os.kill(os.getpid(), signal.SIGKILL)
        return whole(*arguments, **options)

    setattr(target, name, dying)
    run(folder)


@pytest.mark.skipif(os.name != "posix", reason="forks")
@pytest.mark.parametrize("point", ["member", "named", "stats"])
def test_killed_while_packing(tmp_path: Path, reference: dict[str, bytes], point: str):
    tiny()
    assert fork(functools.partial(die_in_pack, tmp_path, point)) == -signal.SIGKILL
    run(tmp_path)
    complete(tmp_path, reference)


def run_and_die(folder: Path, number: int) -> None:
    left = iter(range(number, -1, -1))

    def reached(point: str) -> None:
        if point == "linked" and not next(left):
            os.kill(os.getpid(), signal.SIGKILL)

    local.Store = functools.partial(Store, reached=reached)  # type: ignore[misc]
    run(folder)


@pytest.mark.skipif(os.name != "posix", reason="forks")
def test_killed_in_the_middle(tmp_path: Path, reference: dict[str, bytes]):
    tiny()
    chance = random.Random(0)
    kills = 0
    while fork(functools.partial(run_and_die, tmp_path, chance.randrange(4))) == -signal.SIGKILL:
        kills += 1
    assert kills >= 2
    complete(tmp_path, reference)


@pytest.mark.skipif(os.name != "posix", reason="forks")
def test_processes_on_one_folder(tmp_path: Path, reference: dict[str, bytes]):
    tiny()
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=functools.partial(run, tmp_path)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    run(tmp_path)  # a picture that one process saved beside the shard of another
    complete(tmp_path, reference)
