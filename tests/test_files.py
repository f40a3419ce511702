"""Holds the limits of JSON from outside, and that a written file or folder appears whole or not at all."""

import errno
import multiprocessing
import os
import resource
import signal
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sdlite import files
from sdlite.files import DiskFull, atomic_file, atomic_folder, parse_json, read_json, sweep, write_file


def names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


@contextmanager
def small_disk(size: int) -> Iterator[None]:
    """While it is active no file may grow beyond size bytes, which the system reports like a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_json_is_read():
    assert parse_json(b'{"a": [1, 2.5, null, true, "\\u00e9"], "b": {}}') == {"a": [1, 2.5, None, True, "é"], "b": {}}
    assert parse_json("[" * 64 + "]" * 64) is not None


@pytest.mark.parametrize(
    ("text", "what"),
    [
        (b"{", "not JSON: line 1, column 2"),
        (b"\xff", "not JSON in UTF-8"),
        (b'{"a": 1, "b": 2, "a": 1}', "'a' is there twice"),
        (b"[" * 65 + b"]" * 65, "deeper than 64"),
        (b"[" * 100_000 + b"]" * 100_000, "deeper than 64"),
        (b"[" + b"{}," * 500_000 + b"{}]", "more than 500000 lists and objects"),
        (b'{"a": NaN}', "NaN is not a JSON number"),
        (b"[" + b"9" * 5000 + b"]", "limit"),
    ],
)
def test_json_beyond_the_limits(text: bytes, what: str):
    with pytest.raises(ValueError, match=what) as caught:
        parse_json(text)
    assert "\n" not in str(caught.value)


def test_a_duplicate_among_many_keys_is_found_at_once():
    """In time proportional to the text: looking for each key among all others took minutes."""
    keys = ",".join(f'"{i}":0' for i in range(100_000))
    with pytest.raises(ValueError, match="'99999' is there twice"):
        parse_json(f'{{{keys},"99999":0}}')


def test_json_file(tmp_path: Path):
    path = tmp_path / "a.json"
    with pytest.raises(FileNotFoundError, match=r"a\.json is missing"):
        read_json(path)
    for content, limit, what in ((b"[]", 9, "not a JSON object"), (b'{"a":0}', 6, "more than 6 bytes")):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=rf"a\.json: .*{what}"):
            read_json(path, limit)
    assert read_json(path, 7) == {"a": 0}
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(FileNotFoundError):  # reading it would wait for ever
        read_json(tmp_path / "pipe")


def test_a_file_that_is_there_is_kept_without_force(tmp_path: Path):
    path = tmp_path / "a"
    write_file(path, b"1")
    with pytest.raises(FileExistsError, match="exists; --force replaces it"):
        write_file(path, b"2")
    assert path.read_bytes() == b"1"
    write_file(path, b"2", force=True)
    assert path.read_bytes() == b"2" and names(tmp_path) == ["a"]


def test_a_file_that_appears_meanwhile_is_kept(tmp_path: Path):
    with pytest.raises(FileExistsError), atomic_file(tmp_path / "a") as temporary:
        temporary.write_bytes(b"mine")
        (tmp_path / "a").write_bytes(b"theirs")
    assert (tmp_path / "a").read_bytes() == b"theirs" and names(tmp_path) == ["a"]


@pytest.mark.parametrize("dangling", [False, True])
def test_a_link_is_replaced_and_never_written_through(tmp_path: Path, dangling: bool):
    target, link = tmp_path / "target", tmp_path / "link"
    link.symlink_to(target)
    if not dangling:
        target.write_bytes(b"precious")
    with pytest.raises(FileExistsError):
        write_file(link, b"new")
    write_file(link, b"new", force=True)
    assert not link.is_symlink() and link.read_bytes() == b"new"
    assert target.exists() != dangling and (dangling or target.read_bytes() == b"precious")


def test_folders_and_devices_are_never_replaced(tmp_path: Path):
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for name in ("folder", "pipe"):
        with pytest.raises(FileExistsError, match="is not a file"):
            write_file(tmp_path / name, b"x", force=True)
        with pytest.raises(FileExistsError, match="is not a folder"), atomic_folder(tmp_path / "pipe", force=True):
            pass
    assert names(tmp_path) == ["folder", "pipe"]


def test_mode_is_what_the_umask_leaves(tmp_path: Path):
    """safetensors gives its files 0600, which nobody else on the machine can read."""
    before = os.umask(0o022)
    try:
        with atomic_file(tmp_path / "a") as temporary:
            save_file({"a": torch.ones(3)}, temporary)
        with atomic_folder(tmp_path / "b") as temporary:
            save_file({"a": torch.ones(3)}, temporary / "a")
    finally:
        os.umask(before)
    assert {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("a", "b/a")} == {0o644}


def test_a_full_disk_is_named_and_nothing_is_left(tmp_path: Path):
    """Also where a library hides the system's error in its own: safetensors says "(os error 27)"."""
    write_file(tmp_path / "old", b"old")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "old").write_bytes(b"old")
    large = {"a": torch.ones(3000)}
    with small_disk(1000):
        with pytest.raises(DiskFull, match="File too large") as caught:
            write_file(tmp_path / "new" / "deep" / "a", bytes(3000))
        assert str(tmp_path / "new" / "deep" / "a") in caught.value.strerror
        with pytest.raises(DiskFull), atomic_file(tmp_path / "old", force=True) as temporary:
            save_file(large, temporary)
        with pytest.raises(DiskFull), atomic_folder(tmp_path / "folder", force=True) as temporary:
            save_file(large, temporary / "a")
    assert names(tmp_path) == ["folder", "folder/old", "old"] and (tmp_path / "old").read_bytes() == b"old"


def test_an_interrupted_write_leaves_nothing(tmp_path: Path):
    for make in (atomic_file, atomic_folder):
        with pytest.raises(KeyboardInterrupt), make(tmp_path / "new" / "a"):
            raise KeyboardInterrupt
    assert names(tmp_path) == []


def test_a_disk_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(*_: object) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(Path, "hardlink_to", fail)
    write_file(tmp_path / "a", b"1")
    with pytest.raises(FileExistsError):
        write_file(tmp_path / "a", b"2")
    assert (tmp_path / "a").read_bytes() == b"1" and names(tmp_path) == ["a"]


def test_a_folder_is_replaced_only_with_force(tmp_path: Path):
    path = tmp_path / "a"
    path.mkdir()
    with atomic_folder(path) as temporary:  # an empty one is free
        (temporary / "1").touch()
    with pytest.raises(FileExistsError, match="not empty"), atomic_folder(path) as temporary:
        pass
    with atomic_folder(path, force=True) as temporary:
        (temporary / "2").touch()
        assert names(path) == ["1"]  # to the last moment
    assert names(tmp_path) == ["a", "a/2"]


def replace_and_die(path: Path) -> None:
    """Replaces a folder, and is killed between the two renames."""
    rename = Path.rename

    def kills(source: Path, target: Path) -> Path:
        if source.name.endswith(".tmp"):
            os.kill(os.getpid(), signal.SIGKILL)
        return rename(source, target)

    Path.rename = kills  # type: ignore[method-assign,assignment]
    with atomic_folder(path, force=True) as temporary:
        (temporary / "2").touch()


@pytest.mark.parametrize("by", ["sweep", "the next writer"])
def test_a_folder_killed_between_the_two_renames_is_put_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by: str):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "1").touch()
    child = multiprocessing.get_context("fork").Process(target=replace_and_die, args=(tmp_path / "a",))
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL and not (tmp_path / "a").exists()
    if by == "sweep":
        sweep(tmp_path)
    else:
        with pytest.raises(FileExistsError), atomic_folder(tmp_path / "a"):
            pass
    assert names(tmp_path) == ["a", "a/1"]

    rename = Path.rename

    def fails_second(path: Path, target: Path) -> Path:
        if path.name.endswith(".tmp"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fails_second)
    with pytest.raises(OSError, match="Input/output"), atomic_folder(tmp_path / "a", force=True):
        pass
    assert names(tmp_path) == ["a", "a/1"]


def test_sweep_takes_what_dead_processes_left(tmp_path: Path):
    token = "0" * 16
    for name in (f".{files.HOST}-999999999.{token}.tmp", f".{files.HOST}-9999999999.{token}.tmp"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "inside").touch()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "precious").touch()
    (tmp_path / f".{files.HOST}-999999999.{token}.old").symlink_to("mine")  # by somebody else, in a shared folder
    kept = [f".{files.HOST}-{os.getpid()}.{token}.tmp", f".{files.HOST}-{'9' * 30}.{token}.tmp", ".mine.tmp"]
    for name in kept:
        (tmp_path / name).touch()
    sweep(tmp_path)
    assert names(tmp_path) == sorted([*kept, "mine", "mine/precious"])
