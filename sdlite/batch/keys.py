"""What is hashed for an image of a batch, and which seed a row without one gets.

Two samples with equal keys have equal bytes. The key is in the manifest and, unless --name says otherwise, in the file
name; it decides which images of a folder are done. Old folders must stay valid: leave whatever is added later out of
the key as long as it has its default.
"""

import hashlib
import json
import unicodedata
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from sdlite.request import Request

if TYPE_CHECKING:
    from sdlite.pipeline import Pipeline

SCHEMA = 1  # of keys and folders; add 1 if their meaning changes
CANONICAL = json.JSONEncoder(sort_keys=True, separators=(",", ":"))


def sample_key(request: Request, model: Mapping[str, Any]) -> str:
    """SHA-256, in hexadecimal, of everything that decides an image.

    request: with its size, and checksums in place of start image and mask. `Request.deciding` leaves out fields without
    effect. Texts count in Unicode's composed form (NFC). model: `model_facts`.
    """
    fields = request.deciding()
    fields |= {name: unicodedata.normalize("NFC", fields[name]) for name in ("prompt", "negative_prompt")}
    hashed = {"request": fields, "engine": dict(model), "schema": SCHEMA}
    return hashlib.sha256(CANONICAL.encode(hashed).encode()).hexdigest()


def model_facts(pipe: "Pipeline", exact: bool) -> dict[str, Any]:
    """What decides an image besides the request: the weights, what they predict, the numerics, and any backend."""
    return {"model": pipe.model_hash, "prediction": pipe.denoiser.prediction, "exact": exact, **pipe.about.bits}


def derived_seed(base: int, row: int) -> int:
    """The seed of a row that gives none: 31 bits of a SHA-256, so that rows added at the end change no other."""
    return int.from_bytes(hashlib.sha256(f"{base}:{row}".encode()).digest()[:4]) >> 1
