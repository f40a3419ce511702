"""Parts in, pictures out."""

from sdlite.pipeline.pipeline import Picture as Picture, Pictures as Pictures, Pipeline as Pipeline
