"""Sliders in a notebook: the fields of a request, and the image while it comes out of the noise."""

from typing import Any

from sdlite.images.files import Images, png_bytes
from sdlite.pipeline import Finished, Pipeline
from sdlite.request import Request, reason


def playground(pipe: Pipeline, prompt: str = "a red apple") -> Any:
    """A box of widgets that draws with pipe; its `pictures` are all that were drawn.

    Raises ImportError with one line if ipywidgets is not installed.
    """
    try:
        import ipywidgets  # type: ignore[import-not-found,import-untyped,unused-ignore]
    except ImportError:
        raise ImportError('playground needs ipywidgets; pip install "sdlite[notebook]"') from None
    default = Request(prompt=prompt)
    fields = {
        "prompt": ipywidgets.Text(prompt, description="prompt"),
        "negative_prompt": ipywidgets.Text("", description="negative"),
        "seed": ipywidgets.BoundedIntText(default.seed, min=0, max=2**53, description="seed"),
        "steps": ipywidgets.IntSlider(default.steps, min=1, max=100, description="steps"),
        "guidance_scale": ipywidgets.FloatSlider(
            default.guidance_scale, min=1, max=20, step=0.5, description="guidance"
        ),
    }
    button = ipywidgets.Button(description="Draw")
    shown = ipywidgets.Image(format="png", width=256)
    said = ipywidgets.Label("")
    box = ipywidgets.VBox([*fields.values(), button, shown, said])
    box.pictures = Images()

    def draw(_: object) -> None:
        button.disabled = True
        try:
            request = Request(**{name: field.value for name, field in fields.items()})
            for event in pipe.draw(pipe.jobs(request)):
                if isinstance(event, Finished):
                    box.pictures.append(event.picture)
                    shown.value = png_bytes(event.picture)
                    continue
                said.value = f"step {event.step} of {event.of}"
                if event.latents is not None and event.step < event.of:
                    shown.value = png_bytes(pipe.decode(event.latents, request)[0])
        except Exception as error:  # it has no other way to be seen: a callback's traceback goes nowhere
            said.value = reason(error)
        finally:
            button.disabled = False

    button.on_click(draw)
    return box
