"""Adds `model_card.md` and `recipes/`, which are at the top of the source tree, to the package data.

In a wheel they are inside `sq_llava`. An editable install reads them where they are (`sq_llava/resources.py`).
Everything else is in pyproject.toml.
"""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithResources(build_py):
    """Copies the card template and the recipes into the package that is built."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        package = Path(self.build_lib) / "sq_llava"
        shutil.copy("model_card.md", package)
        shutil.rmtree(package / "recipes", ignore_errors=True)  # files of an earlier build may be outdated
        shutil.copytree("recipes", package / "recipes")


setup(cmdclass={"build_py": BuildWithResources})
