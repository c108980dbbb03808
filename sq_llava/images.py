"""Image files -> RGB images, the same for training, the doctor and inference.

    >>> open_image("photo.jpg").mode
    'RGB'
    >>> [fault.code for fault in image_faults("dance.gif")]  # by its header and its end; no pixels are decoded
    ['image_animated']

What is not plain 8-bit RGB becomes it: photos are turned as their EXIF data says; of an animation the first frame is
taken; CMYK, palette and grey images are converted; 16-bit grey levels are scaled to 8 bits (Pillow would clip them);
transparency is dropped, as transformers' image processors do. Floating-point pixels have no agreed range: refused, and
so are EPS files, which are programs, and strips of more than 200 times their width.
"""

import base64
import io
import math
import warnings
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from PIL import ExifTags, Image, UnidentifiedImageError


# Pillow's own limit: about 9,460 x 9,460 pixels. A file of a few kilobytes can claim more than memory holds.
MAX_IMAGE_PIXELS = 89_478_485
# A longer side is made so long first: padded to a square, the image would have more pixels than that.
MAX_IMAGE_SIDE = math.isqrt(MAX_IMAGE_PIXELS)
# Of the longer side to the shorter one, which preprocessing may resize to the height of the model's image.
MAX_ASPECT_RATIO = 200

# Of the files that a folder of images is taken to hold.
IMAGE_SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}

# How an image of each EXIF orientation is turned upright. Pillow's own `exif_transpose` also writes the EXIF data
# anew, which fails on some.
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# The last bytes of a whole file. GIF's own is a single one: here with the end of the block before it.
END_MARKERS = {"JPEG": b"\xff\xd9", "MPO": b"\xff\xd9", "PNG": b"\0\0\0\0IEND\xaeB`\x82", "GIF": b"\0;"}


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
    image: str | Path | dict[str, Any] | io.BytesIO | Image.Image, formats: tuple[str, ...] | None = None
) -> Image.Image:
    """
    Opens an image in RGB; one with a side of more than `MAX_IMAGE_SIDE` is made smaller.

    Args:
        image: A path; the `{"bytes": ..., "path": ...}` of an undecoded `datasets.Image`; the bytes as a stream; or a
            `PIL.Image.Image`.
        formats (`tuple[str, ...]`, *optional*): The only ones to be read, by Pillow's names; default: all but EPS.

    Raises:
        ValueError: if the file is missing, broken, truncated, or large enough to be an attack.
    """
    name = image_name(image)
    try:
        if isinstance(image, Image.Image):
            converted = _in_rgb(image)
        else:
            with Image.open(image_stream(image), formats=formats or safe_formats()) as file:
                check_size(file)
                file.load()
                turn = TURNS.get(file.getexif().get(ExifTags.Base.Orientation))
                converted = _in_rgb(file if turn is None else file.transpose(turn))
    except FileNotFoundError as error:
        raise ValueError(f"{name}: no such image file.") from error
    # Of a broken file, Pillow's parsers and converters raise whatever comes, TypeError and MemoryError among it.
    except Exception as error:
        raise ValueError(f"{name}: cannot be read as an image ({error}). Save it anew as PNG or JPEG.") from error
    if converted is None:
        raise ValueError(f"{name}: has floating-point pixels, whose range is unknown. Save it anew with 8 bits.")
    return converted


def _in_rgb(image: Image.Image) -> Image.Image | None:
    """`None` for floating-point pixels."""
    if image.mode == "F":
        return None
    if image.mode.startswith("I"):
        image = image.convert("I").point(lambda level: level / 256).convert("L")
    image = image.convert("RGB")
    if max(image.size) > MAX_IMAGE_SIDE:
        image.thumbnail((MAX_IMAGE_SIDE, MAX_IMAGE_SIDE))
    return image


@cache
def safe_formats() -> tuple[str, ...]:
    """All formats that Pillow reads but EPS, which it hands to Ghostscript: that runs what is in the file."""
    Image.init()
    return tuple(sorted(Image.OPEN.keys() - {"EPS"}))


def squared(image: Image.Image, image_processor) -> Image.Image:
    """
    The padded and resized square that `LlavaImageProcessorPil` begins with, pixel for pixel, but without its way
    through NumPy arrays, in which it spends more than half of its time. It takes the square as it is. What another
    image processor gets, such as that of torchvision, or one that crops, is the image itself.
    """
    if type(image_processor).__name__ != "LlavaImageProcessorPil":
        return image
    if not (image_processor.do_pad and image_processor.do_resize and "shortest_edge" in image_processor.size):
        return image
    longest = max(image.size)
    if image.width != image.height:
        square = Image.new("RGB", (longest, longest), tuple(int(level * 255) for level in image_processor.image_mean))
        square.paste(image, ((longest - image.width) // 2, (longest - image.height) // 2))
        image = square
    side = image_processor.size["shortest_edge"]
    return image.resize((side, side), image_processor.resample)


def jpeg_data_url(image: Image.Image, longest_side: int, quality: int) -> str:
    """An RGB image as `data:image/jpeg;base64,...`, made smaller where it is larger than that."""
    image = image.copy()
    image.thumbnail((longest_side, longest_side))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"


def image_name(image: str | Path | dict[str, Any] | io.BytesIO | Image.Image) -> str:
    """What an error calls the image."""
    if isinstance(image, dict):
        return image.get("path") or "embedded image"
    if isinstance(image, io.BytesIO):
        return "embedded image"
    return "image" if isinstance(image, Image.Image) else str(image)


def image_key(image: str | Path | dict[str, Any] | Image.Image) -> Hashable:
    """Equal for two images of a batch if they are the same: the same path, bytes or object."""
    if isinstance(image, dict):
        return image.get("path"), image.get("bytes")
    return id(image) if isinstance(image, Image.Image) else str(image)


class OnceEach:
    """
    An image processor that stands before another one: images that repeat in a batch, as one object, are processed
    once. Then it gives `image_indices`, for each image of the text its place in the output, as the model takes it.
    """

    def __init__(self, image_processor):
        self.image_processor = image_processor
        self.model_input_names = [*image_processor.model_input_names, "image_indices"]

    def fetch_images(self, images: list[list]) -> list[list]:
        return images

    def __call__(self, images: list[list], **kwargs) -> dict[str, Any]:
        images = [image for of_row in images for image in of_row]
        unique = {id(image): image for image in images}
        batch = dict(self.image_processor([list(unique.values())], **kwargs))
        if len(unique) < len(images):
            places = {identity: place for place, identity in enumerate(unique)}
            batch["image_indices"] = [places[id(image)] for image in images]
        return batch


def image_stream(image: str | Path | dict[str, Any] | io.BytesIO) -> Path | io.BytesIO:
    """What `PIL.Image.open` takes."""
    if isinstance(image, io.BytesIO):
        return image
    if isinstance(image, dict) and image.get("bytes") is not None:
        return io.BytesIO(image["bytes"])
    return Path(image["path"] if isinstance(image, dict) else image)


def check_size(image: Image.Image) -> None:
    """
    Raises:
        PIL.Image.DecompressionBombError: before any pixel is decoded, if there are more than `MAX_IMAGE_PIXELS`.
        ValueError: if it is a strip, or has no pixels.
    """
    width, height = image.size
    if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        raise ValueError(
            f"{width} x {height} pixels: a side is more than {MAX_ASPECT_RATIO} times the other, cut it into pieces"
        )
    if width * height > MAX_IMAGE_PIXELS:
        raise Image.DecompressionBombError(
            f"{width} x {height} pixels are more than the {MAX_IMAGE_PIXELS:,} that are allowed"
        )


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
        yield Fault("image_missing", f"{name}: no such file.", "Bring it back, or mend the path or image_root.")
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
