"""One way to read JSON from outside, and one way to write a file or a folder: whole or not at all.

Reading: bytes, brackets and depth are limited, and a key that occurs twice is refused.

Writing: a file or a folder is made in a temporary folder beside its place, brought to the disk, and only then renamed.
Without `force` a name that is taken is refused. With it a file replaces a file or a link (never the link's target), and
a folder replaces a folder; nothing replaces a device. An error or Ctrl-C removes the temporary folder. Only a process
that is killed leaves one, under a name that `sweep` knows.
"""

import errno
import hashlib
import json
import os
import platform
import re
import secrets
import shutil
import stat
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

MAX_BRACKETS = 500_000  # of lists and objects, which take 20 to 50 times the memory of their text
MAX_DEPTH = 64
HOST = re.sub(r"[^A-Za-z0-9-]", "-", platform.node())[:40] or "host"
Hook = Callable[[str], None]
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}  # errno of an OSError: the disk cannot be written
SEPARATOR = re.compile(r'"?sep=([,;|\t])"?\r?\n?', re.IGNORECASE)  # Excel reads it, and so people write it
TEMPORARY = re.compile(r"\.(.+)-(\d{1,10})\.[0-9a-f]{16}\.(tmp|old)")  # host, process, kind
STALE_SECONDS = 24 * 3600.0  # another machine's temporary file that is older is left over; writing takes moments
RUST_ERROR = re.compile(r"\(os error (\d+)\)")  # how safetensors reports an error of the system


class DiskFull(OSError):
    """The disk or the quota is used up, or the disk is read-only. strerror is the whole message."""


def parse_json(text: bytes | str) -> Any:
    """A JSON value. Raises ValueError, in one line, for text that is not JSON in UTF-8 or goes beyond the limits."""
    try:
        text = text.decode() if isinstance(text, bytes) else text
        if text.count("[") + text.count("{") > MAX_BRACKETS:
            raise ValueError(f"more than {MAX_BRACKETS} lists and objects")
        value = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant)
        if _depth(value) > MAX_DEPTH:
            raise RecursionError
    except RecursionError:
        raise ValueError(f"nested deeper than {MAX_DEPTH} levels") from None
    except UnicodeDecodeError:
        raise ValueError("not JSON in UTF-8") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: line {error.lineno}, column {error.colno}: {error.msg}") from None
    return value


def read_json(path: Path, max_bytes: int = 16 * 2**20) -> dict[str, Any]:
    """The JSON object in a file. Raises FileNotFoundError or ValueError, in one line that begins with the path."""
    data = _read_bytes(path, max_bytes)
    try:
        content = parse_json(data)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: not a JSON object")
    return content


def read_text(path: Path, max_bytes: int) -> str:
    """The text in a file. Raises FileNotFoundError or ValueError, in one line that begins with the path."""
    try:
        return _read_bytes(path, max_bytes).decode()
    except UnicodeDecodeError:
        raise ValueError(f"{path}: not UTF-8") from None


def _read_bytes(path: Path, max_bytes: int) -> bytes:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing")
    if path.stat().st_size > max_bytes:
        raise ValueError(f"{path}: has more than {max_bytes} bytes")
    return path.read_bytes()


def checksum(path: Path) -> str:
    """The sha256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def csv_delimiter(first: str) -> tuple[str, bool]:
    """The delimiter of a CSV by its first line, and whether that is Excel's line `sep=;`, which the header follows.

    A header's delimiter is the one that it has most of: a spreadsheet's depends on its language.
    """
    stated = SEPARATOR.fullmatch(first)
    return (stated[1], True) if stated else (max(",;\t", key=first.count), False)


def exported(folder: Path, name: str) -> Path:
    """The folder that holds the file `name`: this one, or its folder "export", where a training run puts it."""
    return folder / "export" if not (folder / name).is_file() and (folder / "export" / name).is_file() else folder


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"{twice!r:.80} is there twice")
    return content


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not a JSON number")


def _depth(value: Any) -> int:
    """Levels of lists and objects. Raises RecursionError beyond Python's own limit."""
    if not isinstance(value, dict | list):
        return 0
    inside = value.values() if isinstance(value, dict) else value
    return 1 + max((_depth(inner) for inner in inside if isinstance(inner, dict | list)), default=0)


@contextmanager
def atomic_file(path: Path, *, force: bool = False, reached: Hook = lambda point: None) -> Iterator[Path]:
    """Gives an empty temporary file of that name; when the block ends well, it becomes the file `path`.

    Missing folders are made. reached: called with "written", "synced" and "linked", for tests that end the process
    there. Raises FileExistsError, DiskFull, or OSError as the system says; `path` is unchanged then.
    """
    path = path if path.name else path.absolute()
    check_file(path, force)
    with making(path) as folder:
        folder.mkdir()  # some writers make temporary files of their own beside the one that they are given
        temporary = folder / path.name
        mode = _touch(temporary)  # some writers take 0600
        yield temporary
        temporary.chmod(mode)
        reached("written")
        _sync(temporary)
        reached("synced")
        if force:
            check_file(path, force)
            temporary.replace(path)
        else:
            _link(temporary, path)
        reached("linked")
        _sync(path.parent)


def write_file(path: Path, data: bytes, *, force: bool = False, reached: Hook = lambda point: None) -> None:
    """Writes the bytes with `atomic_file`."""
    with atomic_file(path, force=force, reached=reached) as temporary:
        temporary.write_bytes(data)


@contextmanager
def atomic_folder(path: Path, *, force: bool = False) -> Iterator[Path]:
    """Gives a new temporary folder; when the block ends well, it becomes the folder `path`.

    `path` must be free or an empty folder; with force, a folder that holds files is replaced, and removed only when the
    new one is in its place. Missing folders are made. Raises as `atomic_file` does.
    """
    path = path if path.name else path.absolute()
    check_folder(path, force)
    with making(path) as temporary:
        temporary.mkdir()
        mode = _touch(temporary / "probe")
        (temporary / "probe").unlink()
        yield temporary
        for entry in sorted(temporary.rglob("*"), reverse=True):  # what is inside before the folder it is in
            if entry.is_file():
                entry.chmod(mode)
            _sync(entry)
        _sync(temporary)
        check_folder(path, force)
        _move_folder(temporary, path)
        _sync(path.parent)


def temporary_name(folder: Path) -> Path:
    """A free name for a file or folder that is being made; `sweep` removes it when the process is gone."""
    return folder / f".{HOST}-{os.getpid()}.{secrets.token_hex(8)}.tmp"


def sweep(folder: Path) -> None:
    """Removes what killed processes left unfinished in this folder, and puts back folders that they were replacing."""
    for path in folder.glob(".*"):
        if match := TEMPORARY.fullmatch(path.name):
            with suppress(OSError):  # its process was quicker, or it is not ours
                age = time.time() - path.lstat().st_mtime
                if age > STALE_SECONDS or (match[1] == HOST and not _is_running(int(match[2]))):
                    _put_back(path) if match[3] == "old" and not path.is_symlink() else _remove(path)


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        pass  # it runs and is not ours
    return True


@contextmanager
def making(path: Path) -> Iterator[Path]:
    """A temporary name beside path, whose folders are there; both go again if the block fails."""
    missing = [folder for folder in path.parents if not folder.exists()]
    temporary = temporary_name(path.parent)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        _remove(temporary)
    except BaseException as error:
        _remove(temporary)
        for folder in missing:
            with suppress(OSError):  # it holds something else by now, or was never made
                folder.rmdir()
        _raise_clearly(error, path)
        raise


def _raise_clearly(error: BaseException, path: Path) -> None:
    """Raises DiskFull for a full disk, and OSError for an error that a library hides in its text."""
    hidden = None if isinstance(error, OSError) else RUST_ERROR.search(str(error))
    number: Any = int(hidden[1]) if hidden else getattr(error, "errno", None)
    if number in FULL:
        raise DiskFull(number, f"{path}: {os.strerror(number)}; it was not written: make space and try again") from None
    if hidden:
        raise OSError(number, os.strerror(number), str(path)) from None


def check_file(path: Path, force: bool) -> None:
    """Raises FileExistsError, in one line, if `atomic_file` would not write there."""
    if not _is_there(path):
        return
    if not (path.is_symlink() or path.is_file()):
        raise FileExistsError(f"{path} exists and is not a file; give another name")
    if not force:
        raise FileExistsError(f"{path} exists; --force replaces it")


def check_folder(path: Path, force: bool) -> None:
    """Raises FileExistsError, in one line, if `atomic_folder` would not write there."""
    sweep(path.parent)  # puts the folder back if a process was killed while it replaced it
    if not _is_there(path):
        return
    if path.is_symlink() or not path.is_dir():
        raise FileExistsError(f"{path} exists and is not a folder; give another name")
    if not force and any(path.iterdir()):
        raise FileExistsError(f"{path} exists and is not empty; give a new folder")


def _is_there(path: Path) -> bool:
    """Also for a link to nothing, which Path.exists denies. Raises OSError for a name that no file can have."""
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def _move_folder(source: Path, path: Path) -> None:
    """Renames source to path, which is free or a folder that may go."""
    if not path.exists():
        source.rename(path)
        return
    aside = temporary_name(path.parent).with_suffix(".old")
    aside.mkdir()
    try:
        path.rename(aside / path.name)
        source.rename(path)
    except BaseException:
        _put_back(aside)
        raise
    _remove(aside)


def _put_back(aside: Path) -> None:
    """Moves a folder that was set aside to its place, unless a new one is there, and removes the rest."""
    for folder in aside.iterdir():
        if not _is_there(aside.with_name(folder.name)):
            folder.rename(aside.with_name(folder.name))
    _remove(aside)


def _link(source: Path, path: Path) -> None:
    """Gives source a second name that must be free; where the disk knows no links, claims the name and moves."""
    try:
        path.hardlink_to(source)
    except FileExistsError:
        raise FileExistsError(f"{path} exists; --force replaces it") from None
    except OSError:
        path.touch(exist_ok=False)
        source.replace(path)


def _remove(path: Path) -> None:
    """Removes a file, a link or a folder with its contents, if it exists. Ctrl-C is raised after it is done."""
    try:
        _remove_once(path)
    except KeyboardInterrupt:
        _remove_once(path)
        raise


def _remove_once(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _touch(file: Path) -> int:
    """Makes a file; the permissions that the umask leaves it."""
    file.touch()
    return stat.S_IMODE(file.stat().st_mode)


def _sync(path: Path) -> None:
    """Brings a file, or the names in a folder, to the disk, where the system has a way to (Windows has none)."""
    if os.name == "posix":
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
