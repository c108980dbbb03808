"""Reads image-caption pairs in the layouts in which people have them.

| file | a row |
|---|---|
| `.json`, `.jsonl` | an object with `image` and `caption`, and optionally `id` |
| `.json`, `.jsonl` | LLaVA's pretraining set: `image`, and `conversations` with the caption as the only answer |
| `.csv`, `.tsv` with a header | columns `image` and `caption`, and optionally `id` |
| `.tsv` without a header | Conceptual Captions: caption and URL, or caption and file, in either order |

`file_name` and `url` can take the place of `image`, and `text` that of `caption`. An `id` that is `null` or empty is
the same as none. The image of a URL is the file that a downloader has made of it: `00012/000120034.jpg` for row
120,034, as img2dataset names it, or else a file with the name at the end of the URL.
"""

import csv
import os
import posixpath
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote, urlsplit

from sq_llava.data.json_file import JsonFile
from sq_llava.data.row_layouts import is_unicode, normalize, recognize
from sq_llava.early_checks import IMAGE_SUFFIXES


IMAGE_FIELDS = ("image", "file_name", "url")
CAPTION_FIELDS = ("caption", "text")
HEADER = "The first line must name the columns: image and caption, optionally id."
# Rows of a table without a header that are read to find the column of the images.
FIRST_ROWS = 20
# img2dataset puts this many images into a folder.
IMAGES_PER_FOLDER = 10_000


@dataclass(frozen=True)
class Caption:
    """One row of the input. `id` is the row's own, or its number. `line` is known for tables only."""

    id: str
    image: str
    text: str
    line: int | None = None


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be used."""

    error: str
    line: int | None = None


class CaptionFile:
    """
    Iterates over the captions of a file. Each iteration reads the file again, so the rows are never all in memory. For
    a row that cannot be used, it yields a [`BadRow`].

    Args:
        path (`Path`): A file in one of the layouts in the table above.
        limit (`int`, *optional*): Number of rows to read.
        image_root (`Path`, *optional*): Folder of the images. Default: the folder of the file.

    Raises:
        ValueError: If the file is missing, of another kind or encoding, or its columns are unknown.
    """

    def __init__(self, path: Path, limit: int | None = None, image_root: Path | None = None):
        self._suffix = path.suffix.lower()
        if self._suffix not in (".json", ".jsonl", ".csv", ".tsv"):
            raise ValueError(f"{path}: captions must be in a .json, .jsonl, .csv or .tsv file.")
        if not path.is_file():
            raise ValueError(f"{path}: no such file.")
        self.path, self.limit, self.image_root = path, limit, image_root or path.parent
        with path.open("rb") as file:
            if file.read(2) in (b"\xff\xfe", b"\xfe\xff"):
                raise ValueError(f"{path}, line 1: the file is in UTF-16. Save it again as UTF-8.")
        self._json = JsonFile(str(path)) if self._suffix.startswith(".json") else None
        if self._json is None:
            self._columns, self._num_columns, self._begin = self._find_columns()
        elif self._json.broken:
            raise ValueError(f"{path}, after row {len(self._json) - 1}: cannot be read as JSON: {self._json.broken}.")

    def __iter__(self) -> Iterator[Caption | BadRow]:
        rows = self._table_rows() if self._json is None else self._json_rows()
        for number, (row, line) in enumerate(islice(rows, self.limit)):
            try:
                yield self._caption(row, number, line)
            except ValueError as error:
                yield BadRow(str(error), line)

    def places(self, rows: Iterable[tuple[int, int | None]]) -> list[str]:
        """The places of rows for error messages: file, line and row. `rows`: number and, if it is known, line."""
        rows = list(rows)
        numbers = [number for number, _ in rows]
        lines = [line for _, line in rows] if self._json is None else self._json.lines(numbers)
        return [f"{self.path}, line {line} (row {number})" for number, line in zip(numbers, lines)]

    def _json_rows(self) -> Iterator[tuple[Any, None]]:
        for row in self._json.rows(range(len(self._json))):
            yield row, None

    def _read_table(self) -> Iterator[tuple[list[str] | ValueError, int]]:
        """Yields the fields of each row that is not blank, and its first line. Bytes that are no UTF-8 stay."""
        with self.path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as lines:
            # In a .tsv file, quotation marks have no meaning: a caption may start with one that is never closed.
            tab = {"delimiter": "\t", "quoting": csv.QUOTE_NONE}
            reader = csv.reader(lines, **(tab if self._suffix == ".tsv" else {}))
            while True:
                line = reader.line_num + 1
                try:
                    row = next(reader)
                except StopIteration:
                    return
                except csv.Error as error:
                    yield ValueError(f"cannot be read as a row of {self._suffix}: {error}"), line
                    continue
                if row:
                    yield row, line

    def _find_columns(self) -> tuple[dict[str, int], int, int]:
        """The place of each column that is read, the number of columns, and the number of rows of the header."""
        first = [row for row, _ in islice(self._read_table(), FIRST_ROWS) if isinstance(row, list)]
        header = [name.strip() for name in first[0]] if first else []
        columns = {
            role: next((header.index(name) for name in names if name in header), None)
            for role, names in (("image", IMAGE_FIELDS), ("caption", CAPTION_FIELDS), ("id", ("id",)))
        }
        columns = {role: place for role, place in columns.items() if place is not None}
        if {"image", "caption"} <= columns.keys() or not first:
            return columns, len(header), min(1, len(first))
        if not columns and self._suffix == ".tsv":
            for image in (1, 0):
                if any(len(row) == 2 and _names_image(row[image]) for row in first):
                    return {"image": image, "caption": 1 - image}, 2, 0
        missing = " and ".join(f"no column {name}" for name in ("caption", "image") if name not in columns)
        raise ValueError(
            f"{self.path}, line 1: has {missing}, only {header}. {HEADER} A .tsv file without a header must have two "
            "columns: the caption, and the file or URL of its image."
        )

    def _table_rows(self) -> Iterator[tuple[dict[str, str] | ValueError, int]]:
        for row, line in islice(self._read_table(), self._begin, None):
            if isinstance(row, ValueError):
                yield row, line
            elif len(row) != self._num_columns:
                yield ValueError(f"has {len(row)} columns, expected {self._num_columns}: {row!r:.100}."), line
            else:
                yield {role: row[place] for role, place in self._columns.items()}, line

    def _caption(self, row: Any, number: int, line: int | None) -> Caption:
        if isinstance(row, UnicodeDecodeError):
            raise ValueError(f"is not UTF-8: {row}. Save the file again as UTF-8.") from row
        if isinstance(row, ValueError):
            raise ValueError(f"cannot be read as JSON: {row}") if self._json is not None else row
        if not isinstance(row, dict):
            raise ValueError(f"is {row!r:.100}, expected an object with image and caption.")
        row = _as_pair(row)
        for name in ("image", "caption"):
            value = row.get(name)
            if not isinstance(value, str) or not value.strip():
                raise ValueError(f"{name} is {value!r:.100}, expected a text. Correct or remove the row.")
        row["id"] = str(row.get("id", number))
        for name in ("image", "caption", "id"):
            if not is_unicode(row[name]):
                raise ValueError(f"{name} is {row[name]!r:.100}, which is not UTF-8. Save the file as UTF-8.")
        image = row["image"]
        if _is_url(image):
            image = self._file_of_url(image, number)
        return Caption(row["id"], image, " ".join(row["caption"].split()), line)

    def _file_of_url(self, url: str, number: int) -> str:
        """The file of a URL's image, as a path in the image root; the first name if there is no such file."""
        folder, place = divmod(number, IMAGES_PER_FOLDER)
        usual = f"{folder:05}/{folder:05}{place:04}.jpg"
        if os.path.isfile(os.path.join(self.image_root, usual)):
            return usual
        last = posixpath.basename(unquote(urlsplit(url).path))
        return last if last and os.path.isfile(os.path.join(self.image_root, last)) else usual


def _as_pair(row: dict[str, Any]) -> dict[str, Any]:
    """A row with `image` and `caption` under these names. The caption of a conversation is its only answer."""
    image = next((row[name] for name in IMAGE_FIELDS if row.get(name) is not None), None)
    caption = next((row[name] for name in CAPTION_FIELDS if row.get(name) is not None), None)
    if caption is None and recognize(row) is not None:
        read = normalize(row)
        if read.faults:
            raise ValueError(f"{read.faults[0].message} {read.faults[0].fix}")
        answers = [message for message in read.messages if message["role"] == "assistant"]
        if len(answers) != 1 or len(read.images) != 1:
            raise ValueError(
                f"has {len(answers)} answers and {len(read.images)} images, expected one image and its caption as the "
                "only answer."
            )
        image, caption = read.images[0], "".join(part.get("text", "") for part in answers[0]["content"])
    return {"image": image, "caption": caption, **({} if row.get("id") in (None, "") else {"id": row["id"]})}


def _is_url(text: str) -> bool:
    return text.startswith(("http://", "https://"))


def _names_image(text: str) -> bool:
    return _is_url(text) or PurePosixPath(text.strip()).suffix.lower() in IMAGE_SUFFIXES
