"""A look inside a run: attention maps, x_0 at every step, feature sizes, and notebook widgets."""

from typing import TYPE_CHECKING

from sdlite.package import fetching

if TYPE_CHECKING:
    from sdlite.inspect.maps import (
        attention_maps as attention_maps,
        attention_sheet as attention_sheet,
        clean_latents as clean_latents,
        feature_sizes as feature_sizes,
        overlay as overlay,
        record_attention as record_attention,
        word_maps as word_maps,
    )
    from sdlite.inspect.widgets import playground as playground

_MAPS = "attention_maps attention_sheet clean_latents feature_sizes overlay record_attention word_maps"
__getattr__, __dir__ = fetching(
    __name__, dict.fromkeys(_MAPS.split(), "sdlite.inspect.maps") | {"playground": "sdlite.inspect.widgets"}
)
