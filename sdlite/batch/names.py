"""Names of a batch's images: the key of all that decides one, its seed, and its file name.

With --exact, two samples with equal keys have equal bytes; without it they differ by at most one grey level. The key is
in the manifest and, unless --name says otherwise, in the file name; it decides which images of a folder are done. Old
folders must stay valid: leave whatever is added later out of the key as long as it has its default.

A template of file names is read with string.Formatter().parse and never handed to str.format, so it can name fields and
nothing behind them. Numbers take a width (`{seed:010}`), texts a length (`{key:8}` is the first eight letters).
"""

import hashlib
import json
import re
import unicodedata
from collections.abc import Mapping
from string import Formatter
from typing import Any

from sdlite.request import Request

SCHEMA = 1  # of keys and folders; add 1 if their meaning changes
DEFAULT = "{index:06}-{key:16}.png"
MAX_NAME_BYTES = 200  # file systems take 255; the rest is for what temporary names add
MAX_SLUG_BYTES = 120  # of the words of a prompt, with hyphens between; letters of every script are kept
NUMBERS = ("index", "seed", "row", "steps", "width", "height")
TEXTS = ("key", "guidance_scale", "solver", "prompt", "prompt_hash")
FORBIDDEN = set('/\\:*?"<>|')
RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d|conin\$|conout\$)(\..*)?", re.IGNORECASE)

Template = list[tuple[str, str | None, int]]  # literal text, then a field, its width or length (0: none)


def sample_key(request: Request, model: Mapping[str, Any]) -> str:
    """SHA-256, in hexadecimal, of everything that decides an image.

    request: with its size, and checksums in place of start image and mask. `Request.deciding` leaves out fields without
    effect. Texts count in Unicode's composed form (NFC). model: weights, what they predict, numerics, any backend.
    """
    fields = request.deciding()
    fields |= {name: unicodedata.normalize("NFC", fields[name]) for name in ("prompt", "negative_prompt")}
    hashed = {"request": fields, "engine": dict(model), "schema": SCHEMA}
    return hashlib.sha256(json.dumps(hashed, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def derived_seed(base: int, row: int) -> int:
    """The seed of a row that gives none: 31 bits of a SHA-256, so that rows added at the end change no other."""
    return int.from_bytes(hashlib.sha256(f"{base}:{row}".encode()).digest()[:4]) >> 1


def parse_template(text: str) -> Template:
    """Reads a template. Raises ValueError, in one line, for a field that is not fixed and for unsafe text."""
    fault = f"name={text!r:.80}"
    template: Template = []
    try:
        for literal, field, spec, conversion in Formatter().parse(text):
            if field is not None and (field not in NUMBERS + TEXTS or conversion):
                raise ValueError(f"{{{field}}} must be one of {', '.join(NUMBERS + TEXTS)}, and nothing behind it")
            if not re.fullmatch(r"\d{0,3}d?", spec or "", re.ASCII) or (field in TEXTS and "d" in (spec or "")):
                raise ValueError(f"{{{field}:{spec}}} must have digits after the colon, e.g. {{index:06}} or {{key:8}}")
            template.append((literal, field, int((spec or "").rstrip("d") or 0)))
        checked("".join(literal + ("0" if field else "") for literal, field, _ in template))  # once, not for every row
    except ValueError as error:
        raise ValueError(f"{fault}: {error}") from None
    if not text.endswith(".png"):
        raise ValueError(f"{fault} must end in .png")
    return template


def fill(template: Template, request: Request, **given: int | str) -> str:
    """The file name of an item, checked. request: with its size filled in. Raises ValueError for an unsafe name."""
    pieces = []
    for literal, field, size in template:
        value = "" if field is None else str(given[field] if field in given else _value(request, field))
        pieces += [literal, value.zfill(size) if field in NUMBERS else value[: size or None]]
    return checked("".join(pieces))


def _value(request: Request, field: str) -> object:
    if field == "prompt":
        words = re.sub(r"[^\w]+", "-", unicodedata.normalize("NFC", request.prompt)).strip("-_")
        return words.encode()[:MAX_SLUG_BYTES].decode(errors="ignore") or "empty"
    if field == "prompt_hash":
        return hashlib.sha256(unicodedata.normalize("NFC", request.prompt).encode()).hexdigest()
    return f"{request.guidance_scale:g}" if field == "guidance_scale" else getattr(request, field)


def checked(name: str) -> str:
    """The name, if it is a single safe file name on Linux, macOS and Windows. Raises ValueError."""
    fault = f"file name {name!r:.80}"
    if not name or name.startswith((".", " ")) or name != name.strip():
        raise ValueError(f"{fault} must not be empty or start with a dot or a space")
    if not name.isprintable() or FORBIDDEN & set(name):
        raise ValueError(f'{fault} must be without / \\ : * ? " < > | and invisible characters')
    if name.casefold() == "contact-sheet.png":
        raise ValueError(f"{fault} is the contact sheet's")
    if RESERVED.fullmatch(name):
        raise ValueError(f"{fault} is a device on Windows; add {{index}} to the template")
    if len(name.encode()) > MAX_NAME_BYTES:
        raise ValueError(f"{fault} must have at most {MAX_NAME_BYTES} bytes, not {len(name.encode())}")
    return name


def same_file(name: str) -> str:
    """Equal for two names that a case-folding file system takes for one."""
    return unicodedata.normalize("NFC", name).casefold()
