"""What a pipeline knows of its model besides the parts themselves."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from sdlite.models.device import num_weights


@dataclass(frozen=True, slots=True)
class About:
    """name, hash: of the model, for the images' metadata. notes: what loading had to guess; the caller should show it.

    sample_size: default size of an image in latent cells, one number for both sides or (height, width). dtype: of text
    model and denoiser. backend: what computes the parts, if that is not PyTorch with the weights of `hash`; it changes
    the bits of an image, and so belongs to the keys of a batch and to the metadata.
    """

    name: str = ""
    hash: str = ""
    notes: tuple[str, ...] = ()
    sample_size: int | tuple[int, int] = 64
    dtype: str = "float32"
    backend: str = ""

    @property
    def bits(self) -> dict[str, str]:
        """What decides an image's bits besides request, model and prediction. Defaults are left out of keys."""
        return {"backend": self.backend} if self.backend else {}

    def summary(self, parts: Mapping[str, object], draws: str, device: torch.device) -> dict[str, str]:
        """The model in words. draws: size and prediction. Parts without weights are left out."""
        sizes = {name: num_weights(part) for name, part in parts.items()}
        kinds = {name: type(part).__name__ for name, part in parts.items() if sizes[name]}
        return {
            "model": self.name or "unnamed",
            **{name: f"{kind}, {sizes[name] / 1e6:.1f} million weights" for name, kind in kinds.items()},
            "draws": draws,
            "device": str(device),
            "sha256": self.hash[:10] or "none",
            **{f"note {i}": note for i, note in enumerate(self.notes, 1)},
        }


UNKNOWN = About()
