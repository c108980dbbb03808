"""A picture for every row of the table in `docs/images.md`, and the pixels that the model must get for it."""

import base64
import io
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from tests import tiny


WIDTH, HEIGHT = 30, 20
COLOURS = tiny.picture(width=WIDTH, height=HEIGHT)
ALPHA = Image.fromarray(np.linspace(0, 255, WIDTH * HEIGHT).astype(np.uint8).reshape(HEIGHT, WIDTH))
LEVELS = np.linspace(0, 65535, WIDTH * HEIGHT).astype(np.uint16).reshape(HEIGHT, WIDTH)


@dataclass(frozen=True)
class Picture:
    """
    Args:
        row (`str`): First cell of the row.
        file (`bytes`, *optional*): The image file, if a file format supports this mode.
        rgb (`PIL.Image.Image`, *optional*): What the model sees, before padding. `None` if the picture is refused.
    """

    row: str
    image: Image.Image
    file: bytes | None
    rgb: Image.Image | None

    @property
    def url(self) -> str:
        return f"data:image/png;base64,{base64.b64encode(self.file).decode()}"


def table() -> dict[str, str]:
    """The last column of the table (what the model sees), by the first column."""
    text = (Path(__file__).parent.parent / "docs/images.md").read_text().split("\n\n")
    rows = next(part for part in text if part.startswith("| Pillow mode")).splitlines()[2:]
    cells = [[cell.strip().replace("`", "") for cell in re.split(r" \| ?", row.strip("| "))] for row in rows]
    return {mode: seen for mode, _, seen in cells}


def encoded(image: Image.Image, form: str, **settings) -> bytes:
    stream = io.BytesIO()
    image.save(stream, form, **settings)
    return stream.getvalue()


def opened(file: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(file))
    image.load()
    return image


def on_white(rgb: np.ndarray, alpha: np.ndarray) -> Image.Image:
    shares = alpha[..., None] / 255
    return Image.fromarray(np.round(shares * rgb + (1 - shares) * 255).astype(np.uint8))


def _files() -> dict[str, bytes]:
    """Image files of the modes that a file format supports, by row."""
    grey, palette = COLOURS.convert("L"), COLOURS.quantize(16)
    rgba, deep = COLOURS.copy(), Image.fromarray(LEVELS)
    rgba.putalpha(ALPHA)
    return {
        "RGB": encoded(COLOURS, "PNG"),
        "RGB, transparent colour": encoded(COLOURS, "PNG", transparency=COLOURS.getpixel((3, 3))),
        "RGBA": encoded(rgba, "PNG"),
        "L": encoded(grey, "PNG"),
        "L, transparent level": encoded(grey, "PNG", transparency=grey.getpixel((3, 3))),
        "LA": encoded(rgba.convert("LA"), "PNG"),
        "1": encoded(grey.convert("1"), "PNG"),
        "1, transparent level": encoded(grey.convert("1"), "PNG", transparency=0),
        "P": encoded(palette, "PNG"),
        "P, transparent colour": encoded(palette, "GIF", transparency=palette.getpixel((3, 3))),
        "P, transparency of each colour": encoded(palette, "PNG", transparency=bytes(range(0, 160, 10))),
        "CMYK": encoded(COLOURS.convert("CMYK"), "TIFF"),
        "LAB": encoded(COLOURS.convert("LAB"), "TIFF"),
        "I;16": encoded(deep, "PNG"),
        "I;16, transparent level": encoded(deep, "PNG", transparency=int(LEVELS[3, 3])),
        "I;16B": encoded(Image.frombytes("I;16B", deep.size, LEVELS.astype(">u2").tobytes()), "TIFF"),
        "I": encoded(Image.fromarray(LEVELS.astype(np.int32)), "TIFF"),
        "I, beyond 16 bits": encoded(Image.fromarray(LEVELS.astype(np.int32) - 7), "TIFF"),
        "F": encoded(Image.fromarray(LEVELS.astype(np.float32) / 65535), "TIFF"),
    }


def _in_memory() -> dict[str, Image.Image]:
    """Images of the modes that no file format supports, by row."""
    rgba = COLOURS.copy()
    rgba.putalpha(ALPHA)
    with_palette = COLOURS.quantize(16).convert("PA")
    with_palette.putalpha(ALPHA)
    return {
        "RGBa": rgba.convert("RGBa"),
        "RGBX": COLOURS.convert("RGBX"),
        "La": rgba.convert("LA").convert("La"),
        "P, palette with transparency": rgba.quantize(16),
        "PA": with_palette,
        "YCbCr": COLOURS.convert("YCbCr"),
        "HSV": COLOURS.convert("HSV"),
        "I;16L": Image.frombytes("I;16L", COLOURS.size, LEVELS.astype("<u2").tobytes()),
        "I;16N": Image.frombytes("I;16N", COLOURS.size, LEVELS.tobytes()),
    }


def _seen(image: Image.Image, rule: str) -> Image.Image | None:
    if rule == "as Pillow converts it":
        return image.convert("RGB")
    if rule == "on white":
        rgba = np.asarray((image.convert("LA") if image.mode == "La" else image).convert("RGBA")).astype(float)
        assert rgba[..., 3].min() < 255
        return on_white(rgba[..., :3], rgba[..., 3])
    grey = (LEVELS // 256).astype(np.uint8)
    if rule == "divided by 256":
        return Image.fromarray(grey).convert("RGB")
    if rule == "divided by 256, on white":
        return Image.fromarray(np.where(LEVELS[3, 3] == LEVELS, 255, grey).astype(np.uint8)).convert("RGB")
    assert rule == "refused"
    return None


def pictures() -> list[Picture]:
    """One picture for each row, in the order of the table."""
    files = _files()
    images = {row: opened(file) for row, file in files.items()} | _in_memory()
    for row, image in images.items():
        assert image.mode == row.split(",")[0], f"{row} is {image.mode}"
    rules = table()
    assert images.keys() == rules.keys(), "docs/images.md and tests/pictures.py have different rows"
    return [Picture(row, images[row], files.get(row), _seen(images[row], rule)) for row, rule in rules.items()]


def turned() -> list[Picture]:
    """A photo of each EXIF orientation. The EXIF standard says where its first row and column must appear."""
    pixels, found = np.asarray(COLOURS), []
    # https://www.cipa.jp/std/documents/e/DC-008-2012_E.pdf, 4.6.4 A
    upright = {
        1: pixels,
        2: pixels[:, ::-1],
        3: pixels[::-1, ::-1],
        4: pixels[::-1],
        5: pixels.transpose(1, 0, 2),
        6: pixels[::-1].transpose(1, 0, 2),
        7: pixels[::-1, ::-1].transpose(1, 0, 2),
        8: pixels[:, ::-1].transpose(1, 0, 2),
    }
    for orientation, seen in upright.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        file = encoded(COLOURS, "PNG", exif=exif)
        found.append(Picture(f"EXIF {orientation}", opened(file), file, Image.fromarray(np.ascontiguousarray(seen))))
    return found
