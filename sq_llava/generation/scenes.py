"""Reads captions and boxes that people made: COCO's files or JSON lines -> scenes.

COCO's `captions_*.json`, optionally with `instances_*.json` for the boxes; or a `.jsonl` file with one image per line:

    {"image": "17.jpg", "captions": ["A dog on a sofa."], "boxes": [{"label": "dog", "box": [0.1, 0.2, 0.55, 0.9]}]}

`boxes` is optional. A box is x1, y1, x2, y2 as fractions of the image's size, from 0 to 1.

What this module does not do: open an image.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any


# Half of a surrogate pair: UTF-8 cannot hold it.
_HALF = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Box:
    """An object in an image: x1, y1, x2, y2 from 0 to 1."""

    label: str
    corners: tuple[float, float, float, float]


@dataclass(frozen=True)
class Scene:
    """What is known about an image."""

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
        ValueError: If the input is wrong; with file, entry, field and value.
    """
    if captions.suffix == ".jsonl":
        if instances is not None:
            raise ValueError(f"--instances {instances}: {captions} holds its own boxes. Leave out the option.")
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
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{place}: cannot be read as JSON: {error}. Correct the line.") from error
            if not isinstance(row, dict):
                raise ValueError(f"{place}: is {row!r:.100}, expected an object with image, captions and boxes.")
            image = _image(row.get("image"), place, "image")
            captions = row.get("captions")
            if not isinstance(captions, list) or not captions or not all(map(_is_text, captions)):
                raise ValueError(f"{place}: captions is {captions!r:.100}, expected a list of texts in UTF-8.")
            boxes = row.get("boxes", [])
            if not isinstance(boxes, list):
                raise ValueError(f"{place}: boxes is {boxes!r:.100}, expected a list.")
            scenes.append(
                Scene(
                    str(row.get("id", PurePosixPath(image).with_suffix(""))),
                    image,
                    tuple(caption.strip() for caption in captions),
                    tuple(_box(box, place) for box in boxes),
                )
            )
    return scenes


def _box(box: Any, place: str) -> Box:
    label, corners = (box.get("label"), box.get("box")) if isinstance(box, dict) else (None, None)
    is_right = _is_text(label) and isinstance(corners, list) and len(corners) == 4
    if not is_right or not all(isinstance(edge, int | float) and 0 <= edge <= 1 for edge in corners):
        raise ValueError(
            f'{place}: a box is {box!r:.150}, expected {{"label": ..., "box": [x1, y1, x2, y2]}} with numbers from 0 '
            "to 1."
        )
    if corners[0] > corners[2] or corners[1] > corners[3]:
        raise ValueError(f"{place}: the box of {label!r} is {corners}, expected x1 <= x2 and y1 <= y2.")
    return Box(label, tuple(map(float, corners)))


def _read_coco(captions: Path, instances: Path | None) -> list[Scene]:
    with_captions = _load(captions, ("images", "annotations"))
    texts: dict[Any, list[str]] = {}
    for number, each in enumerate(with_captions["annotations"]):
        if not isinstance(each, dict) or not _is_id(each.get("image_id")) or not _is_text(each.get("caption")):
            raise ValueError(
                f"{captions}, annotations[{number}]: is {each!r:.150}, expected image_id and caption, as in COCO's "
                "captions_*.json."
            )
        texts.setdefault(each["image_id"], []).append(each["caption"].strip())
    boxes = _coco_boxes(instances) if instances is not None else {}
    scenes = []
    for number, image in enumerate(with_captions["images"]):
        place = f"{captions}, images[{number}]"
        if not isinstance(image, dict) or not _is_id(image.get("id")):
            raise ValueError(f"{place}: is {image!r:.150}, expected id and file_name.")
        if image["id"] not in texts:
            continue
        name = _image(image.get("file_name"), place, "file_name")
        of_image = boxes.get(image["id"], [])
        size = (image.get("width"), image.get("height"))
        if of_image and not all(isinstance(side, int) and side > 0 for side in size):
            raise ValueError(f"{place}: width and height are {size}, expected the size in pixels, which boxes need.")
        scenes.append(
            Scene(
                str(image["id"]), name, tuple(texts[image["id"]]), tuple(_from_pixels(*box, *size) for box in of_image)
            )
        )
    return scenes


def _coco_boxes(path: Path) -> dict[Any, list[tuple[str, list[float]]]]:
    """The labels and boxes of each image, in pixels: left, top, width, height."""
    content = _load(path, ("annotations", "categories"))
    label_of = {}
    for number, each in enumerate(content["categories"]):
        if not isinstance(each, dict) or not _is_id(each.get("id")) or not _is_text(each.get("name")):
            raise ValueError(
                f"{path}, categories[{number}]: is {each!r:.150}, expected id and name, as in COCO's instances_*.json."
            )
        label_of[each["id"]] = each["name"]
    boxes: dict[Any, list] = {}
    for number, each in enumerate(content["annotations"]):
        place = f"{path}, annotations[{number}]"
        ids = [each.get(name) for name in ("image_id", "category_id")] if isinstance(each, dict) else [None]
        if not all(map(_is_id, ids)) or ids[1] not in label_of:
            raise ValueError(
                f"{place}: is {each!r:.150}, expected image_id, bbox, and a category_id that is in categories, as in "
                "COCO's instances_*.json."
            )
        box = each.get("bbox")
        if not isinstance(box, list) or len(box) != 4 or not all(map(_is_number, box)) or min(box[2:]) < 0:
            raise ValueError(f"{place}: bbox is {box!r:.100}, expected left, top, width and height in pixels.")
        boxes.setdefault(each["image_id"], []).append((label_of[each["category_id"]], box))
    return boxes


def _from_pixels(label: str, box: list[float], width: int, height: int) -> Box:
    """From COCO's left, top, width and height. Some of COCO's boxes exceed their image by a fraction of a pixel."""
    left, top, *size = box
    corners = (left / width, top / height, (left + size[0]) / width, (top + size[1]) / height)
    return Box(label, tuple(min(max(edge, 0.0), 1.0) for edge in corners))


def _load(path: Path, fields: tuple[str, ...]) -> Mapping[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: cannot be read as JSON: {error}.") from error
    for name in fields:
        if not isinstance(content, dict) or not isinstance(content.get(name), list):
            raise ValueError(f"{path}: has no list {name!r}. Expected a file in COCO's layout, or a .jsonl file.")
    return content


def _image(name: Any, place: str, field: str) -> str:
    path = PurePosixPath(name) if _is_text(name) else None
    if path is None or path.is_absolute() or ".." in path.parts or "\\" in name or "://" in name:
        raise ValueError(
            f"{place}: {field} is {name!r:.150}, expected a path in UTF-8 that stays inside the image root."
        )
    return name


def _is_text(value: Any) -> bool:
    """A text that is not blank and can be written as UTF-8. A file name that is not UTF-8 has half surrogate pairs."""
    return isinstance(value, str) and bool(value.strip()) and not _HALF.search(value)


def _is_id(value: Any) -> bool:
    return isinstance(value, int | str)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
