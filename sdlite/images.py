"""Pictures at the border: tensors to PIL and back, PNG files with their recipe inside, contact sheets.

    pixels in [-1, 1]  <--from_pil, to_pil-->  PIL  <--open_image, save_png-->  file

A picture that sdlite writes holds two PNG texts: "parameters", which Automatic1111 and the tools around it read, and
"sdlite", one JSON object (`Recipe`) from which `sdlite regen` draws the same picture again. Neither holds a path: a
source picture is recorded as the digest of its pixels. What is read from a file is data and is validated as hostile.
"""

import base64
import hashlib
import html
import json
import re
import warnings
from collections.abc import Sequence
from importlib.metadata import version
from io import BytesIO
from math import ceil, sqrt
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from PIL import Image, ImageChops, ImageDraw, ImageFont, ImageOps, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo
from pydantic import Field
from torch import Tensor

from sdlite.config import Prediction, Record, Request
from sdlite.files import write_file

FORMATS = ("PNG", "JPEG", "WEBP")
MAX_PIXELS = 16 * 1024 * 1024  # of a picture that is read: the largest that can be drawn, MAX_SIDE squared
MAX_PIXEL_BYTES = 8  # of a file, for each of its pixels at most: 16-bit RGBA, uncompressed
READABLE = {"WEBP": "WebP", "JPEG2000": "JPEG 2000"}  # Pillow's name of a format -> as people write it
MAX_RECIPE_CHARS = 1024 * 1024  # two prompts of Request's length, every character escaped, and room
A1111_SAMPLERS = {  # solver -> (sampler, schedule type) as Automatic1111 1.10 calls them
    "ddim": ("DDIM", None),
    "ddpm": ("DDPM", None),
    "euler": ("Euler", "Uniform"),
    "euler_a": ("Euler a", "Uniform"),
    "dpmpp_2m": ("DPM++ 2M", "Uniform"),
    "dpmpp_2m_karras": ("DPM++ 2M", "Karras"),
    "unipc": ("UniPC", None),
    "pndm": ("PLMS", None),
    "lcm": ("LCM", None),
}
MAX_SHOWN = 64  # pictures that a notebook shows of a list
MAX_NAME = 200  # characters of a model's name
MAX_LABEL = 240  # pixels of a contact sheet's row labels
UNKNOWN_SOURCE = "sha256:unknown"


class Recipe(Record):
    """All that a picture records about itself; sizes in the request are resolved, sources are digests."""

    request: Request
    model: str = Field(max_length=MAX_NAME)
    model_hash: str = Field(pattern=r"^[0-9a-f]{0,64}$")
    prediction: Prediction  # not in the weights, which the hash is of
    versions: dict[Literal["sdlite", "torch", "diffusers", "transformers"], Annotated[str, Field(max_length=64)]]


def to_pil(images: Tensor) -> list[Image.Image]:
    """(B, 3, H, W) in [-1, 1] to RGB pictures, rounded as diffusers does."""
    pixels = ((images.float() / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
    return [Image.fromarray(image.permute(1, 2, 0).contiguous().cpu().numpy()) for image in pixels]


def from_pil(image: Image.Image, size: tuple[int, int]) -> Tensor:
    """(1, 3, H, W) in [-1, 1], resized to size = (width, height) with the Lanczos filter as diffusers does."""
    return 2.0 * _unit_interval(image.convert("RGB").resize(size, Image.Resampling.LANCZOS)) - 1.0


def mask_from_pil(mask: Image.Image, size: tuple[int, int]) -> Tensor:
    """(1, 1, H, W) of 0 (keep) and 1 (repaint, white in the picture), resized and cut at half as diffusers does."""
    return (_unit_interval(mask.resize(size, Image.Resampling.LANCZOS).convert("L")) >= 0.5).float()


def _unit_interval(image: Image.Image) -> Tensor:
    """(1, C, H, W) in [0, 1]."""
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)  # H * W * C
    return pixels.view(1, image.height, image.width, -1).permute(0, 3, 1, 2).float() / 255


def digest(image: Image.Image) -> str:
    """ "sha256:..." of the size and the RGB pixels, whatever file they came from."""
    size = f"{image.width}x{image.height}:".encode()
    return "sha256:" + hashlib.sha256(size + image.convert("RGB").tobytes()).hexdigest()


def largest_difference(first: Image.Image, second: Image.Image) -> int:
    """In grey levels, 0 to 255, over all pixels and channels; 255 where the sizes differ."""
    if first.size != second.size:
        return 255
    return max(ImageChops.difference(first.convert("RGB"), second.convert("RGB")).tobytes())


def open_image(path: str | Path) -> Image.Image:
    """An RGB picture from a PNG, JPEG or WebP file: upright, transparency on white, 16 bits cut to 8.

    Raises FileNotFoundError, or ValueError for anything else that is wrong with it, both in one line.
    """
    image = decoded(path)
    if image.mode.startswith("I"):
        image = image.convert("I").point(lambda value: value * (1 / 257)).convert("L")
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return image.convert("RGB")


def decoded(path: str | Path, formats: tuple[str, ...] = FORMATS, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The picture in a file, its header checked before any pixel is decoded; whatever Pillow raises, in one line.

    formats: those allowed, as Pillow calls them. A TIFF of several pages is its first page, with "pages" in `.info`;
    other files of several pictures are refused.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} is not a file" if Path(path).exists() else f"{path} does not exist")
    most = max_pixels * MAX_PIXEL_BYTES
    fault = f"is larger than {most >> 20} MiB; scale the picture down" if Path(path).stat().st_size > most else None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of large pictures; the limit below refuses smaller ones
            with Image.open(path, formats=() if fault else formats) as image:
                if image.width * image.height > max_pixels:
                    raise Image.DecompressionBombError
                several = getattr(image, "is_animated", False)
                if several and image.format not in ("MPO", "TIFF"):  # MPO: a phone's JPEG and a preview
                    fault = "is an animation; save one of its frames as a PNG and give that"
                else:
                    upright = ImageOps.exif_transpose(image)
                    upright.info |= {"pages": "several"} if several and image.format == "TIFF" else {}
                    return upright
    except Image.DecompressionBombError:
        fault = f"has more than {max_pixels >> 20} megapixels; scale the picture down"
    except UnidentifiedImageError:
        *first, last = (READABLE.get(name, name) for name in formats)
        fault = fault or f"is not a {', '.join(first)} or {last} picture"
    except Exception as error:  # the decoders raise what the bytes lead them to: OSError, SyntaxError, struct.error...
        fault = f"is damaged: {' '.join(str(error).split()) or type(error).__name__}"
    raise ValueError(f"{path} {fault}")


def metadata(
    request: Request, *, model: str, model_hash: str, prediction: Prediction, width: int, height: int
) -> dict[str, str]:
    """The two PNG texts of a picture; width and height are those drawn, model_hash is hexadecimal."""
    sources = {name: _source(getattr(request, name)) for name in ("image", "mask")}
    recipe = Recipe(
        request=request.replace(width=width, height=height, **sources),
        model=re.split(r"[/\\]", model.rstrip("/\\"))[-1][:MAX_NAME],  # a name, never where it lies
        model_hash=model_hash,
        prediction=prediction,
        versions=versions(),
    )
    return {"parameters": _infotext(recipe), "sdlite": recipe.model_dump_json(ensure_ascii=True)}


def versions() -> dict[Any, str]:
    """Of sdlite and of the libraries that decide a picture's bytes."""
    from sdlite import __version__

    return {name: version(name) for name in ("torch", "diffusers", "transformers")} | {"sdlite": __version__}


def _source(name: str | None) -> str | None:
    return name if name is None or re.fullmatch(r"sha256:[0-9a-f]{64}", name) else UNKNOWN_SOURCE


def _infotext(recipe: Recipe) -> str:
    """Automatic1111's text: prompt, negative prompt, then one line of settings. RNG: CPU is how noise is drawn."""
    request = recipe.request
    sampler, schedule = A1111_SAMPLERS[request.solver]
    settings = {
        "Steps": request.steps,
        "Sampler": sampler,
        "Schedule type": schedule,
        "CFG scale": request.guidance_scale,
        "Seed": request.seed,
        "Size": f"{request.width}x{request.height}",
        "Model hash": recipe.model_hash[:10] or None,
        "Model": recipe.model or None,
        "Denoising strength": request.strength if request.image is not None else None,
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


def read_texts(path: str | Path) -> dict[str, str]:
    """The "parameters" and "sdlite" texts of a picture as they are, whoever wrote them."""
    info = decoded(path).info
    return {name: info[name] for name in ("parameters", "sdlite") if isinstance(info.get(name), str)}


def read_metadata(path: str | Path) -> Recipe:
    """What `metadata` wrote. Raises ValueError when there is none or it does not hold together."""
    text = read_texts(path).get("sdlite")
    if text is None:
        raise ValueError(f"{path} holds no sdlite metadata (not drawn by sdlite, drawn with --no-metadata, or edited)")
    try:
        if len(text) > MAX_RECIPE_CHARS:
            raise ValueError("too long")
        fields = json.loads(text)
        if not isinstance(fields, dict) or not isinstance(fields.get("request"), dict):
            raise ValueError("not an object with a request")
        return Recipe(**fields | {"request": Request(**fields["request"])})
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} holds broken sdlite metadata: {str(error).splitlines()[0]}") from None


def save_png(image: Image.Image, path: str | Path, *, force: bool = False, with_metadata: bool = True) -> None:
    """Writes a PNG whole or not at all, with the texts in image.info; replaces a file only with force.

    Makes the folders on the way. Raises FileExistsError, DiskFull, or OSError as the system says.
    """
    write_file(Path(path), png_bytes(image, with_metadata), force=force)


def png_bytes(image: Image.Image, with_metadata: bool = True) -> bytes:
    """The PNG file of a picture, with the texts in image.info."""
    texts = PngInfo()
    for name in ("parameters", "sdlite"):
        if with_metadata and name in image.info:
            texts.add_text(name, image.info[name])
    data = BytesIO()
    image.save(data, "PNG", pnginfo=texts)
    return data.getvalue()


class Images(list[Image.Image]):
    """Pictures in a list, which a notebook shows with what each was drawn from."""

    def _repr_html_(self) -> str:
        cells = []
        for image in self[:MAX_SHOWN]:
            source = f"data:image/png;base64,{base64.b64encode(png_bytes(image, with_metadata=False)).decode()}"
            caption = html.escape(image.info.get("parameters", "")).replace("\n", "<br>")
            cells.append(
                f'<figure style="display:inline-block;margin:4px;width:{max(image.width, 160)}px;vertical-align:top">'
                f'<img src="{source}" width="{image.width}" height="{image.height}">'
                f'<figcaption style="font-size:10px">{caption}</figcaption></figure>'
            )
        more = f"<p>and {len(self) - MAX_SHOWN} more</p>" if len(self) > MAX_SHOWN else ""
        return "".join(cells) + more


def next_free_name(folder: str | Path, seed: int) -> Path:
    """000000-<seed>.png: one more than the highest such number in the folder."""
    folder = Path(folder)
    found = [re.match(r"(\d{6,9})-", entry.name) for entry in (folder.iterdir() if folder.is_dir() else ())]
    index = max((int(match[1]) for match in found if match), default=-1) + 1
    return folder / f"{index:06d}-{seed}.png"


def contact_sheet(
    images: Sequence[Image.Image | None],
    labels: Sequence[str] | None = None,
    columns: int | None = None,
    axes: tuple[str, Sequence[str], Sequence[str]] | None = None,
) -> Image.Image:
    """All pictures in one, on a near-square grid unless columns is given, each with its label below.

    None leaves a cell empty. axes: (corner, row labels, column labels) of a grid, written at its left and above it.
    """
    corner, down, across = axes or ("", (), ())
    columns = len(across) or columns or ceil(sqrt(len(images)))
    gap, caption, top = 4, 16 if labels else 0, 16 if axes else 0
    shown = [image for image in images if image is not None]
    width, height = max(image.width for image in shown), max(image.height for image in shown) + caption
    rows = ceil(len(images) / columns)
    font = ImageFont.load_default(11)
    margin = gap + min(ceil(max(map(font.getlength, (corner, *down)))), MAX_LABEL) if axes else 0
    size = (margin + columns * (width + gap) + gap, top + rows * (height + gap) + gap)
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for i, image in enumerate(images):
        x, y = margin + gap + i % columns * (width + gap), top + gap + i // columns * (height + gap)
        if image is not None:
            sheet.paste(image, (x, y))
        if labels:
            draw.text((x, y + (image.height if image else 0) + 2), _fitted(labels[i], font, width), "black", font)
    draw.text((gap, 2), _fitted(corner, font, MAX_LABEL), "black", font)
    for j, label in enumerate(across):
        draw.text((margin + gap + j * (width + gap), 2), _fitted(label, font, width), "black", font)
    for j, label in enumerate(down):
        y = top + gap + j * (height + gap) + height // 2 - 6
        draw.text((gap, y), _fitted(label, font, MAX_LABEL), "black", font)
    return sheet


def _fitted(label: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: float) -> str:
    """As much of a label as fits into that many pixels, on one line."""
    label = label.replace("\n", " ")[:200]
    while label and font.getlength(label) > width:
        label = label[:-1]
    return label
