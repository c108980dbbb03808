"""Adds `model_card.md`, `recipes/` and `space/`, which are at the top of the source tree, to the package data.

In a wheel they are inside `sq_llava`. An editable install reads them where they are (`sq_llava/resources.py`).
Everything else is in pyproject.toml.
"""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithResources(build_py):
    """Copies the card template, the recipes and the files of a Space into the package that is built."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        package = Path(self.build_lib) / "sq_llava"
        shutil.copy("model_card.md", package)
        for name in ("recipes", "space"):
            shutil.rmtree(package / name, ignore_errors=True)  # files of an earlier build may be outdated
            shutil.copytree(name, package / name, ignore=shutil.ignore_patterns("__pycache__"))


setup(cmdclass={"build_py": BuildWithResources})
