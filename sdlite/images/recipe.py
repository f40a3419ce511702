"""What an image records about itself: two texts, as data, and back.

    Request + model --metadata--> "parameters" (Automatic1111's text), "sdlite" (one JSON object, `Recipe`)

Neither text holds a path: of an image to start from they hold the checksum of its pixels. What is read comes from
outside, and is checked. files.py puts the texts into files and takes them out again.
"""

import json
import re
from collections.abc import Sequence
from importlib.metadata import version
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field

from sdlite.config import Prediction, Record
from sdlite.files import parse_json
from sdlite.package import __version__
from sdlite.request import SOLVERS, Request

SUFFIXES = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}  # of image files -> Pillow's format
MAX_CHARS = 1024 * 1024  # of a text: two prompts of Request's length, every character escaped, and room
MAX_NAME = 200  # characters of a model's name
UNKNOWN_SOURCE = "sha256:unknown"
A1111_SETTING = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')  # Automatic1111's own rule
UNICODE = b"UNICODE\0"  # EXIF's mark of a comment in UTF-16
MAX_JPEG_EXIF = 65_000  # bytes: a JPEG's segment has two bytes for its length
A1111_FEWEST = 3  # settings in a line, or it belongs to the prompt; also its rule


class Recipe(Record):
    """All that an image records about itself. The request has its size filled in, and checksums for image and mask.

    prediction: None where another program drew it, which does not say. backend: what computed it, if not PyTorch.
    """

    request: Request
    model: str = Field(max_length=MAX_NAME)
    model_hash: str = Field(pattern=r"^[0-9a-f]{0,64}$")
    prediction: Prediction | None  # not in the weights, which the hash is of
    versions: dict[Literal["sdlite", "torch", "diffusers", "transformers"], Annotated[str, Field(max_length=64)]]
    backend: str = Field("", max_length=64)


class Foreign(NamedTuple):
    """The recipe of an image that Automatic1111 drew, and what sdlite does differently."""

    recipe: Recipe
    notes: list[str]


def metadata(
    request: Request, *, model: str, model_hash: str, prediction: Prediction, backend: str = ""
) -> dict[str, str]:
    """The two texts of an image. request: with the size that was drawn. model_hash: hexadecimal."""
    sources = {name: _source(getattr(request, name)) for name in ("image", "mask")}
    recipe = Recipe(
        request=request.replace(**sources),
        model=re.split(r"[/\\]", model.rstrip("/\\"))[-1][:MAX_NAME],  # a name, never where it lies
        model_hash=model_hash,
        prediction=prediction,
        versions=versions(),
        backend=backend,
    )
    written = recipe.model_dump() | {"request": recipe.request.deciding()}
    if not backend:
        del written["backend"]
    return {"parameters": _infotext(recipe), "sdlite": json.dumps(written, separators=(",", ":"))}


def versions() -> dict[Any, str]:
    """Versions of sdlite and of the libraries that decide an image's bytes."""
    return {name: version(name) for name in ("torch", "diffusers", "transformers")} | {"sdlite": __version__}


def parse_recipe(text: str) -> Recipe:
    """What `metadata` wrote under "sdlite". Raises ValueError, TypeError or RecursionError."""
    if len(text) > MAX_CHARS:
        raise ValueError(f"larger than {MAX_CHARS >> 20} MiB")
    fields = parse_json(text)
    if not isinstance(fields, dict) or not isinstance(fields.get("request"), dict):
        raise ValueError("not an object with a request")
    request = fields["request"]
    if request.get("mask") is not None:
        request = {"paste": False} | request  # an image from before anything was pasted
    return Recipe(**fields | {"request": Request(**request)})


def parse_a1111(text: str) -> Foreign:
    """Automatic1111's text as a recipe. Raises ValueError, in one line, for what is not such a text."""
    if len(text) > MAX_CHARS:
        raise ValueError(f"its parameters are larger than {MAX_CHARS >> 20} MiB")
    *lines, last = text.strip().split("\n")
    found = A1111_SETTING.findall(last)
    if len(found) < A1111_FEWEST:
        raise ValueError("its parameters have no line of settings, such as Steps: 20, Sampler: Euler a, Seed: 7")
    settings = {name: _unquoted(value) for name, value in found}
    prompt, _, negative = "\n".join(lines).partition("\nNegative prompt:")
    if prompt.startswith("Negative prompt:"):
        prompt, negative = "", prompt.removeprefix("Negative prompt:")
    solver, notes = _solver(settings)
    width, _, height = settings.get("Size", "").partition("x")
    fields = {
        "steps": settings.get("Steps"),
        "seed": settings.get("Seed"),
        "guidance_scale": settings.get("CFG scale"),
        "width": width or None,
        "height": height or None,
        "eta": settings.get("Eta DDIM") if solver == "ddim" else None,
        **_start(settings),
    }
    if (layers := settings.get("Clip skip", "1")).isdecimal():
        fields["clip_skip"] = max(int(layers[:3]) - 1, 0)
    given = {name: value for name, value in fields.items() if value is not None}
    request = Request(prompt=prompt.strip(), negative_prompt=negative.strip(), solver=solver, **given)
    short, model = settings.get("Model hash", "").lower(), settings.get("Model", "")[:MAX_NAME]
    model_hash = short if re.fullmatch("[0-9a-f]{1,64}", short) else ""
    recipe = Recipe(request=request, model=model, model_hash=model_hash, prediction=None, versions={})
    notes.append("Automatic1111 draws its noise and weighs words in its own way, so the image will be another")
    return Foreign(recipe, notes)


def _start(settings: dict[str, str]) -> dict[str, Any]:
    """Fields of an image that was started from another. A hires fix has a strength too, that of its second pass."""
    if "Denoising strength" not in settings or any(name.startswith("Hires") for name in settings):
        return {}
    blur = settings.get("Mask blur")
    mask = {"mask": UNKNOWN_SOURCE, "mask_blur": blur} if blur is not None else {}
    return {"strength": settings["Denoising strength"], "image": UNKNOWN_SOURCE, **mask}


def _solver(settings: dict[str, str]) -> tuple[str, list[str]]:
    """The solver nearest to a sampler of Automatic1111, and a note where it is another."""
    schedule = settings.get("Schedule type", "Automatic")
    sampler = settings.get("Sampler", "")
    if sampler.endswith(" Karras"):  # before 1.9 the schedule was part of the name
        sampler, schedule = sampler.removesuffix(" Karras"), "Karras"
    named = [solver for solver, entry in SOLVERS.items() if entry.sampler == sampler]
    if len(named) > 1:  # "Automatic" is Karras for a sampler that has both
        named = [solver for solver in named if SOLVERS[solver].karras == (schedule in ("Karras", "Automatic"))]
    if named:
        return named[0], []
    nearest = "euler_a" if sampler.endswith(" a") or "SDE" in sampler else "dpmpp_2m"
    return nearest, [f"sampler {sampler!r:.60} is not there, {nearest} is used; --set solver=NAME takes another"]


def _source(name: str | None) -> str | None:
    return name if name is None or re.fullmatch(r"sha256:[0-9a-f]{64}", name) else UNKNOWN_SOURCE


def _infotext(recipe: Recipe) -> str:
    """Automatic1111's text: prompt, negative prompt, then one line of settings. RNG: CPU is how noise is drawn."""
    request = recipe.request
    solver = SOLVERS[request.solver]
    pasted = request.mask is not None and request.paste
    settings = {
        "Steps": request.steps,
        "Sampler": solver.sampler,
        "Schedule type": solver.schedule_type,
        "CFG scale": request.guidance_scale,
        "Seed": request.seed,
        "Size": f"{request.width}x{request.height}",
        "Model hash": recipe.model_hash[:10] or None,
        "Model": recipe.model or None,
        "Denoising strength": request.strength if request.image is not None else None,
        "Mask blur": f"{request.mask_blur:g}" if pasted else None,
        "Eta DDIM": request.eta or None,
        "Clip skip": request.clip_skip + 1 if request.clip_skip else None,
        "RNG": "CPU",
        "Version": f"sdlite-{recipe.versions['sdlite']}",
    }
    negative = f"\nNegative prompt: {request.negative_prompt}" if request.negative_prompt else ""
    line = ", ".join(f"{name}: {_quoted(value)}" for name, value in settings.items() if value is not None)
    return f"{request.prompt}{negative}\n{line}"


def _quoted(value: object) -> str:
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if re.search(r'[,:\n"]', text) else text


def _unquoted(value: str) -> str:
    try:
        return str(json.loads(value)) if value.startswith('"') else value.strip()
    except ValueError:
        return value


def write_comment(text: str) -> bytes:
    """The text as EXIF's user comment, in the order of bytes that Automatic1111 writes."""
    return UNICODE + text.encode("utf-16-be", "replace")


def read_comment(data: bytes) -> str:
    """An EXIF comment: 8 bytes that name its encoding, then the text. The order of UTF-16's bytes is nowhere said."""
    text = data[8:]
    if data.startswith(UNICODE):
        big = text[0::2].count(0) >= text[1::2].count(0)  # where most letters have their zero
        return text.decode("utf-16-be" if big else "utf-16-le", "replace")
    return text.decode("utf-8", "replace").strip("\0 ")


def fits_jpeg(texts: Sequence[str]) -> bool:
    """Whether a JPEG has room for these prompts: each stands in it once in UTF-16 and once as escaped JSON."""
    return sum(2 * len(text) + len(json.dumps(text)) for text in texts) < MAX_JPEG_EXIF - 4096
