"""A look inside a run: attention maps, x_0 at every step, feature sizes, and notebook widgets."""

from typing import TYPE_CHECKING

from sdlite.package import fetching, homes_of

if TYPE_CHECKING:
    from sdlite.inspect.attention import (
        attention_maps as attention_maps,
        attention_sheet as attention_sheet,
        overlay as overlay,
        record_attention as record_attention,
        word_maps as word_maps,
    )
    from sdlite.inspect.steps import clean_latents as clean_latents, feature_sizes as feature_sizes
    from sdlite.inspect.widgets import playground as playground

_HOMES = homes_of(
    {  # the same names as above, which only type checkers read
        "sdlite.inspect.attention": "attention_maps attention_sheet overlay record_attention word_maps",
        "sdlite.inspect.steps": "clean_latents feature_sizes",
        "sdlite.inspect.widgets": "playground",
    }
)
__getattr__, __dir__ = fetching(__name__, _HOMES)
