"""Messages with their images in their places: what a user gives, made into what a chat template takes.

    >>> place_images("photo.jpg", "What is it?")
    [{'role': 'user', 'content': [{'type': 'image', 'image': <PIL.Image.Image ...>}, {'type': 'text', 'text': ...}]}]

An image that several messages or requests name is opened once.
"""

from collections.abc import Hashable

from PIL import Image

from image_processing_sq_llava import open_in_rgb
from sq_llava.data.images import image_key, open_image


def place_images(images, messages: str | list[dict], opened: dict[Hashable, Image.Image] | None = None) -> list[dict]:
    """
    Messages in which every image part holds its image; see [`Assistant.answer`] for the arguments.

    Args:
        opened (`dict`, *optional*): Images that were opened before, by [`image_key`]; it is added to.

    Raises:
        ValueError: if there are more images than places for them, or fewer.
    """
    images = [] if images is None else list(images) if isinstance(images, (list, tuple)) else [images]
    opened = {} if opened is None else opened
    images = [_open_once(image, opened) for image in images]
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    messages = [{**message, "content": _as_parts(message["content"], opened)} for message in messages]
    empty = [part for message in messages for part in message["content"] if part.keys() == {"type"}]
    if images and not empty and not any(part["type"] == "image" for m in messages for part in m["content"]):
        first_user_turn = next((message for message in messages if message["role"] == "user"), None)
        if first_user_turn is None:
            raise ValueError("There are images, but no user turn to put them into.")
        empty = [{"type": "image"} for _ in images]
        first_user_turn["content"] = [*empty, *first_user_turn["content"]]
    if len(empty) != len(images):
        raise ValueError(f"The messages have {len(empty)} places for images, but {len(images)} images were given.")
    for part, image in zip(empty, images):
        part["image"] = image
    return messages


def _as_parts(content: str | list[dict], opened: dict[Hashable, Image.Image]) -> list[dict]:
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else [dict(part) for part in content]
    for part in parts:
        # The places that transformers' chat templates know.
        for key in part.keys() & {"image", "path", "url", "base64"}:
            source = part.pop(key)
            part["image"] = _open_once(open_in_rgb(source) if key in ("url", "base64") else source, opened)
    return parts


def _open_once(image, opened: dict[Hashable, Image.Image]) -> Image.Image:
    key = image_key(image)
    if key not in opened:
        opened[key] = open_image(image)
        # Its own place, too: a message that is placed again.
        opened[image_key(opened[key])] = opened[key]
    return opened[key]


def place_images_of_all(requests: list[tuple]) -> list[list[dict]]:
    """`place_images` of several `(images, messages)`, with one opened image for all places of one path or object."""
    opened: dict[Hashable, Image.Image] = {}
    return [place_images(images, messages, opened) for images, messages in requests]


def images_of(conversation: list[dict]) -> list[Image.Image]:
    contents = [message["content"] for message in conversation if not isinstance(message["content"], str)]
    return [part["image"] for parts in contents for part in parts if part["type"] == "image"]
