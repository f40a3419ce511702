"""Training: one loop and a task per network; `datasets` and `evaluation` beside it. Modules load on first use."""

from sdlite.package import fetching

__getattr__, __dir__ = fetching(__name__, {})
