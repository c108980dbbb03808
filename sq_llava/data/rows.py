"""Reads and mixes training data: files of several formats -> checked rows of `row_id`, `id`, `messages`, `images`.

A row in LLaVA's layout (`.json` holds a list of rows, `.jsonl` one row per line)

    {"id": "17", "image": "17.png", "conversations": [
        {"from": "human", "value": "<image>\\nWhat animal is this?"}, {"from": "gpt", "value": "A dog."}]}

becomes

    {"row_id": 0, "id": "17", "images": ["ROOT/17.png"], "messages": [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What animal is this?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "A dog."}]}]}

`sq_llava/data/self_questions.py` shows the text that the chat template makes from such messages. A single `<image>` is
moved to the front of its turn, as in LLaVA. Several in one turn stay where they are. `image` may be a path, a list, or
absent. `docs/data.md` shows the other layouts, the kinds of files, and how a recipe mixes several sources.

Memory stays small: only the positions of the rows of a JSON file are kept, tables are mapped from disk, and images are
opened when a batch is made. `sq_llava/doctor/check.py` checks image files and lengths.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np

from processing_sq_llava import IMAGE_TOKEN
from sq_llava.data.images import Fault
from sq_llava.data.json_file import JsonFile
from sq_llava.data.row_layouts import IMAGE_PART, is_unicode, normalize, shown
from sq_llava.data.sources import DataSource, Table, image_root_of, open_source


# A rough estimate for English text in JSON with Llama's tokenizer, used to group rows of similar length.
BYTES_PER_TOKEN = 4


def load_rows(sources: list[DataSource], seed: int = 0, image_seq_length: int = 576) -> datasets.Dataset:
    """
    Opens and mixes sources of rows. A row is parsed and checked when it is read.

    Args:
        sources (`list[DataSource]`): At least one.
        seed (`int`): Random seed for choosing rows, where a source gives only a part of its rows.
        image_seq_length (`int`): Tokens of one image, for `length`.

    Returns:
        `datasets.Dataset` whose rows have `row_id` (int, position in the mix), `id`, `messages`, `images`, `length`
        (int, estimated tokens) and `num_images` (int).

    Raises:
        ValueError: for a source that cannot be opened. Reading a row with an error raises it, too. The message names
            file, row, id, field and value, and says what to do.
    """
    if not sources:
        raise ValueError("There is no data: set dataset_path or datasets in the recipe.")
    opened = []
    for source in sources:
        rows = open_source(source)
        if rows.broken:
            raise ValueError(f"{rows.path}, after row {len(rows) - 1}: cannot be read as JSON: {rows.broken}.")
        if not len(rows):
            raise ValueError(f"{rows.path}: the file has no rows.")
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
    roots = [image_root_of(source, rows) for source, rows in zip(sources, opened)]
    return mix.with_transform(RowReader(opened, roots, instructions))


def rows_per_epoch(source: DataSource, available: int) -> int:
    """Returns how many rows of a source with `available` rows are in one epoch: at least one."""
    return source.num_rows or max(1, round((source.weight or 1.0) * available))


def _choose_rows(source: DataSource, available: int, generator: np.random.Generator) -> np.ndarray:
    """Returns the indices of the rows of an epoch: full copies of all rows, then a drawn part of them, sorted."""
    copies, rest = divmod(rows_per_epoch(source, available), available)
    drawn = np.sort(generator.permutation(available)[:rest])
    return np.concatenate([np.tile(np.arange(available), copies), drawn])


def hold_out(rows: datasets.Dataset, num_rows: int, seed: int = 0) -> tuple[datasets.Dataset, datasets.Dataset]:
    """
    Splits rows into training rows and evaluation rows. All copies of a row (see `weight`) stay in the same part.

    Args:
        rows (`datasets.Dataset`): From [`load_rows`].
        num_rows (`int`): Number of evaluation rows.
        seed (`int`): Random seed of the split.

    Returns:
        The training rows and the evaluation rows.

    Raises:
        ValueError: if there are not enough rows.
    """
    places = rows.with_format("numpy", columns=["source", "index"])[:]
    unique, first, place_of_row = np.unique(
        np.stack([places["source"], places["index"]]), axis=1, return_index=True, return_inverse=True
    )
    if num_rows >= unique.shape[1]:
        raise ValueError(f"num_eval_rows is {num_rows}, but there are only {unique.shape[1]} rows: lower it.")
    chosen = np.random.default_rng(seed).permutation(unique.shape[1])[:num_rows]
    train = np.flatnonzero(~np.isin(place_of_row.ravel(), chosen))
    return rows.select(train), rows.select(np.sort(first[chosen]))


@dataclass
class RowReader:
    """Reads the rows at given positions of the sources; the transform of the dataset that [`load_rows`] returns."""

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
    """Adds one of the `instructions`, chosen by `index`, to a first question that has only images."""
    first = next((number for number, message in enumerate(messages) if message["role"] == "user"), None)
    if not instructions or first is None:
        return messages
    images = [part for part in messages[first]["content"] if part["type"] == "image"]
    texts = [part["text"] for part in messages[first]["content"] if part["type"] == "text"]
    if "".join(texts).strip():
        return messages
    digest = blake2b(str(index).encode(), digest_size=8).digest()
    drawn = instructions[int.from_bytes(digest, "big") % len(instructions)]
    asked = {**messages[first], "content": [*images, {"type": "text", "text": drawn}]}
    return [*messages[:first], asked, *messages[first + 1 :]]


class Row(NamedTuple):
    """A row in the common form, and its faults. `messages` is empty if the turns cannot be read."""

    faults: list[Fault]
    messages: list[dict]
    images: list


def parse_row(raw: Any, place: str, image_root: Path) -> dict:
    """
    Converts one row of any layout to `id`, `messages` and `images`; the module's docstring has an example.

    Args:
        raw: The row as its file has it.
        place (`str`): File and row, for the error.
        image_root (`Path`): Resolved folder of the images.

    Raises:
        ValueError: for the first fault, with `place`, the id, the value and what to do.
    """
    faults, messages, images = read_row(raw, image_root)
    for fault in faults:
        if fault.level == "error":
            raise ValueError(f"{place}{_quote_id(raw)}: {fault.message} {fault.fix}")
    return {
        "id": id_of(raw) or "",
        "messages": messages,
        "images": [image if is_embedded(image) else str(image_root / image) for image in images],
    }


def _quote_id(raw: Any) -> str:
    return "" if id_of(raw) is None else f" (id {shown(raw['id'])})"


def id_of(raw: Any) -> str | None:
    """Returns the id of a row as its file has it, or `None` if it has none."""
    return str(raw["id"]) if isinstance(raw, dict) and raw.get("id") is not None else None


def is_embedded(image: Any) -> bool:
    """Returns whether the row holds the bytes of the image, not a path."""
    return isinstance(image, dict) and isinstance(image.get("bytes"), bytes)


def read_row(raw: Any, image_root: Path) -> Row:
    """
    Converts one row of any layout, and lists the faults of its turns, its image paths and their number.

    No image file is opened. The messages have the roles and parts that the chat template needs; there is one image for
    each image part.
    """
    row = normalize(raw)
    order_faults = _order_faults(row.messages, row.layout) if row.messages else ()
    path_faults = [fault for image in row.images for fault in _image_path_faults(image, image_root)]
    return Row([*order_faults, *row.faults, *path_faults], row.messages, row.images)


def _order_faults(messages: list[dict], layout: str) -> Iterator[Fault]:
    roles = [message["role"] for message in messages]
    begin = int(roles[0] == "system")
    if len(roles) == begin or roles[begin:] != ["user", "assistant"] * ((len(roles) - begin) // 2):
        yield Fault(
            "turn_order",
            f"read as {layout}: the roles of the turns are {', '.join(roles[:20])}.",
            "They must alternate between user (human) and assistant (gpt), begin with user and end with assistant. "
            "One system turn may come first.",
        )
        return
    is_empty = [_is_empty(message["content"]) for message in messages]
    if all(is_empty[begin + 1 :: 2]):
        yield Fault("no_label", "all answers are empty: nothing can be learned.", "Write an answer.")
        return
    for index, message in enumerate(messages):
        if message["role"] == "assistant" and IMAGE_PART in message["content"]:
            fix = "Move the image to a question."
            yield Fault("image_in_answer", f"turn {index} is an answer, but has an {IMAGE_TOKEN}.", fix)
        if is_empty[index]:
            yield Fault("empty_turn", f"turn {index} is empty.", "Write its text, or remove the exchange.", "warning")


def _is_empty(content: list[dict]) -> bool:
    text = "".join([part.get("text", IMAGE_TOKEN) for part in content])
    return not text or text.isspace()


def _image_path_faults(path: Any, image_root: Path) -> Iterator[Fault]:
    if is_embedded(path):
        return
    if not isinstance(path, str) or not path or "\0" in path or not is_unicode(path):
        fix = f"Give a path relative to {image_root}, or the bytes or base64 of an image."
        yield Fault("wrong_image", f"an image is {shown(path)}.", fix)
        return
    if "://" in path:
        yield Fault("image_is_url", f"image {shown(path)} is a URL.", "Download it and give its path.")
        return
    if not _stays_inside(path, str(image_root)):
        yield Fault(
            "image_outside_root",
            f"image {shown(path)} is outside the image root {image_root}.",
            "Move the image into that folder, or set image_root to a folder that contains it.",
        )


def _stays_inside(path: str, image_root: str) -> bool:
    place = os.path.join(image_root, path)
    folder, name = os.path.split(place)
    if name in ("", ".", "..") or os.path.islink(place):
        return Path(os.path.realpath(place)).is_relative_to(image_root)
    return _folder_is_inside(folder, image_root)


@lru_cache(maxsize=2**16)  # resolving a path takes as long as all other checks of a row
def _folder_is_inside(folder: str, image_root: str) -> bool:
    return Path(os.path.realpath(folder)).is_relative_to(image_root)
