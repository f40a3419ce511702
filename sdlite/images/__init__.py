"""Images: pixels and tensors, files, the metadata in them (recipe), and contact sheets."""

from typing import TYPE_CHECKING

from sdlite.package import fetching, homes_of

if TYPE_CHECKING:
    from sdlite.images.files import (
        Drawn as Drawn,
        Images as Images,
        open_picture as open_picture,
        picture_bytes as picture_bytes,
        png_bytes as png_bytes,
        read_any_metadata as read_any_metadata,
        read_metadata as read_metadata,
        save_numbered as save_numbered,
        save_picture as save_picture,
    )
    from sdlite.images.pixels import (
        digest as digest,
        from_pil as from_pil,
        largest_difference as largest_difference,
        mask_from_pil as mask_from_pil,
        pasted as pasted,
        to_pil as to_pil,
    )
    from sdlite.images.sheet import contact_sheet as contact_sheet

_HOMES = homes_of(
    {  # the same names as above, which only type checkers read
        "sdlite.images.files": "Drawn Images open_picture picture_bytes png_bytes read_any_metadata read_metadata "
        "save_numbered save_picture",
        "sdlite.images.pixels": "digest from_pil largest_difference mask_from_pil pasted to_pil",
        "sdlite.images.sheet": "contact_sheet",
    }
)
__getattr__, __dir__ = fetching(__name__, _HOMES)
