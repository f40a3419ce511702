"""The version of sdlite, and names of a package that are fetched on first use."""

from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.util import find_spec
from typing import Any

__version__ = "0.1.0"


def homes_of(modules: Mapping[str, str]) -> dict[str, str]:
    """{"sdlite.a": "B C"} -> {"B": "sdlite.a", "C": "sdlite.a"}: public name -> module that holds it."""
    return {name: module for module, names in modules.items() for name in names.split()}


def fetching(package: str, homes: Mapping[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """`__getattr__` and `__dir__` of a package whose names and modules are imported on first use (PEP 562).

    homes: public name -> module that holds it; a module's own name stands for the module itself.
    """

    def __getattr__(name: str) -> Any:
        if name in homes:
            return getattr(import_module(homes[name]), name)
        module = f"{package}.{name}"
        if name.startswith("_") or find_spec(module) is None:
            raise AttributeError(f"module {package!r} has no attribute {name!r}; it has {', '.join(sorted(homes))}")
        return import_module(module)

    return __getattr__, lambda: sorted(homes)
