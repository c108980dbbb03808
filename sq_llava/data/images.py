"""Opens image files as RGB images, in the same way for training, the doctor and inference.

    >>> open_image("photo.jpg").mode
    'RGB'
    >>> [fault.code for fault in image_faults("dance.gif")]  # reads header and last bytes; decodes no pixels
    ['image_animated']

`to_rgb` converts an image to 8-bit RGB. It is in `image_processing_sq_llava.py`, which is saved with every
checkpoint. This module adds what a dataset needs: a name for each image in errors, and a list of its faults.
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

from image_processing_sq_llava import check_size, open_header, open_in_rgb, open_stream
from sq_llava.early_checks import register_heic


register_heic()

# The last bytes of a complete file. A GIF ends with the one byte ";"; the zero before it ends its last block.
END_MARKERS = {"JPEG": b"\xff\xd9", "MPO": b"\xff\xd9", "PNG": b"\0\0\0\0IEND\xaeB`\x82", "GIF": b"\0;"}

# Images for a chat server: longest side in pixels, and JPEG quality.
CHAT_SIDE, CHAT_QUALITY = 1024, 90

# Longest side in pixels of an image that a visitor or a client sends. No model here sees more.
MAX_SENT_SIDE = 4096


@dataclass(frozen=True)
class Fault:
    """
    Something wrong or unusual in a row or an image.

    Args:
        code (`str`): Short name of the kind of fault. `docs/data.md` lists all codes.
        message (`str`): What is wrong.
        fix (`str`): What to do about it.
        level (`str`): "error" (the row cannot be used for training), "warning" (it can, but it probably does not say
            what its author wanted) or "info" (it is unusual, but supported).
    """

    code: str
    message: str
    fix: str
    level: str = "error"


def open_image(
    image: str | Path | dict[str, Any] | bytes | io.BytesIO | Image.Image, formats: tuple[str, ...] | None = None
) -> Image.Image:
    """
    Opens an image in RGB, converted as [`to_rgb`] does. Errors name the image.

    Args:
        image: A path; the `{"bytes": ..., "path": ...}` of an undecoded `datasets.Image`; the bytes of a file, or a
            stream of them; or a `PIL.Image.Image`.
        formats (`tuple[str, ...]`, *optional*): Pillow's names of the allowed formats; default: all but EPS.

    Returns:
        A new `PIL.Image.Image` in mode "RGB". The caller may draw on it.

    Raises:
        ValueError: if the file is missing, broken or truncated, or has so many pixels that it may be an attack.
    """
    name = image_name(image)
    try:
        # A string is always a path here, never a URL or base64.
        opened = open_in_rgb(image if isinstance(image, Image.Image) else image_source(image), formats)
    except FileNotFoundError as error:
        raise ValueError(f"{name}: no such image file.") from error
    # For a broken file, Pillow raises exceptions of many kinds, also TypeError and MemoryError.
    except Exception as error:
        raise ValueError(f"{name}: cannot be read as an image ({error}). Save it again as PNG or JPEG.") from error
    return opened.copy() if opened is image else opened


def open_sent_image(image: str | Path | bytes, formats: tuple[str, ...] | None = None) -> Image.Image:
    """
    [`open_image`] for the server and the page. A side longer than `MAX_SENT_SIDE` is scaled down to it, so that the
    photo of a phone, padded to a square, needs little memory.
    """
    opened = open_image(image, formats)
    opened.thumbnail((MAX_SENT_SIDE, MAX_SENT_SIDE))
    return opened


def chat_part(image: str | Path | dict[str, Any] | Image.Image) -> dict[str, Any]:
    """Returns the message part that holds the image for an OpenAI-compatible server."""
    return {"type": "image_url", "image_url": {"url": jpeg_data_url(open_image(image), CHAT_SIDE, CHAT_QUALITY)}}


def jpeg_data_url(image: Image.Image, longest_side: int, quality: int) -> str:
    """
    Encodes an RGB image as `data:image/jpeg;base64,...`.

    Args:
        longest_side (`int`): In pixels. A larger image is made smaller.
        quality (`int`): JPEG quality, up to 95.
    """
    image = image.copy()
    image.thumbnail((longest_side, longest_side))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"


def png_data_url(image: Image.Image) -> str:
    """Encodes an image as `data:image/png;base64,...`, without loss."""
    file = io.BytesIO()
    image.save(file, "PNG", compress_level=1)
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def image_name(image: str | Path | dict[str, Any] | bytes | io.BytesIO | Image.Image) -> str:
    """Returns the name of the image for error messages."""
    if isinstance(image, dict):
        return image.get("path") or "embedded image"
    if isinstance(image, (bytes, io.BytesIO)):
        return "embedded image"
    return "image" if isinstance(image, Image.Image) else str(image)


def image_key(image: str | Path | dict[str, Any] | bytes | Image.Image) -> Hashable:
    """Returns a key that two images of a batch share if they are the same path, bytes or object."""
    if isinstance(image, dict):
        image = image["path"] if image.get("bytes") is None else image["bytes"]
    if isinstance(image, bytes):
        return image
    return id(image) if isinstance(image, Image.Image) else str(image)


def image_source(image: str | Path | dict[str, Any] | bytes | io.BytesIO) -> Path | bytes | io.BytesIO:
    """Returns the path, the bytes or the stream of an image."""
    if isinstance(image, (bytes, io.BytesIO)):
        return image
    if isinstance(image, dict) and image.get("bytes") is not None:
        return image["bytes"]
    return Path(image["path"] if isinstance(image, dict) else image)


def image_faults(image: str | Path | dict[str, Any]) -> Iterator[Fault]:
    """
    Yields what is wrong with an image, or unusual about it.

    It reads the header and the last bytes. It decodes the pixels only if these do not show that the file is complete:
    when the usual last bytes are missing, or the format is not JPEG, PNG, GIF or WebP.

    Args:
        image: A path, or the `{"bytes": ..., "path": ...}` of an undecoded `datasets.Image`.
    """
    name, save_again = f"image {image_name(image)!r}", "Save it again as PNG or JPEG."
    try:
        with warnings.catch_warnings(action="ignore"):
            unusual, is_complete = _read_header(image, name)
    except FileNotFoundError:
        dataset = re.search(r"/datasets--([^/]+?)--([^/]+)/", str(image))  # a folder of the Hub's cache
        fix = "Restore the file, or correct the path or image_root."
        if dataset:
            command = f"`hf download {dataset[1]}/{dataset[2]} --repo-type dataset --local-dir DIR`"
            fix = f"The rows hold only paths. Download the images with {command}, unpack them, set image_root to DIR."
        yield Fault("image_missing", f"{name}: no such file.", fix)
        return
    except Image.DecompressionBombError as error:
        yield Fault("image_huge", f"{name} is too large: {str(error).rstrip('.')}.", "Save it with fewer pixels.")
        return
    except UnidentifiedImageError:
        yield Fault("image_unreadable", f"{name} has an unknown format or a broken header.", save_again)
        return
    except Exception as error:  # see open_image
        yield Fault("image_unreadable", f"{name} cannot be read: {error}.", save_again)
        return
    if not is_complete and all(fault.level != "error" for fault in unusual):
        try:
            with warnings.catch_warnings(action="ignore"):
                open_image(image)
        except ValueError as error:
            reason = error.__cause__ or error
            fix = f"Restore the file. {save_again}"
            yield Fault("image_truncated", f"{name} is truncated or broken: {reason}.", fix)
            return
    yield from unusual


def require_whole_images(images: list[Path]) -> None:
    """
    Checks images with [`image_faults`].

    Raises:
        ValueError: for the first image that has an error.
    """
    for image in images:
        for fault in image_faults(image):
            if fault.level == "error":
                raise ValueError(f"{fault.message} {fault.fix}")


def _read_header(image: str | Path | dict[str, Any], name: str) -> tuple[list[Fault], bool]:
    """Returns the faults that the header shows, and whether header and last bytes show that the file is complete."""
    with open_stream(image_source(image)) as stream:
        num_bytes = stream.seek(0, io.SEEK_END)
        if num_bytes == 0:
            return [Fault("image_empty", f"{name} is an empty file.", "Restore the file.")], True
        stream.seek(0)
        begin = stream.read(8)
        declared = int.from_bytes(begin[4:], "little") + 8 if begin.startswith(b"RIFF") else 0  # WebP
        if declared > num_bytes:
            message = f"{name} has {num_bytes} bytes, but its header says {declared}."
            return [Fault("image_truncated", message, "Restore the file.")], True
        stream.seek(-min(num_bytes, 12), io.SEEK_END)
        end = stream.read()
        with open_header(stream) as file:
            check_size(file)
            # Not file.getexif(): for a PNG, it decodes all pixels first.
            orientation = Image.Image.getexif(file).get(ExifTags.Base.Orientation, 1)
            unusual = list(_unusual(file, orientation, name))
            marker = END_MARKERS.get(file.format)
            return unusual, file.format == "WEBP" or (marker is not None and end.endswith(marker))


def _unusual(file: Image.Image, orientation: int, name: str) -> Iterator[Fault]:
    if getattr(file, "is_animated", False):  # not every format has this attribute
        yield Fault("image_animated", f"{name} has several frames.", "The first frame is used.", "info")
    if file.mode == "CMYK":
        yield Fault("image_cmyk", f"{name} is CMYK.", "It is converted to RGB.", "info")
    if file.mode.startswith("I"):
        yield Fault("image_16_bit", f"{name} has 16 bits per pixel.", "They are scaled to 8 bits.", "info")
    if file.mode in ("P", "PA") and file.format != "GIF":  # every GIF has a palette
        yield Fault("image_palette", f"{name} has a palette.", "It is converted to RGB.", "info")
    if orientation != 1:
        yield Fault("image_rotated", f"{name} has EXIF orientation {orientation}.", "It is rotated upright.", "info")
    if file.mode == "F":
        yield Fault("image_float", f"{name} has floating-point pixels of unknown range.", "Save it in 8 bits.")
