"""The version of sdlite, and names of a package that are fetched on first use."""

import ast
from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

__version__ = "0.1.0"


def listed(file: str) -> dict[str, str]:
    """Public name -> module that holds it, of a package's `__init__.py`: what it imports `as` itself for type checkers.

    So a public name stands in one place, though nothing is imported before its first use.
    """
    found = (node for node in ast.walk(ast.parse(Path(file).read_text("utf-8"))) if isinstance(node, ast.ImportFrom))
    homes = ((alias.name, str(node.module)) for node in found for alias in node.names if alias.asname)
    return {name: module for name, module in homes if "." in module}  # the rest are modules of the package itself


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
