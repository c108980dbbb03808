"""Opens the sources of rows: JSON files, Parquet, folders of `save_to_disk` and datasets of the Hub.

    >>> rows = open_source(DataSource("mix665k.json", image_root="images"))
    >>> rows[0]["id"]

Tables are mapped from disk, with undecoded images. `sq_llava/data/json_file.py` has the JSON files.
`sq_llava/data/rows.py` reads and checks the rows.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets.packaged_modules.cache.cache import Cache
from huggingface_hub import constants

from sq_llava.data.json_file import JsonFile
from sq_llava.data.row_layouts import (
    EXPECTED,
    IMAGE_FIELDS,
    PART_IMAGE_KEYS,
    TEXT_FIELDS,
    images_of,
    recognize,
)
from sq_llava.locations import is_hub_id


ROW_FILES = {".json": "JSON", ".jsonl": "JSON", ".parquet": "Parquet"}
# Rows of a table read at a time. Few, because they may hold images.
TABLE_ROWS = 32
# `datasets.load_dataset` can load a folder that has a file of one of these types.
DATA_SUFFIXES = {".parquet", ".json", ".jsonl", ".csv", ".arrow", ".tar"}
FILE_SUFFIXES = {*DATA_SUFFIXES, ".tsv", ".txt", ".zip", ".gz", ".xlsx", ".pkl"}


@dataclass
class DataSource:
    """
    One entry of a recipe's `datasets`.

    Args:
        path (`str`): A `.json`, `.jsonl` or `.parquet` file; a folder of `save_to_disk`, or one that
            `datasets.load_dataset` can load; or the id of a dataset on the Hub, which is downloaded completely. For a
            very large one, download a part and give its folder:
            `hf download org/name --repo-type dataset --include "data/train-0000*" --local-dir DIR`.
        image_root (`str`, *optional*): Folder of the images. Image paths are relative to it and must stay inside it.
            Default: the folder of `path`. A dataset of the Hub needs it only if its rows hold paths of images.
        split (`str`, *optional*): A split, or a part of one such as "train[:10%]". Required if there are several.
        name (`str`, *optional*): Configuration (subset). Required if the dataset has several.
        revision (`str`, *optional*): Branch, tag or commit on the Hub.
        weight (`float`, *optional*): How often each row is used in an epoch. With 0.5, half of the rows are used,
            drawn once by the seed, but at least one. Default: 1.
        num_rows (`int`, *optional*): Number of rows in an epoch, in place of `weight`.
        instructions (`list[str]`): Questions for rows whose question is only an image. Each such row gets one of them.
    """

    path: str
    image_root: str | None = None
    split: str | None = None
    name: str | None = None
    revision: str | None = None
    weight: float | None = None
    num_rows: int | None = None
    instructions: list[str] = field(default_factory=list)

    def __post_init__(self):
        if self.weight is not None and self.num_rows is not None:
            raise ValueError(f"datasets, {self.path}: weight and num_rows are both set: remove one of them.")
        for name in ("weight", "num_rows"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"datasets, {self.path}: {name} is {value}: it must be greater than 0.")


class Table:
    """The rows of a `datasets.Dataset`, mapped from disk, with undecoded images. Attributes are as in [`JsonFile`]."""

    broken = None

    def __init__(self, dataset: datasets.Dataset, path: str, folder: Path):
        self.path, self.folder = path, folder
        # The Arrow format leaves images undecoded. Casting the image columns would copy all images in lists.
        self.dataset = dataset.with_format("arrow")
        columns = dataset.column_names
        if recognize(dict.fromkeys(columns, True)) is None:
            raise ValueError(f"{path}: the columns are {', '.join(columns)}: this is no known layout. {EXPECTED}")
        texts = [name for name in columns if name in TEXT_FIELDS]
        # To count images fast, images and texts are first replaced by `True` or null.
        images = [name for name in columns if name in IMAGE_FIELDS]
        if any(_holds_parts(self.dataset.data.schema.field(name)) for name in texts):
            images += texts
        self.text_bytes = np.zeros(len(dataset), dtype=np.int64)
        self.num_images = np.zeros(len(dataset), dtype=np.int64)
        begin = 0
        for batch in self.dataset.select_columns(list(dict.fromkeys(texts + images))).iter(10_000):
            end = begin + len(batch)
            for name in texts:
                self.text_bytes[begin:end] += _string_bytes(batch[name].combine_chunks())
            marks = [pa.chunked_array([_marks(chunk) for chunk in batch[name].chunks]) for name in images]
            rows = pa.Table.from_arrays(marks, images).to_pylist() if images else ()
            self.num_images[begin : begin + len(rows)] = [len(images_of(row)) for row in rows]
            begin = end

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.dataset[int(index) : int(index) + 1].to_pylist()[0]

    def rows(self, indices: Iterable[int]) -> Iterator[Any]:
        """Yields several rows, as in [`JsonFile`]."""
        for batch in self.dataset.select(indices).iter(TABLE_ROWS):
            yield from batch.to_pylist()


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind)


def _is_string(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _holds_parts(field: pa.Field) -> bool:
    """Returns whether a column is a list of turns whose content is a list of parts."""
    turn = field.type.value_type if _is_list(field.type) else None
    if turn is None or not pa.types.is_struct(turn) or turn.get_field_index("content") < 0:
        return False
    return _is_list(turn.field("content").type)


def _marks(column: pa.Array) -> pa.Array:
    """
    Replaces each image and text of a column by `True`, and each absent one by null. Turns, parts and the types of
    parts are kept.
    """
    if _is_list(column.type):
        lengths = pc.fill_null(pc.list_value_length(column), 0).to_numpy(zero_copy_only=False)
        return pa.LargeListArray.from_arrays(np.concatenate([[0], np.cumsum(lengths)]), _marks(column.flatten()))
    if pa.types.is_struct(column.type):
        names = [field.name for field in column.type]
        children = dict(zip(names, column.flatten()))
        if not {"type", "content"} & children.keys():  # an image
            present = np.zeros(len(column), dtype=bool)
            for child in children.values():
                present |= _marks(child).is_valid().to_numpy(zero_copy_only=False)
            return pa.array(np.ones(len(column), dtype=bool), mask=~present)
        kept = [child if name == "type" else _marks(child) for name, child in children.items()]
        return pa.StructArray.from_arrays(kept, names)
    present = column.is_valid().to_numpy(zero_copy_only=False)
    if _is_string(column.type):
        present = pc.fill_null(pc.greater(pc.binary_length(column), 0), False).to_numpy(zero_copy_only=False)
    return pa.array(np.ones(len(column), dtype=bool), mask=~present)


def _string_bytes(column: pa.Array) -> np.ndarray:
    """Counts the bytes of all texts inside each element of a nested column."""
    if _is_string(column.type):
        return pc.fill_null(pc.binary_length(column), 0).to_numpy(zero_copy_only=False).astype(np.int64)
    if pa.types.is_struct(column.type):
        texts = [child for field, child in zip(column.type, column.flatten()) if field.name not in PART_IMAGE_KEYS]
        return sum(map(_string_bytes, texts), np.zeros(len(column), dtype=np.int64))
    if _is_list(column.type):
        lengths = pc.fill_null(pc.list_value_length(column), 0).to_numpy(zero_copy_only=False)
        totals = np.concatenate([[0], np.cumsum(_string_bytes(column.flatten()))])
        ends = np.cumsum(lengths)
        return totals[ends] - totals[ends - lengths]
    return np.zeros(len(column), dtype=np.int64)


def open_source(source: DataSource) -> JsonFile | Table:
    """
    Opens one source, without checking its rows. A dataset of the Hub is downloaded if it is not in the cache.

    Raises:
        ValueError: if there is no such file, folder, dataset, configuration, revision or split, or its format is
            unknown.
    """
    path = Path(source.path).expanduser()
    if kind := ROW_FILES.get(path.suffix.lower()):
        if not path.is_file():
            raise ValueError(f"{path}: no such file.")
        _refuse(source, f"a {kind} file", "split", "name", "revision")
        if kind == "JSON":
            return JsonFile(str(path))
        loaded = _complain(source, lambda: datasets.load_dataset("parquet", data_files=str(path), split="train"))
        return Table(loaded, source.path, path.parent)
    if path.is_file():
        raise ValueError(
            f"{path}: the suffix of a data file must be {', '.join(ROW_FILES)}. Convert the file, or put it into a "
            "folder and give the folder, if `datasets.load_dataset` can read it."
        )
    if path.is_dir():
        if any((path / name).is_file() for name in ("dataset_info.json", "dataset_dict.json", "state.json")):
            return Table(_load_saved(source, path), _label(source), path)
        _refuse(source, "a folder", "revision")
        if not holds_dataset(path):
            raise ValueError(
                f"{path}: the folder has neither data files ({', '.join(sorted(DATA_SUFFIXES))}) nor a dataset of "
                "save_to_disk."
            )
        return Table(_load_dataset(source, str(path)), _label(source), path)
    if not is_hub_id(source.path) or path.suffix.lower() in FILE_SUFFIXES:
        raise ValueError(f"{path}: no such file or folder, and this is no id of a dataset on the Hub (org/name).")
    return Table(_load_dataset(source, source.path), _label(source), _hub_folder(source.path))


def holds_dataset(folder: Path) -> bool:
    """Returns whether a folder has a file that `datasets` can load."""
    return any(file.suffix.lower() in DATA_SUFFIXES for file in folder.rglob("*"))


def _label(source: DataSource) -> str:
    """Returns the name of the source for error messages."""
    details = [value for value in (source.name, source.split) if value is not None]
    return f"{source.path} ({', '.join(details)})" if details else source.path


def _refuse(source: DataSource, what: str, *fields: str) -> None:
    """
    Raises:
        ValueError: if one of the fields is set, though `what` has no such thing.
    """
    for field_name in fields:
        if (value := getattr(source, field_name)) is not None:
            kind = {"split": "splits", "name": "configurations", "revision": "revisions"}[field_name]
            raise ValueError(f"{source.path}: {field_name} is {value!r}, but {what} has no {kind}: remove it.")


def _complain(source: DataSource, load: Callable[[], Any]) -> Any:
    """
    Calls `load`, and shortens its errors.

    Raises:
        ValueError: with the error of `datasets` in one line.
    """
    try:
        return load()
    # `datasets` raises RuntimeError for a dataset that is a script. The script is never run.
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        says_nothing = isinstance(error, datasets.exceptions.DatasetGenerationError) and error.__cause__ is not None
        reason = error.__cause__ if says_nothing else error
        reason = " ".join(str(reason).partition("Example of usage")[0].split())
        is_missing = isinstance(error, (FileNotFoundError, ConnectionError)) and not Path(source.path).exists()
        here = " There is no folder of this name either." if is_missing else ""
        raise ValueError(f"{_label(source)}: cannot be loaded: {reason}{here}") from error


def _load_saved(source: DataSource, path: Path) -> datasets.Dataset:
    """Loads a folder of `save_to_disk`."""
    _refuse(source, "a folder of save_to_disk", "name", "revision")
    loaded = _complain(source, lambda: datasets.load_from_disk(str(path)))
    if isinstance(loaded, datasets.Dataset):
        if source.split in (None, str(loaded.split)):
            return loaded
        _refuse(source, "a folder of a single dataset", "split")
    split = _choose_split(source, list(loaded))
    lengths = {name: len(rows) for name, rows in loaded.items()}
    slices = _complain(source, lambda: datasets.ReadInstruction.from_spec(split).to_absolute(lengths))
    return datasets.concatenate_datasets(
        [loaded[each.splitname].select(range(lengths[each.splitname])[each.from_ : each.to]) for each in slices]
    )


def _load_dataset(source: DataSource, path: str) -> datasets.Dataset:
    """Loads a dataset of the Hub, or a folder with its files, as `datasets.load_dataset` does."""
    builder = _complain(
        source, lambda: datasets.load_dataset_builder(path, name=source.name, revision=source.revision)
    )
    if isinstance(builder, Cache):
        builder = _of_revision(source, builder)
    split = _choose_split(source, list(builder.info.splits or builder.config.data_files))
    _complain(source, builder.download_and_prepare)
    return _complain(source, lambda: builder.as_dataset(split=split))


def _choose_split(source: DataSource, names: list[str]) -> str:
    names = [str(name) for name in names]
    if source.split is None and len(names) == 1:
        return names[0]
    asked = [piece.partition("[")[0].strip() for piece in (source.split or "").split("+")]
    if not set(asked) <= set(names):
        raise ValueError(
            f"{source.path}: split is {source.split!r}: use one of {', '.join(names)}, or a part such as "
            f"{names[0]}[:10%]. In a recipe: datasets: [{{path: {source.path}, split: {names[0]}}}]"
        )
    return source.split


def _of_revision(source: DataSource, builder: Cache) -> Cache:
    """
    Finds the requested configuration and revision in the cache. If the Hub cannot be reached, `datasets` takes the
    newest ones of the cache instead of those requested.

    Raises:
        ValueError: if they are not in the cache, or there are several configurations and none is named.
    """
    newest = Path(builder.cache_dir)
    names = sorted(folder.name for folder in newest.parents[1].iterdir() if folder.is_dir())
    if source.name is None and len(names) > 1:
        raise ValueError(
            f"{source.path}: the Hub cannot be reached, and the cache has the configurations {', '.join(names)}: set "
            "name to one of them."
        )
    if source.revision is None:
        return builder
    ref = _hub_folder(source.path) / "refs" / source.revision
    commit = ref.read_text().strip() if ref.is_file() else source.revision
    if not (newest.parent / commit).is_dir():
        commits = sorted(folder.name for folder in newest.parent.iterdir() if folder.is_dir())
        raise ValueError(
            f"{source.path}: the Hub does not give revision {source.revision!r}, and the cache has only the commits "
            f"{', '.join(commits)}: use one of them, or connect to the Hub."
        )
    version, name = newest.parent.name, builder.config.name
    return Cache(
        repo_id=source.path, dataset_name=builder.dataset_name, config_name=name, version=version, hash=commit
    )


def _hub_folder(dataset: str) -> Path:
    """Returns the folder of the Hub's cache with the files of a dataset, such as images."""
    return Path(constants.HF_HUB_CACHE) / f"datasets--{dataset.replace('/', '--')}"


def image_root_of(source: DataSource, rows: JsonFile | Table) -> Path:
    """
    Returns the resolved folder in which the images of a source must be.

    Raises:
        ValueError: if `image_root` is set and does not exist.
    """
    if source.image_root is None:
        return rows.folder.resolve()
    root = Path(source.image_root).expanduser()
    if not root.is_dir():
        raise ValueError(f"image_root {root}: no such folder.")
    return root.resolve()
