"""From rows to items: every request checked, its seed and size filled in, its key and file name made.

    row --read_row--> Request + extra --resolve--> size --num_images--> seeds --sample_key--> Item (key, file name)

An item is plain data, so any process or machine may draw it. Its seed depends on the row alone, never on who draws it
or when. `in_part` divides items among machines, `groups` makes batches of them.
"""

import re
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from pydantic import Field

from sdlite.batch.names import DEFAULT, Template, derived_seed, fill, parse_template, same_file, sample_key
from sdlite.batch.read import Source, Table, read_table
from sdlite.batch.rows import MAX_ROWS, Faults, Row, read_row
from sdlite.config import LoadOptions
from sdlite.request import Request

if TYPE_CHECKING:
    from sdlite.images.pixels import Opened

WINDOW = 256  # items looked at together to find those that may share a batch
WORKERS = "Number of processes or Ray actors; they share the cores, or each gets a GPU."
SEED = "Rows without a seed get different seeds, which are derived from this one."
PART = (
    "Draw only part I of N, for many machines on one folder. In a SLURM array of 1-N: $SLURM_ARRAY_TASK_ID/N. "
    "In a shell that accelerate launch starts: $((RANK+1))/$WORLD_SIZE."
)
FORMAT = "folder: PNG files. webdataset: shards DIR/00000.tar, ..."
RAY_ADDRESS = "Address of a running Ray cluster; all its machines must see the folder, the model and the start images."


class Options(LoadOptions):
    """Options of a batch, for `batch.run` and for the flags of `sdlite batch`, which show the descriptions.

    exact works by a fixed batch size on one thread in each process. defaults: fields of a request, or num_images, for
    rows that do not have them. name: see `sdlite.batch.names`. ray_address implies ray.
    """

    batch_size: int = Field(4, ge=1, le=256, description="Images drawn at the same time.")
    workers: int = Field(1, ge=1, le=256, description=WORKERS)
    exact: bool = Field(False, description="Same bytes for every batch size and number of workers, on one kind of CPU.")
    seed: int = Field(0, ge=0, lt=2**64, description=SEED)
    same_seed: bool = Field(False, description="Give all rows without a seed the seed --seed.")
    defaults: dict[str, Any] = Field(default_factory=dict)
    keep_going: bool = Field(False, description="Continue after a row that fails.")
    part: str | None = Field(None, description=PART)
    name: str | None = Field(None, description="File names, e.g. '{index:06}-{prompt}.png'.")
    format: Literal["folder", "webdataset"] = Field("folder", description=FORMAT)
    ray: bool = Field(False, description="Make the workers actors of a Ray cluster on this machine.")
    ray_address: str | None = Field(None, description=RAY_ADDRESS)

    @property
    def on_ray(self) -> bool:
        return self.ray or self.ray_address is not None


DEFAULTS = Options()


@dataclass(frozen=True, slots=True)
class Item:
    """One image to draw. index: its place in the output. row: its row of the input, from 0. extra: unknown columns.

    request: with seed and size, and checksums in place of start image and mask. image, mask: absolute paths of those.
    kind: equal for items that may share a batch.
    """

    index: int
    row: int
    request: Request
    extra: dict[str, Any]
    sample_key: str
    file_name: str
    kind: int = 0
    image: Path | None = None
    mask: Path | None = None

    @property
    def pixels(self) -> int:
        return (self.request.width or 0) * (self.request.height or 0)


class Plan(NamedTuple):
    """Items in the order of the output. axes: of a grid file, the last varying fastest. notes: for the user."""

    items: list[Item]
    axes: dict[str, list[Any]] | None
    notes: Sequence[str] = ()


class Resolved(NamedTuple):
    """A request with its size, as the model will draw it. batch_key, remarks: as in `sdlite.pipeline.Job`."""

    request: Request
    batch_key: Hashable = None
    remarks: Sequence[str] = ()


Resolve = Callable[[Request, "Opened | None", "Opened | None"], Resolved]


def make_plan(source: Source, options: Options = DEFAULTS, *, resolve: Resolve, model: Mapping[str, Any]) -> Plan:
    """All items of a request file, checked.

    resolve: request, start image and mask -> `Resolved`, or ValueError if the model cannot draw it. model: see
    `sample_key`. Raises ValueError with one line per fault.
    """
    read_row({}, {"prompt": "", **options.defaults})  # so that a fault in them is shown once, not for each row
    template = parse_template(DEFAULT if options.name is None else options.name)
    faults = Faults("stdin" if source == "-" else str(source) if isinstance(source, str | Path) else "requests")
    making = _Making(template, read_table(source, faults), faults, resolve, model)
    for number, row in enumerate(making.table.rows):
        try:
            making.add(number, row, options)
        except (ValueError, OSError) as error:
            faults.add(row.line if making.table.axes is None else None, error)
    faults.check()
    if not making.items:
        raise ValueError(f"{faults.name} holds no requests")
    if "strength" in options.defaults and not any(item.image for item in making.items):
        faults.note("strength", "strength has no effect: no row names an image to start from")
    return Plan(making.items, making.table.axes, list(faults.notes.values()))


@dataclass
class _Making:
    """A plan in the making. opened: start images and masks. kinds: batch key -> kind. taken: folded names of files."""

    template: Template
    table: Table
    faults: Faults
    resolve: Resolve
    model: Mapping[str, Any]
    items: list[Item] = field(default_factory=list)
    opened: dict[tuple[Path, str], "Opened"] = field(default_factory=dict)
    kinds: dict[Hashable, int] = field(default_factory=dict)
    taken: dict[str, int] = field(default_factory=dict)

    def add(self, number: int, row: Row, options: Options) -> None:
        """The items of a row. Raises ValueError or OSError."""
        in_order = number if self.table.axes is None else 0  # the cells of a grid differ by their axes alone
        seed = options.seed if options.same_seed else derived_seed(options.seed, in_order)
        request, count, extra = read_row(row.columns, {"seed": seed, **options.defaults})
        if len(self.items) + count > MAX_ROWS:
            raise ValueError(f"num_images={count} makes more than {MAX_ROWS:,} images; split the file")
        (image, start), (mask, area) = (self._open(getattr(request, side), side) for side in ("image", "mask"))
        if start is not None:
            request = request.replace(image=start.checksum, mask=area and area.checksum)
        resolved = self.resolve(request, start, area)
        for remark in resolved.remarks:
            self.faults.note(re.sub(r"\d+x\d+", "", remark), remark)  # once, whatever the sizes of the images
        kind = self.kinds.setdefault(resolved.batch_key, len(self.kinds))
        for k in range(count):
            drawn = resolved.request.model_copy(update={"seed": request.seed + k})
            key = sample_key(drawn, self.model)
            name = self._free_name(fill(self.template, drawn, index=len(self.items), row=number, key=key))
            self.items.append(Item(len(self.items), number, drawn, extra, key, name, kind, image, mask))

    def _open(self, name: str | None, side: str) -> "tuple[Path | None, Opened | None]":
        """The absolute path of a start image or mask, as workers run in other folders, and facts about it.

        Each is opened once. Raises FileNotFoundError or ValueError.
        """
        if name is None:
            return None, None
        path = self.table.folder / name
        if (path, side) not in self.opened:
            from sdlite.pipeline.job import opened

            self.opened[path, side] = replace(opened(path, for_mask=side == "mask"), picture=None)
        return path.absolute(), self.opened[path, side]

    def _free_name(self, name: str) -> str:
        other = self.taken.setdefault(same_file(name), len(self.items))
        if other != len(self.items):
            raise ValueError(f"file name {name!r} is also that of image {other}; add {{index}} to --name")
        return name


def parse_part(text: str) -> tuple[int, int]:
    """Reads "2/8", the second of eight parts. Raises ValueError."""
    match = re.fullmatch(r"(\d{1,18})/(\d{1,18})", text, re.ASCII)
    if match is None:
        raise ValueError(f"part={text!r:.40} must be I/N, e.g. 2/8 for the second of eight parts")
    number, count = map(int, match.groups())
    if not 1 <= number <= count:
        raise ValueError(f"part={text!r:.40}: the part must be 1 to {count}")
    return number, count


def in_part(item: Item, part: tuple[int, int]) -> bool:
    """Whether an item belongs to part I of N. It depends on the item's key, so rows added later move no item."""
    return int(item.sample_key, 16) % part[1] == part[0] - 1


def groups(items: Sequence[Item], size: int) -> Iterator[list[Item]]:
    """The items in lists of up to `size` that may share a batch, about in their order."""
    rest = iter(items)
    left: list[Item] = []
    while window := left + list(islice(rest, WINDOW)):
        alike: dict[int, list[Item]] = {}
        for item in window:
            alike.setdefault(item.kind, []).append(item)
        ended = len(window) - len(left) < WINDOW
        left = []
        for group in alike.values():
            whole = len(group) if ended else len(group) // size * size
            yield from (group[first : first + size] for first in range(0, whole, size))
            left += group[whole:]
