"""Finds the files of this library that are not modules, in a source tree and in an installed wheel.

    >>> find_resource("model_card.md").read_text()
    >>> code_file("modeling_sq_llava.py")

`model_card.md`, `recipes/` and `space/` are at the top of the source tree, where readers look for them. In a wheel
they are inside the package (see `setup.py`). The code files of a checkpoint are top-level modules. For a file next to
the module that reads it, use `importlib.resources` instead.
"""

import hashlib
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path


# Every checkpoint contains these files.
CODE_FILES = (
    "configuration_sq_llava.py",
    "image_processing_sq_llava.py",
    "modeling_sq_llava.py",
    "processing_sq_llava.py",
)


def find_resource(name: str) -> Path:
    """
    The path of a file or folder of the library, such as `recipes`.

    Raises:
        FileNotFoundError: if it is missing from this installation.
    """
    package = files("sq_llava")
    for path in (package / name, package.parent / name):
        if path.exists():
            return path
    raise FileNotFoundError(f"{package / name} is missing. Install sq-llava again: this installation is damaged.")


def code_file(name: str) -> Path:
    """The path of the file of this name (one of `CODE_FILES`) that this library itself runs."""
    return Path(find_spec(Path(name).stem).origin)


def code_digests(folder: Path | None = None) -> dict[str, str]:
    """SHA-256 of each of the `CODE_FILES` in a folder, by name. Default: the files that this library itself runs."""
    files = {name: folder / name if folder else code_file(name) for name in CODE_FILES}
    return {name: hashlib.sha256(file.read_bytes()).hexdigest() for name, file in files.items() if file.is_file()}
