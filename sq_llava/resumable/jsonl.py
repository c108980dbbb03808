"""Files of JSON lines: written as a whole, or appended as work comes along and read by a later run after a kill.

>>> for line in map(json.loads, read_complete_lines(Path("answers.jsonl"))):
...     print(line)
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def to_line(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False) + "\n"


def write_jsonl(path: Path, values: Iterable[Any]) -> None:
    path.write_text("".join(map(to_line, values)), encoding="utf-8")


def read_complete_lines(path: Path, mends: bool = True) -> list[bytes]:
    """
    The lines of a file without a last one that a kill has cut off; none if there is no file.

    Args:
        mends (`bool`): Also removes the incomplete line from the file. A process that only reads must not, as another
            one may be writing it.
    """
    content = path.read_bytes() if path.is_file() else b""
    complete = content[: content.rfind(b"\n") + 1]
    if len(complete) < len(content) and mends:
        path.write_bytes(complete)
    return complete.splitlines()
