"""Images as SQ-LLaVA sees them: one rule for training, inference, servers and everyone who loads a checkpoint.

    >>> from transformers import AutoImageProcessor
    >>> image_processor = AutoImageProcessor.from_pretrained("org/sq-llava-7b", trust_remote_code=True)
    >>> image_processor("dog.png", return_tensors="pt")["pixel_values"].shape
    torch.Size([1, 3, 336, 336])

A picture gives the same pixels however it comes: as a path, a URL, bytes, a PIL image or an array.
`SQLlavaImageProcessor` says what is taken, `to_rgb` what becomes of each Pillow mode, and what is refused.
"""

import base64
import binascii
import io
import math
import os
import sys
import urllib.request
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

import torch
from PIL import ExifTags, Image, ImageMath
from transformers import LlavaImageProcessorPil
from transformers.image_utils import ChannelDimension, infer_channel_dimension_format, is_valid_image


# Pillow's own limit: about 9,460 x 9,460 pixels. A file of a few kilobytes can claim more than memory holds.
MAX_IMAGE_PIXELS = 89_478_485
# An image with a longer side is made smaller first: padded to a square, it would have more pixels than that.
MAX_IMAGE_SIDE = math.isqrt(MAX_IMAGE_PIXELS)
# Of the longer side to the shorter one, which a centre crop resizes to the height of the model's image.
MAX_ASPECT_RATIO = 200
DOWNLOAD_SECONDS = 60

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


def open_in_rgb(
    image: str | Path | bytes | BinaryIO | Image.Image, formats: tuple[str, ...] | None = None
) -> Image.Image:
    """
    Opens an image and makes it RGB by [`to_rgb`]; of an animation, the first frame.

    Args:
        image: A path; an http(s) or `data:` URL; base64; the bytes of an image file, or a stream of them; or a
            `PIL.Image.Image`.
        formats (`tuple[str, ...]`, *optional*): The only file formats to be read, by Pillow's names; default: those
            of [`safe_formats`].

    Raises:
        ValueError: if it is no image, or one that [`to_rgb`] refuses. Of broken files, Pillow raises other errors too.
    """
    if isinstance(image, Image.Image):
        return to_rgb(image)
    if isinstance(image, str):
        image = _locate(image)
    if isinstance(image, (bytes, bytearray)):
        image = io.BytesIO(image)
    with Image.open(image, formats=formats or safe_formats()) as file:
        converted = to_rgb(file)
        # Not the file itself, which would keep what it was read from.
        return converted.copy() if converted is file else converted


@cache
def safe_formats() -> tuple[str, ...]:
    """All formats that Pillow reads but EPS, which it hands to Ghostscript: that runs what is in the file."""
    Image.init()
    return tuple(sorted(Image.OPEN.keys() - {"EPS"}))


def _locate(image: str) -> Path | bytes:
    """The file or the bytes of what transformers' `load_image` takes as a string."""
    if image.startswith(("http://", "https://")):
        request = urllib.request.Request(image, headers={"Accept": "image/*", "User-Agent": "sq-llava"})
        with urllib.request.urlopen(request, timeout=DOWNLOAD_SECONDS) as response:
            return response.read()
    if not image.startswith("data:image/") and os.path.isfile(image):
        return Path(image)
    try:
        return base64.b64decode(image.split(",", 1)[1] if image.startswith("data:image/") else image, validate=True)
    except (binascii.Error, IndexError, ValueError) as error:
        shown = image if len(image) <= 100 else f"{image[:100]}..."
        raise ValueError(f"{shown!r} is neither an image file, nor an http(s) or data: URL, nor base64.") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """
    An upright RGB image of 8 bits, the same for training, inference and serving; `docs/images.md` has the table.

    - It is turned as its EXIF orientation says, as transformers' `load_image` does.
    - What is transparent stands on white, as in transformers' `convert_to_rgb` since 5.21 and in vLLM: modes LA, La,
      PA, RGBA and RGBa, palettes with transparent colours, and the transparent colour of a PNG or GIF.
    - 16-bit grey levels (I;16 and its byte orders, and I) are divided by 256; Pillow would cut them off at 255.
    - Modes 1, L, P, RGBX, CMYK, YCbCr, HSV and LAB are converted as Pillow does.
    - One with a side of more than 9,459 pixels is made smaller.

    Returns:
        The image itself, if it is one already.

    Raises:
        ValueError: for floating-point pixels (mode F) and levels of more than 16 bits, whose range is unknown, for
            strips of more than 200 times their width, and for an image without pixels.
        PIL.Image.DecompressionBombError: for more than 89,478,485 pixels.
    """
    check_size(image)
    image.load()  # before getexif: EXIF data may stand behind the pixels
    turn = TURNS.get(image.getexif().get(ExifTags.Base.Orientation))
    upright = image if turn is None else image.transpose(turn)
    if upright.mode.startswith(("I", "F")):
        rgb = _eight_bits(upright).convert("RGB")
    elif _is_transparent(upright):
        if upright.mode == "La":  # which Pillow converts to this one only
            upright = upright.convert("LA")
        rgb = Image.new("RGBA", upright.size, "white")
        rgb = Image.alpha_composite(rgb, upright.convert("RGBA")).convert("RGB")
    else:
        rgb = upright if upright.mode == "RGB" else upright.convert("RGB")
    if max(rgb.size) > MAX_IMAGE_SIDE:
        rgb = rgb.copy()
        rgb.thumbnail((MAX_IMAGE_SIDE, MAX_IMAGE_SIDE))
    if rgb is not image:
        rgb.info = {}  # it would be turned again, and made transparent
    return rgb


def check_size(image: Image.Image) -> None:
    """
    Raises:
        PIL.Image.DecompressionBombError: before any pixel is decoded, if there are more than `MAX_IMAGE_PIXELS`.
        ValueError: if it is a strip, or has no pixels.
    """
    width, height = image.size
    if min(width, height) == 0:
        raise ValueError(f"{width} x {height} pixels: it is empty")
    if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        raise ValueError(
            f"{width} x {height} pixels: a side is more than {MAX_ASPECT_RATIO} times the other, cut it into pieces"
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
    # A str is a text of that name in the file.
    return isinstance(image.info.get("transparency"), (int, bytes, tuple))


def _eight_bits(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise ValueError("it has floating-point pixels (mode F), whose range is unknown: make them 8 bits")
    transparent = image.info.get("transparency")
    if image.mode == "I;16N":  # Pillow would cut its levels off
        image = Image.frombytes("I;16" if sys.byteorder == "little" else "I;16B", image.size, image.tobytes())
    levels = image.convert("I")
    lowest, highest = levels.getextrema()
    if lowest < 0 or highest > 0xFFFF:
        raise ValueError(f"it has grey levels from {lowest} to {highest}: at most 16 bits, 0 to 65535, are read")
    grey = levels.point(lambda level: level / 256).convert("L")
    if isinstance(transparent, int):
        mask = ImageMath.lambda_eval(lambda of: of["convert"]((of["levels"] == transparent) * 255, "L"), levels=levels)
        grey.paste(255, mask=mask)
    return grey


class SQLlavaImageProcessor(LlavaImageProcessorPil):
    """
    LLaVA's image processor, which pads to a square and resizes (or resizes and crops the centre), behind one rule of
    what an image is. It takes:

    - what [`open_in_rgb`] opens: paths, http(s) and `data:` URLs, base64, bytes of a file, PIL images of any mode;
    - arrays and tensors of one channel (grey), three (RGB) or four (RGBA), channels first or last; two dimensions are
      grey. Integers are levels from 0 to 255, `uint16` ones from 0 to 65535. Floating-point ones are whole levels, or,
      with `do_rescale=False`, lie between 0 and 1, as everywhere in transformers.

    It resizes by Pillow, also where torchvision is installed, which rounds otherwise: the same pixels on each machine.
    Configurations name LLaVA's class, which is what loads them without this code.
    """

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), "image_processor_type": "LlavaImageProcessor"}

    def fetch_images(self, image_url_or_urls):
        if isinstance(image_url_or_urls, (list, tuple)):
            return [self.fetch_images(image) for image in image_url_or_urls]
        if _is_array(image_url_or_urls):
            # transformers refuses two dimensions.
            return image_url_or_urls[None] if image_url_or_urls.ndim == 2 else image_url_or_urls
        return open_in_rgb(image_url_or_urls)

    def process_image(
        self,
        image,
        do_convert_rgb: bool | None = True,
        input_data_format: str | ChannelDimension | None = None,
        **settings,
    ):
        """One image as a square, or resized before the crop, channels first: levels of 8 bits."""
        if do_convert_rgb is False:
            raise ValueError("do_convert_rgb=False: the vision tower takes RGB images only.")
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
        # Padded and resized they are: of floating-point images, LLaVA's class would not get the colour right.
        return super()._preprocess(images, **{**settings, "do_pad": False, "do_resize": False})

    def pad_and_resize(self, image: Image.Image) -> Image.Image:
        """
        The square of an RGB image, of which this processor makes the same pixels: it needs less memory to keep. If
        the centre is cropped, the image itself.
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
        array (`np.ndarray` or `torch.Tensor`): Of shape (1, 3 or 4, height, width) or (height, width, 1, 3 or 4).
        channels: Which of the two; where it is not given, by the shape.
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
        if not (lowest >= 0 and highest <= 1):  # so that NaN is refused
            raise ValueError(f"do_rescale=False: values must be between 0 and 1, but are {lowest} to {highest}.")
        levels = (array.astype("float64") * 255).round()
    elif array.dtype.kind == "b":
        levels = array * 255
    elif array.dtype.kind == "u" and array.dtype.itemsize == 2:
        levels = array // 256
    else:
        if array.dtype.kind == "f" and 0 < highest <= 1:
            raise ValueError("The values are between 0 and 1: pass do_rescale=False, or levels from 0 to 255.")
        if not (lowest >= 0 and highest <= 255 and (array == array.round()).all()):
            raise ValueError(f"Levels must be whole numbers from 0 to 255, but the array has {lowest} to {highest}.")
        levels = array
    levels = levels.astype("uint8")
    return Image.fromarray(levels[..., 0] if levels.shape[-1] == 1 else levels)


SQLlavaImageProcessor.register_for_auto_class()

__all__ = ["SQLlavaImageProcessor"]
