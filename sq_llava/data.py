"""Training data: files of several formats -> checked rows with `row_id`, `id`, `messages` and `images`.

A row of LLaVA's JSON (a list in `.json`, one object a line in `.jsonl`)

    {"id": "17", "image": "17.png", "conversations": [
        {"from": "human", "value": "<image>\\nWhat animal is this?"}, {"from": "gpt", "value": "A dog."}]}

becomes

    {"row_id": 0, "id": "17", "images": ["ROOT/17.png"], "messages": [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What animal is this?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "A dog."}]}]}

and, by the chat template, the text of `sq_llava/self_questioning.py`. A single `<image>` is moved to the front of its
turn, as LLaVA does; where a turn holds several they stay in place. `image` may be a path, a list, or absent.

TRL's `messages` + `images` are read too, and both layouts in Parquet, in a folder of `Dataset.save_to_disk` and in a
data set of the Hub; there images may also stand as bytes in the table. A recipe mixes several sources:

    datasets:
      - {path: mix665k.json, image_root: images}
      - {path: documents.jsonl, weight: 2.0}                # each row twice an epoch
      - {path: org/charts, split: train, num_rows: 10000}   # this many an epoch
      - {path: captions.json, instructions: ["Describe it.", "What is it?"]}   # where a question is "<image>" alone

Nothing is held decoded: of a JSON file only the place of each row is kept in memory, tables are mapped from disk, and
images are opened when a batch is made. What it does not do: check image files and lengths (`sq_llava/doctor.py`).
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from processing_sq_llava import IMAGE_TOKEN
from sq_llava.images import Fault
from sq_llava.sources import DataSource, JsonFile, Table, image_root_of, open_source


ROLES = {"human": "user", "gpt": "assistant", "system": "system"}
MESSAGE_ROLES = ("system", "user", "assistant")
IMAGE_PART = {"type": "image"}
# A rough measure, for grouping rows of like length: of English text under Llama's tokenizer, its JSON included.
BYTES_PER_TOKEN = 4


def load_rows(sources: list[DataSource], seed: int = 0, image_seq_length: int = 576) -> datasets.Dataset:
    """
    Opens and mixes sources of rows. A row is parsed and checked when it is fetched.

    Args:
        sources (`list[DataSource]`): At least one.
        seed (`int`): Of the draw where a source gives a part of its rows.
        image_seq_length (`int`): Tokens of one image, for the lengths.

    Returns:
        `datasets.Dataset`, whose rows have `row_id` (int, the place in the mix), `id`, `messages`, `images`, `length`
        (int, a rough number of tokens) and `num_images` (int).

    Raises:
        ValueError: for a source that cannot be opened; on fetching, for a wrong row: with file, row, id, field, value
            and mend.
    """
    if not sources:
        raise ValueError("No data: give dataset_path, or datasets in the recipe.")
    opened = []
    for source in sources:
        rows = open_source(source)
        if rows.broken:
            raise ValueError(f"{rows.path}, behind row {len(rows) - 1}: cannot be read as JSON: {rows.broken}.")
        if not len(rows):
            raise ValueError(f"{rows.path}: no rows.")
        opened.append(rows)
    generator = np.random.default_rng(seed)
    columns = {"row_id": [], "source": [], "index": [], "length": [], "num_images": []}
    for number, (source, rows) in enumerate(zip(sources, opened)):
        index = _choose_rows(source, len(rows), generator)
        columns["source"].append(np.full(len(index), number))
        columns["index"].append(index)
        columns["num_images"].append(rows.num_images[index])
        length = rows.text_bytes[index] // BYTES_PER_TOKEN + image_seq_length * rows.num_images[index]
        columns["length"].append(length)
    columns["row_id"] = [np.arange(sum(map(len, columns["index"])))]
    mix = datasets.Dataset.from_dict({name: np.concatenate(parts) for name, parts in columns.items()})
    instructions = [source.instructions for source in sources]
    return mix.with_transform(RowReader(opened, [image_root_of(source) for source in sources], instructions))


def rows_per_epoch(source: DataSource, available: int) -> int:
    return source.num_rows or round((source.weight or 1.0) * available)


def _choose_rows(source: DataSource, available: int, generator: np.random.Generator) -> np.ndarray:
    """Whole copies of all rows, and a drawn part of them, in their order."""
    copies, rest = divmod(rows_per_epoch(source, available), available)
    drawn = np.sort(generator.permutation(available)[:rest])
    return np.concatenate([np.tile(np.arange(available), copies), drawn])


def hold_out(rows: datasets.Dataset, num_rows: int, seed: int = 0) -> tuple[datasets.Dataset, datasets.Dataset]:
    """
    Splits rows of [`load_rows`] into those to train on and `num_rows` others. All copies of a row that a weight makes
    stand on one side.

    Raises:
        ValueError: if there are not enough rows.
    """
    places = rows.with_format("numpy", columns=["source", "index"])[:]
    unique, first, place_of_row = np.unique(
        np.stack([places["source"], places["index"]]), axis=1, return_index=True, return_inverse=True
    )
    if num_rows >= unique.shape[1]:
        raise ValueError(f"{num_rows} rows are to be held out, but there are only {unique.shape[1]}.")
    chosen = np.random.default_rng(seed).permutation(unique.shape[1])[:num_rows]
    train = np.flatnonzero(~np.isin(place_of_row.ravel(), chosen))
    return rows.select(train), rows.select(np.sort(first[chosen]))


@dataclass
class RowReader:
    """Makes rows of the places in a mix; the `datasets` transform of [`load_rows`]."""

    sources: list[JsonFile | Table]
    image_roots: list[Path]
    instructions: list[list[str]]

    def __call__(self, batch: dict[str, list[int]]) -> dict[str, list]:
        read = [self.read(source, index) for source, index in zip(batch["source"], batch["index"])]
        rows = {name: [row[name] for row in read] for name in ("id", "messages", "images")}
        return rows | {name: batch[name] for name in ("row_id", "length", "num_images")}

    def read(self, source: int, index: int) -> dict:
        place = f"{self.sources[source].path}, row {index}"
        try:
            raw = self.sources[source][index]
        except ValueError as error:
            raise ValueError(f"{place}: cannot be read as JSON: {error}") from error
        row = parse_row(raw, place, self.image_roots[source])
        return row | {"messages": with_instruction(row["messages"], self.instructions[source], index)}


def with_instruction(messages: list[dict], instructions: list[str], index: int) -> list[dict]:
    """The messages of row `index`, whose first question is one of `instructions` if it is images alone."""
    first = next((number for number, message in enumerate(messages) if message["role"] == "user"), None)
    if not instructions or first is None:
        return messages
    images = [part for part in messages[first]["content"] if part["type"] == "image"]
    texts = [part["text"] for part in messages[first]["content"] if part["type"] == "text"]
    if "".join(texts).strip():
        return messages
    digest = blake2b(str(index).encode(), digest_size=8).digest()
    drawn = instructions[int.from_bytes(digest, "big") % len(instructions)]
    asked = {**messages[first], "content": [*images, _part("text", drawn)]}
    return [*messages[:first], asked, *messages[first + 1 :]]


def parse_row(raw: Any, place: str, image_root: Path) -> dict:
    """
    One row of LLaVA's or TRL's layout as `id`, `messages` and `images`. See the module's example.

    Raises:
        ValueError: with `place`, the id, the value and the mend, for the first fault.
    """
    faults, messages = read_row(raw, image_root)
    for fault in faults:
        if fault.level == "error":
            raise ValueError(f"{place}{_quote_id(raw)}: {fault.message} {fault.fix}")
    return {
        "id": str(raw.get("id", "")),
        "messages": messages,
        "images": [image if is_embedded(image) else str(image_root / path_of(image)) for image in images_of(raw)],
    }


def _quote_id(raw: Any) -> str:
    return f" (id {raw['id']!r})" if isinstance(raw, dict) and "id" in raw else ""


def images_of(raw: dict) -> list:
    """The images of a row, as they stand there: paths, or undecoded images with `path` and `bytes`."""
    images = raw.get("images") if raw.get("image") is None else raw["image"]
    if not images and not isinstance(images, list):
        return []
    return images if isinstance(images, list) else [images]


def is_embedded(image: Any) -> bool:
    """Whether an image stands in the row itself, as bytes."""
    return isinstance(image, dict) and isinstance(image.get("bytes"), bytes)


def path_of(image: Any) -> Any:
    return image.get("path") if isinstance(image, dict) else image


def read_row(raw: Any, image_root: Path) -> tuple[list[Fault], list[dict]]:
    """
    All that is wrong with a row by itself, its turns, its images' paths and their number, though no file is opened;
    and its messages, in the roles and parts that the chat template takes: none if its turns cannot be read.
    """
    if not isinstance(raw, dict):
        return [Fault("not_an_object", f"is {raw!r:.100}.", "Expected an object with 'conversations'.")], []
    name = "messages" if "messages" in raw and raw.get("conversations") is None else "conversations"
    turns = raw.get(name)
    if not isinstance(turns, list) or not turns:
        return [Fault("no_turns", f"'{name}' is {turns!r:.100}.", "Expected a list of turns that is not empty.")], []
    faults = [fault for index, turn in enumerate(turns) if (fault := _turn_fault(turn, index, name))]
    if faults:
        return faults, []
    messages = _messages(raw)
    return [*_order_faults(messages), *_image_faults(messages, name, images_of(raw), image_root)], messages


def _image_faults(messages: list[dict], name: str, images: list, image_root: Path) -> Iterator[Fault]:
    num_placeholders = sum(message["content"].count(IMAGE_PART) for message in messages)
    if num_placeholders != len(images):
        yield Fault(
            "image_count",
            f"{num_placeholders} {IMAGE_TOKEN} in '{name}', but {len(images)} images.",
            f"Write one {IMAGE_TOKEN} for each image.",
        )
    for image in images:
        yield from _image_path_faults(image, image_root)


def _turn_fault(turn: Any, index: int, name: str) -> Fault | None:
    role_key, text_key, roles = ("role", "content", MESSAGE_ROLES) if name == "messages" else ("from", "value", ROLES)
    if not isinstance(turn, dict) or role_key not in turn or text_key not in turn:
        fix = f"Expected an object with '{role_key}' and '{text_key}'."
        return Fault("wrong_turn", f"turn {index} is {turn!r:.100}.", fix)
    if not isinstance(turn[role_key], str) or turn[role_key] not in roles:
        return Fault(
            "unknown_role",
            f"turn {index} has '{role_key}' {turn[role_key]!r:.50}.",
            f"Give one of {', '.join(roles)}.",
        )
    text = turn[text_key]
    if isinstance(text, str):
        texts = [text]
    elif name == "messages" and isinstance(text, list) and all(map(_is_known_part, text)):
        texts = [part["text"] for part in text if part["type"] == "text"]
    else:
        return Fault("wrong_turn", f"turn {index} has '{text_key}' {text!r:.100}.", "Expected text.")
    if not all(map(_is_unicode, texts)):
        return Fault("broken_text", f"turn {index} holds half a character: {text!a:.100}.", "Write it in UTF-8 anew.")
    return None


def _is_unicode(text: str) -> bool:
    """Whether a text has no lone surrogate, such as JSON's escape of one half of an emoji; tokenizers refuse those."""
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _is_known_part(part: Any) -> bool:
    if not isinstance(part, dict):
        return False
    return part.get("type") == "image" or (part.get("type") == "text" and isinstance(part.get("text"), str))


def _order_faults(messages: list[dict]) -> Iterator[Fault]:
    roles = [message["role"] for message in messages]
    begin = int(roles[0] == "system")
    if len(roles) == begin or roles[begin:] != ["user", "assistant"] * ((len(roles) - begin) // 2):
        yield Fault(
            "turn_order",
            f"the turns are from {', '.join(roles)}.",
            "They must alternate, user (human) then assistant (gpt), and end with assistant (a system turn may "
            "stand first).",
        )
        return
    is_empty = [_is_empty(message["content"]) for message in messages]
    if all(is_empty[begin + 1 :: 2]):
        yield Fault("no_label", "no answer holds any text: nothing can be learned.", "Write an answer.")
        return
    for index, message in enumerate(messages):
        if message["role"] == "assistant" and IMAGE_PART in message["content"]:
            fix = "Put it into a question."
            yield Fault("image_in_answer", f"turn {index} is an answer, but holds {IMAGE_TOKEN}.", fix)
        if is_empty[index]:
            yield Fault("empty_turn", f"turn {index} is empty.", "Write its text, or take the turn out.", "warning")


def _is_empty(content: list[dict]) -> bool:
    text = "".join([part.get("text", IMAGE_TOKEN) for part in content])
    return not text or text.isspace()


def _image_path_faults(image: Any, image_root: Path) -> Iterator[Fault]:
    if is_embedded(image):
        return
    path = path_of(image)
    if not isinstance(path, str) or not path or "\0" in path or not _is_unicode(path):
        yield Fault("wrong_image", f"an image is {path!a:.100}.", f"Expected a path relative to {image_root}.")
        return
    if path.startswith(("http://", "https://")):
        yield Fault("image_is_url", f"image {path!r:.200} is an address.", "Download it, and give its path.")
        return
    if not _stays_inside(path, str(image_root)):
        yield Fault(
            "image_outside_root",
            f"image {path!r:.200} leaves the image root {image_root}.",
            "Give a path inside of it.",
        )


def _stays_inside(path: str, image_root: str) -> bool:
    place = os.path.join(image_root, path)
    folder, name = os.path.split(place)
    if name in ("", ".", "..") or os.path.islink(place):
        return Path(os.path.realpath(place)).is_relative_to(image_root)
    return _folder_is_inside(folder, image_root)


@lru_cache(maxsize=2**16)  # to resolve a path takes as long as all else that is checked of a row
def _folder_is_inside(folder: str, image_root: str) -> bool:
    return Path(os.path.realpath(folder)).is_relative_to(image_root)


def _messages(raw: dict) -> list[dict]:
    if raw.get("conversations") is not None:
        return [{"role": ROLES[turn["from"]], "content": _parse_text(turn["value"])} for turn in raw["conversations"]]
    messages = []
    for turn in raw["messages"]:
        content = _parse_text(turn["content"]) if isinstance(turn["content"], str) else turn["content"]
        messages.append({"role": turn["role"], "content": [_part(part["type"], part.get("text")) for part in content]})
    if all(isinstance(turn["content"], str) for turn in raw["messages"]) and not any(
        part["type"] == "image" for message in messages for part in message["content"]
    ):
        # As in TRL: where no text says where the images stand, they begin the first user turn.
        first = next((message for message in messages if message["role"] == "user"), None)
        if first is not None:
            first["content"] = [_part("image", None) for _ in images_of(raw)] + first["content"]
    return messages


def _part(kind: str, text: str | None) -> dict:
    return dict(IMAGE_PART) if kind == "image" else {"type": "text", "text": text}


def _parse_text(text: str) -> list[dict]:
    """The parts of a text in which `<image>` stands for an image."""
    if IMAGE_TOKEN not in text:
        return [_part("text", text)]
    pieces = text.split(IMAGE_TOKEN)
    if len(pieces) == 2:
        pieces = ["", "".join(pieces).strip()]
    content = []
    for index, piece in enumerate(pieces):
        if index > 0:
            content.append(_part("image", None))
            # The template writes the line break after the images that begin a turn.
            if not any(part["type"] == "text" for part in content):
                piece = piece.removeprefix("\n")
        if piece:
            content.append(_part("text", piece))
    return content or [_part("text", "")]
