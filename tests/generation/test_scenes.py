"""Captions and boxes from COCO's files and JSON lines: how they are read, and the errors for wrong ones."""

import json
import re
from pathlib import Path

import pytest

from sq_llava.generation.bad_rows import BadRows
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
    scenes = read_scenes(tmp_path / "captions.json", tmp_path / "instances.json", BadRows(0.1))
    assert scenes == [Scene("7", "7.jpg", ("A dog.", "It sits."), (Box("dog", (0.1, 0.1, 0.6, 1.0)),))]
    assert describe(scenes[0]) == "Sentences:\n- A dog.\n- It sits.\n\nObjects:\n- dog: [0.100, 0.100, 0.600, 1.000]"


@pytest.mark.parametrize("name", ["scenes.jsonl", "SCENES.JSONL"])
def test_null_is_the_same_as_an_absent_field(tmp_path, name):
    lines = [{"image": f"{letter}.png", "captions": ["A."], "boxes": None, "id": None} for letter in "ab"]
    (tmp_path / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    scenes = read_scenes(tmp_path / name, None, BadRows(0.1))
    assert scenes == [Scene("a", "a.png", ("A.",)), Scene("b", "b.png", ("A.",))]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"image": "a.png", "captions": []}', r"captions is \[\], expected a list of texts"),
        ('{"image": "../a.png", "captions": ["A."]}', "image is '../a.png', expected a path"),
        ('{"image": "/a.png", "captions": ["A."]}', "stays inside the image root"),
        ('{"image": "a.png", "captions": ["A."], "boxes": [{"label": "b", "box": [0, 1]}]}', "a box is"),
        ('{"image": "a.png", "captions": ["A."], "boxes": [{"label": "b", "box": [0.5, 0, 0.1, 1]}]}', "x1 <= x2"),
        ('{"image": "a.png", "captions": ["A."], "boxes": [{"label": "b", "box": [0, 0, 64, 64]}]}', "from 0 to 1"),
        ('{"image": "0.png", "captions": ["A."]}', "image id is '0', expected an id that no earlier"),
        ('{"image": "caf\\udce9.png", "captions": ["A."]}', r"image is 'caf\\udce9.png', expected a path in UTF-8"),
        ('{"image": "a.png", "captions": ["\\ud83d"]}', "captions is .* texts in UTF-8"),
        ('{"image": "a.png", "id": "\\ud83d", "captions": ["A."]}', r"id is '\\ud83d', expected a text in UTF-8"),
        ('{"image"', "cannot be read as JSON"),
        (b'{"image": "a.png", "captions": ["caf\xe9"]}', "is not UTF-8: .*byte 0xe9"),
    ],
)
def test_bad_line_is_listed_and_the_others_are_used(line, message, tmp_path):
    path = tmp_path / "scenes.jsonl"
    line = line.encode() if isinstance(line, str) else line
    path.write_bytes(b'{"image": "0.png", "captions": ["A boat."]}\n' + line + b"\n")
    assert_one_is_bad(f"{path}, line 2", message, path)


def assert_one_is_bad(place: str, message: str, captions: Path, instances: Path | None = None) -> None:
    bad = BadRows(1.0)
    assert [scene.id for scene in read_scenes(captions, instances, bad)] == ["0"]
    [(found, error)] = bad.found
    assert found == place and re.search(message, error)


def test_too_many_bad_lines_are_refused_before_anything_is_asked(tmp_path):
    path = tmp_path / "scenes.jsonl"
    path.write_text('{"image": "0.png", "captions": ["A boat."]}\n' * 3)
    with pytest.raises(ValueError, match=r"2 of 3 rows cannot be used(?s:.*)line 2: the image id is '0'"):
        read_scenes(path, None, BadRows(0.1))


CATEGORY = {"id": 3, "name": "dog"}
DRAWN = {"image_id": 0, "bbox": [20, 10, 100, 90.4], "category_id": 3}
IMAGE = {"id": 0, "file_name": "0.jpg", "width": 200, "height": 100}
SAID = {"image_id": 0, "caption": "A dog."}


def write_coco(folder: Path, category, *drawn) -> tuple[Path, Path]:
    captions, instances = folder / "captions.json", folder / "instances.json"
    captions.write_text(json.dumps({"images": [IMAGE], "annotations": [SAID]}))
    instances.write_text(json.dumps({"annotations": [*drawn], "categories": [category]}))
    return captions, instances


@pytest.mark.parametrize(
    ("drawn", "message"),
    [
        ({"bbox": [1, 2, 3, 4], "category_id": 3}, r"the entry is {.*, expected image_id, bbox, and"),
        (DRAWN | {"image_id": [7]}, r"the entry is .*, expected image_id"),
        (DRAWN | {"category_id": 4}, r"the entry is .* a category_id that is in categories"),
        (DRAWN | {"bbox": ["a", 2, 3, 4]}, r"bbox is \['a', 2, 3, 4\], expected left, top"),
        (DRAWN | {"bbox": [1, 2, -3, 4]}, r"bbox is \[1, 2, -3, 4\]"),
        (DRAWN | {"bbox": [1, 2, float("nan"), 4]}, r"bbox is \[1, 2, nan, 4\]"),
        (DRAWN | {"bbox": [1, 2, 3]}, r"bbox is \[1, 2, 3\]"),
    ],
)
def test_bad_box_of_coco_is_listed_with_its_entry(drawn, message, tmp_path):
    captions, instances = write_coco(tmp_path, CATEGORY, DRAWN, drawn)
    assert_one_is_bad(f"{instances}, annotations[1]", message, captions, instances)


@pytest.mark.parametrize("category", [{"id": 3}, "dog"])
def test_wrong_categories_of_coco_are_refused(category, tmp_path):
    with pytest.raises(ValueError, match=r"instances.json, categories\[0\] is .*, expected id and name"):
        read_scenes(*write_coco(tmp_path, category, DRAWN), BadRows(1.0))


@pytest.mark.parametrize(
    ("field", "entry", "message"),
    [
        ("annotations", SAID | {"caption": " "}, "the entry is {.*'caption': ' '}, expected image_id and caption"),
        ("annotations", SAID | {"image_id": [7]}, "expected image_id and caption"),
        ("images", IMAGE | {"id": [7]}, "expected id and file_name"),
        ("images", IMAGE | {"file_name": "/etc/passwd"}, "file_name is '/etc/passwd', expected a path"),
        ("images", IMAGE, "the image id is '0', expected an id that no earlier image has"),
    ],
)
def test_bad_caption_or_image_of_coco_is_listed_with_its_entry(field, entry, message, tmp_path):
    content = {"images": [IMAGE], "annotations": [SAID]}
    content[field] = [*content[field], entry]
    (tmp_path / "captions.json").write_text(json.dumps(content))
    assert_one_is_bad(f"{tmp_path / 'captions.json'}, {field}[1]", message, tmp_path / "captions.json")


def test_coco_file_in_another_encoding_is_refused_with_its_line(tmp_path):
    (tmp_path / "captions.json").write_bytes(b'{"images": [],\n"annotations": [{"caption": "caf\xe9"}]}')
    with pytest.raises(ValueError, match=r"captions.json, line 2: is not UTF-8: .*Save the file again as UTF-8"):
        read_scenes(tmp_path / "captions.json", None, BadRows(0.1))
