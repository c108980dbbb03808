"""Lines that several processes write as their work comes along, and that a run after a kill reads.

Each process appends to `<stem>-<rank>.jsonl`; all files of that stem are read, whatever the number of processes was.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

from accelerate import PartialState

from sq_llava.resumable.jsonl import whole_lines


def read_lines(
    folder: Path, stem: str, known_ids: Sequence[str], with_failed: bool = False
) -> dict[str, dict[str, Any]]:
    """
    What was written before, by its `id`. A line that a kill has cut off is dropped from its file. All processes read
    before any may write.

    Args:
        with_failed (`bool`): Also what failed (an `error` that is not `None`), if it did not succeed another time.

    Raises:
        ValueError: if a line's id is none of `known_ids`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    known = set(known_ids)
    done = {}
    for path in sorted(folder.glob(f"{stem}-*.jsonl")):
        for line in map(json.loads, whole_lines(path, mends=PartialState().is_main_process)):
            if line["id"] not in known:
                raise ValueError(
                    f"{path}: has a line for {line['id']!r}, which is not asked about: give another --out."
                )
            if line["error"] is None:
                done[line["id"]] = line
            elif with_failed:
                done.setdefault(line["id"], line)
    PartialState().wait_for_everyone()
    return done


def open_lines(folder: Path, stem: str) -> BinaryIO:
    """The file of this process, to append to."""
    return (folder / f"{stem}-{PartialState().process_index}.jsonl").open("ab")


def write_line(file: BinaryIO, line: dict[str, Any]) -> None:
    file.write((json.dumps(line, ensure_ascii=False) + "\n").encode())
