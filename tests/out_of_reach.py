"""Runs checks in a process in which this project cannot be imported, however it is installed.

    OUT_OF_REACH = runpy.run_path(Path(__file__).with_name("out_of_reach.py"))

Other modules cannot import this one: it hides the package `tests`, too.
"""

import json
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path


SOURCES = {
    "configuration_sq_llava",
    "image_processing_sq_llava",
    "modeling_sq_llava",
    "processing_sq_llava",
    "sq_llava",
    "tests",
}


class SourcesOutOfReach:
    """An import hook."""

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in SOURCES:
            raise ModuleNotFoundError(f"{name} is hidden in this process", name=name)


def run_checks(checks: Sequence[Callable], folder: Path) -> None:
    """
    Calls each check with the folder and the content of its `expected.pt`. Writes `results.json` into the folder: the
    traceback of each check by name, or "" if it passed.
    """
    sys.meta_path.insert(0, SourcesOutOfReach())
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
