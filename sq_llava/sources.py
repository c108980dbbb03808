"""Where rows come from: JSON files, Parquet, folders of `save_to_disk` and data sets of the Hub, opened lazily.

Of a JSON file only the place of each row is kept in memory; tables are mapped from disk, their images undecoded. What
stands in a row is the matter of `sq_llava/data.py`.
"""

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc


# Bytes of JSON read at a time, and the longest row that is believed.
WINDOW = 2**24
MAX_ROW_BYTES = 2**26
# Rows of a table read at a time: they may hold images.
TABLE_ROWS = 32
BOM = b"\xef\xbb\xbf"


@dataclass
class DataSource:
    """
    One entry of a recipe's `datasets`.

    Args:
        path (`str`): A `.json`, `.jsonl` or `.parquet` file, a folder of Parquet files or of `save_to_disk`, or the id
            of a data set on the Hub.
        image_root (`str`, *optional*): Folder that image paths are relative to and must stay inside of. Default: the
            folder of `path`.
        split (`str`, *optional*): Of a data set that has several, as for `datasets.load_dataset`.
        weight (`float`): How often each row is seen in an epoch; 0.5 takes half of the rows, drawn once by the seed.
        num_rows (`int`, *optional*): Instead of `weight`: the number of rows in an epoch.
        instructions (`list[str]`): What rows are asked whose question is an image alone: one of them, drawn for each.
    """

    path: str
    image_root: str | None = None
    split: str | None = None
    weight: float | None = None
    num_rows: int | None = None
    instructions: list[str] = field(default_factory=list)

    def __post_init__(self):
        if self.weight is not None and self.num_rows is not None:
            raise ValueError(f"datasets, {self.path}: both weight and num_rows are given: leave one out.")
        for name in ("weight", "num_rows"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"datasets, {self.path}: {name} is {value}: give a number above 0.")


class JsonFile:
    """
    The rows of a `.json` or `.jsonl` file, parsed when they are asked for.

    Attributes:
        offsets, sizes (`np.ndarray` of int64): Where each row stands, in bytes.
        num_images (`np.ndarray` of int64): Images of each row.
        text_bytes (`np.ndarray` of int64): Size of each row's text; here of its JSON.
        broken (`str` or `None`): What ends a `.json` file early, so that no row behind it could be found.
    """

    def __init__(self, path: str):
        self.path = str(path)
        self.broken = None
        places = []
        try:
            for place in (_scan_lines if self.path.endswith(".jsonl") else _scan_list)(self.path):
                places.append(place)
        except ValueError as error:
            self.broken = str(error)
        table = np.array(places, dtype=np.int64).reshape(-1, 3)
        self.offsets, self.sizes, self.num_images = table.T.copy()
        self.text_bytes = self.sizes

    def __len__(self) -> int:
        return len(self.offsets)

    def read(self, index: int) -> bytes:
        return next(self._read_several([index]))

    def _read_several(self, indices: Iterable[int]) -> Iterator[bytes]:
        with open(self.path, "rb") as stream:
            for index in indices:
                stream.seek(self.offsets[index])
                yield stream.read(self.sizes[index])

    def rows(self, indices: Iterable[int]) -> Iterator[Any]:
        """Several rows, faster than one by one; a `ValueError` stands in place of a row that cannot be read."""
        for data in self._read_several(indices):
            try:
                yield json.loads(data.decode("utf-8"))
            except ValueError as error:
                yield error

    def __getitem__(self, index: int) -> Any:
        """
        Raises:
            ValueError: if the row is not JSON in UTF-8.
        """
        return json.loads(self.read(index).decode("utf-8"))


def _count_images(row: Any) -> int:
    images = row.get("image", row.get("images")) if isinstance(row, dict) else None
    return len(images) if isinstance(images, list) else int(bool(images))


def _scan_lines(path: str) -> Iterator[tuple[int, int, int]]:
    with open(path, "rb") as stream:
        offset = 0
        for line in stream:
            text = line.removeprefix(BOM) if offset == 0 else line
            begin = offset + len(line) - len(text.lstrip())
            offset += len(line)
            if not text.strip():
                continue
            try:
                num_images = _count_images(json.loads(text))
            except ValueError:
                num_images = 0  # the row itself is an error for whoever asks for it
            yield begin, len(text.strip()), num_images


_SPACE = re.compile(r"[ \t\r\n]*")
_EXPECTED = {"[": "expected [ (one row a line goes into a .jsonl file)", ",]": "expected , or ]"}


def _scan_list(path: str) -> Iterator[tuple[int, int, int]]:
    """
    Finds the objects of a JSON list without holding the list. Bytes are read as Latin-1, so that characters and bytes
    have the same places; the texts are wrong by that, but not their ends.
    """
    decoder = json.JSONDecoder()
    with open(path, "rb") as stream:
        start = len(BOM) if stream.read(len(BOM)) == BOM else 0
        stream.seek(start)
        text, at, wanted = stream.read(WINDOW).decode("latin-1"), 0, "["
        while True:
            at = _SPACE.match(text, at).end()
            try:
                if wanted != "row":
                    if text[at] not in wanted:
                        raise json.JSONDecodeError(_EXPECTED[wanted], text, at)
                    if text[at] == "]":
                        rest = (text[at + 1 :] + stream.read(WINDOW).decode("latin-1")).strip()
                        if rest:
                            raise ValueError(f"{_line_of(path, start + at + 1)}: more stands behind the list's end")
                        return
                    at, wanted, first = at + 1, "row", wanted == "["
                    continue
                if text[at] == "]" and first:
                    wanted = ",]"
                    continue
                row, end = decoder.raw_decode(text, at)
            except (IndexError, json.JSONDecodeError) as error:
                more = stream.read(max(WINDOW, len(text) - at)) if len(text) - at < MAX_ROW_BYTES else b""
                if not more:
                    place = start + (error.pos if isinstance(error, json.JSONDecodeError) else len(text))
                    what = error.msg if isinstance(error, json.JSONDecodeError) else "the list is not closed"
                    raise ValueError(f"{_line_of(path, place)}: {what}") from error
                text, start, at = text[at:] + more.decode("latin-1"), start + at, 0
                continue
            yield start + at, end - at, _count_images(row)
            at, wanted = end, ",]"


def _line_of(path: str, place: int) -> str:
    with open(path, "rb") as stream:
        before = 0
        line_start = 0
        position = 0
        while position < place and (block := stream.read(min(WINDOW, place - position))):
            before += block.count(b"\n")
            if (last := block.rfind(b"\n")) >= 0:
                line_start = position + last + 1
            position += len(block)
    return f"line {before + 1}, column {place - line_start + 1}"


class Table:
    """The rows of a `datasets.Dataset`, mapped from disk; images stay undecoded. Attributes as of [`JsonFile`]."""

    broken = None

    def __init__(self, dataset: datasets.Dataset, path: str):
        self.path = path
        # As Arrow has them, images are undecoded. A cast to that would write lists of images anew, all of them.
        self.dataset = dataset.with_format("arrow")
        texts = [name for name in ("conversations", "messages") if name in dataset.column_names]
        if not texts:
            raise ValueError(
                f"{path}: the columns are {', '.join(dataset.column_names)}: expected 'conversations' (LLaVA's "
                "layout) or 'messages' (TRL's)."
            )
        images = [name for name in ("image", "images") if name in dataset.column_names]
        self.text_bytes = np.zeros(len(dataset), dtype=np.int64)
        self.num_images = np.zeros(len(dataset), dtype=np.int64)
        begin = 0
        for batch in self.dataset.select_columns(texts + images).iter(10_000):
            end = begin + len(batch)
            for name in texts:
                self.text_bytes[begin:end] += _string_bytes(batch[name].combine_chunks())
            for name in images:
                column = batch[name]  # not combined: that would copy the images themselves
                count = pc.list_value_length(column) if _is_list(column.type) else pc.is_valid(column).cast(pa.int64())
                self.num_images[begin:end] += pc.fill_null(count, 0).to_numpy()
            begin = end

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.dataset[int(index) : int(index) + 1].to_pylist()[0]

    def rows(self, indices: Iterable[int]) -> Iterator[Any]:
        """Several rows, as of [`JsonFile`]."""
        for batch in self.dataset.select(indices).iter(TABLE_ROWS):
            yield from batch.to_pylist()


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind)


def _string_bytes(column: pa.Array) -> np.ndarray:
    """Bytes of all strings inside each element of a nested column."""
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        return pc.fill_null(pc.binary_length(column), 0).to_numpy(zero_copy_only=False).astype(np.int64)
    if pa.types.is_struct(column.type):
        return sum((_string_bytes(child) for child in column.flatten()), np.zeros(len(column), dtype=np.int64))
    if _is_list(column.type):
        lengths = pc.fill_null(pc.list_value_length(column), 0).to_numpy(zero_copy_only=False)
        totals = np.concatenate([[0], np.cumsum(_string_bytes(column.flatten()))])
        ends = np.cumsum(lengths)
        return totals[ends] - totals[ends - lengths]
    return np.zeros(len(column), dtype=np.int64)


def open_source(source: DataSource) -> JsonFile | Table:
    """
    Opens one source, without checking its rows.

    Raises:
        ValueError: if there is no such file or folder, or it is of no known format.
    """
    path = Path(source.path)
    if path.suffix in (".json", ".jsonl"):
        if not path.is_file():
            raise ValueError(f"{path}: no such file.")
        if source.split is not None:
            raise ValueError(f"{path}: split is {source.split!r}, but a JSON file has no splits: leave it out.")
        return JsonFile(str(path))
    return Table(_load_table(source), source.path)


def _load_table(source: DataSource) -> datasets.Dataset:
    path = Path(source.path)
    parquet = [str(path)] if path.suffix == ".parquet" else sorted(map(str, path.glob("*.parquet")))
    if path.exists() and parquet:
        loaded = datasets.load_dataset("parquet", data_files=parquet, split="train")
    elif path.is_dir():
        if not any((path / name).is_file() for name in ("dataset_info.json", "dataset_dict.json")):
            raise ValueError(
                f"{path}: holds neither Parquet files nor a data set of save_to_disk. Give a .json, .jsonl or "
                ".parquet file, or one of these folders."
            )
        loaded = datasets.load_from_disk(str(path))
    elif path.is_absolute() or path.suffix or source.path.count("/") != 1:
        raise ValueError(f"{path}: no such file or folder, and not the id of a data set on the Hub (org/name).")
    else:
        try:
            loaded = datasets.load_dataset(source.path, split=source.split)
        except (FileNotFoundError, ConnectionError) as error:
            raise ValueError(
                f"{path}: there is no such folder here, and the Hub gave no data set of this id: {error}"
            ) from error
    if isinstance(loaded, datasets.DatasetDict):
        if source.split not in loaded:
            raise ValueError(f"{path}: split is {source.split!r}: give one of {', '.join(loaded)}.")
        loaded = loaded[source.split]
    return loaded


def image_root_of(source: DataSource) -> Path:
    """
    The resolved folder that the images of a source must stay inside of.

    Raises:
        ValueError: if it does not exist.
    """
    path = Path(source.path)
    root = Path(source.image_root) if source.image_root else path if path.is_dir() else path.parent
    if not root.is_dir():
        raise ValueError(f"image_root {root}: no such folder.")
    return root.resolve()
