"""The processor makes square images: padded with the mean colour, or cropped."""

import pytest
import torch
from PIL import Image
from transformers import Siglip2ImageProcessorPil, SiglipImageProcessorPil

from processing_sq_llava import SQLlavaProcessor
from tests.tiny import byte_level_tokenizer, tiny_image_processor, tiny_processor


def colour(values):
    return torch.tensor(values).view(3, 1, 1)


def pixels_of(processor, image):
    """Pixels `(3, height, width)` from 0 to 1, before the normalization."""
    pixels = processor(text="<image>", images=[image], return_tensors="pt").pixel_values[0]
    return pixels * colour(processor.image_processor.image_std) + colour(processor.image_processor.image_mean)


def assert_one_colour(pixels, values, tolerance=1e-5):
    torch.testing.assert_close(pixels, colour(values).expand_as(pixels), atol=tolerance, rtol=0)


@pytest.mark.parametrize(
    ("image_processor", "mean"),
    [
        (tiny_image_processor(), [0.48145466, 0.4578275, 0.40821073]),
        (SiglipImageProcessorPil(size={"height": 42, "width": 42}), [0.5, 0.5, 0.5]),
    ],
    ids=["clip", "siglip"],
)
def test_images_are_padded_to_a_square_with_the_mean_colour(image_processor, mean):
    processor = SQLlavaProcessor(image_processor, byte_level_tokenizer(), image_seq_length=9)
    pixels = pixels_of(processor, Image.new("RGB", (84, 42), "red"))  # a quarter is padding above, and one below
    assert pixels.shape == (3, 42, 42)
    for padding in (pixels[:, :9], pixels[:, -9:]):
        assert_one_colour(padding, mean, tolerance=1 / 255)
    assert_one_colour(pixels[:, 12:30], [1.0, 0.0, 0.0])
    torch.testing.assert_close(pixels_of(processor, Image.new("RGB", (42, 84), "red")), pixels.mT)


def test_image_processor_without_a_fixed_size_is_refused():
    with pytest.raises(ValueError, match="is a Siglip2ImageProcessorPil, whose images have no fixed size"):
        SQLlavaProcessor(Siglip2ImageProcessorPil(), byte_level_tokenizer())


def test_centre_crop_shows_only_the_middle():
    image = Image.new("RGB", (126, 42), "green")
    image.paste("red", (42, 0, 84, 42))
    assert_one_colour(pixels_of(tiny_processor(image_aspect_ratio="crop"), image), [1.0, 0.0, 0.0])
