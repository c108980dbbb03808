"""Answers that were paid for, on disk: one JSON line each, written by one process at a time.

    journal = Journal(Path("answers.jsonl"))
    journal.add({"key": "9f3a", "answer": "A dog.", "prompt_tokens": 100, "completion_tokens": 10})
    journal.get("9f3a")["answer"]

A line without an answer, under a key that no request has, is what was paid for nothing.
"""

import json
import threading
import warnings
from pathlib import Path
from typing import Any

from filelock import BaseFileLock, FileLock, Timeout

from sq_llava.resumable.jsonl import read_complete_lines, to_line


class Journal:
    """Answers by their keys, appended as they come."""

    def __init__(self, path: Path, reads_only: bool = False):
        self.path = path
        self._lock = threading.Lock()
        self._lines: list[dict[str, Any]] = []
        self._line_of: dict[str, dict[str, Any]] = {}
        for number, line in enumerate(read_complete_lines(path, mends=not reads_only), 1):
            try:
                line = json.loads(line)
            except ValueError as error:
                raise ValueError(
                    f"{path}, line {number}: cannot be read as JSON: {error}. Remove the line: it is asked again."
                ) from error
            self._keep(line)

    def get(self, key: str) -> dict[str, Any] | None:
        return self._line_of.get(key)

    def all(self) -> list[dict[str, Any]]:
        """Every line: where several have the same key, each was paid for."""
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
    Lets this process alone write a journal, as long as one of its locks on it lives.

    Raises:
        ValueError: if another process has it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # One object for all threads and clients of this process.
    held = FileLock(f"{path.resolve()}.lock", blocking=False, thread_local=False, is_singleton=True)
    try:
        held.acquire()
    except Timeout as error:
        raise ValueError(
            f"{path}: another run writes into this folder, and both would pay. Wait for it, or give another folder or "
            "shard."
        ) from error
    except OSError as error:  # some network file systems
        warnings.warn(f"{path}: cannot be locked here ({error}): start no other run into this folder.", stacklevel=2)
    return held
