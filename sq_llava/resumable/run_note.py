"""The note of a run: `run.json` in its output folder. It keeps a run with other settings from resuming there."""

import hashlib
import json
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sq_llava.output import write_json


def check_note(out: Path, about: dict[str, Any], identity: Sequence[str]) -> dict[str, Any]:
    """
    Compares this run with the run that is noted in its output folder.

    Args:
        out (`Path`): Output folder.
        about (`dict`): All settings that are needed to repeat this run.
        identity (`Sequence[str]`): Keys of `about` whose values must be equal to resume.

    Returns:
        `dict`: `about`. A value that is a dict also has the entries of earlier runs.

    Raises:
        ValueError: If the folder contains a run that differs in one of these keys.
    """
    note = out / "run.json"
    before = json.loads(note.read_text()) if note.is_file() else {}
    for name in identity if before else ():
        was, now = before.get(name), about[name]
        if isinstance(now, dict):  # such as settings: only those that both runs have must be equal
            was = was or {}
            differing = [each for each in was.keys() & now.keys() if was[each] != now[each]]
            about = {**about, name: was | now}
            name = f"{name} of {', '.join(sorted(differing))}"
            was, now = [was[each] for each in differing], [now[each] for each in differing]
        if was != now:
            raise ValueError(
                f"{out} contains answers of a run with {name} {was!r}, but this run has {now!r}. Choose another "
                "--out, or remove the folder."
            )
    return about


class RunNote:
    """
    The note of a run. It is written with the first result, so a run that fails before does not claim its folder.

    Args:
        out, about, identity: As for [`check_note`], which is called at once.

    Attributes:
        about (`dict`): What [`check_note`] returns.
    """

    def __init__(self, out: Path, about: dict[str, Any], identity: Sequence[str]):
        self.out = out
        self.about = check_note(out, about, identity)
        self._is_written = False
        self._lock = threading.Lock()

    def write(self) -> None:
        """Writes `run.json`. Call it before each result, also in threads; only the first call writes."""
        with self._lock:
            if not self._is_written:
                self.out.mkdir(parents=True, exist_ok=True)
                write_json(self.out / "run.json", self.about)
                self._is_written = True


def hash_of_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
