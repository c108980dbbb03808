"""Finds the rows of a `.json` or `.jsonl` file. Only their positions are kept in memory.

>>> rows = JsonFile("mix665k.json")
>>> len(rows), rows[0]["id"]
"""

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from sq_llava.data.row_layouts import measure
from sq_llava.json_text import parse_json


# Bytes of JSON read at a time, and the largest size of a row. A larger row counts as broken JSON.
WINDOW = 2**24
MAX_ROW_BYTES = 2**26
BOM = b"\xef\xbb\xbf"


class JsonFile:
    """
    The rows of a `.json` or `.jsonl` file. A row is parsed when it is read.

    Attributes:
        offsets, sizes (`np.ndarray` of int64): Position and size of each row, in bytes.
        num_images (`np.ndarray` of int64): Number of images of each row.
        text_bytes (`np.ndarray` of int64): Bytes of text in each row. For a JSON file, this is the size of the row's
            JSON without base64 images.
        folder (`Path`): Default folder of the images.
        broken (`str` or `None`): The error that makes the rest of the file unreadable.
    """

    def __init__(self, path: str):
        self.path = str(path)
        self.folder = Path(path).parent
        self.broken = None
        places = []
        try:
            for place in (_scan_lines if self.path.lower().endswith(".jsonl") else _scan_list)(self.path):
                places.append(place)
        except ValueError as error:
            self.broken = str(error)
        table = np.array(places, dtype=np.int64).reshape(-1, 4)
        self.offsets, self.sizes, self.num_images, in_base64 = table.T.copy()
        self.text_bytes = self.sizes - in_base64

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
        """Yields several rows, faster than one by one. In place of a row that cannot be read it yields the error."""
        for data in self._read_several(indices):
            try:
                yield parse_json(data.decode("utf-8"))
            except ValueError as error:
                yield error

    def lines(self, indices: Iterable[int]) -> list[int]:
        """The lines of the file on which rows begin, counted from 1. `indices` must be sorted."""
        lines, line, position = [], 1, 0
        with open(self.path, "rb") as stream:
            for index in indices:
                while position < self.offsets[index]:
                    block = stream.read(min(WINDOW, int(self.offsets[index]) - position))
                    line, position = line + block.count(b"\n"), position + len(block)
                lines.append(line)
        return lines

    def __getitem__(self, index: int) -> Any:
        """
        Raises:
            ValueError: if the row is not JSON in UTF-8.
        """
        return parse_json(self.read(index).decode("utf-8"))


def _scan_lines(path: str) -> Iterator[tuple[int, int, int, int]]:
    with open(path, "rb") as stream:
        offset = 0
        while line := stream.readline(MAX_ROW_BYTES + 1):
            if len(line) > MAX_ROW_BYTES:
                raise ValueError(f"{_line_of(path, offset)}: the row has more than {MAX_ROW_BYTES:,} bytes")
            text = line.removeprefix(BOM) if offset == 0 else line
            begin = offset + len(line) - len(text.lstrip())
            offset += len(line)
            if not text.strip():
                continue
            try:
                measures = measure(parse_json(text))
            except ValueError:
                measures = (0, 0)  # reading the row reports the error
            yield begin, len(text.strip()), *measures


_SPACE = re.compile(r"[ \t\r\n]*")


def _scan_list(path: str) -> Iterator[tuple[int, int, int, int]]:
    """Yields position, size and [`measure`] of each row of a JSON list, without loading the list."""
    with open(path, "rb") as stream:
        window = _Window(path, stream)
        delimiter = window.take("[", "expected [ (a file with one row per line must be named .jsonl)")
        if window.peek() == "]":
            delimiter = window.take("]")
        while delimiter != "]":
            yield window.take_row()
            delimiter = window.take(",]", "expected , or ]")
        end = window.position
        if not window.is_at_end():
            raise window.error(end, "there is text after the end of the list")


class _Window:
    """
    A part of a JSON file that moves forward. Bytes are decoded as Latin-1, because then a character and its byte have
    the same position. This gives wrong texts, but correct ends of rows.
    """

    def __init__(self, path: str, stream: BinaryIO):
        self.path, self.stream, self.decoder = path, stream, json.JSONDecoder()
        # `text` begins at byte `start` of the file. Its characters before `at` are done.
        self.text, self.at = "", 0
        self.start = len(BOM) if stream.read(len(BOM)) == BOM else 0
        stream.seek(self.start)

    @property
    def position(self) -> int:
        return self.start + self.at

    def read_on(self) -> bool:
        """Moves the window forward. Returns `False` at the end of the file, or if a row would be too large."""
        rest = self.text[self.at :]
        more = self.stream.read(max(WINDOW, len(rest))) if len(rest) < MAX_ROW_BYTES else b""
        self.text, self.start, self.at = rest + more.decode("latin-1"), self.position, 0
        return bool(more)

    def is_at_end(self) -> bool:
        """Skips white space. Returns whether the file ends there."""
        while True:
            self.at = _SPACE.match(self.text, self.at).end()
            if self.at < len(self.text):
                return False
            if not self.read_on():
                return True

    def peek(self) -> str:
        """Returns the next character after white space."""
        if self.is_at_end():
            raise self.error(self.position, "the list is not closed")
        return self.text[self.at]

    def take(self, wanted: str, message: str = "") -> str:
        """Takes the next character, which must be one of `wanted`."""
        if self.peek() not in wanted:
            raise self.error(self.position, message)
        self.at += 1
        return self.text[self.at - 1]

    def take_row(self) -> tuple[int, int, int, int]:
        """Takes the next JSON value. Returns its position, its size, and [`measure`] of it."""
        self.peek()
        begin = self.position
        while True:
            try:
                row, self.at = self.decoder.raw_decode(self.text, self.at)
                return begin, self.position - begin, *measure(row)
            except RecursionError as error:
                raise self.error(begin, "the row is nested too deeply") from error
            except json.JSONDecodeError as error:
                place = self.start + error.pos
                if not self.read_on():
                    raise self.error(place, error.msg) from error

    def error(self, place: int, message: str) -> ValueError:
        return ValueError(f"{_line_of(self.path, place)}: {message}")


def _line_of(path: str, place: int) -> str:
    line, line_start, position = 1, 0, 0
    with open(path, "rb") as stream:
        while position < place and (block := stream.read(min(WINDOW, place - position))):
            line += block.count(b"\n")
            if (last := block.rfind(b"\n")) >= 0:
                line_start = position + last + 1
            position += len(block)
    return f"line {line}, column {place - line_start + 1}"
