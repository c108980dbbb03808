"""Image files -> RGB images, the same for training, the doctor and inference.

    >>> open_image("photo.jpg").mode
    'RGB'

What is not plain 8-bit RGB becomes it: photos are turned as their EXIF data says; of an animation the first frame is
taken; CMYK, palette and grey images are converted; 16-bit grey levels are scaled to 8 bits (Pillow would clip them);
transparency is dropped, as transformers' image processors do. Floating-point pixels have no agreed range: refused.
"""

import io
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps


# Pillow's own limit: about 9,460 x 9,460 pixels. A file of a few kilobytes can claim more than memory holds.
MAX_IMAGE_PIXELS = 89_478_485

# What Pillow raises for a broken file: its parsers, zlib and struct each have their own.
BROKEN_IMAGE_ERRORS = (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError)


def open_image(image: str | Path | dict[str, Any] | Image.Image) -> Image.Image:
    """
    Opens an image in RGB.

    Args:
        image: A path; the `{"bytes": ..., "path": ...}` of an undecoded `datasets.Image`; or a `PIL.Image.Image`.

    Raises:
        ValueError: if the file is missing, broken, truncated, or large enough to be an attack.
    """
    name = image_name(image)
    if not isinstance(image, Image.Image):
        try:
            with Image.open(image_stream(image)) as file:
                check_size(file)
                file.load()
                image = ImageOps.exif_transpose(file)
        except FileNotFoundError as error:
            raise ValueError(f"{name}: no such image file.") from error
        except BROKEN_IMAGE_ERRORS as error:
            raise ValueError(f"{name}: cannot be read as an image ({error}). Save it anew as PNG or JPEG.") from error
    if image.mode.startswith("I"):
        return image.convert("I").point(lambda level: level / 256).convert("L").convert("RGB")
    if image.mode == "F":
        raise ValueError(f"{name}: has floating-point pixels, whose range is unknown. Save it anew with 8 bits.")
    return image.convert("RGB")


def image_name(image: str | Path | dict[str, Any] | Image.Image) -> str:
    """What an error calls the image."""
    if isinstance(image, dict):
        return image.get("path") or "embedded image"
    return "image" if isinstance(image, Image.Image) else str(image)


def image_stream(image: str | Path | dict[str, Any]) -> Path | io.BytesIO:
    """What `PIL.Image.open` takes."""
    if isinstance(image, dict) and image.get("bytes") is not None:
        return io.BytesIO(image["bytes"])
    return Path(image["path"] if isinstance(image, dict) else image)


def check_size(image: Image.Image) -> None:
    """
    Raises:
        ValueError: before any pixel is decoded, if there are more than `MAX_IMAGE_PIXELS`.
    """
    width, height = image.size
    if width * height > MAX_IMAGE_PIXELS:
        raise ValueError(f"{width} x {height} pixels are more than the {MAX_IMAGE_PIXELS:,} that are allowed")
