"""The files that this library reads beside its own modules, wherever it is installed.

    >>> find_resource("model_card.md").read_text()
    >>> code_file("modeling_sq_llava.py")

`model_card.md` and `recipes/` stand at the top of the source tree, where readers look for them; a wheel has them
inside the package (`setup.py`). The code files of a checkpoint are top-level modules. What this module does not
do: find files that stand beside the module that reads them; for those, `importlib.resources` is enough.
"""

import hashlib
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path


# What every checkpoint carries.
CODE_FILES = (
    "configuration_sq_llava.py",
    "image_processing_sq_llava.py",
    "modeling_sq_llava.py",
    "processing_sq_llava.py",
)


def find_resource(name: str) -> Path:
    """
    The file or folder of this name.

    Raises:
        FileNotFoundError: if this installation lacks it.
    """
    package = files("sq_llava")
    for path in (package / name, package.parent / name):
        if path.exists():
            return path
    raise FileNotFoundError(f"{package / name} is missing: this installation of sq-llava is damaged, install it anew.")


def code_file(name: str) -> Path:
    """The file of `CODE_FILES` that this library itself runs."""
    return Path(find_spec(Path(name).stem).origin)


def code_digests(folder: Path | None = None) -> dict[str, str]:
    """The SHA-256 of each file of `CODE_FILES` that is in a folder; without one, of those that this library runs."""
    files = {name: folder / name if folder else code_file(name) for name in CODE_FILES}
    return {name: hashlib.sha256(file.read_bytes()).hexdigest() for name, file in files.items() if file.is_file()}
