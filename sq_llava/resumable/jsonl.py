"""Files of JSON lines: written as a whole, or appended to line by line so that a killed run can resume from them.

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
    The complete lines of a file. A last line that a kill cut off is left out. A missing file has no lines.

    Args:
        mends (`bool`): Also remove the incomplete line from the file. Pass `False` in a process that only reads:
            another process may be writing that line.
    """
    content = path.read_bytes() if path.is_file() else b""
    complete = content[: content.rfind(b"\n") + 1]
    if len(complete) < len(content) and mends:
        path.write_bytes(complete)
    return complete.splitlines()
