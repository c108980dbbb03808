"""The journal: paid answers on disk, one JSON line each, written by one process at a time.

    journal = Journal(Path("answers.jsonl"))
    journal.add({"key": "9f3a", "answer": "A dog.", "prompt_tokens": 100, "completion_tokens": 10})
    journal.get("9f3a")["answer"]

A line without an answer records a request that was probably billed but gave no answer. No request has its key.
"""

import threading
import warnings
from pathlib import Path
from typing import Any

from filelock import BaseFileLock, FileLock, Timeout

from sq_llava.json_text import parse_json
from sq_llava.resumable.jsonl import read_complete_lines, to_line


class Journal:
    """Answers by their keys. Each answer is appended to the file as it arrives."""

    def __init__(self, path: Path, reads_only: bool = False):
        self.path = path
        self._lock = threading.Lock()
        self._lines: list[dict[str, Any]] = []
        self._line_of: dict[str, dict[str, Any]] = {}
        for number, line in enumerate(read_complete_lines(path, mends=not reads_only), 1):
            try:
                line = parse_json(line)
            except ValueError as error:
                raise ValueError(
                    f"{path}, line {number}: cannot be read as JSON: {error}. Remove the line: "
                    "its question will be sent again."
                ) from error
            self._keep(line)

    def get(self, key: str) -> dict[str, Any] | None:
        return self._line_of.get(key)

    def all(self) -> list[dict[str, Any]]:
        """Every line. If several lines have the same key, each of them was paid for."""
        return list(self._lines)

    def add(self, line: dict[str, Any]) -> None:
        with self._lock:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab") as file:
                file.write(to_line(line).encode())
            self._keep(line)

    def _keep(self, line: dict[str, Any]) -> None:
        self._lines.append(line)
        self._line_of[line["key"]] = line


def lock(path: Path) -> BaseFileLock:
    """
    Locks a journal so that only this process can write to it, until its last lock object is deleted.

    Raises:
        ValueError: If another process holds the lock.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # All threads and clients of this process share one object.
    held = FileLock(f"{path.resolve()}.lock", blocking=False, thread_local=False, is_singleton=True)
    try:
        held.acquire()
    except Timeout as error:
        raise ValueError(
            f"{path}: another run writes into this folder. Both would pay for the same answers. Wait for it to end, "
            "or choose another --out or --shard."
        ) from error
    except OSError as error:  # some network file systems
        warnings.warn(f"{path}: cannot be locked ({error}). Start no other run into this folder.", stacklevel=2)
    return held
