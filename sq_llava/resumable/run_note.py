"""The note of a run: `run.json` in its output folder. It keeps a run with other settings from resuming there."""

import hashlib
import json
import shlex
import sys
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any


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
        if isinstance(now, dict):  # by task, for example: only the tasks of both runs must be equal
            differing = [task for task in was.keys() & now.keys() if was[task] != now[task]]
            about = {**about, name: was | now}
            name = f"{name} of {', '.join(sorted(differing))}"
            was, now = [was[task] for task in differing], [now[task] for task in differing]
        if was != now:
            raise ValueError(
                f"{out} contains answers of a run with {name} {was!r}, but this run has {now!r}. Choose another "
                "--out, or remove the folder."
            )
    return about


def write_note(out: Path, about: dict[str, Any], writer: str = "") -> None:
    """Writes `run.json` in one step, so a kill leaves no half file. Each `writer` has its own temporary file."""
    out.mkdir(parents=True, exist_ok=True)
    whole = out / f"run{writer}.new"
    whole.write_text(json.dumps(about, indent=2) + "\n")
    whole.replace(out / "run.json")


def hash_of_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def command_line() -> str:
    """The command that started this process, as it can be typed: `sq-llava evaluate ...`, `python -m demo.run ...`."""
    program = Path(sys.argv[0])
    is_module = program.suffix == ".py" and (program.parent / "__init__.py").is_file()
    if program.stem == "sq-llava" or program == files("sq_llava") / "__main__.py":
        start = ["sq-llava"]
    elif is_module:
        start = ["python", "-m", f"{program.parent.name}.{program.stem}"]
    else:
        start = ["python", str(program)]
    return shlex.join([*start, *sys.argv[1:]])
