"""What a run is, noted in its folder as `run.json`, so that another one does not go on with its work by mistake."""

import json
import shlex
import sys
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any


def check_note(out: Path, about: dict[str, Any], identity: Sequence[str]) -> dict[str, Any]:
    """
    Compares a run with the one that its folder holds.

    Args:
        about (`dict`): What it takes to repeat the run.
        identity (`Sequence[str]`): The keys of it that must be the same for what is there to be taken over.

    Returns:
        `dict`: `about`, with what the folder holds of other tasks.

    Raises:
        ValueError: if the folder holds the work of a run that differs in one of these.
    """
    note = out / "run.json"
    before = json.loads(note.read_text()) if note.is_file() else {}
    for name in identity if before else ():
        was, now = before.get(name), about[name]
        if isinstance(now, dict):  # by task: those of one run only are in nobody's way
            differing = [task for task in was.keys() & now.keys() if was[task] != now[task]]
            about = {**about, name: was | now}
            name = f"{name} of {', '.join(sorted(differing))}"
            was, now = [was[task] for task in differing], [now[task] for task in differing]
        if was != now:
            raise ValueError(
                f"{out} holds answers of a run with {name} {was!r}, now it is {now!r}: give another --out, or "
                "remove the folder."
            )
    return about


def write_note(out: Path, about: dict[str, Any], writer: str = "") -> None:
    """In one step: a note that a kill has cut off would keep the run from going on. Each `writer` has its own file."""
    out.mkdir(parents=True, exist_ok=True)
    whole = out / f"run{writer}.new"
    whole.write_text(json.dumps(about, indent=2) + "\n")
    whole.replace(out / "run.json")


def command_line() -> str:
    """
    What was typed to start this process, so that it can be typed again: `sq-llava evaluate ...`, or for a program of
    its own `python -m demo.run ...`.
    """
    program = Path(sys.argv[0])
    is_module = program.suffix == ".py" and (program.parent / "__init__.py").is_file()
    if program.stem == "sq-llava" or program == files("sq_llava") / "__main__.py":
        start = ["sq-llava"]
    elif is_module:
        start = ["python", "-m", f"{program.parent.name}.{program.stem}"]
    else:
        start = ["python", str(program)]
    return shlex.join([*start, *sys.argv[1:]])
