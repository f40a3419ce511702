"""From rows to items: every request checked, its seed and size filled in, its key and file name made.

    row --read_row--> Request + extra --resolve--> size --num_images--> seeds --sample_key--> Item (key, file name)

An item is plain data, so any process or machine may draw it. Its seed depends on the row alone, never on who draws it
or when.
"""

import re
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from sdlite.batch.keys import derived_seed, sample_key
from sdlite.batch.names import DEFAULT, Template, fill, parse_template, same_file
from sdlite.batch.options import Options
from sdlite.batch.read import Source, Table, read_table
from sdlite.batch.rows import MAX_ROWS, Faults, Row, read_row
from sdlite.request import Request

if TYPE_CHECKING:
    from sdlite.images.pixels import Opened

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


def make_plan(
    source: Source,
    options: Options = DEFAULTS,
    *,
    resolve: Resolve,
    model: Mapping[str, Any],
) -> Plan:
    """All items of a request file, checked.

    resolve: request, start image and mask -> `Resolved`, or ValueError if the model cannot draw it. model: see
    `keys.model_facts`. Raises ValueError with one line per fault.
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
        paths = {side: self._path(getattr(request, side)) for side in ("image", "mask")}
        resolved = self._resolved(request, **paths)
        kind = self.kinds.setdefault(resolved.batch_key, len(self.kinds))
        places = [None if path is None else path.absolute() for path in paths.values()]  # workers run in other folders
        for k in range(count):
            drawn = resolved.request.model_copy(update={"seed": request.seed + k})
            key = sample_key(drawn, self.model)
            name = self._free_name(fill(self.template, drawn, index=len(self.items), row=number, key=key))
            self.items.append(Item(len(self.items), number, drawn, extra, key, name, kind, *places))

    def _path(self, name: str | None) -> Path | None:
        return None if name is None else self.table.folder / name

    def _resolved(self, request: Request, image: Path | None, mask: Path | None) -> Resolved:
        start, area = self._open(image, "image"), self._open(mask, "mask")
        if start is not None:
            request = request.replace(image=start.checksum, mask=area and area.checksum)
        resolved = self.resolve(request, start, area)
        for remark in resolved.remarks:
            self.faults.note(re.sub(r"\d+x\d+", "", remark), remark)  # once, whatever the sizes of the images
        return resolved

    def _open(self, path: Path | None, side: str) -> "Opened | None":
        """Facts about a start image or mask; each is opened once. Raises FileNotFoundError or ValueError."""
        if path is None:
            return None
        if (path, side) not in self.opened:
            from sdlite.images.files import open_picture
            from sdlite.images.pixels import Opened

            for_mask = side == "mask"
            opened = Opened.of(open_picture(path, for_mask=for_mask), for_mask=for_mask)
            self.opened[path, side] = opened._replace(picture=None)
        return self.opened[path, side]

    def _free_name(self, name: str) -> str:
        other = self.taken.setdefault(same_file(name), len(self.items))
        if other != len(self.items):
            raise ValueError(f"file name {name!r} is also that of image {other}; add {{index}} to --name")
        return name
