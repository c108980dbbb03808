"""The quick demo, which tests of the demo and of the documents share."""

from pathlib import Path

import pytest
from filelock import FileLock

from demo import run


@pytest.fixture(scope="session")
def quick_demo(tmp_path_factory, worker_id) -> Path:
    """The output of `python -m demo.run --quick`. Tests copy it before they change it."""
    folder = tmp_path_factory.getbasetemp()
    if worker_id != "master":  # the workers of pytest-xdist share one demo
        folder = folder.parent
    folder = folder / "quick-demo"
    with FileLock(f"{folder}.lock"):
        if not (folder / "report.json").is_file():
            run.main(["--quick", "--output-dir", str(folder)])
    return folder
