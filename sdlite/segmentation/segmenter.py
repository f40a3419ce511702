"""A trained network as a file folder and as a function of pictures: picture in, mask out, in tiles if it is large.

    picture --standardized--> (C, H, W) --tiles that overlap--> network --centres put together--> (K, H, W) --> mask

The folder holds config.json and model.safetensors. A tile's outer part, whose surroundings the network has not seen, is
thrown away; around the picture lies its mirror image (Ronneberger et al. 2015, figure 2).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
from PIL import Image
from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import load as load_bytes, save as save_bytes
from torch import Tensor

from sdlite.config import Record
from sdlite.files import read_json, write_file
from sdlite.segmentation.models import FCN, SegmentationUNet

# Of pictures; not all that Pillow opens: EPS starts another program, TGA takes many a file for a picture.
FORMATS = ("PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF", "JPEG2000", "AVIF", "PPM", "PSD")
MAX_PIXELS = 128 * 1024 * 1024
Count = Annotated[int, Field(ge=1, le=256)]
CONTEXT = 8  # part of a tile's side, at each end, that only gives context: an eighth
COLOURS = (0, 0, 0, 255, 255, 255, 230, 25, 75, 60, 180, 75, 0, 130, 200, 245, 130, 48, 145, 30, 180, 70, 240, 240)
CYCLES = 42  # of the six colours after black and white, to fill a palette of 256
MAX_MAP_BYTES = 2**29  # of the largest feature map; a network holds a few of them at once
MAX_COMPUTED = 2**29  # pixels computed for one picture, in all its tiles: about ten times a photo of 24 megapixels
BLOCK = 2**22  # pixels that are added up at once
MIN_DEVIATION = 1e-3  # of a picture's values; below it there is nothing to see, and noise is not blown up


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


def pixels_of(image: Image.Image, channels: int) -> Tensor:
    """(C, H, W), uint8, or float32 for pictures of 16 or 32 bits, as they are: only differences will matter.

    channels: 1 or 3; colour becomes grey and grey three times the same. Palettes are looked up, transparency is laid
    over white. Raises ValueError for a picture without pixels or with values that are not finite.
    """
    if 0 in image.size:
        raise ValueError(f"the picture is {image.width} x {image.height} pixels; it must have some")
    if image.mode.startswith(("I", "F")):
        values = torch.frombuffer(bytearray(image.convert("F").tobytes()), dtype=torch.float32)
        if not values.isfinite().all():
            raise ValueError("the picture has values that are infinite or not a number")
        return values.view(1, image.height, image.width).expand(channels, -1, -1)
    image = _over_white(image).convert("L" if channels == 1 else "RGB")
    values = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return values.view(image.height, image.width, channels).movedim(-1, 0)


def _over_white(image: Image.Image) -> Image.Image:
    if not image.has_transparency_data:
        return image
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)


def statistics(pixels: Tensor) -> tuple[float, float]:
    """Mean and deviation of all values of a picture, (C, H, W), in float64, some rows at a time to save memory."""
    blocks = torch.split(pixels, max(1, BLOCK // pixels.shape[-1]), dim=1)
    mean = sum(float(block.double().sum()) for block in blocks) / pixels.numel()
    square = sum(float((block.double() - mean).square().sum()) for block in blocks) / pixels.numel()
    return mean, max(square**0.5, MIN_DEVIATION)


def standardized(pixels: Tensor, over: tuple[float, float] | None = None) -> Tensor:
    """(C, H, W) float32 with mean 0 and deviation 1, so that exposure and bit depth do not matter.

    over: the `statistics` of the whole picture when pixels are a part of it.
    """
    mean, deviation = statistics(pixels) if over is None else over
    return ((pixels.double() - mean) / deviation).float()


def mirrored(start: int, stop: int, size: int) -> Tensor:
    """Indices of positions start..stop-1 on a line of `size` pixels that is mirrored at its ends, again and again."""
    period = max(2 * size - 2, 1)
    position = torch.arange(start, stop) % period
    return torch.minimum(position, period - position) if size > 1 else torch.zeros_like(position)


@dataclass(frozen=True)
class Tiles:
    """How a picture is cut. side: of what the network is given. margin: of that, at each end, what is thrown away."""

    side: int
    margin: int

    @property
    def step(self) -> int:
        return self.side - 2 * self.margin

    def count(self, height: int, width: int) -> int:
        return -(-height // self.step) * -(-width // self.step)


class Segmenter:
    """A network and how to apply it. `Segmenter.load(folder)(picture)` is the mask."""

    def __init__(self, network: Network, config: SegmenterConfig) -> None:
        self.network, self.config = network, config

    @classmethod
    def load(cls, folder: Path | str) -> "Segmenter":
        """What `save` wrote, or the export of a run's folder.

        Raises FileNotFoundError or a ValueError of one line that says what is wrong with it.
        """
        folder = Path(folder)
        folder = folder / "export" if (folder / "export" / "model.safetensors").is_file() else folder
        for file in ("config.json", "model.safetensors"):
            if not (folder / file).is_file():
                raise FileNotFoundError(f"{folder} holds no {file}; give the folder that a Segmenter was saved into")
        try:
            fields = read_json(folder / "config.json")
            config = SegmenterConfig(**fields)
            tensors = load_bytes((folder / "model.safetensors").read_bytes())  # no map: the file may be rewritten
        except (TypeError, ValueError, SafetensorError) as error:
            raise ValueError(f"{folder} is no segmentation model: {str(error).splitlines()[0]:.200}") from None
        with torch.device("meta"):  # no memory is asked for before the file turns out to hold that much
            network = build(config.network)
        _check(network.state_dict(), tensors, folder)
        floats = {name: t.float() if t.is_floating_point() else t for name, t in tensors.items()}
        network.load_state_dict(floats, assign=True)
        segmenter = cls(network.eval().requires_grad_(False), config)
        size = segmenter.tiles.side**2 * 4 * max(config.network.base_width, config.network.num_classes)
        if size > MAX_MAP_BYTES:
            raise ValueError(
                f"{folder}: tile={config.tile} needs {size >> 20} MiB a feature map, and at most {MAX_MAP_BYTES >> 20} "
                "are given; set a smaller tile in config.json"
            )
        return segmenter

    def save(self, folder: Path | str) -> None:
        """Writes config.json and model.safetensors, each in one step, also over the files that were loaded."""
        folder = Path(folder)
        tensors = {name: tensor.cpu().contiguous() for name, tensor in self.network.state_dict().items()}
        contents = {"model.safetensors": save_bytes(tensors), "config.json": self.config.model_dump_json(indent=1)}
        for name, content in contents.items():
            write_file(folder / name, content if isinstance(content, bytes) else f"{content}\n".encode(), force=True)

    def __call__(self, image: Image.Image, progress: Callable[[float], None] | None = None) -> Image.Image:
        """Mask of the picture's size, mode "P": the values are class numbers, the palette makes them visible.

        progress: called with the part that is done, 0 to 1. Raises ValueError for a shape that would take hours.
        """
        pixels = pixels_of(image, self.config.network.in_channels)
        classes = torch.empty(pixels.shape[1:], dtype=torch.uint8)
        for done, (rows, columns, part) in self._parts(pixels):
            classes[rows, columns] = part.argmax(0).to("cpu", torch.uint8)
            if progress is not None:
                progress(done)
        return mask_image(classes)

    def probabilities(self, pixels: Tensor) -> Tensor:
        """(K, H, W) float32 of `pixels_of` a picture, (C, H, W)."""
        result = next(self.network.parameters()).new_empty(self.config.network.num_classes, *pixels.shape[1:])
        for _, (rows, columns, part) in self._parts(pixels):
            result[:, rows, columns] = part.softmax(0)
        return result

    @torch.no_grad()
    def _parts(self, pixels: Tensor) -> Iterator[tuple[float, tuple[slice, slice, Tensor]]]:
        """The part done, then the rows and columns of a tile with its logits (K, h, w), until all are covered."""
        height, width = pixels.shape[-2:]
        whole = not self._is_valid and max(height, width) <= self.config.tile
        side, margin, step = self.tiles.side, self.tiles.margin, self.tiles.step
        count = self.tiles.count(height, width)
        if count * side**2 > MAX_COMPUTED and not whole:
            raise ValueError(
                f"a picture of {width} x {height} pixels is cut into {count:,} tiles of {side} x {side}, and more than "
                f"{MAX_COMPUTED // side**2:,} would take hours; cut or shrink it"
            )
        device, over = next(self.network.parameters()).device, statistics(pixels)
        if whole:
            logits = self.network(standardized(pixels, over)[None].to(device))[0]  # (K, H, W)
            yield 1.0, (slice(height), slice(width), logits)
            return
        places = [(top, left) for top in range(0, height, step) for left in range(0, width, step)]
        for number, (top, left) in enumerate(places, 1):
            rows = mirrored(top - margin, top - margin + side, height)
            columns = mirrored(left - margin, left - margin + side, width)
            tile = standardized(pixels[:, rows][:, :, columns], over)[None].to(device)  # (1, C, side, side)
            logits = self.network(tile)[0]  # (K, side, side), valid (K, step, step)
            if not self._is_valid:
                logits = logits[:, margin : margin + step, margin : margin + step]
            part = logits[:, : height - top, : width - left]
            yield number / count, (slice(top, top + step), slice(left, left + step), part)

    @property
    def _is_valid(self) -> bool:
        return isinstance(self.network, SegmentationUNet) and self.network.valid

    @property
    def tiles(self) -> Tiles:
        """What the network labels at once: of a tile the middle, whose surroundings it has seen."""
        network, tile = self.network, self.config.tile
        if isinstance(network, SegmentationUNet) and network.valid:
            margin = network.margin // 2
            return Tiles(network.input_side(tile + 2 * margin), margin)
        return Tiles(tile, tile // CONTEXT)


def _check(ours: dict[str, Tensor], theirs: dict[str, Tensor], folder: Path) -> None:
    """Raises ValueError unless both have the same names and shapes and all values are finite."""
    for name in sorted(ours.keys() | theirs.keys()):
        want = tuple(ours[name].shape) if name in ours else "absent"
        have = tuple(theirs[name].shape) if name in theirs else "absent"
        if want != have:
            raise ValueError(
                f"{folder}: {name} is {have} in model.safetensors and {want} by config.json; not of one model"
            )
        if not theirs[name].isfinite().all():
            raise ValueError(
                f"{folder}: {name} has values that are not finite; the file is damaged or training diverged"
            )


def mask_image(classes: Tensor) -> Image.Image:
    """(H, W) class numbers to a picture of mode "P" with a colour for each class, 0 black and 1 white."""
    data = classes.to("cpu", torch.uint8).contiguous()
    mask = Image.frombytes("P", (data.shape[1], data.shape[0]), data.numpy().tobytes())
    mask.putpalette([*COLOURS[:6], *COLOURS[6:] * CYCLES])
    return mask


def visible(image: Image.Image) -> Image.Image:
    """RGBA picture; values of 16 or 32 bits become grey, from 2.7 deviations below their mean to 2.7 above."""
    if not image.mode.startswith(("I", "F")):
        return image.convert("RGBA")
    values = standardized(pixels_of(image, 1)) * 48 + 128
    grey = values.clamp(0, 255).to(torch.uint8).contiguous()
    return Image.frombytes("L", image.size, grey.numpy().tobytes()).convert("RGBA")


def overlay(image: Image.Image, mask: Image.Image) -> Image.Image:
    """RGB picture, over white, in which every class but 0 is tinted half with its colour, class 1 red."""
    if image.size != mask.size:
        raise ValueError(f"picture of {image.size} and mask of {mask.size} must have one size")
    tints = mask.copy()
    tints.putpalette([0, 0, 0, *COLOURS[6:] * CYCLES])
    strength = Image.frombytes("L", mask.size, mask.tobytes()).point([0] + [128] * 255)
    return Image.composite(tints.convert("RGB"), _over_white(visible(image)).convert("RGB"), strength)


def cutout(image: Image.Image, mask: Image.Image) -> Image.Image:
    """RGBA picture, transparent where the mask has class 0 (mode "P") or is black (other modes, which may be soft).

    Where the picture is transparent already it stays so. Raises ValueError if the sizes differ.
    """
    if image.size != mask.size:
        raise ValueError(f"picture of {image.size} and mask of {mask.size} must have one size")
    result = visible(image)
    if mask.mode == "P":
        mask = Image.frombytes("L", mask.size, mask.tobytes()).point([0] + [255] * 255)
    alpha = Image.new("L", image.size)
    alpha.paste(result.getchannel("A"), mask=mask.convert("L"))
    result.putalpha(alpha)
    return result
