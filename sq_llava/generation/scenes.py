"""Reads captions and boxes that people made: COCO's files or JSON lines -> scenes.

COCO's `captions_*.json`, optionally with `instances_*.json` for the boxes; or a `.jsonl` file with one image per line:

    {"image": "17.jpg", "captions": ["A dog on a sofa."], "boxes": [{"label": "dog", "box": [0.1, 0.2, 0.55, 0.9]}]}

`boxes` is optional. A box is x1, y1, x2, y2 as fractions of the image's size, from 0 to 1.

No image is opened.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

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


def read_scenes(captions: Path, instances: Path | None = None) -> list[Scene]:
    """
    Args:
        captions (`Path`): COCO's `captions_*.json`, or a `.jsonl` file as the module's docstring shows it.
        instances (`Path`, *optional*): COCO's `instances_*.json`.

    Raises:
        ValueError: If the input is wrong. The message names file, entry, field and value.
    """
    if captions.suffix == ".jsonl":
        if instances is not None:
            raise ValueError(f"--instances {instances}: {captions} holds its own boxes. Remove --instances.")
        scenes = _read_lines(captions)
    else:
        scenes = _read_coco(captions, instances)
    if not scenes:
        raise ValueError(f"{captions}: holds no image with captions.")
    seen = set()
    for scene in scenes:
        if not _is_text(scene.id):
            raise ValueError(f"{captions}: the image id {scene.id!r} is empty or not UTF-8. Change it.")
        if scene.id in seen:
            raise ValueError(f"{captions}: two images have the id {scene.id!r}. Give each image its own id.")
        seen.add(scene.id)
    return scenes


def _read_lines(path: Path) -> list[Scene]:
    scenes = []
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            place = f"{path}, line {number}"
            if not line.strip():
                continue
            try:
                row = parse_json(line)
            except ValueError as error:
                raise ValueError(f"{place}: cannot be read as JSON: {error}. Correct the line.") from error
            _require(isinstance(row, dict), place, row, "an object with image, captions and boxes")
            image = _image(row.get("image"), place, "image")
            captions, boxes = row.get("captions"), row.get("boxes", [])
            are_texts = isinstance(captions, list) and captions and all(map(_is_text, captions))
            _require(are_texts, f"{place}: captions", captions, "a list of texts in UTF-8")
            _require(isinstance(boxes, list), f"{place}: boxes", boxes, "a list")
            id = str(row.get("id", PurePosixPath(image).with_suffix("")))
            captions = tuple(caption.strip() for caption in captions)
            scenes.append(Scene(id, image, captions, tuple(_box(box, place) for box in boxes)))
    return scenes


def _box(box: Any, place: str) -> Box:
    label, corners = (box.get("label"), box.get("box")) if isinstance(box, dict) else (None, None)
    is_right = _is_text(label) and isinstance(corners, list) and len(corners) == 4
    is_right = is_right and all(isinstance(edge, int | float) and 0 <= edge <= 1 for edge in corners)
    _require(is_right, f"{place}: a box", box, '{"label": ..., "box": [x1, y1, x2, y2]} with numbers from 0 to 1')
    is_ordered = corners[0] <= corners[2] and corners[1] <= corners[3]
    _require(is_ordered, f"{place}: the box of {label!r}", corners, "x1 <= x2 and y1 <= y2")
    return Box(label, tuple(map(float, corners)))


def _read_coco(captions: Path, instances: Path | None) -> list[Scene]:
    with_captions = _load(captions, ("images", "annotations"))
    texts: dict[Any, list[str]] = {}
    for number, each in enumerate(with_captions["annotations"]):
        is_right = isinstance(each, dict) and _is_id(each.get("image_id")) and _is_text(each.get("caption"))
        expected = "image_id and caption, as in COCO's captions_*.json"
        _require(is_right, f"{captions}, annotations[{number}]", each, expected)
        texts.setdefault(each["image_id"], []).append(each["caption"].strip())
    boxes = _coco_boxes(instances) if instances is not None else {}
    scenes = []
    for number, image in enumerate(with_captions["images"]):
        place = f"{captions}, images[{number}]"
        _require(isinstance(image, dict) and _is_id(image.get("id")), place, image, "id and file_name")
        if image["id"] not in texts:
            continue
        name = _image(image.get("file_name"), place, "file_name")
        of_image = boxes.get(image["id"], [])
        size = (image.get("width"), image.get("height"))
        has_size = all(isinstance(side, int) and side > 0 for side in size)
        _require(has_size or not of_image, f"{place}: width and height", size, "the size in pixels, which boxes need")
        boxes_of_image = tuple(_from_pixels(*box, *size) for box in of_image)
        scenes.append(Scene(str(image["id"]), name, tuple(texts[image["id"]]), boxes_of_image))
    return scenes


def _coco_boxes(path: Path) -> dict[Any, list[tuple[str, list[float]]]]:
    """The labels and boxes of each image, in pixels: left, top, width, height."""
    content = _load(path, ("annotations", "categories"))
    label_of = {}
    for number, each in enumerate(content["categories"]):
        is_right = isinstance(each, dict) and _is_id(each.get("id")) and _is_text(each.get("name"))
        _require(is_right, f"{path}, categories[{number}]", each, "id and name, as in COCO's instances_*.json")
        label_of[each["id"]] = each["name"]
    boxes: dict[Any, list] = {}
    for number, each in enumerate(content["annotations"]):
        place = f"{path}, annotations[{number}]"
        ids = [each.get(name) for name in ("image_id", "category_id")] if isinstance(each, dict) else [None]
        expected = "image_id, bbox, and a category_id that is in categories, as in COCO's instances_*.json"
        _require(all(map(_is_id, ids)) and ids[1] in label_of, place, each, expected)
        box = each.get("bbox")
        is_right = isinstance(box, list) and len(box) == 4 and all(map(_is_number, box)) and min(box[2:]) >= 0
        _require(is_right, f"{place}: bbox", box, "left, top, width and height in pixels")
        boxes.setdefault(each["image_id"], []).append((label_of[each["category_id"]], box))
    return boxes


def _from_pixels(label: str, box: list[float], width: int, height: int) -> Box:
    """From COCO's left, top, width and height. Some of COCO's boxes exceed their image by a fraction of a pixel."""
    left, top, *size = box
    corners = (left / width, top / height, (left + size[0]) / width, (top + size[1]) / height)
    return Box(label, tuple(min(max(edge, 0.0), 1.0) for edge in corners))


def _load(path: Path, fields: tuple[str, ...]) -> Mapping[str, Any]:
    try:
        content = parse_json(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: cannot be read as JSON: {error}.") from error
    for name in fields:
        if not isinstance(content, dict) or not isinstance(content.get(name), list):
            raise ValueError(f"{path}: has no list {name!r}. Expected a file in COCO's layout, or a .jsonl file.")
    return content


def _image(name: Any, place: str, field: str) -> str:
    path = PurePosixPath(name) if _is_text(name) else None
    is_inside = path is not None and not path.is_absolute() and ".." not in path.parts
    is_right = is_inside and "\\" not in name and "://" not in name
    _require(is_right, f"{place}: {field}", name, "a path in UTF-8 that stays inside the image root")
    return name


def _require(is_right: Any, place: str, value: Any, expected: str) -> None:
    if not is_right:
        raise ValueError(f"{place} is {value!r:.150}, expected {expected}.")


def _is_text(value: Any) -> bool:
    """A text that is not blank and can be written as UTF-8. A file name that is not UTF-8 has half surrogate pairs."""
    return isinstance(value, str) and bool(value.strip()) and not _HALF.search(value)


def _is_id(value: Any) -> bool:
    return isinstance(value, int | str)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
