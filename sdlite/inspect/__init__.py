"""A look inside a run: attention maps, x_0 at every step, feature sizes, and notebook widgets."""

from typing import TYPE_CHECKING

from sdlite.package import fetching, listed

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

__getattr__, __dir__ = fetching(__name__, listed(__file__))
