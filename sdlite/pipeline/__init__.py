"""Parts in, images out."""

from sdlite.pipeline.about import About as About
from sdlite.pipeline.job import (
    Finished as Finished,
    Job as Job,
    Source as Source,
    Sources as Sources,
    Step as Step,
    batches as batches,
)
from sdlite.pipeline.pipeline import Pipeline as Pipeline
