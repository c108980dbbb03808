"""The journal: paid answers on disk, one JSON line each, written by one process at a time.

    journal = Journal(Path("answers.jsonl"))
    journal.add({"key": "9f3a", "answer": "A dog.", "prompt_tokens": 100, "completion_tokens": 10})
    journal.get("9f3a")["answer"]

A line with `fault` is a paid reply whose text cannot be used. Two kinds of lines have no answer, and keys that no
request has: `lost` records a request that was probably billed, `refused` one that the server refused and did not bill.
"""

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sq_llava.json_text import parse_json
from sq_llava.resumable.jsonl import LineWriter, read_complete_lines


class Journal:
    """
    Answers by their keys. Each answer is appended to the file as it arrives, and flushed to the disk.

    Args:
        path (`Path`): The file.
        reads_only (`bool`): Leave an incomplete last line in the file.
        others (`Sequence[Path]`): Files of other journals. Their lines are read too, and nothing is written to them.
    """

    def __init__(self, path: Path, reads_only: bool = False, others: Sequence[Path] = ()):
        self.path, self.others = path, others
        self._lock = threading.Lock()
        self._lines: list[dict[str, Any]] = []
        self._line_of: dict[str, dict[str, Any]] = {}
        for file in (*others, path):
            self._read(file, mends=file == path and not reads_only)

    def _read(self, file: Path, mends: bool) -> None:
        for number, line in enumerate(read_complete_lines(file, mends), 1):
            try:
                line = parse_json(line)
            except ValueError as error:
                raise ValueError(
                    f"{file}, line {number}: cannot be read as JSON: {error}. Remove the line: "
                    "its question will be sent again."
                ) from error
            self._keep(line)

    def get(self, key: str) -> dict[str, Any] | None:
        return self._line_of.get(key)

    def all(self) -> list[dict[str, Any]]:
        """Every line. If several lines have the same key, each of them was paid for."""
        return list(self._lines)

    @property
    def has_refusals(self) -> bool:
        return any("refused" in line for line in self._lines)

    def add(self, line: dict[str, Any]) -> None:
        with self._lock:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with LineWriter(self.path) as file:
                file.add([line])
            self._keep(line)

    def _keep(self, line: dict[str, Any]) -> None:
        self._lines.append(line)
        self._line_of[line["key"]] = line
