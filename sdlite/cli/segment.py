"""`sdlite segment`: which pixels of a picture are what, as a mask, laid over the picture, or cut out of it."""

from pathlib import Path
from typing import Annotated

import typer

from sdlite.cli.app import Force, app, limit_threads
from sdlite.cli.output import check_free


@app.command()
def segment(
    image: Annotated[str, typer.Argument(help="PNG, JPEG or WebP of any size.")],
    model: Annotated[Path, typer.Option("--model", "-m", help="OUTPUT/export of `sdlite train segmentation`.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="PNG; each value is a class number.")] = Path(
        "mask.png"
    ),
    overlay: Annotated[bool, typer.Option("--overlay", help="The picture with the classes coloured instead.")] = False,
    cutout: Annotated[bool, typer.Option("--cutout", help="The picture without its background instead.")] = False,
    force: Force = False,
) -> None:
    """Label every pixel of a picture with a network that was trained on masks."""
    from sdlite.images import decoded
    from sdlite.segmentation.segmenter import Segmenter, cutout as cut, overlay as laid_over

    if overlay and cutout:
        raise ValueError("--overlay and --cutout are two different pictures; give one of them")
    if output.suffix.lower() != ".png":
        raise ValueError(f"{output} must end in .png: other formats change a mask's values")
    check_free([output], force)
    limit_threads()
    picture = decoded(image)
    result = Segmenter.load(model)(picture)
    if overlay or cutout:
        result = cut(picture, result) if cutout else laid_over(picture, result)
    output.parent.mkdir(parents=True, exist_ok=True)
    result.save(output)
    print(output)
