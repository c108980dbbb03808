"""The SQ-LLaVA library: data, training, checkpoints, inference, evaluation and serving.

    >>> from sq_llava import load
    >>> load("org/sq-llava-7b").answer("photo.jpg", "What is it?")

The names below are imported on first use, so that importing this package is fast.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from sq_llava.checkpoints.compose import compose
    from sq_llava.data.rows import load_rows
    from sq_llava.inference.assistant import Assistant, load

__version__ = "0.1.0"
__all__ = ["Assistant", "__version__", "compose", "load", "load_rows"]

_HOMES = {
    "Assistant": "sq_llava.inference.assistant",
    "compose": "sq_llava.checkpoints.compose",
    "load": "sq_llava.inference.assistant",
    "load_rows": "sq_llava.data.rows",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
