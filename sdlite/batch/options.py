"""Options of a batch: one record for `batch.run` and for the flags of `sdlite batch`, which show the descriptions."""

from typing import Any, Literal

from pydantic import Field

from sdlite.config import LoadOptions

PART = """Draw only part I of N, for many machines on one folder. In a SLURM array of 1-N: $SLURM_ARRAY_TASK_ID/N.
In a shell that accelerate launch starts: $((RANK+1))/$WORLD_SIZE."""
RAY_ADDRESS = "Address of a running Ray cluster; all its machines must see the folder, the model and the start images."


class Options(LoadOptions):
    """How to run a batch; `LoadOptions` holds the fields about the model.

    exact works by a fixed batch size on one thread in each process. defaults: fields of a request, or num_images, for
    rows that do not have them. name: see `sdlite.batch.names`. ray_address implies ray.
    """

    batch_size: int = Field(4, ge=1, le=256, description="Images drawn at the same time.")
    workers: int = Field(
        1,
        ge=1,
        le=256,
        description="Number of processes or Ray actors; they share the cores, or each gets a GPU.",
    )
    exact: bool = Field(False, description="Same bytes for every batch size and number of workers, on one kind of CPU.")
    seed: int = Field(
        0, ge=0, lt=2**64, description="Rows without a seed get different seeds, which are derived from this one."
    )
    same_seed: bool = Field(False, description="Give all rows without a seed the seed --seed.")
    defaults: dict[str, Any] = Field(default_factory=dict)
    keep_going: bool = Field(False, description="Continue after a row that fails.")
    part: str | None = Field(None, description=" ".join(PART.split()))
    name: str | None = Field(None, description="File names, e.g. '{index:06}-{prompt}.png'.")
    format: Literal["folder", "webdataset"] = Field(
        "folder", description="folder: PNG files. webdataset: shards DIR/00000.tar, ..."
    )
    ray: bool = Field(False, description="Make the workers actors of a Ray cluster on this machine.")
    ray_address: str | None = Field(None, description=RAY_ADDRESS)

    @property
    def on_ray(self) -> bool:
        return self.ray or self.ray_address is not None
