"""Image files, with the recipe of the image inside.

    pixels in [-1, 1]  <--from_pil, to_pil-->  PIL  <--open_picture, save_picture-->  file

`open_picture` reads every image, wherever it comes from: the command line, a batch, Python. `picture_bytes` makes every
image file, with the two texts of `sdlite.images.recipe`: in a PNG as texts, in a JPEG or WebP in EXIF, where
Automatic1111 looks for them too. What a file says is checked, as it may come from anyone.
"""

import base64
import html
import re
import warnings
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

from sdlite.files import write_file
from sdlite.images.recipe import SUFFIXES, Foreign, Recipe, parse_a1111, parse_recipe, read_comment, write_comment

FORMATS = ("PNG", "JPEG", "WEBP")
MAX_PIXELS = 16 * 1024 * 1024  # of an image that is read: the largest that can be drawn, MAX_SIDE squared
MAX_PIXEL_BYTES = 8  # of a file, for each of its pixels at most: 16-bit RGBA, uncompressed
READABLE = {"WEBP": "WebP", "JPEG2000": "JPEG 2000"}  # Pillow's name of a format -> as people write it
TEXTS = ("parameters", "sdlite")  # names of the texts in an image's info and in a PNG
QUALITY: dict[str, dict[str, Any]] = {
    "PNG": {},
    "JPEG": {"quality": 95, "subsampling": 0},
    "WEBP": {"lossless": True},  # smaller than PNG, and `regen` finds the same pixels
}
MAX_SHOWN = 64  # images that a notebook shows of a list


class Drawn(Image.Image):
    """A PIL image with its recipe in `.info`, which `save` writes into the file. `to_pil` makes it."""

    def save(self, fp: Any, format: str | None = None, **options: Any) -> None:
        """PIL's own, with the texts for PNG, JPEG and WebP; pass pnginfo=None or exif=b"" to leave them out."""
        kind = format or SUFFIXES.get(Path(fp).suffix.lower() if isinstance(fp, str | Path) else "", "")
        super().save(fp, format, **(_text_options(self, kind.upper()) | options))


def open_picture(source: str | Path | bytes | Image.Image, *, for_mask: bool = False) -> Image.Image:
    """An RGB image of a file, its bytes, or a PIL image: upright, 16 bits cut to 8, at most 16 megapixels.

    Transparent pixels become white, and in a mask black, so that they are kept. Raises FileNotFoundError, or ValueError
    for anything else that is wrong with it and for a mask that repaints nothing, all in one line.
    """
    named = "mask" if for_mask else "image"
    name = str(source) if isinstance(source, str | Path) else f"the {named}"
    image = _upright(source, name) if isinstance(source, Image.Image) else decoded(source, name=name)
    if image.mode == "F":
        raise ValueError(f"{name} has floating-point pixels, whose range nobody knows; convert it to 8 bits first")
    if image.mode.startswith("I"):
        image = image.convert("I").point(lambda value: value * (1 / 257)).convert("L")
    if image.has_transparency_data:
        ground = Image.new("RGBA", image.size, "black" if for_mask else "white")
        image = Image.alpha_composite(ground, image.convert("RGBA"))
    image = image.convert("RGB")
    if for_mask and image.convert("L").getextrema()[1] < 128:  # type: ignore[operator]
        raise ValueError(f"{name} has nothing white, so nothing would be redrawn; paint white what is to change")
    return image


def _upright(image: Image.Image, name: str) -> Image.Image:
    """A PIL image that the caller opened, within the limits of a file."""
    if image.width * image.height > MAX_PIXELS:
        raise ValueError(f"{name} has more than {MAX_PIXELS >> 20} megapixels; scale the image down")
    if 0 in image.size:
        raise ValueError(f"{name} is {image.width}x{image.height}, without a pixel")
    try:
        image.load()  # PIL opens a file before it decodes it
    except Exception as error:
        raise ValueError(f"{name} {_damage(error)}") from None
    return _turned(image)


def _turned(image: Image.Image) -> Image.Image:
    """The image turned as its EXIF says. If the EXIF is damaged, it is removed and the image is not turned."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of each odd tag
            return ImageOps.exif_transpose(image)
    except Exception:
        plain = image.copy()
        for name in ("exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp"):  # where Pillow looks for it
            plain.info.pop(name, None)
        return plain


def decoded(
    source: str | Path | bytes,
    formats: tuple[str, ...] = FORMATS,
    max_pixels: int = MAX_PIXELS,
    name: str | None = None,
) -> Image.Image:
    """The image in a file. Checks its header before it decodes a pixel; whatever Pillow raises becomes one line.

    formats: those allowed, as Pillow calls them. Of a TIFF with several pages it gives the first, with "pages" in
    `.info`; other files with several images are refused. name: what errors call it, else its path.
    """
    name = str(source) if name is None else name
    if not isinstance(source, bytes) and not Path(source).is_file():
        raise FileNotFoundError(f"{name} is not a file" if Path(source).exists() else f"{name} does not exist")
    size = len(source) if isinstance(source, bytes) else Path(source).stat().st_size
    most = max_pixels * MAX_PIXEL_BYTES
    fault = f"is larger than {most >> 20} MiB; scale the image down" if size > most else None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of large images; the limit below refuses smaller ones
            file = BytesIO(source) if isinstance(source, bytes) else source
            with Image.open(file, formats=() if fault else formats) as image:
                if image.width * image.height > max_pixels:
                    raise Image.DecompressionBombError
                several = getattr(image, "is_animated", False)
                if several and image.format not in ("MPO", "TIFF"):  # MPO: a phone's JPEG and a preview
                    fault = "is an animation; save one of its frames as a PNG and give that"
                else:
                    image.load()
                    upright = _turned(image)
                    upright.info |= {"pages": "several"} if several and image.format == "TIFF" else {}
                    return upright
    except Image.DecompressionBombError:
        fault = f"has more than {max_pixels >> 20} megapixels; scale the image down"
    except UnidentifiedImageError:
        *first, last = (READABLE.get(kind, kind) for kind in formats)
        fault = fault or f"is not a {', '.join(first)} or {last} image"
    except Exception as error:  # the decoders raise what the bytes lead them to: OSError, SyntaxError, struct.error...
        fault = _damage(error)
    raise ValueError(f"{name} {fault}")


def _damage(error: Exception) -> str:
    said = " ".join(str(error).split()) or type(error).__name__
    if "MAX_TEXT" in said:  # Pillow's limits on compressed texts
        return "holds a text that is larger than 1 MiB; save it without its texts"
    return f"is damaged: {said}"


def read_texts(path: str | Path) -> dict[str, str]:
    """The "parameters" and "sdlite" texts of an image file, unchecked, whoever wrote them."""
    image = decoded(path)
    return _texts(image) or _exif_texts(image)


def _texts(image: Image.Image) -> dict[str, str]:
    return {name: image.info[name] for name in TEXTS if isinstance(image.info.get(name), str)}


def read_metadata(path: str | Path) -> Recipe:
    """What `metadata` wrote. Raises ValueError when there is none or it does not hold together."""
    if (text := read_texts(path).get("sdlite")) is None:
        raise ValueError(f"{path} holds no sdlite metadata (not drawn by sdlite, drawn with --no-metadata, or edited)")
    try:
        return parse_recipe(text)
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} holds broken sdlite metadata: {str(error).splitlines()[0]}") from None


def read_any_metadata(path: str | Path) -> Foreign:
    """The recipe of an image that sdlite or Automatic1111 drew. Raises ValueError as `read_metadata`."""
    texts = read_texts(path)
    if "sdlite" in texts or "parameters" not in texts:
        return Foreign(read_metadata(path), [])
    try:
        return parse_a1111(texts["parameters"])
    except ValueError as error:
        raise ValueError(f"{path} cannot be drawn again: {error}") from None


def _exif_texts(image: Image.Image) -> dict[str, str]:
    """Texts of a JPEG or WebP: Automatic1111's in the user comment, ours in the description beside it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            exif = image.getexif()
            comment = exif.get_ifd(ExifTags.IFD.Exif).get(ExifTags.Base.UserComment, b"")
            description = exif.get(ExifTags.Base.ImageDescription)
    except Exception:  # the same as for the pixels: whatever the bytes lead Pillow to
        return {}
    texts = {"parameters": read_comment(comment) if isinstance(comment, bytes) else str(comment)}
    texts["sdlite"] = description if isinstance(description, str) and description.startswith('{"request"') else ""
    return {name: text for name, text in texts.items() if text}


def _text_options(image: Image.Image, kind: str) -> dict[str, Any]:
    """Options of PIL's `save` that write the texts in image.info into a file of that kind."""
    if not (texts := _texts(image)) or kind not in QUALITY:
        return {}
    if kind == "PNG":
        info = PngInfo()
        for name, text in texts.items():
            info.add_text(name, text)
        return {"pnginfo": info}
    exif = Image.Exif()
    exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment] = write_comment(texts.get("parameters", ""))
    exif[ExifTags.Base.ImageDescription] = texts.get("sdlite", "")
    return {"exif": exif}


def save_picture(image: Image.Image, path: str | Path, *, force: bool = False, with_metadata: bool = True) -> None:
    """Writes a PNG, JPEG or WebP whole or not at all, with the texts in image.info, and the folders on the way.

    Replaces a file only with force. Raises FileExistsError, DiskFull, or OSError as the system says.
    """
    kind = SUFFIXES.get(Path(path).suffix.lower(), "PNG")
    write_file(Path(path), picture_bytes(image, kind, with_metadata), force=force)


def save_numbered(
    image: Image.Image, folder: str | Path, seed: int, *, suffix: str = ".png", with_metadata: bool = True
) -> Path:
    """Saves under the next free number of a folder and returns the path. Several programs may save there at a time."""
    while True:
        path = next_free_name(folder, seed, suffix)
        try:
            save_picture(image, path, with_metadata=with_metadata)
            return path
        except FileExistsError:
            continue  # another run took the number in the meantime


def png_bytes(image: Image.Image, with_metadata: bool = True) -> bytes:
    """The PNG file of an image, with the texts in image.info."""
    return picture_bytes(image, "PNG", with_metadata)


def picture_bytes(image: Image.Image, kind: str, with_metadata: bool = True) -> bytes:
    """The file of an image, with the texts in image.info. kind: "PNG", "JPEG" or "WEBP"."""
    data = BytesIO()
    texts = _text_options(image, kind) if with_metadata else {}
    Image.Image.save(image, data, kind, **QUALITY[kind], **texts)  # Drawn's own would add the texts anyway
    return data.getvalue()


class Images(list[Image.Image]):
    """A list of images, which a notebook shows with what each was drawn from."""

    def save(self, folder: str | Path) -> list[Path]:
        """Writes each as 000000-SEED.png, counting up, with its metadata; makes the folder and returns the paths."""
        return [save_numbered(image, folder, _seed(image)) for image in self]

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


def _seed(image: Image.Image) -> int:
    return parse_recipe(image.info["sdlite"]).request.seed if "sdlite" in image.info else 0


def next_free_name(folder: str | Path, seed: int, suffix: str = ".png") -> Path:
    """000000-<seed>.png: one more than the highest such number in the folder."""
    folder = Path(folder)
    names = {entry.name for entry in folder.iterdir()} if folder.is_dir() else set()
    found = [re.match(r"(\d{6,9})-", name) for name in names]
    index = max((int(match[1]) for match in found if match), default=-1) + 1
    while (name := f"{index:06d}-{seed}{suffix}") in names:  # beyond nine digits numbers are not looked for
        index += 1
    return folder / name
