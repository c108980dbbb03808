"""The prototype picture as HTML: pointing at a patch, or at a name below, lights the region of a prototype.

    >>> prototype_picture(assistant, open_image("dog.png"))

The regions are SVG and react by style sheets only. [`STYLE`] has the rules.
"""

from collections.abc import Iterator

import numpy as np
from PIL import Image, ImageOps

from sq_llava.data.images import jpeg_data_url
from sq_llava.inference.assistant import Assistant
from sq_llava.inference.prototypes import PrototypeMap, colour_of_rank, look, paint, square_in


# Prototypes that the list below the picture names.
NUM_NAMED = 8
# Maximum width and height of the picture, in pixels.
LONGEST_SIDE = 768
LEGEND = (
    "Each patch has the colour of the prototype that it belongs to most. The share says how much of the picture these "
    "patches cover. Point at a patch or at a name to light its region."
)
EMPTY = (
    '<figure class="prototypes"><div class="picture">The picture, coloured by the prototypes that the model sees in '
    f"it, appears here.</div><figcaption>{LEGEND}</figcaption><ul></ul></figure>"
)
STYLE = """
.prototypes, .prototypes .picture {margin: 0 !important}
.prototypes {font-size: var(--text-sm)}
#prototypes, #prototypes * {line-height: 1.3}
#prototypes .html-container {padding: 0}
.prototypes .picture {
  display: flex; width: 100%; height: 45vh; align-items: center; justify-content: center; text-align: center;
  padding: 0; border: 1px solid var(--border-color-primary); border-radius: var(--radius-lg);
}
.prototypes div.picture {padding: 1rem; box-sizing: border-box}
.prototypes figcaption {margin: 0.5rem 0}
.prototypes ul {
  display: grid; grid-template-columns: 1fr 1fr; grid-auto-rows: 1.9rem; align-content: start; gap: 0.25rem;
  min-height: 8.5rem; margin: 0; padding: 0;
}
.prototypes li {list-style: none; margin: 0}
.prototypes button {
  width: 100%; height: 100%; text-align: left; white-space: nowrap; padding: 0 0 0 0.5rem; color: inherit;
  border-left: 1rem solid; background: var(--background-fill-secondary); font-weight: normal; font-size: inherit;
}
.prototypes g :is(.shade, text) {visibility: hidden; pointer-events: none}
.prototypes g text {fill: white; stroke: black; stroke-width: 0.2em; paint-order: stroke}
.prototypes g:hover :is(.shade, text) {visibility: visible}
"""
STYLE += "".join(
    f".prototypes:has(li:nth-child({rank}) button:is(:hover, :focus-visible)) g:nth-of-type({rank}) *"
    " {visibility: visible}\n"
    for rank in range(1, NUM_NAMED + 1)
)


def prototype_picture(assistant: Assistant, image: Image.Image) -> str:
    """The picture with the colours of its prototypes, its legend, and the names of the `NUM_NAMED` largest."""
    seen = look(assistant, image)
    image = ImageOps.contain(image, (LONGEST_SIDE, LONGEST_SIDE))
    painted = jpeg_data_url(paint(image, seen), LONGEST_SIDE, quality=90)
    names = [f"Prototype {prototype}: {share:.0%}" for prototype, share in seen.shares.items()]
    regions = "".join(_regions(seen, names, image.size))
    buttons = "".join(
        f'<li><button type="button" style="border-left-color: rgb{colour_of_rank(rank)}">{name}</button></li>'
        for rank, name in enumerate(names[:NUM_NAMED])
    )
    return (
        '<figure class="prototypes">'
        f'<svg class="picture" viewBox="0 0 {image.width} {image.height}" role="img" aria-label="The '
        'picture, coloured by its prototypes. The list below names the largest ones.">'
        f'<svg width="{image.width}" height="{image.height}">'
        f'<image href="{painted}" width="{image.width}" height="{image.height}"/>{regions}</svg></svg>'
        f"<figcaption>{LEGEND}</figcaption><ul>{buttons}</ul></figure>"
    )


def _regions(seen: PrototypeMap, names: list[str], size: tuple[int, int]) -> Iterator[str]:
    """For each prototype: its patches, which are transparent; and, hidden at first, a shade around them and a name."""
    (width, height), rows = size, len(seen.best)
    left, top, side = square_in(size, seen.is_padded)
    path = f'<path transform="translate({left} {top}) scale({side / rows})"'
    text = f'<text x="{width / 2}" y="{height - width / 40}" font-size="{width / 20}" text-anchor="middle">'
    for prototype, name in zip(seen.shares, names, strict=True):
        patches = "".join(f"M{column} {row}h1v1h-1z" for row, column in np.argwhere(seen.best == prototype))
        shade = f'd="M0 0h{rows}v{rows}h-{rows}z{patches}" fill-rule="evenodd" fill-opacity="0.7" class="shade"'
        yield f'<g>{path} d="{patches}" fill="transparent"/>{path} {shade}/>{text}{name}</text></g>'
