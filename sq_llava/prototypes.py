"""What the prototypes see: the tokens of an image, coloured by the prototype that each belongs to most.

    sq-llava prototypes dog.png --model org/sq-llava-7b --out seen.png --top 8

    >>> sight = look(assistant, open_image("dog.png"))
    >>> paint(open_image("dog.png"), sight, [*sight.shares][:8]).save("seen.png")

Which token belongs to which prototype is the extractor's own `assignment`. What this module does not do: say what a
prototype means. Colours go by rank within one picture, so that the largest are told apart; not by prototype.
"""

import colorsys
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from sq_llava.inference import Assistant


# Neighbouring ranks are far apart on the circle of hues, and no two are alike.
GOLDEN_RATIO = 0.618034
OPACITY = 150
SHADE = (0, 0, 0, 170)


@dataclass(frozen=True)
class Sight:
    """
    best (`np.ndarray` of shape `(rows, columns)`): The prototype that each token belongs to most.
    left, top, side (`int`): The square that the tokens cover, in pixels of the picture; it may be larger or smaller.
    shares (`dict[int, float]`): Share of the picture that each prototype has, the largest first; together one.
    """

    best: np.ndarray
    left: int
    top: int
    side: int
    shares: dict[int, float]


@torch.inference_mode()
def look(assistant: Assistant, image: Image.Image) -> Sight:
    """
    Raises:
        ValueError: if the model has no prototypes.
    """
    model = assistant.model.model
    if model.config.prototype_variant == "none":
        raise ValueError("This model has no prototypes: prototype_variant of its config.json is 'none'.")
    pixel_values = assistant.processor.image_processor(image, return_tensors="pt")["pixel_values"]
    assignment = model.prototype_extractor.assignment(model.get_vision_features(pixel_values.to(model.device)))[0]
    vision = model.config.vision_config
    num_rows = vision.image_size // vision.patch_size
    # A class token stands first, if it is among the features.
    best = assignment.argmax(dim=0)[-(num_rows**2) :].view(num_rows, num_rows).cpu().numpy()

    width, height = image.size
    side = max(width, height) if assistant.processor.image_aspect_ratio == "pad" else min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    area = np.outer(_overlap(num_rows, top, side, height), _overlap(num_rows, left, side, width))
    area_of = np.bincount(best.ravel(), weights=area.ravel())
    largest_first = np.argsort(-area_of, kind="stable")
    shares = {int(index): float(area_of[index] / area.sum()) for index in largest_first if area_of[index] > 0}
    return Sight(best, left, top, side, shares)


def _overlap(num_cells: int, begin: int, side: int, length: int) -> np.ndarray:
    """How much of each cell of a row of them, which begins at `begin`, lies on the picture from 0 to `length`."""
    borders = (begin + side * np.arange(num_cells + 1) / num_cells).clip(0, length)
    return np.diff(borders)


def colours(sight: Sight) -> dict[int, tuple[int, int, int]]:
    """The colour of each prototype in the picture."""
    return {
        prototype: tuple(round(255 * level) for level in colorsys.hsv_to_rgb(rank * GOLDEN_RATIO % 1, 0.85, 1.0))
        for rank, prototype in enumerate(sight.shares)
    }


def paint(image: Image.Image, sight: Sight, chosen: list[int] | None = None) -> Image.Image:
    """
    Args:
        image: The picture, in the size that it was looked at.
        chosen (`list[int]`, *optional*): Prototypes to show; the others are left in the dark. Default: all.

    Returns:
        The picture under the colours, RGB. What lies outside of the tokens' square stays as it is.
    """
    layer_of_tokens = np.zeros((*sight.best.shape, 4), dtype=np.uint8)
    layer_of_tokens[:] = SHADE
    for prototype, colour in colours(sight).items():
        if chosen is None or prototype in chosen:
            layer_of_tokens[sight.best == prototype] = (*colour, OPACITY)
    square = Image.fromarray(layer_of_tokens).resize((sight.side, sight.side), Image.Resampling.NEAREST)
    layer = Image.new("RGBA", image.size)
    layer.paste(square, (sight.left, sight.top))
    return Image.alpha_composite(image.convert("RGBA"), layer).convert("RGB")
