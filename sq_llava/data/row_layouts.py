"""Converts rows in the layouts of many trainers to one form: messages of text and image parts, and a list of images.

    >>> normalize({"query": "<image>What is it?", "response": "A dog.", "images": ["17.png"]})
    NormalRow(layout="query + response", faults=[], images=["17.png"], messages=[
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "A dog."}]}])

| fields of a row | fields of a turn | used by |
|---|---|---|
| `conversations` | `from` + `value` | LLaVA, ShareGPT |
| `messages`, `conversations` | `role` + `content` (text or parts) | TRL, OpenAI, axolotl, LLaMA-Factory, ms-swift |
| `texts`, `conversation`, `conversations` | `user` (or `human`) + `assistant` | FineVision, the Cauldron, ms-swift |
| `prompt` + `completion` | text, or lists of `role` + `content` | TRL |
| `query` + `response` (+ `history`, `system`) | text | ms-swift |
| `instruction` (+ `input`) + `output` (+ `history`, `system`) | text | Alpaca, LLaMA-Factory |

The images are in the field `image` or `images`, or in the parts: `{"type": "image", "image": ...}` (or `path`, `url`,
`base64`, `bytes`), or OpenAI's `{"type": "image_url", "image_url": {"url": ...}}`. An image is a path, bytes, base64
(with or without `data:image/png;base64,`), or an undecoded `datasets.Image`. `None` means the same as an absent field,
because Arrow writes `None` there. A single `<image>` in a text is moved to the front of its turn. If no turn has an
`<image>` or an image part, the images go to the front of the first question, as in TRL. LLaVA's `from` + `value` needs
`<image>`.

Videos, audio, the image tags of other models, and fields that change what is trained, are faults. They are never read
as text and never ignored. `sq_llava/data/rows.py` checks the order of turns and the paths.
"""

import base64
import binascii
import re
import reprlib
from collections.abc import Iterator
from typing import Any, NamedTuple

from processing_sq_llava import IMAGE_TOKEN
from sq_llava.data.images import Fault


IMAGE_PART = {"type": "image"}
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
# Fields with a list of turns, and pairs of fields with a question and its answer.
TURN_LISTS = ("conversations", "messages", "texts", "conversation")
EXCHANGES = {
    "prompt + completion": ("prompt", "completion"),
    "query + response": ("query", "response"),
    "instruction + output": ("instruction", "output"),
}
TEXT_FIELDS = (*TURN_LISTS, *(name for pair in EXCHANGES.values() for name in pair), "input", "history", "system")
IMAGE_FIELDS = ("image", "images")
FROM_VALUE, ROLE_CONTENT = ("from", "value"), ("role", "content")
USER_KEYS, ASSISTANT_KEYS = ("user", "human"), ("assistant", "gpt", "bot")
# Keys of a part that may hold its image.
PART_IMAGE_KEYS = ("image", "path", "url", "image_url", "base64", "bytes")
KNOWN_PART_KEYS = {"type", "text", "index", "detail", *PART_IMAGE_KEYS}
KNOWN_FIELDS = {"id", *IMAGE_FIELDS, *TEXT_FIELDS}

EXPECTED = (
    "Expected 'conversations', 'messages', 'texts', prompt + completion, query + response or instruction + output."
)
NO_OTHER_MEDIA = "This model reads images only. Remove it or remove the row."
_MEDIA = "image|img|picture|photo|video|audio|speech|sound|frame|media|gif|pdf|pixel_value"
_REFERENCE = "path|file|filename|name|url|uri"
_MEDIA_KEY = re.compile(
    rf"(?:.*_)?(?P<kind>{_MEDIA})s?(?:_?\d+)?(?P<reference>(?:_?(?:{_REFERENCE})s?)+)?(?:_?(?:bytes|base64|b64|data|list)s?)*",
    re.IGNORECASE,
)
_IMAGE_KINDS = {"image", "img", "picture", "photo"}
# Placeholders of other models. IMAGE_TOKEN is excluded, and so are the turns of ChatML (`<|im_start|>`) and tags with
# attributes, which are HTML.
_MEDIA_TAG = re.compile(
    rf"(?!(?-i:{IMAGE_TOKEN})|<\|im_(?:start|end)\|>)<\|?(?:(?:start|begin|end)_of_)?(?:/?img|image|video|audio|speech|sound|(?:im|vision)(?=[_-]))"
    r"(?:here|[_-]?(?:\d+|pad|bos|eos|patch|start|end|token|soft_token|context|placeholder|content|embed))*\|?>"
    r"|(?-i:\[IMG\])",
    re.IGNORECASE,
)
# Fields of a row or turn that change what other trainers do, and the values with which they change nothing.
_TRAINER_FIELDS = {
    **dict.fromkeys(("loss", "train", "training", "weight", "loss_scale"), (True, 1)),
    **dict.fromkeys(
        ("tools", "functions", "tool_calls", "function_call", "tool_call_id", "reasoning_content"), (False,)
    ),
    **dict.fromkeys(("thinking", "rejected_response", "chosen", "rejected"), (False,)),
}
# First characters of PNG, JPEG, GIF, WebP, TIFF and BMP in base64. A text longer than `_LONGEST_PATH` is no path.
_BASE64_BEGINNINGS = ("iVBORw0KGgo", "/9j/", "R0lGOD", "UklGR", "SUkq", "TU0AK", "Qk0", "Qk1", "Qk2", "Qk3")
_SHORTEST_BASE64, _LONGEST_PATH = 64, 1024
_BASE64 = re.compile(r"[A-Za-z0-9+/\s]+={0,2}\s*")
_SURROGATE = re.compile(r"[\ud800-\udfff]")


class NormalRow(NamedTuple):
    """`images` holds paths or `{"bytes": ..., "path": ...}`; `messages` is empty if a turn cannot be read."""

    layout: str
    faults: list[Fault]
    messages: list[dict]
    images: list


class _Unread(Exception):
    def __init__(self, code: str, message: str, fix: str):
        self.fault = Fault(code, message, fix)


class _Shown(reprlib.Repr):
    def repr_str(self, text, level):
        if text.startswith("data:") or _is_base64(text):
            return f"<{len(text):,} characters of base64>"
        return repr(text if len(text) <= 100 else f"{text[:100]}...")

    def repr_bytes(self, data, level):
        return f"<{len(data):,} bytes>"


_shown = _Shown()
_shown.maxlevel, _shown.maxdict, _shown.maxlist, _shown.maxother = 4, 6, 4, 60


def shown(value: Any) -> str:
    """Returns a short form of a value for errors, without the bytes or base64 of images."""
    return _shown.repr(value)


def recognize(raw: dict) -> str | None:
    """Returns the layout of a row by its fields: one of `TURN_LISTS` or `EXCHANGES`, or `None`."""
    for name in TURN_LISTS:
        if raw.get(name) is not None:
            return name
    for name, pair in EXCHANGES.items():
        if raw.get(pair[0]) is not None and pair[1] in raw:
            return name
    return None


def images_of(raw: Any) -> list:
    """Returns all images of a row, unconverted: those in `image` or `images`, then those in the parts of its turns."""
    if not isinstance(raw, dict):
        return []
    found, layout = _images_of_fields(raw), recognize(raw)
    for name in EXCHANGES.get(layout, (layout,)):
        turns = raw.get(name)
        if isinstance(turns, list) and turns and _keys_of(turns[0], name) == ROLE_CONTENT:
            contents = [turn.get("content") for turn in turns if isinstance(turn, dict)]
            parts = [part for content in contents if isinstance(content, list) for part in content]
            found += [image for part in parts if (image := _image_of_part(part)) is not None]
    return found


def measure(raw: Any) -> tuple[int, int]:
    """Returns the number of images of a row, and the number of characters of its images in base64."""
    images = images_of(raw)
    values = [value for image in images for value in (image.values() if isinstance(image, dict) else [image])]
    return len(images), sum(len(text) for text in values if isinstance(text, str) and len(text) > _LONGEST_PATH)


def _images_of_fields(raw: dict) -> list:
    """Returns the images in the fields `image` or `images`."""
    images = raw.get("image") or raw.get("images")
    if isinstance(images, list):
        return list(images)
    return [images] if _is_filled(images) else []


def _image_of_part(part: Any) -> Any:
    if not isinstance(part, dict) or part.get("type") not in ("image", "image_url"):
        return None
    return next((part[key] for key in PART_IMAGE_KEYS if _is_filled(part.get(key))), None)


def _is_filled(value: Any) -> bool:
    """Returns whether a field has a value. Arrow writes an absent image as a struct of `None`."""
    return bool(value) and not (isinstance(value, dict) and all(inner is None for inner in value.values()))


def normalize(raw: Any) -> NormalRow:
    """Converts a row of any layout in the table above. The faults name the layout that was recognized."""
    if not isinstance(raw, dict):
        fix = "Give an object with 'conversations' or 'messages'."
        fault = Fault("not_an_object", f"the row is {shown(raw)}, not an object.", fix)
        return NormalRow("", [fault], [], [])
    layout = recognize(raw)
    if layout is None:
        named = {name: raw[name] for name in TURN_LISTS if name in raw}
        fields = f"the fields are {', '.join(map(str, list(raw)[:12])) or 'none'}"
        what = ", ".join([f"'{name}' is {value!r}" for name, value in named.items()] or [fields])
        fault = Fault("no_turns", f"{what}: this is no known layout.", EXPECTED)
        return NormalRow("", [fault, *_unread_fields(raw)], [], [])
    reader = _Reader(layout, raw)
    messages = reader.read()
    faults = [*reader.faults, *_unread_fields(raw)]
    if faults:
        return NormalRow(reader.name, faults, [], [])
    try:
        return NormalRow(reader.name, [], messages, reader.place_images(messages))
    except _Unread as unread:
        return NormalRow(reader.name, [unread.fault], messages, [])


def _unread_fields(raw: dict) -> Iterator[Fault]:
    for name in sorted(raw.keys() - KNOWN_FIELDS, key=str):
        if fault := _field_fault(name, raw[name], bool(_images_of_fields(raw))):
            yield fault


def _turn_fault(turn: dict, keys: tuple[str, str]) -> Fault | None:
    """Returns the first fault of the fields of a turn other than its two keys."""
    extra = sorted(turn.keys() - set(keys), key=str)
    return next((fault for name in extra if (fault := _field_fault(name, turn[name]))), None)


def _field_fault(name: str, value: Any, has_images: bool = False) -> Fault | None:
    """Returns the fault of an unknown field that holds media or changes the training; `None` if it may be ignored."""
    if name in _TRAINER_FIELDS:
        if value in (None, "", [], {}, *_TRAINER_FIELDS[name]):
            return None
        fix = "Remove it or remove the row."
        return Fault("unread_field", f"'{name}' is {shown(value)}, and this field is not supported.", fix)
    match = _MEDIA_KEY.fullmatch(name)
    if match is None or not _is_filled(value) or isinstance(value, (int, float)):
        return None
    if match["kind"].lower() not in _IMAGE_KINDS:
        return Fault("unread_media", f"'{name}' is {shown(value)}.", NO_OTHER_MEDIA)
    if has_images and match["reference"]:  # it says where the images came from
        return None
    fix = "Rename the field to 'image' or 'images', or remove it."
    return Fault("unread_media", f"'{name}' is {shown(value)}, and this field is not read.", fix)


class _Reader:
    """
    Reads the turns of one row. `slots` has an item for each image part: its image, or `None` if the image is in the
    field `image` or `images`.
    """

    def __init__(self, layout: str, raw: dict):
        self.raw, self.layout, self.name, self.keys = raw, layout, layout, None
        self.slots: list = []
        self.faults: list[Fault] = []
        self.has_parts = False

    def read(self) -> list[dict]:
        messages, where = [], ""
        turns = self._turns()
        while True:
            try:
                where, role, content = next(turns)
                messages.append({"role": self._role(role, content), "content": self._content(content)})
            except StopIteration:
                return messages
            except _Unread as unread:
                fault = unread.fault
                place = f"turn {where} " if isinstance(where, int) else where and f"{where} "
                message = f"read as {self.name}: {place}{fault.message}"
                self.faults.append(Fault(fault.code, message, fault.fix))

    def _turns(self) -> Iterator[tuple[int | str, str | None, Any]]:
        """Yields the place of each turn (its number or a text), its role, and its content or what is wrong with it."""
        raw = self.raw
        if _is_filled(raw.get("system")):
            yield "'system'", "system", raw["system"]
        if self.layout in TURN_LISTS:
            yield from self._list_of_turns(self.layout)
            return
        first, second = EXCHANGES[self.layout]
        if isinstance(raw[first], list):
            yield from self._list_of_turns(first)
            yield from self._list_of_turns(second)
            return
        history = raw.get("history") or []
        for exchange in history if isinstance(history, list) else [history]:
            if not isinstance(exchange, (list, tuple)) or len(exchange) != 2:
                fix = "Give a list of [question, answer] pairs."
                yield "'history'", None, _Unread("wrong_turn", f"holds {shown(exchange)}.", fix)
                continue
            yield "a question in 'history'", "user", exchange[0]
            yield "an answer in 'history'", "assistant", exchange[1]
        question = raw[first]
        if first == "instruction" and _is_filled(raw.get("input")) and isinstance(question, str):
            question = f"{question}\n{raw['input']}"
        yield f"'{first}'", "user", question
        yield f"'{second}'", "assistant", raw[second]

    def _list_of_turns(self, field: str) -> Iterator[tuple[int | str, str | None, Any]]:
        turns, place = self.raw[field], "" if self.layout == field else f"'{field}', "
        if not isinstance(turns, list) or not turns:
            fix = "Give a list with at least one turn."
            yield f"'{field}'", None, _Unread("no_turns", f"is {shown(turns)}.", fix)
            return
        first_key, second_key = self.keys = _keys_of(turns[0], field)
        has_roles = self.keys in (FROM_VALUE, ROLE_CONTENT)
        if self.layout == field:
            self.name = _name_of(field, self.keys)
        for number, turn in enumerate(turns):
            where = f"{place}turn {number}" if place else number
            if not isinstance(turn, dict) or first_key not in turn or second_key not in turn:
                fix = f"Give an object with '{first_key}' and '{second_key}'."
                yield where, None, _Unread("wrong_turn", f"is {shown(turn)}.", fix)
            elif len(turn) > 2 and (fault := _turn_fault(turn, self.keys)):
                yield where, None, _Unread(fault.code, f"has {fault.message}", fault.fix)
            elif has_roles:
                yield where, turn[first_key], turn[second_key]
            else:
                yield where, "user", turn[first_key]
                yield where, "assistant", turn[second_key]

    def _role(self, role: Any, content: Any) -> str:
        if isinstance(content, _Unread):
            raise content
        if not isinstance(role, str) or role not in ROLES:
            raise _Unread("unknown_role", f"has '{self.keys[0]}' {shown(role)}.", f"Use one of {', '.join(ROLES)}.")
        return ROLES[role]

    def _content(self, content: Any) -> list[dict]:
        if isinstance(content, str):
            _check_text(content)
            if IMAGE_TOKEN not in content:
                return [{"type": "text", "text": content}]
            self.slots += [None] * content.count(IMAGE_TOKEN)
            return _parse_text(content)
        if not isinstance(content, list) or not content or self.keys != ROLE_CONTENT:
            key = f"'{self.keys[1]}' " if self.keys in (FROM_VALUE, ROLE_CONTENT) else ""
            raise _Unread("wrong_turn", f"has {key}{shown(content)}.", "Give a text.")
        self.has_parts = True
        return [self._part(part) for part in content]

    def _part(self, part: Any) -> dict:
        kind = part.get("type") if isinstance(part, dict) else None
        if not isinstance(kind, str):
            raise _Unread("wrong_turn", f"has the part {shown(part)}.", "Give an object with 'type'.")
        if kind not in ("text", "image", "image_url"):
            raise _Unread("unread_media", f"has a part of type {shown(kind)}.", NO_OTHER_MEDIA)
        filled = {key for key in part if key != "type" and _is_filled(part[key])}
        for key in sorted(filled - KNOWN_PART_KEYS):
            if fault := _field_fault(key, part[key]):
                raise _Unread(fault.code, f"has a part with {fault.message}", fault.fix)
        held = filled & set(PART_IMAGE_KEYS)
        if kind == "text":
            if not isinstance(part.get("text"), str) or held:
                fix = "Give a text, and put the image in its own part."
                raise _Unread("wrong_turn", f"has the part {shown(part)}.", fix)
            _check_text(part["text"])
            return {"type": "text", "text": part["text"]}
        if len(held) > 1 or "text" in filled or (kind == "image_url" and not held):
            raise _Unread("wrong_turn", f"has the part {shown(part)}.", "Give exactly one image.")
        index, place = part.get("index"), self.slots.count(None)
        if index is not None and not held and index != place:
            fix = "List the images in the order of the parts."
            raise _Unread("image_count", f"has 'index' {shown(index)} in the part of image {place}.", fix)
        self.slots.append(_image_of_part(part))
        return dict(IMAGE_PART)

    def place_images(self, messages: list[dict]) -> list:
        """
        Returns the images in the order of the image parts. If the turns do not say where the images belong, image
        parts are added to the first question.
        """
        images = _images_of_fields(self.raw)
        others = _images_of_fields({"images": self.raw.get("images")})
        if others and others != images:
            raise _Unread("image_count", "'image' and 'images' hold different images.", "Remove one of them.")
        if images and not self.slots and not self.has_parts and self.keys != FROM_VALUE:
            first = next((message for message in messages if message["role"] == "user"), None)
            if first is not None:
                first["content"] = [*(dict(IMAGE_PART) for _ in images), *first["content"]]
                self.slots = [None] * len(images)
        empty = self.slots.count(None)
        if empty != len(images):
            fields = " and ".join(f"'{name}'" for name in EXCHANGES.get(self.layout, (self.layout,)))
            held = f", and {len(self.slots) - empty} in image parts" if len(self.slots) > empty else ""
            raise _Unread(
                "image_count",
                f"read as {self.name}: {empty} {IMAGE_TOKEN} in {fields}{held}, but {len(images)} in 'image' or "
                "'images'.",
                f"Write exactly one {IMAGE_TOKEN} for each image.",
            )
        following = iter(images)
        return [as_image(next(following) if slot is None else slot) for slot in self.slots]


def _keys_of(turn: Any, field: str) -> tuple[str, str]:
    """Returns the two keys of the turns of a list, by its first turn."""
    if isinstance(turn, dict):
        for keys in (FROM_VALUE, ROLE_CONTENT):
            if turn.get(keys[0]) is not None or turn.get(keys[1]) is not None:
                return keys
        user = next((key for key in USER_KEYS if key in turn), None)
        assistant = next((key for key in ASSISTANT_KEYS if key in turn), None)
        if user and assistant:
            return user, assistant
    return {"conversations": FROM_VALUE, "texts": ("user", "assistant"), "conversation": ("human", "assistant")}.get(
        field, ROLE_CONTENT
    )


def _name_of(field: str, keys: tuple[str, str]) -> str:
    if (field, keys) == ("conversations", FROM_VALUE):
        return "LLaVA's conversations"
    return "TRL's messages" if (field, keys) == ("messages", ROLE_CONTENT) else f"{field} of {' + '.join(keys)}"


def _check_text(text: str) -> None:
    if not is_unicode(text):
        fix = "Write the text again in UTF-8."
        raise _Unread("broken_text", f"has half of a surrogate pair: {shown(text)}.", fix)
    if ("<" in text or "[IMG]" in text) and (found := _MEDIA_TAG.search(text)):
        fix = f"Write {IMAGE_TOKEN} for an image. Other media are not read: remove the tag or the row."
        raise _Unread("unread_media", f"has {found[0]!r}.", fix)


def is_unicode(text: str) -> bool:
    """Returns whether a text has no lone surrogate, such as the JSON escape of half an emoji. Tokenizers refuse it."""
    return text.isascii() or _SURROGATE.search(text) is None


def _parse_text(text: str) -> list[dict]:
    """Divides a text with `<image>` into text parts and image parts."""
    pieces = text.split(IMAGE_TOKEN)
    if len(pieces) == 2:
        pieces = ["", "".join(pieces).strip()]
    content = []
    for index, piece in enumerate(pieces):
        if index > 0:
            content.append(dict(IMAGE_PART))
            # The chat template writes the line break after the images at the start of a turn.
            if not any(part["type"] == "text" for part in content):
                piece = piece.removeprefix("\n")
        if piece:
            content.append({"type": "text", "text": piece})
    return content


def as_image(image: Any) -> Any:
    """
    Converts an image of a row to a path or to `{"bytes": ..., "path": ...}`. Another value is returned unchanged; the
    check of paths reports it.
    """
    if isinstance(image, str):
        if len(image) >= _SHORTEST_BASE64 and _is_base64(image):
            return {"bytes": _decode(image), "path": None}
        if image.startswith("data:"):
            header, _, data = image.partition(",")
            if not header.endswith(";base64"):
                raise _Unread("wrong_image", f"an image is {header[:60]!r}...", "Give data:image/png;base64,...")
            return {"bytes": _decode(data), "path": None}
        return image.removeprefix("file://")
    if isinstance(image, bytes):
        return {"bytes": image, "path": None}
    if not isinstance(image, dict):
        return image
    if isinstance(image.get("bytes"), bytes):
        return {"bytes": image["bytes"], "path": image.get("path")}
    keys = [key for key in PART_IMAGE_KEYS if isinstance(image.get(key), str)]
    # "bytes" in JSON is base64. A text that is not base64 is wrong there: it is no path.
    inner = as_image(image[keys[0]]) if keys else image
    return image if keys == ["bytes"] and isinstance(inner, str) else inner


def _is_base64(text: str) -> bool:
    if len(text) < _SHORTEST_BASE64 or "." in text:
        return False
    return (text.startswith(_BASE64_BEGINNINGS) or len(text) > _LONGEST_PATH) and bool(_BASE64.fullmatch(text))


def _decode(text: str) -> bytes:
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except binascii.Error as error:
        message = f"an image of {len(text):,} characters is not valid base64 ({error})."
        raise _Unread("wrong_image", message, "Encode the image again.") from error
