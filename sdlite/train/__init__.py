"""Training: one loop, a data folder, and a task per network. Each module is imported on first use."""

from importlib import import_module
from importlib.util import find_spec
from types import ModuleType


def __getattr__(name: str) -> ModuleType:
    if name.startswith("_") or find_spec(f"sdlite.train.{name}") is None:
        raise AttributeError(f"module 'sdlite.train' has no attribute {name!r}")
    return import_module(f"sdlite.train.{name}")
