"""What a notebook shows of a pipeline and of its pictures, and the sliders that draw."""

import base64
from html.parser import HTMLParser
from io import BytesIO

import pytest
from PIL import Image

from sdlite.images.files import MAX_SHOWN, Images
from sdlite.pipeline import Pipeline


class Parsed(HTMLParser):
    """Tags with their attributes, and the text between them."""

    def __init__(self, markup: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(markup)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    return Pipeline.load("tiny", device="cpu")


def test_pictures_are_a_list_shown_with_their_requests(pipe: Pipeline):
    prompt = '<script>alert("x")</script> & a cat'
    pictures = pipe(prompt, num_images=2, seed=5, steps=1)
    assert isinstance(pictures, list) and len(pictures) == 2
    shown = Parsed(pictures._repr_html_())
    assert [tag for tag, _ in shown.tags if tag == "script"] == []
    assert prompt in shown.text and "Seed: 5" in shown.text and "Seed: 6" in shown.text
    sources = [attributes["src"] for tag, attributes in shown.tags if tag == "img"]
    for source, picture in zip(sources, pictures, strict=True):
        with Image.open(BytesIO(base64.b64decode(source.removeprefix("data:image/png;base64,")))) as inline:
            assert inline.tobytes() == picture.tobytes()


def test_of_many_pictures_some_are_shown():
    shown = Parsed(Images([Image.new("RGB", (8, 8))] * (MAX_SHOWN + 3))._repr_html_())
    assert sum(tag == "img" for tag, _ in shown.tags) == MAX_SHOWN and "3 more" in shown.text


def test_a_pipeline_says_what_it_is_made_of(pipe: Pipeline):
    shown = Parsed(pipe._repr_html_())
    count = sum(p.numel() for p in pipe.denoiser.parameters()) / 1e6
    for words in (f"UNet, {count:.1f} million weights", "64 x 64 pixels", "epsilon", "untrained"):
        assert words in shown.text
        assert words in repr(pipe)


def test_the_playground_draws_what_the_sliders_say(pipe: Pipeline):
    pytest.importorskip("ipywidgets", reason="the sliders need ipywidgets")
    from sdlite.inspect.widgets import playground

    box = playground(pipe, "a boat")
    fields = {widget.description: widget for widget in box.children if hasattr(widget, "description")}
    fields["seed"].value, fields["steps"].value, fields["guidance"].value = 3, 2, 4.0
    fields["Draw"].click()
    (picture,) = pipe("a boat", seed=3, steps=2, guidance_scale=4.0)
    assert [drawn.tobytes() for drawn in box.pictures] == [picture.tobytes()]
    fields["negative"].value = "x" * 30_000
    fields["Draw"].click()
    assert "negative_prompt" in box.children[-1].value and not fields["Draw"].disabled and len(box.pictures) == 1


def test_the_playground_says_what_nobody_foresaw(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("ipywidgets", reason="the sliders need ipywidgets")
    from sdlite.inspect.widgets import playground

    def breaks(*_: object) -> None:
        raise IndexError("index 20 is out of bounds")

    monkeypatch.setattr(pipe, "draw", breaks)
    box = playground(pipe, "a boat")
    next(widget for widget in box.children if widget.description == "Draw").click()
    assert box.children[-1].value == "IndexError: index 20 is out of bounds"
