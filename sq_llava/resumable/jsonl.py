"""Files of JSON lines: written as a whole, or appended to line by line so that a killed run can resume from them.

>>> for line in map(json.loads, read_complete_lines(Path("answers.jsonl"))):
...     print(line)
"""

import json
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from sq_llava.output import full_disk_named, write_text


# After this time, appended lines are flushed to the disk. A flush takes milliseconds, a line often less.
SECONDS_TO_FLUSH = 1.0


def to_line(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False) + "\n"


def write_jsonl(path: Path, values: Iterable[Any]) -> None:
    write_text(path, "".join(map(to_line, values)))


class LineWriter:
    """
    Appends JSON lines to a file. A kill loses none that was added. A power failure loses at most the lines of the last
    second, and none after the end of the `with` block.

    Args:
        path (`Path`): The file; it is created if it is missing.
    """

    def __init__(self, path: Path):
        self.path = path

    def __enter__(self) -> "LineWriter":
        self._file = self.path.open("ab")
        self._flushed = time.monotonic()
        return self

    def add(self, values: Iterable[Any]) -> None:
        with full_disk_named(self.path):
            self._file.write("".join(map(to_line, values)).encode())
            self._file.flush()
            if time.monotonic() > self._flushed + SECONDS_TO_FLUSH:
                os.fsync(self._file.fileno())
                self._flushed = time.monotonic()

    def __exit__(self, *error: Any) -> None:
        with full_disk_named(self.path), self._file:
            self._file.flush()
            os.fsync(self._file.fileno())


def read_complete_lines(path: Path, mends: bool = True) -> list[bytes]:
    """
    The complete lines of a file. A last line that a kill cut off is left out. A missing file has no lines.

    Args:
        mends (`bool`): Also remove the incomplete line from the file. Pass `False` in a process that only reads:
            another process may be writing that line.
    """
    content = path.read_bytes() if path.is_file() else b""
    complete = content[: content.rfind(b"\n") + 1]
    if len(complete) < len(content) and mends:
        os.truncate(path, len(complete))
    return complete.splitlines()
