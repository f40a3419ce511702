"""Parts in, images out."""

from sdlite.pipeline.about import About as About
from sdlite.pipeline.job import Job as Job, Source as Source, Sources as Sources
from sdlite.pipeline.pipeline import Pipeline as Pipeline
from sdlite.pipeline.run import Finished as Finished, Step as Step
