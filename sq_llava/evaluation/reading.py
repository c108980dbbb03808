"""The files of benchmarks: the Hub's Parquet layout, LLaVA's own evaluation folders, data sets of the Hub.

    >>> data = Data.locate("playground/data/eval", "pope", "lmms-lab-encoder/POPE")
    >>> rows = data.table(["question_id", "question", "answer", "image"])

Everything that is missing is an error with its place and with what was found there. Image paths that files name must
stay inside of their folder.
"""

import base64
import binascii
import csv
import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa

from sq_llava.locations import is_hub_id


# What fields hold, by their names, which mean the same in all layouts; with `NoneType` they may be empty. What is not
# here is checked by its task, or not used.
NUMBER_OR_TEXT = (int, str)
FIELD_TYPES: dict[str, tuple[type, ...]] = {
    "question_id": NUMBER_OR_TEXT,
    "id": NUMBER_OR_TEXT,
    "image_id": NUMBER_OR_TEXT,
    "index": NUMBER_OR_TEXT,
    "question": (str,),
    "text": (str,),
    "value": (str,),
    "raw": (str,),
    "category": (str,),
    "answer": NUMBER_OR_TEXT,
    "gpt_answer": (str,),
    "caption": (str, list),
    "capability": (str, list),
    "choices": (list,),
    "ocr_tokens": (list,),
    "sentences": (list,),
    "conversations": (list,),
    "imagename": (str,),
    "filename": (str,),
    "file_name": (str,),
    "images": (list,),
    "annotations": (list,),
    "questions": (list,),
    "data": (list,),
    "image": (str, type(None)),
    "hint": (str, type(None)),
    "answers": (list, type(None)),
    "annotations_captions": (list, type(None)),
}


@dataclass(frozen=True, eq=False)
class StoredImage:
    """An image inside a table, read when it is asked for."""

    table: datasets.Dataset
    row: int
    column: str

    def read(self) -> dict[str, Any]:
        """
        Returns `{"bytes": ..., "path": ...}`, as `sq_llava.data.images.open_image` takes it.

        Raises:
            ValueError: if there is none. A path alone is not followed: it would lead anywhere on this machine.
        """
        value = self.table.select_columns(self.column)[self.row : self.row + 1].to_pylist()[0][self.column]
        if value is None or value["bytes"] is None:
            raise ValueError(f"row {self.row}: {self.column} holds no bytes of an image.")
        return value

    def is_there(self) -> bool:
        """Whether the table has it, looked up without reading it."""
        value = self.table.data.column(self.column)[self.row]
        return value.is_valid and value["bytes"].is_valid

    def __str__(self) -> str:
        return f"row {self.row}, column {self.column}"


@dataclass(frozen=True)
class EncodedImage:
    """An image as base64 in the text of a file, decoded when it is asked for."""

    text: str
    place: str = field(compare=False)

    def read(self) -> dict[str, Any]:
        """Returns `{"bytes": ..., "path": ...}`, as `sq_llava.data.images.open_image` takes it."""
        try:
            return {"bytes": base64.b64decode(self.text, validate=True), "path": self.place}
        except binascii.Error as error:
            raise ValueError(f"{self.place}: is not base64 ({error}).") from error

    def __str__(self) -> str:
        return self.place


TaskImage = Path | StoredImage | EncodedImage


@dataclass(frozen=True)
class Data:
    """
    Where a task's data lies: a folder, or the id of a data set on the Hub.

    Args:
        folder (`Path`, *optional*): With Parquet files, or with the files of LLaVA's evaluation.
        hub_id (`str`, *optional*): Instead of it.
        split (`str`, *optional*): The one to take, where there are several.
    """

    folder: Path | None = None
    hub_id: str | None = None
    split: str | None = None

    @classmethod
    def locate(
        cls, place: str, task: str, hub_id: str | None, split: str | None = None, folder_name: str | None = None
    ) -> "Data":
        """
        Finds the data of one task.

        Args:
            place (`str`): A folder with the task's data, or with a folder for each task (`pope`, `mm-vet`, ...);
                the id of a data set on the Hub; or `"hub"` for the task's own.
            folder_name (`str`, *optional*): Another name that the task's folder may have.

        Raises:
            ValueError: if there is no such folder.
        """
        if place == "hub":
            if hub_id is None:
                raise ValueError(f"{task}: has no data set on the Hub. Give --data a folder.")
            return cls(hub_id=hub_id, split=split)
        folder = Path(place).expanduser()
        if folder.is_dir():
            wanted = {_plain(task), _plain(folder_name or task)}
            below = [child for child in sorted(folder.iterdir()) if child.is_dir() and _plain(child.name) in wanted]
            return cls(folder=below[0] if below else folder, split=split)
        if is_hub_id(place):
            return cls(hub_id=place, split=split)
        raise ValueError(f"--data {place}: no such folder, and not the id of a data set on the Hub (org/name).")

    def __str__(self) -> str:
        return str(self.folder or self.hub_id)

    @property
    def is_table(self) -> bool:
        """Whether this is the Hub's layout rather than LLaVA's folders."""
        if self.hub_id is not None or (self.folder / "dataset_info.json").is_file():
            return True
        return any(file for pattern in ("*.parquet", "*/*.parquet") for file in self.folder.glob(pattern))

    def table(
        self, columns: Sequence[str], default_split: str | None = None, config: str | None = None
    ) -> datasets.Dataset:
        """
        The rows of the Parquet files, or of the Hub's data set, images undecoded.

        Args:
            columns: What must be there; there may be more.
            default_split (`str`, *optional*): The split to take, if there are several and none was asked for.
            config (`str`, *optional*): The part of the Hub's data set; the folder of its files, if they have one.

        Raises:
            ValueError: if a column is missing, or the split that was asked for.
        """
        split = self.split or default_split
        if self.hub_id is not None:
            table = self._load_from_hub(config, split)
        elif (self.folder / "dataset_info.json").is_file():
            table = datasets.load_from_disk(str(self.folder))
        else:
            table = self._load_parquet(config, split)
        if isinstance(table, datasets.DatasetDict):
            raise ValueError(f"{self}: has the splits {', '.join(table)}: give --split.")
        self._check_columns(table, columns)
        return table.with_format("arrow")  # undecoded

    def _load_from_hub(self, config: str | None, split: str | None) -> datasets.Dataset | datasets.DatasetDict:
        try:
            return datasets.load_dataset(self.hub_id, config, split=split)
        except (FileNotFoundError, ConnectionError) as error:
            raise ValueError(f"{self.hub_id}: not in the cache, and the Hub did not give it: {error}") from error
        except ValueError as error:
            raise ValueError(f"{self.hub_id}, split {split}: {error}") from error

    def _load_parquet(self, config: str | None, split: str | None) -> datasets.Dataset:
        folder = self.folder
        if config is not None and (folder / config).is_dir():
            folder = folder / config
        files = sorted([*folder.glob("*.parquet"), *folder.glob("data/*.parquet")])
        if not files:
            raise ValueError(f"{self.folder}: holds no Parquet files of {config or 'the task'}: {self._listing()}.")
        # The Hub's files are named after their split: test-00000-of-00002.parquet.
        files_of = defaultdict(list)
        for file in files:
            files_of[file.name.split("-")[0].removesuffix(".parquet")].append(file)
        if len(files_of) > 1 or self.split is not None:
            if split not in files_of:
                names = ", ".join(sorted(files_of))
                raise ValueError(f"{self.folder}: has the splits {names}, not {split}: give --split.")
            files = files_of[split]
        try:
            return datasets.load_dataset("parquet", data_files=[str(file) for file in files], split="train")
        except (ValueError, datasets.exceptions.DatasetGenerationError) as error:
            raise ValueError(f"{self.folder}, {', '.join(file.name for file in files)}: {error}") from error

    def _check_columns(self, table: datasets.Dataset, columns: Sequence[str]) -> None:
        missing = [name for name in columns if name not in table.column_names]
        if missing:
            raise ValueError(
                f"{self}: has no column {', '.join(missing)}. Its columns are {', '.join(table.column_names)}."
            )
        if "image" in table.column_names:
            kind = table.data.schema.field("image").type
            if not pa.types.is_struct(kind) or kind.get_field_index("bytes") < 0:
                raise ValueError(f"{self}: the column image is of type {kind}: expected images (bytes and path).")

    def rows(
        self, columns: Sequence[str], default_split: str | None = None, config: str | None = None
    ) -> Iterator[dict[str, Any]]:
        """
        The rows of a table; of their `image` only its place, as it stays in its file.

        Args: as of [`Data.table`].

        Raises:
            ValueError: if a value is of another type than its column has, as well.
        """
        table = self.table(columns, default_split, config)
        names = [name for name in table.column_names if name != "image"]
        needed = [name for name in columns if name != "image"]
        has_image = "image" in table.column_names
        number = 0
        for batch in table.select_columns(names).iter(1000):
            for row in batch.to_pylist():
                check_fields(row, needed, f"{self}, row {number}")
                yield {**row, "image": StoredImage(table, number, "image")} if has_image else row
                number += 1

    def file(self, *names: str) -> Path:
        """
        The first of these files (patterns such as `*.jsonl` too) that is in the folder.

        Raises:
            ValueError: if there is none.
        """
        found = self.find(*names)
        if found is None:
            raise ValueError(
                f"{self.folder}: has neither Parquet files nor {' or '.join(names)}. It holds: {self._listing()}."
            )
        return found

    def find(self, *names: str) -> Path | None:
        """As [`Data.file`], for a file that need not be there."""
        return next((path for name in names for path in sorted(self.folder.glob(name))), None)

    def _listing(self) -> str:
        there = sorted(child.name + "/" * child.is_dir() for child in self.folder.iterdir())
        return ", ".join(there[:20]) + (f" and {len(there) - 20} more" if len(there) > 20 else "")

    def image(self, root: Path, name: str) -> Path:
        """
        The path of an image that a file names.

        Raises:
            ValueError: if it leads out of the folder `root`.
        """
        path = (root / name).resolve()
        if not path.is_relative_to(root.resolve()):
            raise ValueError(f"image {name!r} lies outside of {root}: give a path inside of it.")
        return path


def _plain(name: str) -> str:
    return name.lower().replace("-", "").replace("_", "")


def evenly_spaced(items: Sequence[Any], limit: int | None) -> Sequence[Any]:
    """At most `limit` of the items, evenly spaced; all of them where it is `None`."""
    if limit is None or limit >= len(items):
        return items
    return [items[number * len(items) // limit] for number in range(limit)]


def read_jsonl(path: Path, fields: Sequence[str]) -> list[dict[str, Any]]:
    """
    Raises:
        ValueError: with file, line and field, if a line is no JSON object or lacks a field.
    """
    rows = []
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode())
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: not JSON ({error}).") from error
            rows.append(check_fields(row, fields, f"{path}, line {number}"))
    return rows


def read_json(path: Path, kind: type = dict) -> Any:
    """Raises a `ValueError` if the file is not JSON, or another `kind` of it: `list` or `dict`."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error}).") from error
    if not isinstance(content, kind):
        raise ValueError(f"{path}: is {type(content).__name__}, not {kind.__name__}.")
    return content


def read_json_rows(path: Path, fields: Sequence[str]) -> list[dict[str, Any]]:
    """The objects of a JSON list. Raises a `ValueError` with row and field, if one is wrong."""
    return [check_fields(row, fields, f"{path}, row {number}") for number, row in enumerate(read_json(path, list))]


def read_tsv(path: Path, fields: Sequence[str]) -> list[dict[str, str]]:
    """
    The rows of a table with tabs, all of them texts: no "None" or "NA" becomes another thing.

    Raises:
        ValueError: if a column is missing, or a row has more or fewer fields than there are columns.
    """
    csv.field_size_limit(2**31 - 1)  # images are in fields
    with path.open(encoding="utf-8", newline="") as lines:
        reader = csv.DictReader(lines, delimiter="\t")
        check_fields(dict.fromkeys(reader.fieldnames or (), ""), fields, f"{path}, header")
        rows = []
        for number, row in enumerate(reader):
            if None in row or None in row.values():
                raise ValueError(f"{path}, row {number}: has not as many fields as there are columns.")
            rows.append(row)
    return rows


def check_fields(row: Any, fields: Sequence[str], place: str) -> dict[str, Any]:
    """Returns the row. Raises a `ValueError` with its place, if it is no object or lacks a field, or one is wrong."""
    if not isinstance(row, dict):
        raise ValueError(f"{place}: is {type(row).__name__}, not an object with {', '.join(fields)}.")
    missing = [name for name in fields if name not in row]
    if missing:
        raise ValueError(f"{place}: has no {', '.join(missing)}. It has: {', '.join(row)}.")
    for name in fields:
        types = FIELD_TYPES.get(name, (object,))
        value = row[name]
        if not isinstance(value, types):
            expected = " or ".join(each.__name__ for each in types)
            raise ValueError(f"{place}: {name} is {value!r}: expected {expected}.")
        if isinstance(value, list) and not all(isinstance(item, (str, dict)) for item in value):
            wrong = next(item for item in value if not isinstance(item, (str, dict)))
            raise ValueError(f"{place}: {name} has {wrong!r} in it: expected texts or objects.")
    return row


def unique_by(rows: Sequence[dict[str, Any]], key: str, place: str) -> dict[Any, dict[str, Any]]:
    """Rows by their key. Raises a `ValueError` for one that is there twice: answers are matched by id."""
    found: dict[Any, dict[str, Any]] = {}
    for row in rows:
        if row[key] in found:
            raise ValueError(f"{place}: {key} {row[key]!r} is there twice.")
        found[row[key]] = row
    return found
