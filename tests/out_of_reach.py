"""Runs checks in a process in which this project cannot be imported, however it is installed.

    OUT_OF_REACH = runpy.run_path(Path(__file__).with_name("out_of_reach.py"))

Other modules cannot import this one: it hides the package `tests`, too.
"""

import json
import runpy
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path


# The hook of `push`, which hides this project in the same way, and here the tests too.
FRESH_LOAD = Path(__file__).parent.parent / "sq_llava" / "checkpoints" / "fresh_load.py"
HOOK = runpy.run_path(str(FRESH_LOAD))
SOURCES = HOOK["SOURCES"]
SOURCES.add("tests")


def run_checks(checks: Sequence[Callable], folder: Path) -> None:
    """
    Calls each check with the folder and the content of its `expected.pt`. Writes `results.json` into the folder: the
    traceback of each check by name, or "" if it passed.
    """
    sys.meta_path.insert(0, HOOK["SourcesOutOfReach"]())
    import torch

    torch.set_num_threads(1)
    expected = torch.load(folder / "expected.pt", weights_only=False)
    results = {}
    for check in checks:
        try:
            check(folder, expected)
            results[check.__name__] = ""
        except Exception:
            results[check.__name__] = traceback.format_exc()
    (folder / "results.json").write_text(json.dumps(results))
