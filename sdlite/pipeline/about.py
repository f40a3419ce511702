"""What a pipeline knows of its model besides the parts, and of the machine that it runs on."""

import math
import os
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import nn

from sdlite.config import check_device


@dataclass(frozen=True, slots=True)
class About:
    """name, hash: of the model, for the images' metadata. notes: what loading had to guess; the caller should show it.

    sample_size: default size of an image in latent cells, one number for both sides or (height, width). dtype: of text
    model and denoiser. backend: what computes the parts, if that is not PyTorch with the weights of `hash`; it changes
    the bits of an image, and so belongs to the keys of a batch and to the metadata. device: where parts compute that
    show no weights, such as plain wrappers.
    """

    name: str = ""
    hash: str = ""
    notes: tuple[str, ...] = ()
    sample_size: int | tuple[int, int] = 64
    dtype: str = "float32"
    backend: str = ""
    device: str = "cpu"

    @property
    def bits(self) -> dict[str, str]:
        """What decides an image's bits besides request, model and prediction. Defaults are left out of keys."""
        return {"backend": self.backend} if self.backend else {}


def find_device(name: str) -> torch.device:
    """The device of that name: "auto", "cpu", "cuda", "cuda:1", "mps". Raises ValueError if it is not there."""
    check_device(name)
    kind, colon, number = name.partition(":")
    counts = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    if name == "auto":
        return torch.device(next(kind for kind in ("cuda", "mps", "cpu") if counts[kind]))
    if (colon and not (number.isdecimal() and number.isascii())) or int(number or "0") >= counts[kind]:
        raise ValueError(f"device={name!r} is not there: PyTorch sees {counts[kind]} of {kind}; try auto or cpu")
    return torch.device(name)


def total_memory(device: torch.device) -> float:
    """Bytes of memory in all, infinite where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    with suppress(AttributeError, ValueError, OSError):  # Windows has no sysconf
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return math.inf


def device_of(*parts: object, default: str = "cpu") -> torch.device:
    """Where the first of the parts that has weights holds them; the default if none has any."""
    weights = (weight for part in parts if isinstance(part, nn.Module) for weight in part.parameters())
    return next((weight.device for weight in weights), torch.device(default))


def num_weights(part: object) -> int:
    """How many numbers a network holds; 0 for other objects."""
    return sum(weight.numel() for weight in part.parameters()) if isinstance(part, nn.Module) else 0
