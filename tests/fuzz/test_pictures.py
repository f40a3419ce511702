"""Pictures with hostile changes: their bytes, and the texts that sdlite and Automatic1111 keep in them."""

import json
from io import BytesIO
from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from sdlite import images
from sdlite.config import Request
from tests.fuzz.rule import TOKENS, Choices, changed, edited, fuzz, hold

REQUEST = Request(prompt="a (red:1.2) apple", negative_prompt="blurry", steps=5, image=f"sha256:{'0' * 64}")
TEXTS = images.metadata(REQUEST, model="m", model_hash="ab" * 32, prediction="v", width=8, height=8)
RECIPE = json.loads(TEXTS["sdlite"])


def picture(texts: dict[str, str], kind: str = "PNG", mode: str = "RGB") -> bytes:
    info, data = PngInfo(), BytesIO()
    for name, text in texts.items():
        info.add_text(name, text)
    Image.new(mode, (3, 2)).save(data, kind, pnginfo=info)
    return data.getvalue()


def test_texts(folder: Path, examples: int):
    path = folder / "a.png"

    def check(choices: Choices) -> None:
        text = edited(json.dumps(changed(RECIPE, choices)).encode(), choices)
        infotext = edited(TEXTS["parameters"].encode(), choices)
        texts = {"sdlite": text.decode("latin-1"), "parameters": infotext.decode("utf-8", "ignore")}
        if choices.number(4) == 0:
            del texts["sdlite"]
        path.write_bytes(picture(texts))
        hold(lambda: images.read_texts(path), folder)
        hold(lambda: images.read_metadata(path), folder)

    fuzz(check, examples)


def test_bytes(folder: Path, examples: int):
    path = folder / "a.png"
    modes = ("RGB", "RGBA", "LA", "L", "P", "1", "I;16")
    pictures = [picture({"parameters": "x"}, mode=mode) for mode in modes]
    pictures += [picture({}, kind) for kind in ("JPEG", "WEBP", "GIF", "BMP", "TIFF")] + TOKENS

    def check(choices: Choices) -> None:
        path.write_bytes(edited(choices.one_of(pictures), choices))
        hold(lambda: images.open_image(path), folder)

    fuzz(check, examples)
