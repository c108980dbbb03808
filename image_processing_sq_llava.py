"""Image processor of SQ-LLaVA: the same pixels in training, inference and serving, and for any user of a checkpoint.

    >>> from transformers import AutoImageProcessor
    >>> image_processor = AutoImageProcessor.from_pretrained("org/sq-llava-7b", trust_remote_code=True)
    >>> image_processor("dog.png", return_tensors="pt")["pixel_values"].shape
    torch.Size([1, 3, 336, 336])

An image gives the same pixels as a path, a URL, bytes, a PIL image or an array. [`SQLlavaImageProcessor`] lists the
inputs that are accepted. [`to_rgb`] says how each Pillow mode is converted and which images are refused.
"""

import base64
import binascii
import io
import math
import os
import stat
import sys
import urllib.request
from pathlib import Path
from typing import Any, BinaryIO

import torch
from PIL import ExifTags, Image, ImageMath, UnidentifiedImageError
from transformers import LlavaImageProcessorPil
from transformers.image_utils import ChannelDimension, infer_channel_dimension_format, is_valid_image


# Pillow's own limit: about 9,460 x 9,460 pixels. A file of a few kilobytes can declare more pixels than fit in memory.
MAX_IMAGE_PIXELS = 89_478_485
# An image with a longer side is downscaled first: padded to a square, it would exceed the limit above.
MAX_IMAGE_SIDE = math.isqrt(MAX_IMAGE_PIXELS)
# Longer side / shorter side. A centre crop first resizes the shorter side to the size of the model's input, so the
# longer one would become very long.
MAX_ASPECT_RATIO = 200
DOWNLOAD_SECONDS = 60
# Limits on the file of an image. Pillow reads it block by block, and joins the blocks of comments and EXIF data in
# quadratic time: a small file with very many blocks would take hours.
MAX_IMAGE_BYTES = 2**30
MAX_READS_OF_HEADER = 10_000
MAX_READS = 200_000

# Beginnings of the files of phones, after four bytes. Pillow reads them with a plug-in only.
HEIC_BEGINNINGS = tuple(b"ftyp" + brand for brand in (b"heic", b"heix", b"heim", b"heis", b"hevc", b"mif1", b"msf1"))

# For each EXIF orientation, the operation that turns the image upright. Pillow's `exif_transpose` is not used: it also
# rewrites the EXIF data, which fails for some files.
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def open_in_rgb(
    image: str | Path | bytes | BinaryIO | Image.Image, formats: tuple[str, ...] | None = None
) -> Image.Image:
    """
    Opens an image and converts it with [`to_rgb`]. The first frame of an animated file is used.

    Args:
        image: A path, an http(s) or `data:` URL, base64, the bytes of an image file, a binary stream, or a
            `PIL.Image.Image`.
        formats (`tuple[str, ...]`, *optional*): File formats to accept, by Pillow's names. Default:
            [`safe_formats`].

    Raises:
        ValueError: if the input is not an image, or if [`to_rgb`] refuses it. Pillow raises other errors for broken
            files.
    """
    if isinstance(image, Image.Image):
        return to_rgb(image)
    if isinstance(image, str):
        image = _locate(image)
    with open_stream(image) as stream, open_header(stream, formats) as file:
        converted = to_rgb(file)
        # A copy, because the opened file would keep its source in memory.
        return converted.copy() if converted is file else converted


class _FewReads:
    """A stream that can be read only a limited number of times."""

    reads_left = MAX_READS

    def _count_read(self):
        self.reads_left -= 1
        if self.reads_left < 0:
            raise ValueError("it has too many blocks")

    def read(self, size: int | None = -1) -> bytes:
        self._count_read()
        return super().read(size)

    def readline(self, size: int | None = -1) -> bytes:
        self._count_read()
        return super().readline(size)


class _Bytes(_FewReads, io.BytesIO):
    def __repr__(self) -> str:
        return "the bytes"


class _File(_FewReads, io.BufferedReader):
    def __repr__(self) -> str:  # Pillow's errors name the stream
        return repr(str(self.name))


def open_stream(image: str | Path | bytes | BinaryIO) -> BinaryIO:
    """
    Opens a path or the bytes of an image for [`open_header`]. A stream is read into memory.

    Raises:
        ValueError: if the path is no file (a folder, a device, a pipe, ...), or if it has more than `MAX_IMAGE_BYTES`.
        FileNotFoundError: if there is no such file.
    """
    if isinstance(image, (str, Path)):
        stream = _File(io.FileIO(image, opener=_open_file))
        num_bytes = os.fstat(stream.fileno()).st_size
    else:
        if not isinstance(image, (bytes, bytearray)):
            if image.seekable():
                image.seek(0)
            image = image.read(MAX_IMAGE_BYTES + 1)
        stream, num_bytes = _Bytes(image), len(image)
    if num_bytes > MAX_IMAGE_BYTES:
        stream.close()
        raise ValueError(f"{num_bytes:,} bytes are more than the {MAX_IMAGE_BYTES:,} that are allowed")
    return stream


def _open_file(path: str, flags: int) -> int:
    # Opening a pipe would wait for its writer, and a device can be endless.
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise ValueError("it is no file, but a folder, a device, a pipe or a socket")
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def open_header(stream: BinaryIO, formats: tuple[str, ...] | None = None) -> Image.Image:
    """
    Opens an image without its pixels.

    Args:
        stream: From [`open_stream`]. It must stay open until the pixels are decoded.
        formats (`tuple[str, ...]`, *optional*): As in [`open_in_rgb`].

    Raises:
        ValueError: if the header has too many blocks, or the file is HEIC and Pillow does not know pillow-heif. Pillow
            raises other errors for broken files.
    """
    stream.reads_left = MAX_READS_OF_HEADER
    try:
        image = Image.open(stream, formats=formats or safe_formats())
    except UnidentifiedImageError as error:
        stream.seek(4)
        if stream.read(8) in HEIC_BEGINNINGS:
            raise ValueError("it is a HEIC image, which needs pillow-heif: pip install pillow-heif") from error
        raise
    stream.reads_left = MAX_READS
    return image


def safe_formats() -> tuple[str, ...]:
    """All formats that Pillow reads except EPS: EPS files are programs, which Pillow would run with Ghostscript."""
    Image.init()
    return tuple(sorted(Image.OPEN.keys() - {"EPS"}))


def _locate(image: str) -> Path | bytes:
    """The path or the bytes of an image given as a string: a path, URL, `data:` URL or base64."""
    if image.startswith(("http://", "https://")):
        request = urllib.request.Request(image, headers={"Accept": "image/*", "User-Agent": "sq-llava"})
        with urllib.request.urlopen(request, timeout=DOWNLOAD_SECONDS) as response:
            return response.read(MAX_IMAGE_BYTES + 1)
    if not image.startswith("data:image/") and os.path.isfile(image):
        return Path(image)
    try:
        return base64.b64decode(image.split(",", 1)[1] if image.startswith("data:image/") else image, validate=True)
    except (binascii.Error, IndexError, ValueError) as error:
        shown = image if len(image) <= 100 else f"{image[:100]}..."
        raise ValueError(f"{shown!r} is neither an image file, nor an http(s) or data: URL, nor base64.") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """
    Converts an image to upright 8-bit RGB. `docs/images.md` has a table of all modes.

    - The EXIF orientation is applied, as in transformers' `load_image`.
    - Transparent pixels are put on white, as in transformers' `convert_to_rgb` from 5.21 on and in vLLM. This applies
      to modes LA, La, PA, RGBA and RGBa, to palettes with transparent colours, and to the transparent colour of a PNG
      or GIF.
    - 16-bit grey levels (mode I, and I;16 in any byte order) are divided by 256. Pillow would clip them at 255.
    - Modes 1, L, P, RGBX, CMYK, YCbCr, HSV and LAB are converted by Pillow.
    - An image with a side of more than 9,459 pixels is downscaled.

    Returns:
        `PIL.Image.Image`: The converted image, or the input object itself if there is nothing to convert.

    Raises:
        ValueError: for floating-point pixels (mode F) and for grey levels of more than 16 bits, because their range is
            unknown; if one side is more than 200 times the other; if the image has no pixels.
        PIL.Image.DecompressionBombError: for more than 89,478,485 pixels.
    """
    check_size(image)
    image.load()  # before getexif, because EXIF data may come after the pixels in the file
    turn = TURNS.get(image.getexif().get(ExifTags.Base.Orientation))
    upright = image if turn is None else image.transpose(turn)
    if upright.mode.startswith(("I", "F")):
        rgb = _eight_bits(upright).convert("RGB")
    elif _is_transparent(upright):
        if upright.mode == "La":  # Pillow converts La to LA only
            upright = upright.convert("LA")
        rgb = Image.new("RGBA", upright.size, "white")
        rgb = Image.alpha_composite(rgb, upright.convert("RGBA")).convert("RGB")
    else:
        rgb = upright if upright.mode == "RGB" else upright.convert("RGB")
    if max(rgb.size) > MAX_IMAGE_SIDE:
        rgb = rgb.copy()
        rgb.thumbnail((MAX_IMAGE_SIDE, MAX_IMAGE_SIDE))
    if rgb is not image:
        rgb.info = {}  # else a second call would rotate it again and read the old transparent colour
    return rgb


def check_size(image: Image.Image) -> None:
    """
    Checks the size of an image before any pixel is decoded.

    Raises:
        PIL.Image.DecompressionBombError: if it has more than `MAX_IMAGE_PIXELS` pixels.
        ValueError: if it has no pixels, or if one side is more than `MAX_ASPECT_RATIO` times the other.
    """
    width, height = image.size
    if min(width, height) == 0:
        raise ValueError(f"{width} x {height} pixels: the image is empty")
    if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        raise ValueError(
            f"{width} x {height} pixels: one side is more than {MAX_ASPECT_RATIO} times the other. Cut the image into "
            "pieces"
        )
    if width * height > MAX_IMAGE_PIXELS:
        raise Image.DecompressionBombError(
            f"{width} x {height} pixels are more than the {MAX_IMAGE_PIXELS:,} that are allowed"
        )


def _is_transparent(image: Image.Image) -> bool:
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa"):
        return True
    if image.mode == "P" and image.palette.mode.endswith("A"):
        return True
    # A string comes from a text chunk of a PNG that is named "transparency".
    return isinstance(image.info.get("transparency"), (int, bytes, tuple))


def _eight_bits(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise ValueError("floating-point pixels (mode F) have an unknown range: convert the image to 8 bits")
    transparent = image.info.get("transparency")
    if image.mode == "I;16N":  # Pillow would clip its levels
        image = Image.frombytes("I;16" if sys.byteorder == "little" else "I;16B", image.size, image.tobytes())
    levels = image.convert("I")
    lowest, highest = levels.getextrema()
    if lowest < 0 or highest > 0xFFFF:
        raise ValueError(
            f"grey levels from {lowest} to {highest}: at most 16 bits (0 to 65535) are supported. Convert the image"
        )
    grey = levels.point(lambda level: level / 256).convert("L")
    if isinstance(transparent, int):
        mask = ImageMath.lambda_eval(lambda of: of["convert"]((of["levels"] == transparent) * 255, "L"), levels=levels)
        grey.paste(255, mask=mask)
    return grey


class SQLlavaImageProcessor(LlavaImageProcessorPil):
    """
    LLaVA's image processor, which pads an image to a square and resizes it, or resizes it and crops the centre. This
    class first converts every input to RGB by the same rules. It accepts:

    - anything that [`open_in_rgb`] opens: paths, http(s) and `data:` URLs, base64, the bytes of a file, PIL images;
    - arrays and tensors with 1 (grey), 3 (RGB) or 4 (RGBA) channels, first or last; an array with two dimensions is
      grey. Integers are levels from 0 to 255, `uint16` from 0 to 65535. Floating-point values are whole numbers from 0
      to 255; with `do_rescale=False` they lie between 0 and 1, as everywhere in transformers.

    Pillow always does the resizing, so every machine gives the same pixels; torchvision would round differently. Saved
    configurations name LLaVA's class, so they also load without this code.
    """

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), "image_processor_type": "LlavaImageProcessor"}

    def fetch_images(self, image_url_or_urls):
        if isinstance(image_url_or_urls, (list, tuple)):
            return [self.fetch_images(image) for image in image_url_or_urls]
        if _is_array(image_url_or_urls):
            # transformers does not accept two dimensions.
            return image_url_or_urls[None] if image_url_or_urls.ndim == 2 else image_url_or_urls
        return open_in_rgb(image_url_or_urls)

    def process_image(
        self,
        image,
        do_convert_rgb: bool | None = True,
        input_data_format: str | ChannelDimension | None = None,
        **settings,
    ):
        """
        Converts, pads and resizes one image; `_preprocess` crops and normalizes it afterwards. Returns an array with
        channels first: levels from 0 to 255, or values from 0 to 1 if the input has such values.
        """
        if do_convert_rgb is False:
            raise ValueError("do_convert_rgb=False: the vision tower takes RGB images only. Remove it.")
        is_fraction = settings["do_rescale"] is False and _is_array(image) and "float" in str(image.dtype)
        if _is_array(image):
            image = _array_to_image(image, input_data_format, is_fraction)
        image = to_rgb(image)
        if settings["do_pad"]:
            image = _pad_to_square(image, settings["image_mean"])
        is_square = image.width == image.height and settings["size"].shortest_edge is not None
        if settings["do_resize"] and is_square:
            image = _resize_square(image, settings["size"].shortest_edge, settings["resample"])
        levels = super().process_image(image, do_convert_rgb=True)
        if settings["do_resize"] and not is_square:
            levels = self.resize(image=levels, size=settings["size"], resample=settings["resample"])
        return self.rescale(levels, 1 / 255) if is_fraction else levels

    def _preprocess(self, images, **settings):
        # `process_image` has padded and resized them. LLaVA's class would pad floats with a wrong colour.
        return super()._preprocess(images, **{**settings, "do_pad": False, "do_resize": False})

    def pad_and_resize(self, image: Image.Image) -> Image.Image:
        """
        Pads and resizes an RGB image, which then needs less memory. The processor gives the same pixels for
        the result as for the image. If the processor crops the centre, the image is returned unchanged.
        """
        if not (self.do_pad and self.do_resize):
            return image
        return _resize_square(_pad_to_square(image, self.image_mean), self.size["shortest_edge"], self.resample)


def _pad_to_square(image: Image.Image, mean) -> Image.Image:
    if image.width == image.height:
        return image
    side = max(image.size)
    square = Image.new("RGB", (side, side), tuple(int(level * 255) for level in mean))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def _resize_square(image: Image.Image, side: int, resample: int) -> Image.Image:
    return image if image.width == side else image.resize((side, side), resample)


def _is_array(image) -> bool:
    return is_valid_image(image) and not isinstance(image, Image.Image)


def _array_to_image(array, channels: str | ChannelDimension | None, is_fraction: bool) -> Image.Image:
    """
    Args:
        array (`np.ndarray` or `torch.Tensor`): Of shape `(C, height, width)` or `(height, width, C)`; C is 1, 3 or 4.
        channels: `"channels_first"` or `"channels_last"`; inferred from the shape if it is `None`.
        is_fraction: Whether the values lie between 0 and 1.
    """
    if isinstance(array, torch.Tensor):
        array = array.detach().cpu()
        array = (array.double() if array.is_floating_point() else array).numpy()  # NumPy has no bfloat16
    channels = channels or infer_channel_dimension_format(array, num_channels=(1, 3, 4))
    array = array.transpose(1, 2, 0) if channels == ChannelDimension.FIRST else array
    if array.shape[-1] not in (1, 3, 4):
        raise ValueError(f"The last dimension of {array.shape} is not 1, 3 or 4 channels: check input_data_format.")
    lowest, highest = array.min(), array.max()
    if is_fraction:
        if not (lowest >= 0 and highest <= 1):  # written so that NaN is refused
            raise ValueError(
                f"do_rescale=False: values must lie between 0 and 1, but the array has {lowest} to {highest}."
            )
        levels = (array.astype("float64") * 255).round()
    elif array.dtype.kind == "b":
        levels = array * 255
    elif array.dtype.kind == "u" and array.dtype.itemsize == 2:
        levels = array // 256
    else:
        if array.dtype.kind == "f" and 0 < highest <= 1:
            raise ValueError("The values lie between 0 and 1: pass do_rescale=False, or give levels from 0 to 255.")
        if not (lowest >= 0 and highest <= 255 and (array == array.round()).all()):
            raise ValueError(f"Levels must be whole numbers from 0 to 255, but the array has {lowest} to {highest}.")
        levels = array
    levels = levels.astype("uint8")
    return Image.fromarray(levels[..., 0] if levels.shape[-1] == 1 else levels)


SQLlavaImageProcessor.register_for_auto_class()

__all__ = ["SQLlavaImageProcessor"]
