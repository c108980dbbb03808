"""Reads the files of benchmarks: the Hub's Parquet layout, LLaVA's evaluation folders, datasets on the Hub.

    >>> data = Data.locate("playground/data/eval", "pope", "lmms-lab-encoder/POPE")
    >>> rows = data.table(["question_id", "question", "answer", "image"])

If something is missing, the error names the place and lists what is there instead. Image paths inside files must not
lead out of their folder.
"""

import base64
import binascii
import csv
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa

from sq_llava.data.row_layouts import is_unicode
from sq_llava.json_text import parse_json
from sq_llava.locations import is_hub_id


# Types of fields by name, which are the same in all layouts. `NoneType` marks a field that may be empty. Fields that
# are not listed are checked by their task, or not used.
FIELD_TYPES: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("question_id", "id", "image_id", "index", "answer"), (int, str)),
    **dict.fromkeys(("question", "text", "value", "raw", "category", "gpt_answer"), (str,)),
    **dict.fromkeys(("imagename", "filename", "file_name"), (str,)),
    **dict.fromkeys(("image", "hint"), (str, type(None))),
    **dict.fromkeys(("caption", "captions", "capability"), (str, list)),
    **dict.fromkeys(("choices", "ocr_tokens", "sentences", "conversations", "instances"), (list,)),
    **dict.fromkeys(("images", "annotations", "questions", "data"), (list,)),
    **dict.fromkeys(("answers", "annotations_captions"), (list, type(None))),
}
# Names of splits. A file or dataset of one of these splits is not used in place of another split.
SPLITS = {"train", "training", "val", "valid", "validation", "dev", "test", "testdev"}
# Files of `save_to_disk`: of a dataset, and of several splits.
SAVED = ("dataset_info.json", "dataset_dict.json")
# A JSON escape of half of a surrogate pair. Correct JSON has them in pairs, for an emoji.
_SURROGATE_ESCAPE = re.compile(rb"\\u[dD][89a-fA-F]")


@dataclass(frozen=True, eq=False)
class StoredImage:
    """An image stored in a table. It is read on demand."""

    table: datasets.Dataset
    row: int
    column: str

    def read(self) -> dict[str, Any]:
        """
        Returns:
            `{"bytes": ..., "path": ...}` for `sq_llava.data.images.open_image`.

        Raises:
            ValueError: If the table holds no bytes. A path without bytes is not followed, because it could point
                anywhere on this machine.
        """
        value = self.table.select_columns(self.column)[self.row : self.row + 1].to_pylist()[0][self.column]
        if value is None or value["bytes"] is None:
            raise ValueError(f"row {self.row}: column {self.column} holds no image bytes.")
        return value

    def is_there(self) -> bool:
        """True if the row has an image. Does not read the image."""
        value = self.table.data.column(self.column)[self.row]
        return value.is_valid and value["bytes"].is_valid

    def __str__(self) -> str:
        return f"row {self.row}, column {self.column}"


@dataclass(frozen=True)
class EncodedImage:
    """An image as base64 text in a file. It is decoded on demand."""

    text: str
    place: str = field(compare=False)

    def read(self) -> dict[str, Any]:
        """Returns `{"bytes": ..., "path": ...}` for `sq_llava.data.images.open_image`."""
        try:
            return {"bytes": base64.b64decode(self.text, validate=True), "path": self.place}
        except binascii.Error as error:
            raise ValueError(f"{self.place}: the image is not valid base64 ({error}).") from error

    def __str__(self) -> str:
        return self.place


TaskImage = Path | StoredImage | EncodedImage


@dataclass(frozen=True)
class Data:
    """
    The location of a task's data: a folder, or a dataset on the Hub.

    Args:
        folder (`Path`, *optional*): Folder with Parquet files, or with LLaVA's evaluation files.
        hub_id (`str`, *optional*): Dataset on the Hub, instead of a folder.
        split (`str`, *optional*): Split to use. Default: the split of the task.
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
            place (`str`): A folder with the task's data, or with one folder per task (`pope`, `mm-vet`, ...); a Hub
                id; or `"hub"` for the task's own dataset on the Hub.
            task (`str`): Name of the task. Its folder is found without regard to case, `-` and `_`.
            hub_id (`str`, *optional*): The task's own dataset on the Hub.
            folder_name (`str`, *optional*): Another name that the task's folder may have.

        Raises:
            ValueError: If there is no such folder, or no dataset on the Hub for `"hub"`.
        """
        if place == "hub":
            if hub_id is None:
                raise ValueError(f"--data hub: {task} has no dataset on the Hub. Set --data to a folder.")
            return cls(hub_id=hub_id, split=split)
        folder = Path(place).expanduser()
        if folder.is_dir():
            wanted = {_plain(task), _plain(folder_name or task)}
            below = [child for child in sorted(folder.iterdir()) if child.is_dir() and _plain(child.name) in wanted]
            return cls(folder=below[0] if below else folder, split=split)
        if is_hub_id(place):
            return cls(hub_id=place, split=split)
        raise ValueError(f"--data {place}: no such folder, and not the id of a dataset on the Hub (org/name).")

    def __str__(self) -> str:
        return str(self.folder or self.hub_id)

    @property
    def is_table(self) -> bool:
        """True for a table in the Hub's layout, false for a folder in LLaVA's layout."""
        if self.hub_id is not None or self._is_saved:
            return True
        return any(file for pattern in ("*.parquet", "*/*.parquet") for file in self.folder.glob(pattern))

    def table(
        self, columns: Sequence[str], default_split: str | None = None, config: str | None = None
    ) -> datasets.Dataset:
        """
        The table of the Parquet files or of the dataset on the Hub. Images stay encoded.

        Args:
            columns (`Sequence[str]`): Required columns. The table may have more.
            default_split (`str`, *optional*): Split to use if the data has several and the user chose none.
            config (`str`, *optional*): Configuration of the dataset, which is also the name of its folder.

        Raises:
            ValueError: If a required column or the split is missing.
        """
        if self.hub_id is not None:
            table = self._load_from_hub(config, self.split or default_split)
        elif self._is_saved:
            table = datasets.load_from_disk(str(self.folder))
            if isinstance(table, datasets.Dataset):
                if self.split is not None and table.split is None:
                    raise ValueError(f"--split {self.split}: the dataset in {self} has no splits. Leave --split out.")
                table = {str(table.split): table}
        else:
            table = self._load_parquet(config, default_split)
        if isinstance(table, dict):
            table = self._choose(table, default_split)
        self._check_columns(table, columns)
        return table.with_format("arrow")  # undecoded

    @property
    def _is_saved(self) -> bool:
        return any((self.folder / name).is_file() for name in SAVED)

    def _choose(self, splits: Mapping[str, Any], default: str | None) -> Any:
        """
        What `splits` has for the chosen split. Without a choice, that is the default split, or the only part if its
        name is not that of another split.

        Raises:
            ValueError: If the split is not there.
        """
        if self.split is None and len(splits) == 1 and not splits.keys() & (SPLITS - {default}):
            return next(iter(splits.values()))
        split = self.split or default
        if split not in splits:
            names = ", ".join(sorted(splits))
            raise ValueError(f"{self}: has the splits {names}, but not {split}. Choose one with --split.")
        return splits[split]

    def _load_from_hub(self, config: str | None, split: str | None) -> datasets.Dataset | datasets.DatasetDict:
        try:
            return datasets.load_dataset(self.hub_id, config, split=split)
        except (FileNotFoundError, ConnectionError) as error:
            raise ValueError(f"{self.hub_id}: not in the local cache, and the download failed: {error}") from error
        except ValueError as error:
            raise ValueError(f"{self.hub_id}, split {split}: {error}") from error

    def _load_parquet(self, config: str | None, default_split: str | None) -> datasets.Dataset:
        folder = self.folder
        if config is not None and (folder / config).is_dir():
            folder = folder / config
        files = sorted([*folder.glob("*.parquet"), *folder.glob("data/*.parquet")])
        if not files:
            wanted = f"folder {config} with Parquet files" if config is not None else "Parquet files"
            raise ValueError(f"{self.folder}: has no {wanted}. It contains: {self._listing()}.")
        # The Hub names files after their split: test-00000-of-00002.parquet.
        files_of = defaultdict(list)
        for file in files:
            files_of[file.name.split("-")[0].removesuffix(".parquet")].append(file)
        files = self._choose(files_of, default_split)
        try:
            return datasets.load_dataset("parquet", data_files=[str(file) for file in files], split="train")
        except (ValueError, datasets.exceptions.DatasetGenerationError) as error:
            raise ValueError(f"{self.folder}, {', '.join(file.name for file in files)}: {error}") from error

    def _check_columns(self, table: datasets.Dataset, columns: Sequence[str]) -> None:
        missing = [name for name in columns if name not in table.column_names]
        if missing:
            raise ValueError(
                f"{self}: has no column {', '.join(missing)}. Its columns are: {', '.join(table.column_names)}."
            )
        if "image" in table.column_names:
            kind = table.data.schema.field("image").type
            if not pa.types.is_struct(kind) or kind.get_field_index("bytes") < 0:
                raise ValueError(f"{self}: column image has type {kind}, expected images (bytes and path).")

    def rows(
        self, columns: Sequence[str], default_split: str | None = None, config: str | None = None
    ) -> Iterator[dict[str, Any]]:
        """
        The rows of a table. `image` is a [`StoredImage`], because the image itself stays in its file.

        Args: as for [`Data.table`].

        Raises:
            ValueError: As [`Data.table`], and also if a value has the wrong type.
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

    def split_of_files(self, *splits: str) -> str:
        """
        The chosen split of a folder in LLaVA's layout.

        Args:
            splits (`str`): The splits that such a folder can have. The first one is the default.

        Raises:
            ValueError: If the user chose another one.
        """
        split = self.split or splits[0]
        if split not in splits:
            raise ValueError(
                f"--split {split}: the files of this task in {self.folder} are of the split {' or '.join(splits)}. "
                "Choose it, or leave --split out."
            )
        return split

    def file(self, *names: str) -> Path:
        """
        The first of these files that exists in the folder. Names may be patterns such as `*.jsonl`.

        Raises:
            ValueError: If none exists.
        """
        found = self.find(*names)
        if found is None:
            raise ValueError(
                f"{self.folder}: has neither Parquet files nor {' or '.join(names)}. It contains: {self._listing()}."
            )
        return found

    def find(self, *names: str) -> Path | None:
        """As [`Data.file`], but `None` if no file exists."""
        return next((path for name in names for path in sorted(self.folder.glob(name))), None)

    def _listing(self) -> str:
        there = sorted(child.name + "/" * child.is_dir() for child in self.folder.iterdir())
        more = f" and {len(there) - 20} more" if len(there) > 20 else ""
        return ", ".join(there[:20]) + more if there else "nothing"

    def image(self, root: Path, name: str) -> Path:
        """
        The path of the image `name` in the folder `root`.

        Raises:
            ValueError: If the path leads out of `root`.
        """
        path = (root / name).resolve()
        if not path.is_relative_to(root.resolve()):
            raise ValueError(f"image {name!r} is outside of {root}. Image paths must stay inside this folder.")
        return path


def _plain(name: str) -> str:
    return name.lower().replace("-", "").replace("_", "")


def id_of(row: dict[str, Any], number: int) -> int | str:
    """The id of a question; the number of its row if it has none."""
    return number if row.get("question_id") is None else row["question_id"]


def evenly_spaced(items: Sequence[Any], limit: int | None) -> Sequence[Any]:
    """At most `limit` items, evenly spaced; all items if `limit` is `None`."""
    if limit is None or limit >= len(items):
        return items
    return [items[number * len(items) // limit] for number in range(limit)]


def read_jsonl(path: Path, fields: Sequence[str]) -> list[dict[str, Any]]:
    """
    The rows of a JSON Lines file. Empty lines are skipped.

    Raises:
        ValueError: If a line is not a JSON object or lacks a field. The message has file, line and field.
    """
    rows = []
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            row = _parse(line, f"{path}, line {number}")
            rows.append(check_fields(row, fields, f"{path}, line {number}"))
    return rows


def read_json(path: Path, kind: type = dict) -> Any:
    """The content of a JSON file. Raises a `ValueError` if it is not valid JSON or not a `kind` (`list` or `dict`)."""
    content = _parse(path.read_bytes(), str(path))
    if not isinstance(content, kind):
        raise ValueError(f"{path}: contains {type(content).__name__}, expected {kind.__name__}.")
    return content


def _parse(content: bytes, place: str) -> Any:
    """A JSON value in UTF-8, with or without a byte order mark. Raises a `ValueError` that starts with `place`."""
    try:
        value = parse_json(content.decode("utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"{place}: not valid JSON ({error}).") from error
    if _SURROGATE_ESCAPE.search(content):
        _require_unicode(value, place)
    return value


def _require_unicode(value: Any, place: str) -> None:
    """
    Raises:
        ValueError: If a text has half of a surrogate pair, which no file in UTF-8 can hold. The message has the field.
    """
    if isinstance(value, str) and not is_unicode(value):
        raise ValueError(f"{place}: has half of a surrogate pair: {value[:80]!a}. Write the text again in UTF-8.")
    if isinstance(value, dict | list):
        for name, each in value.items() if isinstance(value, dict) else enumerate(value):
            _require_unicode(each, f"{place}, {name if isinstance(value, dict) else f'row {name}'}")


def read_json_rows(path: Path, fields: Sequence[str]) -> list[dict[str, Any]]:
    """The objects of a JSON list. Raises a `ValueError` with row and field if one is wrong."""
    return [check_fields(row, fields, f"{path}, row {number}") for number, row in enumerate(read_json(path, list))]


def read_json_list(path: Path, name: str, fields: Sequence[str]) -> list[dict[str, Any]]:
    """The objects of the list `name` in a JSON file. Raises a `ValueError` with row and field if one is wrong."""
    rows = check_fields(read_json(path), [name], str(path))[name]
    return [check_fields(row, fields, f"{path}, {name} {number}") for number, row in enumerate(rows)]


def read_tsv(path: Path, fields: Sequence[str]) -> list[dict[str, str]]:
    """
    The rows of a tab-separated table. All values stay text: "None" and "NA" are not converted.

    Raises:
        ValueError: If a column is missing, or the number of fields in a row differs from the number of columns.
    """
    with path.open(encoding="utf-8-sig", newline="") as lines, _long_fields():
        reader = csv.DictReader(lines, delimiter="\t")
        check_fields(dict.fromkeys(reader.fieldnames or (), ""), fields, f"{path}, header")
        rows = []
        for number, row in enumerate(reader):
            if None in row or None in row.values():
                raise ValueError(f"{path}, row {number}: must have {len(reader.fieldnames)} fields, one per column.")
            rows.append(row)
    return rows


@contextmanager
def _long_fields() -> Iterator[None]:
    """Lets `csv` read fields that hold an image. Its limit is one for the whole process."""
    before = csv.field_size_limit(2**31 - 1)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def check_fields(row: Any, fields: Sequence[str], place: str) -> dict[str, Any]:
    """
    Returns the row if it is an object with all `fields`, of the right types.

    Raises:
        ValueError: Otherwise. The message starts with `place`.
    """
    if not isinstance(row, dict):
        raise ValueError(f"{place}: is {type(row).__name__}, expected an object with {', '.join(fields)}.")
    missing = [name for name in fields if name not in row]
    if missing:
        raise ValueError(f"{place}: has no {', '.join(missing)}. It has: {', '.join(row)}.")
    for name in fields:
        types = FIELD_TYPES.get(name, (object,))
        value = row[name]
        if not isinstance(value, types):
            expected = " or ".join(each.__name__ for each in types)
            raise ValueError(f"{place}: {name} is {value!r}, expected {expected}.")
        if name in FIELD_TYPES and isinstance(value, list):
            wrong = [item for item in value if not isinstance(item, (str, dict))]
            if wrong:
                raise ValueError(f"{place}: {name} contains {wrong[0]!r}, expected strings or objects.")
    return row


def unique_by(rows: Sequence[dict[str, Any]], key: str, place: str) -> dict[Any, dict[str, Any]]:
    """Maps the value of `key` to its row. Raises a `ValueError` if two rows have the same value."""
    found: dict[Any, dict[str, Any]] = {}
    for row in rows:
        if row[key] in found:
            raise ValueError(f"{place}: two rows have {key} {row[key]!r}. It must be unique.")
        found[row[key]] = row
    return found
