"""A trained network as a folder of files and as a function: image in, mask out, in tiles if the image is large.

    image --standardized--> (C, H, W) --tiles that overlap--> network --centres put together--> (K, H, W) --> mask

The folder holds config.json and model.safetensors. The outer part of a tile is thrown away, because the network has not
seen what lies around it. The image is continued by its mirror image (Ronneberger et al. 2015, figure 2).
"""

from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import torch
from PIL import Image
from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import load as load_bytes, save as save_bytes
from torch import Tensor

from sdlite.config import Record
from sdlite.files import exported, read_json, write_file
from sdlite.segmentation.models import FCN, SegmentationUNet
from sdlite.segmentation.pixels import mask_image, pixels_of, standardized, statistics

Count = Annotated[int, Field(ge=1, le=256)]
CONTEXT = 8  # part of a tile's side, at each end, that only gives context: an eighth
MAX_MAP_BYTES = 2**29  # of the largest feature map; a network holds a few of them at once
MAX_COMPUTED = 2**29  # pixels computed for one image, in all its tiles: about ten times a photo of 24 megapixels


class UNetPlan(Record):
    """Arguments of `SegmentationUNet`."""

    kind: Literal["unet"] = "unet"
    in_channels: Literal[1, 3] = 3
    num_classes: Count = 2
    depth: int = Field(4, ge=1, le=8)
    base_width: int = Field(64, ge=1, le=1024)
    padding: Literal["valid", "same"] = "valid"
    upsample: Literal["transposed", "interpolate"] = "transposed"
    batch_norm: bool = False


class FCNPlan(Record):
    """Arguments of `FCN`."""

    kind: Literal["fcn"] = "fcn"
    in_channels: Literal[1, 3] = 3
    num_classes: Count = 2
    stride: Literal[8, 16, 32] = 8
    base_width: int = Field(64, ge=1, le=1024)
    batch_norm: bool = False


Plan = UNetPlan | FCNPlan
Network = SegmentationUNet | FCN


class SegmenterConfig(Record):
    """network: what to build. tile: pixels along the side of what the network labels at once, as in training."""

    network: Annotated[Plan, Field(discriminator="kind")]
    tile: int = Field(256, ge=16, le=4096)


def build(plan: Plan) -> Network:
    """The network of a plan, with its initial weights."""
    arguments = plan.model_dump(exclude={"kind"})
    return SegmentationUNet(**arguments) if isinstance(plan, UNetPlan) else FCN(**arguments)


def mirrored(start: int, stop: int, size: int) -> Tensor:
    """Indices of positions start..stop-1 on a line of `size` pixels that is mirrored at its ends, again and again."""
    period = max(2 * size - 2, 1)
    position = torch.arange(start, stop) % period
    return torch.minimum(position, period - position) if size > 1 else torch.zeros_like(position)


class Tiles(NamedTuple):
    """How an image is cut. side: pixels along the side of a tile. margin: pixels of it thrown away at each end."""

    side: int
    margin: int


class Segmenter:
    """A network and how to apply it. `Segmenter.load(folder)(picture)` is the mask."""

    def __init__(self, network: Network, config: SegmenterConfig) -> None:
        self.network, self.config = network, config

    @classmethod
    def load(cls, folder: Path | str) -> "Segmenter":
        """Reads a folder that `save` wrote, or the export in the folder of a training run.

        Raises FileNotFoundError or a ValueError of one line that says what is wrong with the folder.
        """
        folder = exported(Path(folder), "model.safetensors")
        for file in ("config.json", "model.safetensors"):
            if not (folder / file).is_file():
                raise FileNotFoundError(f"{folder} holds no {file}; give the folder that a Segmenter was saved into")
        try:
            config = SegmenterConfig(**read_json(folder / "config.json"))
            tensors = load_bytes((folder / "model.safetensors").read_bytes())  # not mapped: it may be rewritten
        except (TypeError, ValueError, SafetensorError) as error:
            raise ValueError(f"{folder} is no segmentation model: {str(error).splitlines()[0]:.200}") from None
        with torch.device("meta"):  # takes no memory before the file is checked
            network = build(config.network)
        _check(network.state_dict(), tensors, folder)
        floats = {name: t.float() if t.is_floating_point() else t for name, t in tensors.items()}
        network.load_state_dict(floats, assign=True)
        segmenter = cls(network.eval().requires_grad_(False), config)
        size = segmenter.tiles.side**2 * 4 * max(config.network.base_width, config.network.num_classes)
        if size > MAX_MAP_BYTES:
            limit = f"at most {MAX_MAP_BYTES >> 20} are given; set a smaller tile in config.json"
            raise ValueError(f"{folder}: tile={config.tile} needs {size >> 20} MiB a feature map, and {limit}")
        return segmenter

    def save(self, folder: Path | str) -> None:
        """Writes config.json and model.safetensors atomically. They may replace the files that were loaded."""
        folder = Path(folder)
        tensors = {name: tensor.cpu().contiguous() for name, tensor in self.network.state_dict().items()}
        write_file(folder / "model.safetensors", save_bytes(tensors), force=True)
        write_file(folder / "config.json", f"{self.config.model_dump_json(indent=1)}\n".encode(), force=True)

    def __call__(self, image: Image.Image, progress: Callable[[float], None] | None = None) -> Image.Image:
        """The mask, as large as the image, in mode "P": its values are class numbers, its palette makes them visible.

        progress: called with the fraction done, 0 to 1. Raises ValueError for a shape that would take hours.
        """
        pixels = pixels_of(image, self.config.network.in_channels)
        classes = torch.empty(pixels.shape[1:], dtype=torch.uint8)
        for done, (rows, columns, part) in self._parts(pixels):
            classes[rows, columns] = part.argmax(0).to("cpu", torch.uint8)
            if progress is not None:
                progress(done)
        return mask_image(classes)

    def probabilities(self, pixels: Tensor) -> Tensor:
        """Class probabilities, (K, H, W) float32. pixels: (C, H, W) from `pixels_of`."""
        result = next(self.network.parameters()).new_empty(self.config.network.num_classes, *pixels.shape[1:])
        for _, (rows, columns, part) in self._parts(pixels):
            result[:, rows, columns] = part.softmax(0)
        return result

    @torch.no_grad()
    def _parts(self, pixels: Tensor) -> Iterator[tuple[float, tuple[slice, slice, Tensor]]]:
        """Yields the fraction done and a tile's rows, columns and logits (K, h, w), until the image is covered."""
        height, width = pixels.shape[-2:]
        device, over = next(self.network.parameters()).device, statistics(pixels)
        if not self.network.valid and max(height, width) <= self.config.tile:
            logits = self.network(standardized(pixels, over)[None].to(device))[0]  # (K, H, W)
            yield 1.0, (slice(height), slice(width), logits)
            return
        side, margin = self.tiles
        step = side - 2 * margin
        count = -(-height // step) * -(-width // step)
        if count * side**2 > MAX_COMPUTED:
            limit = f"more than {MAX_COMPUTED // side**2:,} would take hours; cut or shrink it"
            cut = f"is cut into {count:,} tiles of {side} x {side}"
            raise ValueError(f"an image of {width} x {height} pixels {cut}, and {limit}")
        for number, (top, left) in enumerate(product(range(0, height, step), range(0, width, step)), 1):
            rows = mirrored(top - margin, top - margin + side, height)
            columns = mirrored(left - margin, left - margin + side, width)
            tile = standardized(pixels[:, rows][:, :, columns], over)[None].to(device)  # (1, C, side, side)
            logits = self.network(tile)[0]  # (K, side, side), valid (K, step, step)
            if not self.network.valid:
                logits = logits[:, margin : margin + step, margin : margin + step]
            part = logits[:, : height - top, : width - left]
            yield number / count, (slice(top, top + step), slice(left, left + step), part)

    @property
    def tiles(self) -> Tiles:
        """The network reads whole tiles. Only their middle is kept, because the network has seen what surrounds it."""
        network, tile = self.network, self.config.tile
        if isinstance(network, SegmentationUNet) and network.valid:
            margin = network.margin // 2
            return Tiles(network.input_side(tile + 2 * margin), margin)
        return Tiles(tile, tile // CONTEXT)


def _check(ours: dict[str, Tensor], theirs: dict[str, Tensor], folder: Path) -> None:
    """Raises ValueError unless both have the same names and shapes and all values are finite."""
    for name in sorted(ours.keys() | theirs.keys()):
        want, have = (tuple(part[name].shape) if name in part else "absent" for part in (ours, theirs))
        fault = f"is {have} in model.safetensors and {want} by config.json; they are not of one model"
        if want == have:
            if theirs[name].isfinite().all():
                continue
            fault = "has values that are not finite; the file is damaged or training diverged"
        raise ValueError(f"{folder}: {name} {fault}")
