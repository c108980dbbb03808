"""Hides the sources of this project from a process, however they are installed: what a stranger has not.

hide = runpy.run_path(Path(__file__).with_name("out_of_reach.py"))["hide_sources"]
"""

import sys


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
            raise ModuleNotFoundError(f"{name} is out of reach", name=name)


def hide_sources():
    sys.meta_path.insert(0, SourcesOutOfReach())
