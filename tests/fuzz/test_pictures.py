"""Pictures with hostile changes: their bytes, and the texts that sdlite and Automatic1111 keep in them."""

import json
from pathlib import Path

from PIL import Image

from sdlite import images
from sdlite.images.recipe import metadata
from sdlite.request import Request
from tests.fuzz.rule import TOKENS, Choices, changed, edited, fuzz, hold

REQUEST = Request(prompt="a (red:1.2) apple", negative_prompt="blurry", steps=5, image=f"sha256:{'0' * 64}")
TEXTS = metadata(REQUEST, model="m", model_hash="ab" * 32, prediction="v")
RECIPE = json.loads(TEXTS["sdlite"])


def picture(texts: dict[str, str], kind: str = "PNG", mode: str = "RGB") -> bytes:
    image = Image.new(mode, (3, 2))
    image.info.update(texts)
    return images.picture_bytes(image, kind)


def test_texts(folder: Path, examples: int):
    path = folder / "a.png"

    def check(choices: Choices) -> None:
        text = edited(json.dumps(changed(RECIPE, choices)).encode(), choices).decode("latin-1")
        infotext = edited(TEXTS["parameters"].encode(), choices).decode("utf-8", "ignore")
        kind = choices.one_of(("PNG", "PNG", "JPEG", "WEBP"))
        texts = {"parameters": infotext} if choices.number(3) == 0 else {"parameters": infotext, "sdlite": text}
        path.write_bytes(picture(texts, kind))
        hold(lambda: images.read_any_metadata(path), folder)

    fuzz(check, examples)


def test_bytes(folder: Path, examples: int):
    path = folder / "a.png"
    pictures = [picture(TEXTS, mode=mode) for mode in ("RGB", "RGBA", "LA", "L", "P", "1", "I;16")]
    pictures += [picture(TEXTS, kind) for kind in ("JPEG", "WEBP")] + TOKENS

    def check(choices: Choices) -> None:
        path.write_bytes(edited(choices.one_of(pictures), choices))
        for_mask = choices.number(2) == 0
        hold(lambda: images.open_picture(path, for_mask=for_mask), folder)
        hold(lambda: images.read_any_metadata(path), folder)

    fuzz(check, examples)
