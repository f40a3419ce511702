"""How good a model is: a classifier that judges what it draws, probes and the report."""

from sdlite.package import fetching

__getattr__, __dir__ = fetching(__name__, {})
