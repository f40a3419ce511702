"""Options of a batch: one record for `batch.run` and for the flags of `sdlite batch`."""

from typing import Any, Literal

from pydantic import Field

from sdlite.config import LoadOptions


class Options(LoadOptions):
    """How to run a batch; `LoadOptions` holds the fields about the model.

    batch_size: images computed together. workers: processes. exact: the same bytes for every batch_size and number of
    workers and cores, by a fixed batch on one thread each. seed: base of the seeds of rows without one; same_seed: all
    of these get `seed` itself. defaults: fields of a request, or num_images, for rows that do not have them.
    keep_going: continue after a row that fails. part: "I/N", draw only part I of N. name: template of file names.
    format: a folder of PNGs, or shards of WebDataset. ray: workers are actors of a Ray cluster: one on this machine, or
    the one at ray_address, whose machines must all see the folder, the model and the start images.
    """

    batch_size: int = Field(4, ge=1, le=256)
    workers: int = Field(1, ge=1, le=256)
    exact: bool = False
    seed: int = Field(0, ge=0, lt=2**64)
    same_seed: bool = False
    defaults: dict[str, Any] = Field(default_factory=dict)
    keep_going: bool = False
    part: str | None = None
    name: str | None = None
    format: Literal["folder", "webdataset"] = "folder"
    ray: bool = False
    ray_address: str | None = None

    @property
    def on_ray(self) -> bool:
        return self.ray or self.ray_address is not None
