"""Parts in, images out."""

from sdlite.pipeline.about import About as About
from sdlite.pipeline.job import Job as Job, Source as Source, Sources as Sources, batches as batches
from sdlite.pipeline.pipeline import Finished as Finished, Pipeline as Pipeline, Step as Step
