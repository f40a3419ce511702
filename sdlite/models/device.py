"""Where a model runs: the device, its numbers and its memory."""

import math
import os
from contextlib import suppress

import torch
from torch import nn

from sdlite.config import check_device


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


def find_dtype(name: str, device: torch.device) -> torch.dtype:
    known = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
    known["auto"] = torch.float32 if device.type == "cpu" else torch.float16
    if name not in known:
        raise ValueError(f"dtype={name!r} must be one of {', '.join(known)}")
    return known[name]


def device_of(*parts: object) -> torch.device:
    """Where the first of the parts that has weights holds them; the CPU if none has any."""
    weights = (weight for part in parts if isinstance(part, nn.Module) for weight in part.parameters())
    return next((weight.device for weight in weights), torch.device("cpu"))


def num_weights(part: object) -> int:
    """How many numbers a network holds; 0 for other objects."""
    return sum(weight.numel() for weight in part.parameters()) if isinstance(part, nn.Module) else 0
