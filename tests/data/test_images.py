"""Image files become the same pixels as in transformers, and broken files become errors that name them."""

import io
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import EpsImagePlugin, ExifTags, Image, ImageOps, PngImagePlugin
from transformers import CLIPImageProcessorPil, LlavaImageProcessorPil, SiglipImageProcessorPil

from image_processing_sq_llava import MAX_IMAGE_SIDE
from processing_sq_llava import SQLlavaProcessor
from sq_llava.data.images import image_faults, open_image
from sq_llava.early_checks import find_images
from tests import pictures, tiny


def image_processor(kind: str, aspect_ratio: str = "pad"):
    stock = {
        "clip": lambda: CLIPImageProcessorPil(size={"shortest_edge": 42}, crop_size={"height": 42, "width": 42}),
        "siglip": lambda: SiglipImageProcessorPil(size={"height": 42, "width": 42}),
        "bilinear": lambda: CLIPImageProcessorPil(size={"shortest_edge": 42}, crop_size=42, resample=2),
    }[kind]()
    return SQLlavaProcessor(stock, tiny.byte_level_tokenizer(), image_aspect_ratio=aspect_ratio).image_processor


PROCESSORS = {kind: image_processor(kind) for kind in ("clip", "siglip", "bilinear")}
PROCESSORS["crop"] = image_processor("clip", "crop")


@settings(deadline=None, max_examples=40)
@given(
    width=st.integers(1, 130), height=st.integers(1, 130), seed=st.integers(0, 9), kind=st.sampled_from([*PROCESSORS])
)
def test_rgb_image_has_exactly_the_pixels_of_transformers_processor(width, height, seed, kind):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    image, processor = Image.fromarray(pixels), PROCESSORS[kind]
    stock = LlavaImageProcessorPil.from_dict(processor.to_dict())
    expected = stock(image, return_tensors="pt")["pixel_values"]
    assert torch.equal(processor(image, return_tensors="pt")["pixel_values"], expected)
    square = processor.pad_and_resize(image)
    assert processor.do_center_crop and square.size == ((42, 42) if processor.do_pad else image.size)
    assert torch.equal(processor(square, return_tensors="pt")["pixel_values"], expected)


def encoded(image: Image.Image, form: str, **settings) -> dict:
    return {"bytes": pictures.encoded(image, form, **settings), "path": f"a.{form.lower()}"}


@pytest.mark.parametrize("orientation", range(1, 9))
def test_photo_is_rotated_as_its_exif_data_says(orientation):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    photo = encoded(tiny.picture().resize((30, 20)), "PNG", exif=exif)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(photo["bytes"]))).convert("RGB")
    assert open_image(photo).tobytes() == expected.tobytes()


@pytest.mark.skipif(find_spec("pillow_heif") is not None, reason="pillow-heif is installed")
def test_heic_file_is_named_with_the_package_that_reads_it(tmp_path):
    for brand in (b"mif1", b"heic"):
        file = tmp_path / "IMG_0001.HEIC"
        file.write_bytes(b"\0\0\0\x18ftyp" + brand + bytes(100))
        with pytest.raises(ValueError, match=r"IMG_0001.HEIC: .*needs pillow-heif: pip install pillow-heif"):
            open_image(file)
        [fault] = image_faults(str(file))
        assert fault.code == "image_unreadable" and "pip install pillow-heif" in fault.message
    with pytest.raises(ValueError, match=r"IMG_0001.HEIC: .*needs pillow-heif"):
        find_images([tmp_path])  # a folder's HEIC images are not skipped


def test_heic_file_is_read_where_pillow_heif_is_installed(tmp_path):
    pytest.importorskip("pillow_heif")
    tiny.picture(width=64, height=48).save(tmp_path / "a.heic")
    assert find_images([tmp_path]) == [tmp_path / "a.heic"]
    assert open_image(tmp_path / "a.heic").size == (64, 48)
    assert list(image_faults(str(tmp_path / "a.heic"))) == []


def test_eps_file_is_refused_and_its_program_not_run(monkeypatch):
    eps = encoded(tiny.picture(), "EPS")
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *args, **kwargs: pytest.fail("Ghostscript was called"))
    with pytest.raises(ValueError, match=r"a\.eps: cannot be read as an image"):
        open_image(eps)
    assert [fault.code for fault in image_faults(eps)] == ["image_unreadable"]


def test_very_narrow_image_is_refused_and_a_long_one_made_smaller():
    strip = encoded(Image.new("L", (1, 201)), "PNG")
    with pytest.raises(ValueError, match="1 x 201 pixels: one side is more than 200 times the other"):
        open_image(strip)
    assert [fault.code for fault in image_faults(strip)] == ["image_unreadable"]
    assert open_image(encoded(Image.new("L", (1, 200)), "PNG")).size == (1, 200)
    assert open_image(encoded(Image.new("L", (100, 2 * MAX_IMAGE_SIDE)), "PNG")).size == (50, MAX_IMAGE_SIDE)


@pytest.mark.parametrize("key", ["exif", "xmp", "transparency"])
def test_wrong_metadata_is_ignored_or_a_named_error(key):
    texts = PngImagePlugin.PngInfo()
    texts.add_text(key, "7", zip=True)
    try:
        assert open_image(encoded(tiny.picture().convert("L"), "PNG", pnginfo=texts)).mode == "RGB"
    except ValueError as error:
        assert "cannot be read as an image" in str(error)


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.too_slow])
@given(
    form=st.sampled_from(["GIF", "JPEG", "PNG", "TIFF", "WEBP"]),
    changes=st.lists(st.tuples(st.integers(0, 500), st.integers(0, 255)), min_size=1, max_size=8),
    orientation=st.integers(0, 9),
    kept=st.sampled_from([1.0, 0.9, 0.5, 0.1]),
)
def test_broken_file_is_a_named_error_and_a_fault(form, changes, orientation, kept):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    settings = {} if form == "GIF" else {"exif": exif}
    data = bytearray(encoded(tiny.picture().resize((20, 12)), form, **settings)["bytes"])
    del data[max(1, int(kept * len(data))) :]
    for place, value in changes:
        data[place % len(data)] = value
    try:
        assert open_image({"bytes": bytes(data), "path": None}).mode == "RGB"
    except ValueError as error:
        assert "cannot be read as an image" in str(error)
    assert all(fault.message and fault.fix for fault in image_faults({"bytes": bytes(data), "path": None}))


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
def test_complete_image_is_not_decoded(form, monkeypatch):
    images = [encoded(image, form) for image in (tiny.picture(), tiny.picture().convert("L"))]
    monkeypatch.setattr(Image.Image, "load", lambda image: pytest.fail("decoded"))
    assert not [fault for image in images for fault in image_faults(image)]
