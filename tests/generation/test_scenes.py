"""Captions and boxes from COCO's files and JSON lines: how they are read, and the errors for wrong ones."""

import json

import pytest

from sq_llava.generation.llava import describe
from sq_llava.generation.scenes import Box, Scene, read_scenes


def test_coco_files_become_scenes(tmp_path):
    captions = {
        "images": [{"id": 7, "file_name": "7.jpg", "width": 200, "height": 100}, {"id": 8, "file_name": "8.jpg"}],
        "annotations": [{"image_id": 7, "caption": "A dog.\n"}, {"image_id": 7, "caption": "It sits."}],
    }
    instances = {
        "annotations": [{"image_id": 7, "bbox": [20, 10, 100, 90.4], "category_id": 3}],
        "categories": [{"id": 3, "name": "dog"}],
    }
    for name, content in (("captions.json", captions), ("instances.json", instances)):
        (tmp_path / name).write_text(json.dumps(content))
    scenes = read_scenes(tmp_path / "captions.json", tmp_path / "instances.json")
    assert scenes == [Scene("7", "7.jpg", ("A dog.", "It sits."), (Box("dog", (0.1, 0.1, 0.6, 1.0)),))]
    assert describe(scenes[0]) == "Sentences:\n- A dog.\n- It sits.\n\nObjects:\n- dog: [0.100, 0.100, 0.600, 1.000]"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"image": "a.png", "captions": []}', r"line 2: captions is \[\], expected a list of texts"),
        ('{"image": "../a.png", "captions": ["A."]}', "line 2: image is '../a.png', expected a path"),
        ('{"image": "/a.png", "captions": ["A."]}', "stays inside the image root"),
        ('{"image": "a.png", "captions": ["A."], "boxes": [{"label": "b", "box": [0, 1]}]}', "line 2: a box is"),
        ('{"image": "a.png", "captions": ["A."], "boxes": [{"label": "b", "box": [0.5, 0, 0.1, 1]}]}', "x1 <= x2"),
        ('{"image": "a.png", "captions": ["A."], "boxes": [{"label": "b", "box": [0, 0, 64, 64]}]}', "from 0 to 1"),
        ('{"image": "0.png", "captions": ["A."]}', "two images have the id '0'"),
        ('{"image": "caf\\udce9.png", "captions": ["A."]}', r"image is 'caf\\udce9.png', expected a path in UTF-8"),
        ('{"image": "a.png", "captions": ["\\ud83d"]}', "line 2: captions is .* texts in UTF-8"),
        ('{"image": "a.png", "id": "\\ud83d", "captions": ["A."]}', r"image id '\\ud83d' is empty or not UTF-8"),
        ('{"image"', "line 2: cannot be read as JSON"),
    ],
)
def test_wrong_input_is_refused_before_anything_is_asked(line, message, tmp_path):
    path = tmp_path / "scenes.jsonl"
    path.write_text('{"image": "0.png", "captions": ["A boat."]}\n' + line + "\n")
    with pytest.raises(ValueError, match=message):
        read_scenes(path)


CATEGORY = {"id": 3, "name": "dog"}
DRAWN = {"image_id": 7, "bbox": [20, 10, 100, 90.4], "category_id": 3}


@pytest.mark.parametrize(
    ("category", "drawn", "message"),
    [
        ({"id": 3}, DRAWN, r"instances.json, categories\[0\] is {'id': 3}, expected id and name"),
        ("dog", DRAWN, r"categories\[0\] is 'dog'"),
        (
            CATEGORY,
            {"bbox": [1, 2, 3, 4], "category_id": 3},
            r"annotations\[0\] is {.*, expected image_id, bbox, and",
        ),
        (CATEGORY, DRAWN | {"image_id": [7]}, r"annotations\[0\] is .*, expected image_id"),
        (CATEGORY, DRAWN | {"category_id": 4}, r"annotations\[0\] is .* a category_id that is in categories"),
        (
            CATEGORY,
            DRAWN | {"bbox": ["a", 2, 3, 4]},
            r"annotations\[0\]: bbox is \['a', 2, 3, 4\], expected left, top",
        ),
        (CATEGORY, DRAWN | {"bbox": [1, 2, -3, 4]}, r"bbox is \[1, 2, -3, 4\]"),
        (CATEGORY, DRAWN | {"bbox": [1, 2, float("nan"), 4]}, r"bbox is \[1, 2, nan, 4\]"),
        (CATEGORY, DRAWN | {"bbox": [1, 2, 3]}, r"bbox is \[1, 2, 3\]"),
    ],
)
def test_wrong_boxes_of_coco_are_refused_with_their_entry(category, drawn, message, tmp_path):
    image = {"id": 7, "file_name": "7.jpg", "width": 200, "height": 100}
    captions = {"images": [image], "annotations": [{"image_id": 7, "caption": "A dog."}]}
    (tmp_path / "captions.json").write_text(json.dumps(captions))
    (tmp_path / "instances.json").write_text(json.dumps({"annotations": [drawn], "categories": [category]}))
    with pytest.raises(ValueError, match=message):
        read_scenes(tmp_path / "captions.json", tmp_path / "instances.json")


@pytest.mark.parametrize("field", ["images", "annotations"])
def test_wrong_ids_of_coco_are_refused_with_their_entry(field, tmp_path):
    content = {"images": [{"id": 7, "file_name": "7.jpg"}], "annotations": [{"image_id": 7, "caption": "A dog."}]}
    content[field][0] |= {"id": [7], "image_id": [7]}
    (tmp_path / "captions.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=rf"captions.json, {field}\[0\] is .*, expected (image_)?id and"):
        read_scenes(tmp_path / "captions.json")
