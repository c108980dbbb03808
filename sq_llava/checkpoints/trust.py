"""Finds what in a checkpoint's folder could make transformers or PEFT run code that is not this library's.

    >>> foreign_code(Path("model"))
    ["tokenizer_config.json: auto_map, AutoTokenizer is 'org/name--tokenization.Tokenizer'"]
    >>> changed_code(Path("model"))
    ["modeling_sq_llava.py"]

The library itself never runs code of a folder: each load says `trust_remote_code=False`. Others load the same folder
with `trust_remote_code=True`, as `sq-llava push` does before an upload, and then these entries decide what is run.
"""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sq_llava.json_text import MOST_BYTES
from sq_llava.resources import CODE_FILES, code_digests


# A class in a code file of the same folder. transformers splits "org/name--module.Class" at the dashes: such an entry,
# and one with a path such as "folder/module.Class", names code that is elsewhere.
OWN_CLASS = re.compile(rf"(?:{'|'.join(name.removesuffix('.py') for name in CODE_FILES)})\.SQLlava\w+")
# Fields whose values are names of classes. transformers imports them: `custom_pipelines` for `pipeline`.
CLASS_FIELDS = {"auto_map", "custom_pipelines"}
# Fields that name another repository, whose code or weights transformers would load.
REPOSITORY_FIELDS = {"custom_generate", "audio_tokenizer_name_or_path"}
# "org/name" in a field such as `attn_implementation` is a repository, whose kernel would be downloaded and run.
KERNEL_FIELD = "_implementation"
# The modules that an adapter may name as the library of its base. PEFT imports the module.
ADAPTER_LIBRARIES = {"transformers", "modeling_sq_llava"}
# Large files without such fields.
DATA_FILES = {"tokenizer.json", "vocab.json", "model.safetensors.index.json"}
# transformers replaces `generate` by the function in this file.
CUSTOM_GENERATE = "custom_generate/generate.py"


def foreign_code(folder: Path) -> list[str]:
    """
    The entries of a folder that name code other than this library's: fields of its JSON files in any depth, and
    `custom_generate`. Whether the library's own files are unchanged is the question of [`changed_code`].

    Returns:
        For each entry its file, its place in the file, and its value.
    """
    found = [f"{CUSTOM_GENERATE} replaces `generate`"] if (folder / CUSTOM_GENERATE).is_file() else []
    for file in sorted(folder.glob("*.json")):
        if file.name in DATA_FILES or not file.is_file():
            continue
        if file.stat().st_size > MOST_BYTES:
            found.append(f"{file.name} is too large to be checked")
            continue
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
        except RecursionError:
            found.append(f"{file.name} is nested too deep to be checked")
            continue
        except ValueError:
            continue  # transformers cannot read it either
        found += [f"{file.name}: {', '.join(place)} is {text[:100]!r}" for place, text in _foreign_texts(content)]
    return found


def changed_code(folder: Path) -> list[str]:
    """The names of the code files in a folder that differ from this library's."""
    own = code_digests()
    return [name for name, digest in code_digests(folder).items() if digest != own[name]]


def refusal(name: str | Path, entries: list[str]) -> str:
    """The message of an error about entries that [`foreign_code`] found in a model."""
    return (
        f"{name} names code that is not this library's: {'; '.join(entries)}. This library runs only its own code. "
        "Remove these entries, or get the model from a source that you trust."
    )


@contextmanager
def without_remote_code(model: str | Path) -> Iterator[None]:
    """
    Explains the error of transformers about a model that needs its own code.

    Raises:
        ValueError: if an auto class that was told `trust_remote_code=False` refuses the model.
    """
    try:
        yield
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        raise ValueError(
            f"{model} needs code from its own repository, which this library does not run. Give a model whose code is "
            "in transformers."
        ) from error


def _foreign_texts(content: Any) -> Iterator[tuple[tuple[str, ...], str]]:
    """The place and the text of each entry that names foreign code."""
    for place, text in _texts(content):
        names_class = not CLASS_FIELDS.isdisjoint(place)
        is_foreign = (
            not OWN_CLASS.fullmatch(text)
            if names_class
            else not REPOSITORY_FIELDS.isdisjoint(place)
            or ("/" in text and any(KERNEL_FIELD in name for name in place))
            or (place[-1:] == ("parent_library",) and text.rpartition(".")[2] not in ADAPTER_LIBRARIES)
        )
        if is_foreign:
            yield place, text


def _texts(content: Any) -> Iterator[tuple[tuple[str, ...], str]]:
    """All texts in nested lists and dictionaries, each with the names of the fields that lead to it."""
    waiting = [((), content)]
    while waiting:
        place, value = waiting.pop()
        if isinstance(value, str):
            yield place, value
        elif isinstance(value, dict):
            waiting += [((*place, name), inner) for name, inner in reversed(value.items())]
        elif isinstance(value, list):
            waiting += [(place, inner) for inner in reversed(value)]
