"""Rows of an input file that cannot be used. They are counted and listed, and do not end a run.

bad = BadRows(max_share=0.1)
bad.add("captions.tsv, line 18", "caption is '', expected a text")
bad.judge(num_rows)   # ValueError if too many rows are bad
bad.write(out)        # OUT/bad_rows.jsonl: place and error of each row
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from sq_llava.output import written_whole
from sq_llava.resumable.jsonl import to_line


SHOWN = 5


@dataclass
class BadRows:
    """
    Args:
        max_share (`float`): Highest share of bad rows with which a run goes on. A single bad row never ends a run.
    """

    file: ClassVar[str] = "bad_rows.jsonl"

    max_share: float
    found: list[tuple[str, str]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.found)

    def __str__(self) -> str:
        return "1 row of the input" if len(self) == 1 else f"{len(self):,} rows of the input"

    def add(self, place: str, error: str) -> None:
        """
        Args:
            place (`str`): File and line, or file and entry.
            error (`str`): What is wrong, with the value.
        """
        self.found.append((place, error))

    @contextmanager
    def entry(self, place: str) -> Iterator[None]:
        """Reads a row inside a `with` block. A `ValueError` makes it a bad row."""
        try:
            yield
        except ValueError as error:
            self.add(place, str(error))

    def judge(self, num_rows: int) -> None:
        """
        Args:
            num_rows (`int`): Number of rows that were read, the bad ones included.

        Raises:
            ValueError: If no row can be used, or too many cannot. The message shows the first few.
        """
        if num_rows and len(self) == num_rows:
            raise ValueError("\n  ".join(["No row can be used:", *self.shown()]))
        if len(self) > max(1, self.max_share * num_rows):
            counts = f"{len(self):,} of {num_rows:,} rows cannot be used, a larger share than --max-bad-share "
            mend = "Correct the file, or raise --max-bad-share."
            raise ValueError("\n  ".join([f"{counts}{self.max_share:g}. {mend}", *self.shown()]))

    def shown(self) -> Iterator[str]:
        """Yields a line for each of the first few rows, and one with the number of the others."""
        for place, error in self.found[:SHOWN]:
            yield f"{place}: {error}"
        if len(self) > SHOWN:
            yield f"and {len(self) - SHOWN:,} more."

    def write(self, out: Path) -> None:
        out.mkdir(parents=True, exist_ok=True)
        with written_whole(out / self.file) as new, new.open("w", encoding="utf-8", errors="backslashreplace") as file:
            file.writelines(to_line({"place": place, "error": error}) for place, error in self.found)
