"""Makes package data of `model_card.md` and `recipes/`, which stand at the top of the source tree for readers.

A wheel gets them inside `sq_llava`; an editable install reads them where they are (`sq_llava/resources.py`). All else
is in pyproject.toml.
"""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithResources(build_py):
    """Copies the two into the package that is built."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        package = Path(self.build_lib) / "sq_llava"
        shutil.copy("model_card.md", package)
        shutil.rmtree(package / "recipes", ignore_errors=True)  # what an earlier build left may be outdated
        shutil.copytree("recipes", package / "recipes")


setup(cmdclass={"build_py": BuildWithResources})
