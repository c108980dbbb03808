"""A picture gives the same pixels on every way to the model: each row of the table in `docs/images.md`.

`remote_code_checks.py` tests the same pictures with the code of a checkpoint in a new process.
"""

import base64
import threading
from functools import partial
from http.server import HTTPServer, SimpleHTTPRequestHandler

import numpy as np
import pytest
import torch
from fastapi.testclient import TestClient
from PIL import Image, ImageDraw
from transformers import CLIPImageProcessorPil, LlavaImageProcessorPil

from image_processing_sq_llava import MAX_IMAGE_SIDE, to_rgb
from processing_sq_llava import SQLlavaProcessor
from sq_llava.inference.assistant import Assistant
from sq_llava.page.dialogue import Settings, Turn, speak
from sq_llava.serving.app import create_app
from sq_llava.serving.chat import Limits
from sq_llava.training.collator import SelfQuestioningCollator
from tests import tiny
from tests.pictures import COLOURS, LEVELS, encoded, pictures, table, turned


PICTURES = {picture.row: picture for picture in [*pictures(), *turned()]}
IN_FILES = [row for row, picture in PICTURES.items() if picture.file is not None]
OF_THE_WEB = [row for row in IN_FILES if PICTURES[row].image.format in ("PNG", "GIF")]
PROCESSOR = tiny.tiny_processor()
# The reference: the class of transformers, which gets only RGB images here.
STOCK = LlavaImageProcessorPil.from_dict(PROCESSOR.image_processor.to_dict())


def test_every_mode_of_pillow_has_a_row():
    assert {row.split(",")[0] for row in table()} == set(Image.MODES)


@pytest.fixture(scope="module")
def assistant() -> Assistant:
    return Assistant(tiny.tiny_model_for(PROCESSOR), PROCESSOR)


@pytest.fixture(scope="module")
def http(assistant):
    with TestClient(create_app(assistant, "tiny", Limits(), max_batch_size=1)) as client:
        yield client


@pytest.fixture
def seen(assistant, monkeypatch) -> list[torch.Tensor]:
    """Collects the pixels that the vision tower gets."""
    pixels, model = [], assistant.model.model
    monkeypatch.setattr(
        model, "get_vision_features", lambda of, look=model.get_vision_features: pixels.append(of) or look(of)
    )
    return pixels


def trained_on(image) -> torch.Tensor:
    content = [{"type": "image"}, {"type": "text", "text": "What?"}]
    answer = {"role": "assistant", "content": [{"type": "text", "text": "A dog."}]}
    row = {"row_id": 0, "messages": [{"role": "user", "content": content}, answer], "images": [image]}
    return SelfQuestioningCollator(PROCESSOR)([row])["pixel_values"]


def processed(image) -> torch.Tensor:
    return PROCESSOR(images=image, text="<image>", return_tensors="pt")["pixel_values"]


def templated(**image) -> torch.Tensor:
    messages = [{"role": "user", "content": [{"type": "image", **image}]}]
    inputs = PROCESSOR.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt")
    return inputs["pixel_values"]


class Enough(Exception):
    """Carries the pixels out of the model before it generates an answer, which would take long."""


def answered(assistant, images=None, **part) -> torch.Tensor:
    def look(pixels):
        raise Enough(pixels)

    content = [{"type": "image", **part}, {"type": "text", "text": "What?"}] if part else "What?"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Enough) as found:
        patch.setattr(assistant.model.model, "get_vision_features", look)
        assistant.answer(images, [{"role": "user", "content": content}], max_new_tokens=1)
    return found.value.args[0]


def asked_on_page(assistant, seen, file: str) -> torch.Tensor:
    list(speak(assistant, [Turn("user", "What?", (file,))], "assistant", Settings(max_new_tokens=1)))
    return seen.pop()


def served(http, seen, url: str) -> torch.Tensor:
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "What?"}]
    body = {"model": "tiny", "messages": [{"role": "user", "content": content}], "max_tokens": 1}
    reply = http.post("/v1/chat/completions", json=body)
    if reply.status_code != 200:
        raise ValueError(reply.json()["error"]["message"])
    return seen.pop()


def assert_shows(picture, ways: dict) -> None:
    if picture.rgb is None:
        for way, show in ways.items():
            with pytest.raises(ValueError, match=r"floating-point pixels|at most 16 bits"):
                print(way, show())
        return
    expected = STOCK(picture.rgb, return_tensors="pt")["pixel_values"]
    assert [way for way, show in ways.items() if not torch.equal(show(), expected)] == []


@pytest.mark.parametrize("row", PICTURES)
def test_picture_in_memory_is_seen_as_the_table_says(row, assistant):
    image = PICTURES[row].image
    ways = {
        "training": partial(trained_on, image),
        "assistant": partial(answered, assistant, image),
        "assistant, in a message": partial(answered, assistant, image=image),
        "processor": partial(processed, image),
        "chat template": partial(templated, image=image),
        "image processor": lambda: PROCESSOR.image_processor(image, return_tensors="pt")["pixel_values"],
    }
    assert_shows(PICTURES[row], ways)


@pytest.mark.slow
@pytest.mark.parametrize("row", IN_FILES)
def test_picture_in_a_file_is_seen_as_the_table_says(row, assistant, tmp_path):
    picture, file = PICTURES[row], tmp_path / "picture"
    file.write_bytes(picture.file)
    ways = {
        "training, path": partial(trained_on, str(file)),
        "training, bytes": partial(trained_on, {"bytes": picture.file, "path": None}),
        "assistant, path": partial(answered, assistant, file),
        "assistant, bytes": partial(answered, assistant, picture.file),
        "assistant, data: URL": partial(answered, assistant, url=picture.url),
        "processor, path": partial(processed, str(file)),
        "processor, Path": partial(processed, file),
        "processor, bytes": partial(processed, picture.file),
        "processor, data: URL": partial(processed, picture.url),
        "processor, base64": partial(processed, base64.b64encode(picture.file).decode()),
        "chat template, path": partial(templated, path=str(file)),
        "chat template, URL": partial(templated, url=picture.url),
    }
    assert_shows(picture, ways)


@pytest.mark.parametrize("row", OF_THE_WEB)
def test_server_and_page_see_what_the_table_says(row, http, assistant, seen, tmp_path):
    picture, file = PICTURES[row], tmp_path / "picture"
    file.write_bytes(picture.file)
    ways = {
        "server": partial(served, http, seen, picture.url),
        "page": partial(asked_on_page, assistant, seen, str(file)),
    }
    assert_shows(picture, ways)


RGB = np.asarray(COLOURS)
RGBA = np.asarray(PICTURES["RGBA"].image)
ARRAYS = {
    "RGB, channels last": (RGB, "RGB", {}),
    "RGB, channels first": (RGB.transpose(2, 0, 1), "RGB", {}),
    "RGB, which its shape does not tell": (RGB[:3], None, {"input_data_format": "channels_last"}),
    "integers": (RGB.astype(np.int64), "RGB", {}),
    "whole levels": (RGB.astype(np.float32), "RGB", {}),
    "between 0 and 1": (RGB / 255, "RGB", {"do_rescale": False}),
    "between 0 and 1, float16": ((RGB / 255).astype(np.float16), "RGB", {"do_rescale": False}),
    "RGBA": (RGBA, "RGBA", {}),
    "RGBA between 0 and 1": (RGBA / 255, "RGBA", {"do_rescale": False}),
    "grey": (np.asarray(PICTURES["L"].image)[..., None], "L", {}),
    "grey, two dimensions": (np.asarray(PICTURES["L"].image), "L", {}),
    "16 bits": (LEVELS, "I;16", {}),
    "black and white": (np.asarray(PICTURES["1"].image), "1", {}),
}


@pytest.mark.parametrize("kind", ARRAYS)
@pytest.mark.parametrize("aspect_ratio", ["pad", "crop"])
def test_array_and_tensor_have_the_pixels_of_the_image(kind, aspect_ratio):
    array, row, settings = ARRAYS[kind]
    rgb = PICTURES[row].rgb if row else Image.fromarray(array)
    image_processor = tiny.tiny_processor(image_aspect_ratio=aspect_ratio).image_processor
    expected = LlavaImageProcessorPil.from_dict(image_processor.to_dict())(rgb, return_tensors="pt")["pixel_values"]
    tensor = torch.from_numpy(array.copy())
    batch = [array[None], tensor[None], [array, tensor]] if array.ndim == 3 else [[array, tensor]]
    for images in (array, tensor, *batch):
        found = image_processor(images, return_tensors="pt", **settings)["pixel_values"]
        assert torch.equal(found, expected.expand_as(found))


@pytest.mark.parametrize(
    ("array", "settings", "message"),
    [
        (RGB / 255, {}, "between 0 and 1: pass do_rescale=False"),
        (RGB.astype(np.float32), {"do_rescale": False}, "must lie between 0 and 1, but the array has 0.0 to 255.0"),
        (RGB / 255 + np.nan, {"do_rescale": False}, "must lie between 0 and 1, but the array has nan"),
        (RGB + 0.5, {}, "whole numbers from 0 to 255, but the array has"),
        (RGB.astype(np.int32) * 2, {}, "whole numbers from 0 to 255, but the array has"),
        (RGB, {"input_data_format": "channels_first"}, "is not 1, 3 or 4 channels: check input_data_format"),
        (RGB[..., :2], {}, "Unable to infer channel dimension format"),
        (RGB, {"do_convert_rgb": False}, "takes RGB images only"),
        (COLOURS, {"do_convert_rgb": False}, "takes RGB images only"),
    ],
)
def test_ambiguous_array_is_refused(array, settings, message):
    with pytest.raises(ValueError, match=message):
        PROCESSOR.image_processor(array, return_tensors="pt", **settings)


def test_settings_of_a_call_work_as_in_transformers():
    for settings in (
        {"do_rescale": False, "do_normalize": False},
        {"size": {"shortest_edge": 50}, "do_center_crop": False},
        {"size": {"height": 20, "width": 70}, "do_center_crop": False},
        {"do_resize": False, "do_center_crop": False},
        {"do_pad": False, "resample": 2},
    ):
        found, expected = (
            each(COLOURS, return_tensors="pt", **settings) for each in (PROCESSOR.image_processor, STOCK)
        )
        assert torch.equal(found["pixel_values"], expected["pixel_values"])


def test_rotated_picture_is_not_rotated_twice_and_its_original_not_changed():
    image = PICTURES["EXIF 6"].image
    before = image.tobytes()
    again = to_rgb(to_rgb(image))
    assert again.tobytes() == PICTURES["EXIF 6"].rgb.tobytes() and to_rgb(again) is again
    assert image.tobytes() == before and image.getexif()[0x0112] == 6


def test_drawing_on_a_picture_later_does_not_change_the_conversation(assistant, seen):
    image = COLOURS.copy()
    talk = assistant.converse(image, num_turns=1, max_new_tokens=1)
    ImageDraw.Draw(image).rectangle((0, 0, 30, 20), "red")
    list(talk)
    assert torch.equal(seen[0], STOCK(COLOURS, return_tensors="pt")["pixel_values"])


def test_picture_of_a_url_is_downloaded(tmp_path):
    (tmp_path / "picture.png").write_bytes(PICTURES["RGBA"].file)
    with HTTPServer(("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=tmp_path)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        found = processed(f"http://127.0.0.1:{server.server_port}/picture.png")
        server.shutdown()
    assert torch.equal(found, STOCK(PICTURES["RGBA"].rgb, return_tensors="pt")["pixel_values"])


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ("none.png", "'none.png' is neither an image file, nor an http"),
        ("data:image/png;base64", "is neither an image file"),
        ("A" * 200 + "!", r"'A{100}\.\.\.' is neither an image file"),
        (Image.new("RGB", (1, 201)), "one side is more than 200 times the other"),
        (Image.new("RGB", (0, 3)), "0 x 3 pixels: the image is empty"),
        (encoded(COLOURS, "EPS"), "cannot identify image file"),
    ],
)
def test_processor_refuses_anything_but_a_picture(image, message):
    with pytest.raises((ValueError, OSError), match=message):
        processed(image)


def test_processor_refuses_a_huge_image_and_reduces_a_long_one():
    with pytest.raises(Image.DecompressionBombError, match="more than the 89,478,485 that are allowed"):
        processed(Image.new("1", (40_000, 3_000)))
    long = Image.new("RGB", (100, 2 * MAX_IMAGE_SIDE))
    assert to_rgb(long).size == (50, MAX_IMAGE_SIDE)
    assert long.size == (100, 2 * MAX_IMAGE_SIDE)


def test_processors_of_transformers_become_ours_with_the_same_settings():
    """Also those of checkpoints that were saved with an image processor of transformers."""
    settings = {"size": {"shortest_edge": 42}, "crop_size": 42, "image_mean": [0.1, 0.2, 0.3], "resample": 2}
    older = LlavaImageProcessorPil(**settings, do_pad=True, image_std=[0.5, 0.6, 0.7])
    for stock in (older, CLIPImageProcessorPil(**settings, image_std=[0.5, 0.6, 0.7])):
        ours = SQLlavaProcessor(stock, tiny.byte_level_tokenizer()).image_processor
        assert type(ours).__name__ == "SQLlavaImageProcessor"
        assert ours.to_dict() == older.to_dict()
