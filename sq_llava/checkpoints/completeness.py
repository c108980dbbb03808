"""Checks whether a checkpoint of a training run is complete, by its files and their sizes. No weights are read.

    >>> checkpoint_faults(Path("runs/sq-llava-7b/stage2/checkpoint-500"))
    ['optimizer.pt has 1024 bytes of 4096']

The choice of the checkpoint to resume from is in `sq_llava/training/recovery.py`.
"""

import re
from pathlib import Path

from sq_llava.json_text import parse_json


# The Trainer writes this file last.
STATE_FILE = "trainer_state.json"
# [`SQLlavaTrainer`] writes this file just before, after all processes have written their files. It lists the files of
# the checkpoint with their sizes, the settings that the losses depend on, and the losses of the first steps.
RUN_FILE = "run.json"


def step_of(folder: Path) -> int | None:
    """The optimizer step in the name of a checkpoint folder, such as 500; `None` for any other folder."""
    match = re.fullmatch(r"checkpoint-(\d+)", folder.name)
    return int(match[1]) if match and folder.is_dir() else None


def file_sizes(folder: Path) -> dict[str, int]:
    """Sizes in bytes of all files of a checkpoint, by relative path, without the two files that are written last."""
    files = (file for file in folder.rglob("*") if file.is_file() and file.name not in (STATE_FILE, RUN_FILE))
    return {str(file.relative_to(folder)): file.stat().st_size for file in files}


def checkpoint_faults(folder: Path) -> list[str]:
    """Reasons why a checkpoint cannot be resumed; empty if it is complete."""
    faults = [fault for name in (STATE_FILE, RUN_FILE) if (fault := json_fault(folder / name))]
    if json_fault(folder / RUN_FILE):
        return faults
    there = file_sizes(folder)
    for name, size in parse_json((folder / RUN_FILE).read_bytes())["files"].items():
        if name not in there:
            faults.append(f"{name} is missing")
        elif there[name] != size:
            faults.append(f"{name} has {there[name]} bytes of {size}")
    return faults


def json_fault(file: Path) -> str | None:
    """The reason why a JSON file cannot be read; `None` if it can."""
    if not file.is_file():
        return f"{file.name} is missing"
    try:
        parse_json(file.read_bytes())
    except ValueError:
        return f"{file.name} is cut off"
    return None
