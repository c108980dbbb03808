"""Puts images into the messages of a conversation, as a chat template needs them.

    >>> place_images("photo.jpg", "What is it?")
    [{'role': 'user', 'content': [{'type': 'image', 'image': <PIL.Image.Image ...>}, {'type': 'text', 'text': ...}]}]

An image that is used in several messages or requests is opened once.
"""

from collections.abc import Hashable

from PIL import Image

from image_processing_sq_llava import open_in_rgb
from sq_llava.data.images import image_key, open_image


def place_images(images, messages: str | list[dict], opened: dict[Hashable, Image.Image] | None = None) -> list[dict]:
    """
    Returns messages in which every image part holds its opened image.

    Args:
        images: One image, a list of images, or `None`; each as [`open_image`] takes it. They fill the image parts that
            hold no image. If the messages have no image parts, the images go to the front of the first user turn.
        messages (`str` or `list[dict]`): A question, or messages with `role` and `content` (text or parts).
        opened (`dict`, *optional*): Cache of opened images by [`image_key`]. New images are added to it.

    Raises:
        ValueError: if the number of images differs from the number of image parts without an image.
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
            raise ValueError("There are images, but no user turn to put them in: add one.")
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
        # The keys in which transformers' chat templates look for an image.
        for key in part.keys() & {"image", "path", "url", "base64"}:
            source = part.pop(key)
            part["image"] = _open_once(open_in_rgb(source) if key in ("url", "base64") else source, opened)
    return parts


def _open_once(image, opened: dict[Hashable, Image.Image]) -> Image.Image:
    key = image_key(image)
    if key not in opened:
        opened[key] = open_image(image)
        # The opened image has its own key, too: messages may pass through here again.
        opened[image_key(opened[key])] = opened[key]
    return opened[key]


def place_images_of_all(requests: list[tuple]) -> list[list[dict]]:
    """Applies [`place_images`] to several pairs of images and messages. The same path or object is opened once."""
    opened: dict[Hashable, Image.Image] = {}
    return [place_images(images, messages, opened) for images, messages in requests]


def images_of(conversation: list[dict]) -> list[Image.Image]:
    """Returns the images of a conversation in their order."""
    contents = [message["content"] for message in conversation if not isinstance(message["content"], str)]
    return [part["image"] for parts in contents for part in parts if part["type"] == "image"]
