"""Training data: files of several formats -> checked rows with `row_id`, `id`, `messages` and `images`.

A row of LLaVA's JSON (a list in `.json`, one object a line in `.jsonl`)

    {"id": "17", "image": "17.png", "conversations": [
        {"from": "human", "value": "<image>\\nWhat animal is this?"}, {"from": "gpt", "value": "A dog."}]}

becomes

    {"row_id": 0, "id": "17", "images": ["ROOT/17.png"], "messages": [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What animal is this?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "A dog."}]}]}

and, by the chat template, the text of `sq_llava/training/collator.py`. A single `<image>` is moved to the front of its
turn, as LLaVA does; where a turn holds several they stay in place. `image` may be a path, a list, or absent.

The layouts of TRL, ms-swift, LLaMA-Factory, axolotl and others are read too (`sq_llava/data/row_layouts.py` has the
table), and all of them in Parquet, in a folder of `Dataset.save_to_disk` or of data files, and in a dataset of the
Hub; images may also stand in the rows, as bytes or base64. A recipe mixes several sources:

    datasets:
      - {path: mix665k.json, image_root: images}
      - {path: documents.jsonl, weight: 2.0}                # each row twice an epoch
      - {path: org/charts, split: train, num_rows: 10000}   # this many an epoch
      - {path: org/vqa, name: docs, split: "train[:10%]", revision: v1.0}
      - {path: captions.json, instructions: ["Describe it.", "What is it?"]}   # where a question is "<image>" alone

Nothing is held decoded: of a JSON file only the place of each row is kept in memory, tables are mapped from disk, and
images are opened when a batch is made. What it does not do: check image files and lengths
(`sq_llava/doctor/check.py`).
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
from sq_llava.data.row_layouts import IMAGE_PART, is_unicode, normalize, shown
from sq_llava.data.sources import DataSource, JsonFile, Table, image_root_of, open_source


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
    roots = [image_root_of(source, rows) for source, rows in zip(sources, opened)]
    return mix.with_transform(RowReader(opened, roots, instructions))


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
    asked = {**messages[first], "content": [*images, {"type": "text", "text": drawn}]}
    return [*messages[:first], asked, *messages[first + 1 :]]


class Row(NamedTuple):
    """A row in one form, and all that is wrong with it by itself. `messages` is empty if its turns cannot be read."""

    faults: list[Fault]
    messages: list[dict]
    images: list


def parse_row(raw: Any, place: str, image_root: Path) -> dict:
    """
    One row of any layout as `id`, `messages` and `images`. See the module's example.

    Raises:
        ValueError: with `place`, the id, the value and the mend, for the first fault.
    """
    faults, messages, images = read_row(raw, image_root)
    for fault in faults:
        if fault.level == "error":
            raise ValueError(f"{place}{_quote_id(raw)}: {fault.message} {fault.fix}")
    return {
        "id": str(raw.get("id", "")),
        "messages": messages,
        "images": [image if is_embedded(image) else str(image_root / image) for image in images],
    }


def _quote_id(raw: Any) -> str:
    return f" (id {shown(raw['id'])})" if isinstance(raw, dict) and "id" in raw else ""


def is_embedded(image: Any) -> bool:
    """Whether an image stands in the row itself, as bytes."""
    return isinstance(image, dict) and isinstance(image.get("bytes"), bytes)


def read_row(raw: Any, image_root: Path) -> Row:
    """
    All that is wrong with a row by itself, its turns, its images' paths and their number, though no file is opened;
    its messages, in the roles and parts that the chat template takes; and its images, one for each image part.
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
            f"read as {layout}: the turns are from {', '.join(roles[:20])}.",
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


def _image_path_faults(path: Any, image_root: Path) -> Iterator[Fault]:
    if is_embedded(path):
        return
    if not isinstance(path, str) or not path or "\0" in path or not is_unicode(path):
        fix = f"Expected a path relative to {image_root}, or bytes or base64 of an image."
        yield Fault("wrong_image", f"an image is {shown(path)}.", fix)
        return
    if "://" in path:
        yield Fault("image_is_url", f"image {shown(path)} is an address.", "Download it, and give its path.")
        return
    if not _stays_inside(path, str(image_root)):
        yield Fault(
            "image_outside_root",
            f"image {shown(path)} leaves the image root {image_root}.",
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
