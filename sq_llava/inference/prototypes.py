"""A picture of the prototypes: each image token gets the colour of the prototype that it belongs to most.

    sq-llava prototypes dog.png --model org/sq-llava-7b --out seen.png --top 8

    >>> seen = look(assistant, open_image("dog.png"))
    >>> paint(open_image("dog.png"), seen, [*seen.shares][:8]).save("seen.png")

The extractor itself assigns tokens to prototypes (its method `assignment`). The colour depends on the rank of a
prototype in one picture, so that the largest are easy to tell apart. The same prototype can have another colour in
another picture. This module does not explain what a prototype means.
"""

import colorsys
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from sq_llava.checkpoints.load import without_adapter
from sq_llava.inference.assistant import Assistant


# Steps of the golden ratio: neighbouring ranks get very different hues, and no hue comes twice.
GOLDEN_RATIO = 0.618034
OPACITY = 130
SHADE = (0, 0, 0, 180)


@dataclass(frozen=True)
class PrototypeMap:
    """
    The prototype of each image token.

    Args:
        best (`np.ndarray` of shape `(rows, columns)`): Index of the prototype that each token belongs to most.
        is_padded (`bool`): Whether the picture was padded to a square. If not, the square is its centre crop.
        shares (`dict[int, float]`): For each prototype, its share of the visible part of the picture, from 0 to 1.
            The largest comes first.
    """

    best: np.ndarray
    is_padded: bool
    shares: dict[int, float]


@torch.inference_mode()
def look(assistant: Assistant, image: Image.Image) -> PrototypeMap:
    """
    Runs the vision tower and the prototype extractor on an image.

    Raises:
        ValueError: if the model has no prototypes.
    """
    model = without_adapter(assistant.model).model
    if model.config.prototype_variant == "none":
        raise ValueError("This model has no prototypes: prototype_variant in its config.json is 'none'.")
    pixel_values = assistant.processor.image_processor(image, return_tensors="pt")["pixel_values"]
    assignment = model.prototype_extractor.assignment(model.get_vision_features(pixel_values.to(model.device)))[0]
    vision = model.config.vision_config
    num_rows = vision.image_size // vision.patch_size
    # If the features include a class token, it comes first.
    best = assignment.argmax(dim=0)[-(num_rows**2) :].view(num_rows, num_rows).cpu().numpy()

    is_padded = assistant.processor.image_aspect_ratio == "pad"
    return PrototypeMap(best, is_padded, shares_of(best, is_padded, image.size))


def shares_of(best: np.ndarray, is_padded: bool, size: tuple[int, int]) -> dict[int, float]:
    """The `shares` of a [`PrototypeMap`], for a picture of this `(width, height)` in pixels."""
    (num_rows, num_columns), (left, top, side) = best.shape, square_in(size, is_padded)
    area = np.outer(_overlap(num_rows, top, side, size[1]), _overlap(num_columns, left, side, size[0]))
    area_of = np.bincount(best.ravel(), weights=area.ravel())
    largest_first = np.argsort(-area_of, kind="stable")
    return {int(index): float(area_of[index] / area.sum()) for index in largest_first if area_of[index] > 0}


def square_in(size: tuple[int, int], is_padded: bool) -> tuple[int, int, int]:
    """Left, top and side in pixels of the square that the tokens cover, in a picture of this `(width, height)`."""
    side = max(size) if is_padded else min(size)
    return (size[0] - side) // 2, (size[1] - side) // 2, side


def _overlap(num_cells: int, begin: int, side: int, length: int) -> np.ndarray:
    """`side` is cut into `num_cells` from `begin` on. Returns how much of each cell lies between 0 and `length`."""
    borders = (begin + side * np.arange(num_cells + 1) / num_cells).clip(0, length)
    return np.diff(borders)


def colour_of_rank(rank: int) -> tuple[int, int, int]:
    """RGB colour (0 to 255) of the prototype with the `rank`-th largest share. The largest has rank 0."""
    red, green, blue = colorsys.hsv_to_rgb(rank * GOLDEN_RATIO % 1, 0.85, 1.0)
    return round(255 * red), round(255 * green), round(255 * blue)


def paint(image: Image.Image, seen: PrototypeMap, chosen: list[int] | None = None) -> Image.Image:
    """
    Args:
        image: The picture that [`look`] was called with, in any size.
        chosen (`list[int]`, *optional*): Prototypes to show. The others are shaded dark. Default: all.

    Returns:
        The picture with the colours on top, RGB, in its own size. Outside of the tokens' square it is unchanged.
    """
    layer_of_tokens = np.zeros((*seen.best.shape, 4), dtype=np.uint8)
    layer_of_tokens[:] = SHADE
    for rank, prototype in enumerate(seen.shares):
        if chosen is None or prototype in chosen:
            layer_of_tokens[seen.best == prototype] = (*colour_of_rank(rank), OPACITY)
    left, top, side = square_in(image.size, seen.is_padded)
    square = Image.fromarray(layer_of_tokens).resize((side, side), Image.Resampling.NEAREST)
    layer = Image.new("RGBA", image.size)
    layer.paste(square, (left, top))
    return Image.alpha_composite(image.convert("RGBA"), layer).convert("RGB")
