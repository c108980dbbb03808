"""Reads captions and boxes that people made: COCO's files or JSON lines -> scenes.

COCO's `captions_*.json`, optionally with `instances_*.json` for the boxes; or a `.jsonl` file with one image per line:

    {"image": "17.jpg", "captions": ["A dog on a sofa."], "boxes": [{"label": "dog", "box": [0.1, 0.2, 0.55, 0.9]}]}

`boxes` and `id` are optional; `null` means the same as an absent field. A box is x1, y1, x2, y2 as fractions of the
image's size, from 0 to 1.

A caption, box or image that cannot be used is listed and left out. No image is opened.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from sq_llava.generation.bad_rows import BadRows
from sq_llava.json_text import parse_json


# Half of a surrogate pair, which UTF-8 cannot encode.
_HALF = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Box:
    """An object in an image: x1, y1, x2, y2 from 0 to 1."""

    label: str
    corners: tuple[float, float, float, float]


@dataclass(frozen=True)
class Scene:
    """The captions and boxes of an image."""

    id: str
    image: str
    captions: tuple[str, ...]
    boxes: tuple[Box, ...] = ()


def read_scenes(captions: Path, instances: Path | None, bad: BadRows) -> list[Scene]:
    """
    Args:
        captions (`Path`): COCO's `captions_*.json`, or a `.jsonl` file as the module's docstring shows it.
        instances (`Path`, *optional*): COCO's `instances_*.json`.
        bad ([`BadRows`]): Gets the captions, boxes and images that cannot be used.

    Raises:
        ValueError: If a file cannot be read, nothing in it can be used, or too much of it cannot.
    """
    if captions.suffix.lower() == ".jsonl":
        if instances is not None:
            raise ValueError(f"--instances {instances}: {captions} holds its own boxes. Remove --instances.")
        scenes, num_rows = _read_lines(captions, bad)
    else:
        scenes, num_rows = _read_coco(captions, instances, bad)
    seen: set[str] = set()
    kept = []
    for place, scene in scenes:
        with bad.entry(place):
            _require(_is_text(scene.id), "the image id", scene.id, "a text in UTF-8")
            _require(scene.id not in seen, "the image id", scene.id, "an id that no earlier image has")
            seen.add(scene.id)
            kept.append(scene)
    bad.judge(num_rows)
    if not kept:
        raise ValueError("\n  ".join([f"{captions}: holds no image with captions.", *bad.shown()]))
    return kept


def _read_lines(path: Path, bad: BadRows) -> tuple[list[tuple[str, Scene]], int]:
    scenes, num_rows = [], 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            num_rows += 1
            place = f"{path}, line {number}"
            with bad.entry(place):
                scenes.append((place, _scene_of_line(line)))
    return scenes, num_rows


def _scene_of_line(line: bytes) -> Scene:
    try:
        row = parse_json(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"is not UTF-8: {error}. Save the file again as UTF-8.") from error
    except ValueError as error:
        raise ValueError(f"cannot be read as JSON: {error}. Correct the line.") from error
    _require(isinstance(row, dict), "the line", row, "an object with image, captions and boxes")
    row = {name: value for name, value in row.items() if value is not None}
    image = _image(row.get("image"), "image")
    captions, boxes = row.get("captions"), row.get("boxes", [])
    are_texts = isinstance(captions, list) and captions and all(map(_is_text, captions))
    _require(are_texts, "captions", captions, "a list of texts in UTF-8")
    _require(isinstance(boxes, list), "boxes", boxes, "a list")
    id = str(row.get("id", PurePosixPath(image).with_suffix("")))
    return Scene(id, image, tuple(caption.strip() for caption in captions), tuple(map(_box, boxes)))


def _box(box: Any) -> Box:
    label, corners = (box.get("label"), box.get("box")) if isinstance(box, dict) else (None, None)
    is_right = _is_text(label) and isinstance(corners, list) and len(corners) == 4
    is_right = is_right and all(isinstance(edge, int | float) and 0 <= edge <= 1 for edge in corners)
    _require(is_right, "a box", box, '{"label": ..., "box": [x1, y1, x2, y2]} with numbers from 0 to 1')
    is_ordered = corners[0] <= corners[2] and corners[1] <= corners[3]
    _require(is_ordered, f"the box of {label!r}", corners, "x1 <= x2 and y1 <= y2")
    return Box(label, tuple(map(float, corners)))


def _read_coco(captions: Path, instances: Path | None, bad: BadRows) -> tuple[list[tuple[str, Scene]], int]:
    with_captions = _load(captions, ("images", "annotations"))
    images, annotations = with_captions["images"], with_captions["annotations"]
    texts: dict[Any, list[str]] = {}
    for number, each in enumerate(annotations):
        with bad.entry(f"{captions}, annotations[{number}]"):
            is_right = isinstance(each, dict) and _is_id(each.get("image_id")) and _is_text(each.get("caption"))
            _require(is_right, "the entry", each, "image_id and caption, as in COCO's captions_*.json")
            texts.setdefault(each["image_id"], []).append(each["caption"].strip())
    boxes, num_boxes = _coco_boxes(instances, bad) if instances is not None else ({}, 0)
    scenes = []
    for number, image in enumerate(images):
        place = f"{captions}, images[{number}]"
        with bad.entry(place):
            _require(isinstance(image, dict) and _is_id(image.get("id")), "the entry", image, "id and file_name")
            if image["id"] in texts:
                scenes.append((place, _scene_of_coco(image, texts[image["id"]], boxes.get(image["id"], []))))
    return scenes, len(annotations) + len(images) + num_boxes


def _scene_of_coco(image: Mapping[str, Any], texts: list[str], boxes: list[tuple[str, list[float]]]) -> Scene:
    name = _image(image.get("file_name"), "file_name")
    size = (image.get("width"), image.get("height"))
    has_size = all(isinstance(side, int) and side > 0 for side in size)
    _require(has_size or not boxes, "width and height", size, "the size in pixels, which boxes need")
    return Scene(str(image["id"]), name, tuple(texts), tuple(_from_pixels(*box, *size) for box in boxes))


def _coco_boxes(path: Path, bad: BadRows) -> tuple[dict[Any, list[tuple[str, list[float]]]], int]:
    """The labels and boxes of each image, in pixels: left, top, width, height; and the number of entries."""
    content = _load(path, ("annotations", "categories"))
    label_of = {}
    for number, each in enumerate(content["categories"]):
        is_right = isinstance(each, dict) and _is_id(each.get("id")) and _is_text(each.get("name"))
        _require(is_right, f"{path}, categories[{number}]", each, "id and name, as in COCO's instances_*.json")
        label_of[each["id"]] = each["name"]
    boxes: dict[Any, list] = {}
    for number, each in enumerate(content["annotations"]):
        with bad.entry(f"{path}, annotations[{number}]"):
            ids = [each.get(name) for name in ("image_id", "category_id")] if isinstance(each, dict) else [None]
            expected = "image_id, bbox, and a category_id that is in categories, as in COCO's instances_*.json"
            _require(all(map(_is_id, ids)) and ids[1] in label_of, "the entry", each, expected)
            box = each.get("bbox")
            is_right = isinstance(box, list) and len(box) == 4 and all(map(_is_number, box)) and min(box[2:]) >= 0
            _require(is_right, "bbox", box, "left, top, width and height in pixels")
            boxes.setdefault(each["image_id"], []).append((label_of[each["category_id"]], box))
    return boxes, len(content["annotations"])


def _from_pixels(label: str, box: list[float], width: int, height: int) -> Box:
    """From COCO's left, top, width and height. Some of COCO's boxes exceed their image by a fraction of a pixel."""
    left, top, *size = box
    corners = (left / width, top / height, (left + size[0]) / width, (top + size[1]) / height)
    return Box(label, tuple(min(max(edge, 0.0), 1.0) for edge in corners))


def _load(path: Path, fields: tuple[str, ...]) -> Mapping[str, Any]:
    data = path.read_bytes()
    try:
        content = parse_json(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}, line {line}: is not UTF-8: {error}. Save the file again as UTF-8.") from error
    except ValueError as error:
        raise ValueError(f"{path}: cannot be read as JSON: {error}.") from error
    for name in fields:
        if not isinstance(content, dict) or not isinstance(content.get(name), list):
            raise ValueError(f"{path}: has no list {name!r}. Expected a file in COCO's layout, or a .jsonl file.")
    return content


def _image(name: Any, field: str) -> str:
    path = PurePosixPath(name) if _is_text(name) else None
    is_inside = path is not None and not path.is_absolute() and ".." not in path.parts
    is_right = is_inside and "\\" not in name and "://" not in name
    _require(is_right, field, name, "a path in UTF-8 that stays inside the image root")
    return name


def _require(is_right: Any, what: str, value: Any, expected: str) -> None:
    if not is_right:
        raise ValueError(f"{what} is {value!r:.150}, expected {expected}.")


def _is_text(value: Any) -> bool:
    """A text that is not blank and can be written as UTF-8. A file name that is not UTF-8 has half surrogate pairs."""
    return isinstance(value, str) and bool(value.strip()) and not _HALF.search(value)


def _is_id(value: Any) -> bool:
    return isinstance(value, int | str)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
