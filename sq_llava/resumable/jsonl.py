"""Files of lines that are appended as work comes along, and that a run after a kill reads.

>>> for line in map(json.loads, whole_lines(Path("answers.jsonl"))):
...     print(line)
"""

from pathlib import Path


def whole_lines(path: Path, mends: bool = True) -> list[bytes]:
    """
    The lines of a file, none if it is not there, without a last one that a kill has cut off.

    Args:
        mends (`bool`): Takes that one out of the file, too; not so for a process that only reads, as another one may
            be writing it.
    """
    content = path.read_bytes() if path.is_file() else b""
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content) and mends:
        path.write_bytes(whole)
    return whole.splitlines()
