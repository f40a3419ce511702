"""Data that models are trained on: folders of images, masks, and the sets that `sdlite data` makes."""

from sdlite.package import fetching

__getattr__, __dir__ = fetching(__name__, {})
