"""Image files as pixels: a faster way to the square, by the law that no pixel differs."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import CLIPImageProcessorPil, SiglipImageProcessorPil

from processing_sq_llava import SQLlavaProcessor
from sq_llava.images import squared
from tests import tiny


def image_processor(kind: str, aspect_ratio: str = "pad"):
    stock = {
        "clip": lambda: CLIPImageProcessorPil(size={"shortest_edge": 42}, crop_size={"height": 42, "width": 42}),
        "siglip": lambda: SiglipImageProcessorPil(size={"height": 42, "width": 42}),
        "bilinear": lambda: CLIPImageProcessorPil(size={"shortest_edge": 42}, crop_size=42, resample=2),
    }[kind]()
    return SQLlavaProcessor(stock, tiny.byte_level_tokenizer(), image_aspect_ratio=aspect_ratio).image_processor


PROCESSORS = {kind: image_processor(kind) for kind in ("clip", "siglip", "bilinear")}


@settings(deadline=None, max_examples=40)
@given(
    width=st.integers(1, 130), height=st.integers(1, 130), seed=st.integers(0, 9), kind=st.sampled_from([*PROCESSORS])
)
def test_squared_image_has_the_pixels_of_the_image_processor_to_the_last_bit(width, height, seed, kind):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    image, processor = Image.fromarray(pixels), PROCESSORS[kind]
    square = squared(image, processor)
    assert square.size == (42, 42)
    expected, found = (processor(each, return_tensors="pt")["pixel_values"] for each in (image, square))
    assert torch.equal(expected, found)


def test_image_processor_that_crops_gets_the_image_itself():
    image = tiny.picture().resize((60, 30))
    assert squared(image, image_processor("clip", "crop")) is image
