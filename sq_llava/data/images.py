"""Image files -> RGB images, the same for training, the doctor and inference.

    >>> open_image("photo.jpg").mode
    'RGB'
    >>> [fault.code for fault in image_faults("dance.gif")]  # by its header and its end; no pixels are decoded
    ['image_animated']

What becomes of an image that is not plain 8-bit RGB is decided by `to_rgb` of `image_processing_sq_llava.py`, which
travels with every checkpoint. Here are the images of data sets: their names in errors, and their faults.
"""

import base64
import io
import re
import warnings
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import ExifTags, Image, UnidentifiedImageError

from image_processing_sq_llava import check_size, open_in_rgb, safe_formats


# The last bytes of a whole file. GIF's own is a single one: here with the end of the block before it.
END_MARKERS = {"JPEG": b"\xff\xd9", "MPO": b"\xff\xd9", "PNG": b"\0\0\0\0IEND\xaeB`\x82", "GIF": b"\0;"}


# How images are sent to a chat server: pixels of the longest side, and JPEG quality.
CHAT_SIDE, CHAT_QUALITY = 1024, 90


@dataclass(frozen=True)
class Fault:
    """
    What is to be known of a row or an image. Its `level` is "error" (it cannot be trained on), "warning" (it can, but
    hardly as it was meant) or "info" (it is unusual, and taken care of).
    """

    code: str
    message: str
    fix: str
    level: str = "error"


def open_image(
    image: str | Path | dict[str, Any] | bytes | io.BytesIO | Image.Image, formats: tuple[str, ...] | None = None
) -> Image.Image:
    """
    Opens an image in RGB, by the rule of [`to_rgb`], with errors that name it.

    Args:
        image: A path; the `{"bytes": ..., "path": ...}` of an undecoded `datasets.Image`; the bytes of a file, or a
            stream of them; or a `PIL.Image.Image`.
        formats (`tuple[str, ...]`, *optional*): The only ones to be read, by Pillow's names; default: all but EPS.

    Raises:
        ValueError: if the file is missing, broken, truncated, or large enough to be an attack.
    """
    name = image_name(image)
    try:
        # Neither a URL nor base64: a path of a data set is a path.
        opened = open_in_rgb(image if isinstance(image, Image.Image) else image_stream(image), formats)
    except FileNotFoundError as error:
        raise ValueError(f"{name}: no such image file.") from error
    # Of a broken file, Pillow's parsers and converters raise whatever comes, TypeError and MemoryError among it.
    except Exception as error:
        raise ValueError(f"{name}: cannot be read as an image ({error}). Save it anew as PNG or JPEG.") from error
    # Of its own: whoever gave the image may draw on it.
    return opened.copy() if opened is image else opened


def chat_part(image: str | Path | dict[str, Any] | Image.Image) -> dict[str, Any]:
    """An image as a part of a message to an OpenAI-compatible server."""
    return {"type": "image_url", "image_url": {"url": jpeg_data_url(open_image(image), CHAT_SIDE, CHAT_QUALITY)}}


def jpeg_data_url(image: Image.Image, longest_side: int, quality: int) -> str:
    """An RGB image as `data:image/jpeg;base64,...`, made smaller where it is larger than that."""
    image = image.copy()
    image.thumbnail((longest_side, longest_side))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"


def image_name(image: str | Path | dict[str, Any] | bytes | io.BytesIO | Image.Image) -> str:
    """What an error calls the image."""
    if isinstance(image, dict):
        return image.get("path") or "embedded image"
    if isinstance(image, (bytes, io.BytesIO)):
        return "embedded image"
    return "image" if isinstance(image, Image.Image) else str(image)


def image_key(image: str | Path | dict[str, Any] | bytes | Image.Image) -> Hashable:
    """Equal for two images of a batch if they are the same: the same path, bytes or object."""
    if isinstance(image, dict):
        return image.get("path"), image.get("bytes")
    if isinstance(image, bytes):
        return image
    return id(image) if isinstance(image, Image.Image) else str(image)


def image_stream(image: str | Path | dict[str, Any] | bytes | io.BytesIO) -> Path | io.BytesIO:
    """What `PIL.Image.open` takes."""
    if isinstance(image, io.BytesIO):
        return image
    if isinstance(image, bytes):
        return io.BytesIO(image)
    if isinstance(image, dict) and image.get("bytes") is not None:
        return io.BytesIO(image["bytes"])
    return Path(image["path"] if isinstance(image, dict) else image)


def image_faults(image: str | Path | dict[str, Any]) -> Iterator[Fault]:
    """
    What is wrong with an image, or unusual, by its header and its end. All of it is decoded only where these do not
    settle it: without the usual end, or in other formats than JPEG, PNG, GIF and WebP.

    Args:
        image: A path, or the `{"bytes": ..., "path": ...}` of an undecoded `datasets.Image`.
    """
    name, anew = f"image {image_name(image)!r}", "Save it anew as PNG or JPEG."
    try:
        with warnings.catch_warnings(action="ignore"):
            unusual, is_settled = _look_at(image, name)
    except FileNotFoundError:
        dataset = re.search(r"/datasets--([^/]+?)--([^/]+)/", str(image))  # in the Hub's cache
        fix = "Bring it back, or mend the path or image_root."
        if dataset:
            command = f"`hf download {dataset[1]}/{dataset[2]} --repo-type dataset --local-dir DIR`"
            fix = f"The rows have paths alone. Fetch the images by {command}, unpack them, and give image_root DIR."
        yield Fault("image_missing", f"{name}: no such file.", fix)
        return
    except Image.DecompressionBombError as error:
        yield Fault("image_huge", f"{name} claims to be huge: {str(error).rstrip('.')}.", "Save it anew, smaller.")
        return
    except UnidentifiedImageError:
        yield Fault("image_unreadable", f"{name} is of no known format, or its header is broken.", anew)
        return
    except Exception as error:  # see open_image
        yield Fault("image_unreadable", f"{name} cannot be read: {error}.", anew)
        return
    if not is_settled and all(fault.level != "error" for fault in unusual):
        try:
            with warnings.catch_warnings(action="ignore"):
                open_image(image)
        except ValueError as error:
            reason = error.__cause__ or error
            yield Fault("image_truncated", f"{name} is cut off or broken: {reason}.", f"Bring it back. {anew}")
            return
    yield from unusual


def require_whole_images(images: list[Path]) -> None:
    """
    Raises:
        ValueError: for the first image that cannot be opened, or is large enough to be an attack.
    """
    for image in images:
        for fault in image_faults(image):
            if fault.level == "error":
                raise ValueError(f"{fault.message} {fault.fix}")


def _look_at(image: str | Path | dict[str, Any], name: str) -> tuple[list[Fault], bool]:
    """What is unusual in the header, and whether header and end are enough to tell that the image can be opened."""
    source = image_stream(image)
    with source if isinstance(source, io.BytesIO) else source.open("rb") as stream:
        num_bytes = stream.seek(0, io.SEEK_END)
        if num_bytes == 0:
            return [Fault("image_empty", f"{name} has no bytes.", "Bring it back.")], True
        stream.seek(0)
        begin = stream.read(8)
        claimed = int.from_bytes(begin[4:], "little") + 8 if begin.startswith(b"RIFF") else 0  # WebP
        if claimed > num_bytes:
            return [Fault("image_truncated", f"{name} has {num_bytes} bytes of {claimed}.", "Bring it back.")], True
        stream.seek(-min(num_bytes, 12), io.SEEK_END)
        end = stream.read()
        with Image.open(stream, formats=safe_formats()) as file:
            check_size(file)
            # Not file.getexif(): of a PNG, it would decode all pixels first.
            orientation = Image.Image.getexif(file).get(ExifTags.Base.Orientation, 1)
            unusual = list(_unusual(file, orientation, name))
            marker = END_MARKERS.get(file.format)
            is_whole = file.format == "WEBP" or (marker is not None and end.endswith(marker))
            return unusual, is_whole


def _unusual(file: Image.Image, orientation: int, name: str) -> Iterator[Fault]:
    if getattr(file, "is_animated", False):  # Pillow: "if defined"
        yield Fault("image_animated", f"{name} holds several frames.", "The first is taken.", "info")
    if file.mode == "CMYK":
        yield Fault("image_cmyk", f"{name} is CMYK.", "It is converted to RGB.", "info")
    if file.mode.startswith("I"):
        yield Fault("image_16_bit", f"{name} has 16 bits a pixel.", "They are scaled to 8 bits.", "info")
    if file.mode in ("P", "PA") and file.format != "GIF":  # each GIF has one
        yield Fault("image_palette", f"{name} has a palette.", "It is converted to RGB.", "info")
    if orientation != 1:
        yield Fault("image_rotated", f"{name} has EXIF orientation {orientation}.", "It is turned upright.", "info")
    if file.mode == "F":
        yield Fault("image_float", f"{name} has floating-point pixels of unknown range.", "Save it with 8 bits.")
