"""Rows in the layouts of other trainers -> one form: messages of text and image parts, and the images in their order.

    >>> normalize({"query": "<image>What is it?", "response": "A dog.", "images": ["17.png"]})
    NormalRow(layout="query + response", faults=[], images=["17.png"], messages=[
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "A dog."}]}])

| fields of a row | of each turn | from |
|---|---|---|
| `conversations` | `from` + `value` | LLaVA, ShareGPT |
| `messages`, `conversations` | `role` + `content`: a text, or parts | TRL, OpenAI, axolotl, LLaMA-Factory, ms-swift |
| `texts`, `conversation`, `conversations` | `user` (or `human`) + `assistant` | FineVision, the Cauldron, ms-swift |
| `prompt` + `completion` | texts, or lists of `role` + `content` | TRL |
| `query` + `response` (+ `history`, `system`) | texts | ms-swift |
| `instruction` (+ `input`) + `output` (+ `history`, `system`) | texts | Alpaca, LLaMA-Factory |

Images stand in `image` or `images`, or in the parts: `{"type": "image", "image": ...}` (or `path`, `url`, `base64`,
`bytes`) and OpenAI's `{"type": "image_url", "image_url": {"url": ...}}`. An image is a path, bytes, base64 (with or
without `data:image/png;base64,`), or an undecoded `datasets.Image`. `None` is the same as an absent field: so Arrow
writes it. A single `<image>` in a text is moved to the front of its turn. Where no turn says where the images stand,
they begin the first question, as in TRL; LLaVA's `from` + `value` must say it.

Videos, audio, the image tags of other models, and fields that change what is trained, are faults. They are never taken
for text and never ignored. What it does not do: look at the order of turns, or at paths (`sq_llava/data/rows.py`).
"""

import base64
import binascii
import re
import reprlib
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from processing_sq_llava import IMAGE_TOKEN
from sq_llava.data.images import Fault


IMAGE_PART = {"type": "image"}
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
# Fields that hold a list of turns, and pairs of fields that hold a question and its answer.
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
# Where a part may hold its image.
PART_IMAGE_KEYS = ("image", "path", "url", "image_url", "base64", "bytes")
KNOWN_PART_KEYS = {"type", "text", "index", "detail", *PART_IMAGE_KEYS}
KNOWN_FIELDS = {"id", *IMAGE_FIELDS, *TEXT_FIELDS}

EXPECTED = (
    "Expected 'conversations', 'messages', 'texts', prompt + completion, query + response or instruction + output."
)
NO_OTHER_MEDIA = "This model reads images only. Take it out, or leave the row out."
_MEDIA = "image|img|picture|photo|video|audio|speech|sound|frame|media|gif|pdf|pixel_value"
_REFERENCE = "path|file|filename|name|url|uri"
_MEDIA_KEY = re.compile(
    rf"(?:.*_)?(?P<kind>{_MEDIA})s?(?:_?\d+)?(?P<reference>(?:_?(?:{_REFERENCE})s?)+)?(?:_?(?:bytes|base64|b64|data|list)s?)*",
    re.IGNORECASE,
)
_IMAGE_KINDS = {"image", "img", "picture", "photo"}
# Placeholders of this and other models, without attributes: those are of HTML. IMAGE_TOKEN itself is read.
_MEDIA_TAG = re.compile(
    rf"(?!(?-i:{IMAGE_TOKEN}))<\|?(?:(?:start|begin|end)_of_)?(?:/?img|image|video|audio|speech|sound|(?:im|vision)(?=[_-]))"
    r"(?:here|[_-]?(?:\d+|pad|bos|eos|patch|start|end|token|soft_token|context|placeholder|content|embed))*\|?>"
    r"|(?-i:\[IMG\])",
    re.IGNORECASE,
)
# Fields of a row or turn that other trainers obey; with these values they ask for nothing.
_ASKED_OF_TRAINERS = {
    **dict.fromkeys(("loss", "train", "training", "weight", "loss_scale"), (True, 1)),
    **dict.fromkeys(
        ("tools", "functions", "tool_calls", "function_call", "tool_call_id", "reasoning_content"), (False,)
    ),
    **dict.fromkeys(("thinking", "rejected_response", "chosen", "rejected"), (False,)),
}
# How base64 of PNG, JPEG, GIF, WebP, TIFF and BMP begins; a longer text than this is no path.
_BASE64_BEGINNINGS = ("iVBORw0KGgo", "/9j/", "R0lGOD", "UklGR", "SUkq", "TU0AK", "Qk0", "Qk1", "Qk2", "Qk3")
_SHORTEST_BASE64, _LONGEST_PATH = 64, 1024
_BASE64 = re.compile(r"[A-Za-z0-9+/\s]+={0,2}\s*")


class NormalRow(NamedTuple):
    """`images` are paths, or `{"bytes": ..., "path": ...}`; `messages` is empty if a turn cannot be read."""

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
    """A value as an error shows it: short, and never the bytes or the base64 of a picture."""
    return _shown.repr(value)


def recognize(raw: dict) -> str | None:
    """The layout of a row by its fields: one of `TURN_LISTS` or `EXCHANGES`; `None` if it is none of them."""
    for name in TURN_LISTS:
        if raw.get(name) is not None:
            return name
    for name, pair in EXCHANGES.items():
        if raw.get(pair[0]) is not None and pair[1] in raw:
            return name
    return None


def images_of(raw: Any) -> list:
    """All images of a row as they stand there, in `image` or `images` and in the parts of its turns."""
    if not isinstance(raw, dict):
        return []
    found, layout = _images_beside(raw), recognize(raw)
    for name in EXCHANGES.get(layout, (layout,)):
        turns = raw.get(name)
        if isinstance(turns, list) and turns and _keys_of(turns[0], name) == ROLE_CONTENT:
            contents = [turn.get("content") for turn in turns if isinstance(turn, dict)]
            parts = [part for content in contents if isinstance(content, list) for part in content]
            found += [image for part in parts if (image := _image_of_part(part)) is not None]
    return found


def measure(raw: Any) -> tuple[int, int]:
    """The number of images of a row, and how many characters of its JSON are images in base64."""
    images = images_of(raw)
    return len(images), sum(len(text) for image in images for text in _strings(image) if len(text) > _LONGEST_PATH)


def _strings(image: Any) -> Iterable[str]:
    if isinstance(image, str):
        return (image,)
    return [text for text in image.values() if isinstance(text, str)] if isinstance(image, dict) else ()


def _images_beside(raw: dict) -> list:
    """The images in `image` or `images`."""
    images = raw.get("image") or raw.get("images")
    if isinstance(images, list):
        return list(images)
    return [images] if _is_filled(images) else []


def _image_of_part(part: Any) -> Any:
    if not isinstance(part, dict) or part.get("type") not in ("image", "image_url"):
        return None
    return next((part[key] for key in PART_IMAGE_KEYS if _is_filled(part.get(key))), None)


def _is_filled(value: Any) -> bool:
    """Whether something stands there; Arrow also writes an absent image as a struct of nothing."""
    return bool(value) and not (isinstance(value, dict) and all(inner is None for inner in value.values()))


def normalize(raw: Any) -> NormalRow:
    """Reads a row of any layout in the table above. Its faults name the layout that was recognized."""
    if not isinstance(raw, dict):
        fault = Fault("not_an_object", f"is {shown(raw)}.", "Expected an object with 'conversations' or 'messages'.")
        return NormalRow("", [fault], [], [])
    layout = recognize(raw)
    if layout is None:
        named = {name: raw[name] for name in TURN_LISTS if name in raw}
        what = ", ".join([f"'{name}' is {value!r}" for name, value in named.items()] or [f"has {_names(raw)}"])
        faults = [Fault("no_turns", f"{what}: it is of no layout that is read.", EXPECTED)]
        return NormalRow("", [*faults, *_unread_fields(raw)], [], [])
    reader = _Reader(layout, raw)
    messages = reader.read()
    faults = [*reader.faults, *_unread_fields(raw)]
    if faults:
        return NormalRow(reader.name, faults, [], [])
    try:
        return NormalRow(reader.name, [], messages, reader.place_images(messages))
    except _Unread as unread:
        return NormalRow(reader.name, [unread.fault], messages, [])


def _names(raw: dict) -> str:
    return ", ".join(f"{name}" for name in list(raw)[:12]) or "no fields"


def _unread_fields(raw: dict) -> Iterator[Fault]:
    extra = raw.keys() - KNOWN_FIELDS
    if extra:
        for name in sorted(extra, key=str):
            if fault := _field_fault(name, raw[name], bool(_images_beside(raw))):
                yield fault


def _turn_fault(turn: dict, keys: tuple[str, str]) -> Fault | None:
    """The fault of what a turn holds beside its two keys."""
    extra = sorted(turn.keys() - set(keys), key=str)
    return next((fault for name in extra if (fault := _field_fault(name, turn[name]))), None)


def _field_fault(name: str, value: Any, has_images: bool = False) -> Fault | None:
    """The fault of a field that would be ignored, though it holds media or asks something of the training."""
    if name in _ASKED_OF_TRAINERS:
        if value in (None, "", [], {}, *_ASKED_OF_TRAINERS[name]):
            return None
        fix = "Take it out, or leave the row out."
        return Fault("unread_field", f"'{name}' is {shown(value)}, which is not read.", fix)
    match = _MEDIA_KEY.fullmatch(name)
    if match is None or not _is_filled(value) or isinstance(value, (int, float)):
        return None
    if match["kind"].lower() not in _IMAGE_KINDS:
        return Fault("unread_media", f"'{name}' is {shown(value)}.", NO_OTHER_MEDIA)
    if has_images and match["reference"]:  # it tells where the images came from
        return None
    fix = "Name the field 'image' or 'images', or take it out."
    return Fault("unread_media", f"'{name}' is {shown(value)}, which is not read.", fix)


class _Reader:
    """Reads the turns of one row. `slots` has an item for each image part: its image, or `None` for one beside."""

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
        """Where a turn stands (a number is that of a turn), its role, and its content or what is wrong with it."""
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
                fix = "Expected a list of questions, each in a list with its answer."
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
            fix = "Expected a list of turns that is not empty."
            yield f"'{field}'", None, _Unread("no_turns", f"is {shown(turns)}.", fix)
            return
        first_key, second_key = self.keys = _keys_of(turns[0], field)
        has_roles = self.keys in (FROM_VALUE, ROLE_CONTENT)
        if self.layout == field:
            self.name = _name_of(field, self.keys)
        for number, turn in enumerate(turns):
            where = f"{place}turn {number}" if place else number
            if not isinstance(turn, dict) or first_key not in turn or second_key not in turn:
                fix = f"Expected an object with '{first_key}' and '{second_key}'."
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
            raise _Unread("unknown_role", f"has '{self.keys[0]}' {shown(role)}.", f"Give one of {', '.join(ROLES)}.")
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
            raise _Unread("wrong_turn", f"has {key}{shown(content)}.", "Expected text.")
        self.has_parts = True
        return [self._part(part) for part in content]

    def _part(self, part: Any) -> dict:
        kind = part.get("type") if isinstance(part, dict) else None
        if not isinstance(kind, str):
            raise _Unread("wrong_turn", f"has the part {shown(part)}.", "Expected an object with 'type'.")
        if kind not in ("text", "image", "image_url"):
            raise _Unread("unread_media", f"has a part of the type {shown(kind)}.", NO_OTHER_MEDIA)
        filled = {key for key in part if key != "type" and _is_filled(part[key])}
        for key in sorted(filled - KNOWN_PART_KEYS):
            if fault := _field_fault(key, part[key]):
                raise _Unread(fault.code, f"has a part with {fault.message}", fault.fix)
        held = filled & set(PART_IMAGE_KEYS)
        if kind == "text":
            if not isinstance(part.get("text"), str) or held:
                raise _Unread("wrong_turn", f"has the part {shown(part)}.", "Expected a text, and no image beside it.")
            _check_text(part["text"])
            return {"type": "text", "text": part["text"]}
        if len(held) > 1 or "text" in filled or (kind == "image_url" and not held):
            raise _Unread("wrong_turn", f"has the part {shown(part)}.", "Expected one image.")
        index, place = part.get("index"), self.slots.count(None)
        if index is not None and not held and index != place:
            fix = "Put the images into the order of the parts."
            raise _Unread("image_count", f"shows image {shown(index)} where image {place} is due.", fix)
        self.slots.append(_image_of_part(part))
        return dict(IMAGE_PART)

    def place_images(self, messages: list[dict]) -> list:
        """The images in the order of the image parts; where nothing says where they stand, parts are added first."""
        beside = _images_beside(self.raw)
        if (
            self.raw.get("image")
            and self.raw.get("images")
            and _images_beside({"image": self.raw["images"]}) != beside
        ):
            raise _Unread("image_count", "'image' and 'images' hold different images.", "Leave one of them out.")
        if beside and not self.slots and not self.has_parts and self.keys != FROM_VALUE:
            first = next((message for message in messages if message["role"] == "user"), None)
            if first is not None:
                first["content"] = [*(dict(IMAGE_PART) for _ in beside), *first["content"]]
                self.slots = [None] * len(beside)
        empty = self.slots.count(None)
        if empty != len(beside):
            fields = " and ".join(f"'{name}'" for name in EXCHANGES.get(self.layout, (self.layout,)))
            held = f", and {len(self.slots) - empty} images in the turns themselves" if len(self.slots) > empty else ""
            raise _Unread(
                "image_count",
                f"read as {self.name}: {empty} {IMAGE_TOKEN} in {fields}{held}, but {len(beside)} images in "
                "'image' or 'images'.",
                f"Write one {IMAGE_TOKEN} for each image.",
            )
        following = iter(beside)
        return [as_image(next(following) if slot is None else slot) for slot in self.slots]


def _keys_of(turn: Any, field: str) -> tuple[str, str]:
    """The two keys of a list's turns, by the first one."""
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
        raise _Unread("broken_text", f"holds half a character: {shown(text)}.", "Write it in UTF-8 anew.")
    if ("<" in text or "[IMG]" in text) and (found := _MEDIA_TAG.search(text)):
        fix = f"For an image write {IMAGE_TOKEN}; other media are not read. Take it out, or leave the row out."
        raise _Unread("unread_media", f"holds {found[0]!r}.", fix)


def is_unicode(text: str) -> bool:
    """Whether a text has no lone surrogate, such as JSON's escape of one half of an emoji; tokenizers refuse those."""
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _parse_text(text: str) -> list[dict]:
    """The parts of a text in which `<image>` stands for an image."""
    pieces = text.split(IMAGE_TOKEN)
    if len(pieces) == 2:
        pieces = ["", "".join(pieces).strip()]
    content = []
    for index, piece in enumerate(pieces):
        if index > 0:
            content.append(dict(IMAGE_PART))
            # The template writes the line break after the images that begin a turn.
            if not any(part["type"] == "text" for part in content):
                piece = piece.removeprefix("\n")
        if piece:
            content.append({"type": "text", "text": piece})
    return content


def as_image(image: Any) -> Any:
    """
    An image of a row as a path or as `{"bytes": ..., "path": ...}`. What is neither comes back as it is, and is a
    fault of its path.
    """
    if isinstance(image, str):
        if len(image) >= _SHORTEST_BASE64 and _is_base64(image):
            return {"bytes": _decode(image), "path": None}
        if image.startswith("data:"):
            header, _, data = image.partition(",")
            if not header.endswith(";base64"):
                raise _Unread("wrong_image", f"an image is {header[:60]!r}...", "Expected data:image/png;base64,...")
            return {"bytes": _decode(data), "path": None}
        return image.removeprefix("file://")
    if isinstance(image, bytes):
        return {"bytes": image, "path": None}
    if not isinstance(image, dict):
        return image
    if isinstance(image.get("bytes"), bytes):
        return {"bytes": image["bytes"], "path": image.get("path")}
    keys = [key for key in PART_IMAGE_KEYS if isinstance(image.get(key), str)]
    # Bytes in JSON are base64; a text there that is none is no path.
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
        raise _Unread("wrong_image", message, "Encode it anew.") from error
