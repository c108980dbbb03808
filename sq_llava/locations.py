"""Where a model is: a folder on this machine, or the Hub's repository of that id.

    >>> is_adapter("runs/demo/stage2"), base_of_adapter("runs/demo/stage2")
    (True, 'runs/demo/base')
    >>> fetch("org/sq-llava-7b", revision="v1.0")
    PosixPath('.../models--org--sq-llava-7b/snapshots/0123...')

Only configurations are read. What it does not do: look into weights, import a large library before it is needed.
"""

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
ADAPTER_CONFIG = "adapter_config.json"
# Of a SQ-LLaVA and its adapters, without the code: the library's own classes are used.
MODEL_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.yaml", "*.jinja"]
# Chat templates with a name have a folder of their own; other folders are not the model's.
IN_FOLDERS = [f"*/{pattern}" for pattern in MODEL_FILES if pattern != "*.jinja"]


def is_hub_id(name: str | os.PathLike) -> bool:
    """Whether this is an id on the Hub (`org/name`) rather than the path of a file or folder, be it there or not."""
    return HUB_ID.fullmatch(str(name)) is not None and not Path(name).parent.is_dir()


def is_missing_folder(name: str | os.PathLike) -> bool:
    """Whether this is the path of a folder that is not there, rather than a Hub id."""
    return not Path(name).expanduser().is_dir() and not is_hub_id(name)


def require_folder_or_id(name: str | os.PathLike, role: str | None = None) -> Path | None:
    """
    The folder of this name, `~` expanded; `None` for a Hub id.

    Raises:
        ValueError: if it is neither.
    """
    if is_missing_folder(name):
        name = f"{name} ({role})" if role else name
        raise ValueError(f"{name}: no such folder. Give one with a model, or a Hub id such as org/name.")
    return None if is_hub_id(name) else Path(name).expanduser()


@contextmanager
def hub_errors(what: str) -> Iterator[None]:
    """
    Around a request to the Hub.

    Raises:
        ValueError: if the Hub, or the way to it, refuses it: with `what` was tried, in one line.
    """
    from huggingface_hub.errors import HFValidationError, HTTPError

    try:
        yield
    except (HTTPError, HFValidationError, OSError, RuntimeError) as error:  # hf_xet raises RuntimeError
        reason = " ".join(str(error).split())
        raise ValueError(f"{what}: {reason or type(error).__name__}") from error


def find_config(model: str | os.PathLike, revision: str | None = None) -> Path:
    """
    The `adapter_config.json` of an adapter, or the `config.json` of a whole model. Of a Hub id, only this file is
    fetched.

    Args:
        model: A folder, or a Hub id.
        revision (`str`, *optional*): Branch, tag or commit on the Hub.

    Raises:
        ValueError: if there is no such folder, it holds no model, or the Hub and its cache have none of this id.
    """
    folder = require_folder_or_id(model)
    if folder is not None:
        for name in (ADAPTER_CONFIG, "config.json"):
            if (folder / name).is_file():
                return folder / name
        raise ValueError(f"{model} holds neither config.json nor adapter_config.json: give a folder with a model.")
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    place = str(model) if revision is None else f"{model}, revision {revision}"
    with hub_errors(f"{place}: not in the cache, and not to be had from the Hub"):
        try:
            return Path(hf_hub_download(str(model), ADAPTER_CONFIG, revision=revision))
        except EntryNotFoundError:
            return Path(hf_hub_download(str(model), "config.json", revision=revision))


def fetch(model: str | os.PathLike, revision: str | None = None) -> Path:
    """
    The folder that a model is in, as it was given; of a Hub id its snapshot in the cache, fetched before if needed. It
    is called for a model whose configuration was found: see [`find_config`].

    Raises:
        ValueError: if the Hub and its cache have none of this id.
    """
    folder = require_folder_or_id(model)
    if folder is not None:
        return folder
    from huggingface_hub import snapshot_download

    with hub_errors(f"{model}: not to be had from the Hub"):
        return Path(
            snapshot_download(str(model), revision=revision, allow_patterns=MODEL_FILES, ignore_patterns=IN_FOLDERS)
        )


def is_adapter(model: str | os.PathLike, revision: str | None = None) -> bool:
    """Whether a folder or Hub id holds a PEFT adapter rather than a whole checkpoint."""
    if is_hub_id(model):
        return find_config(model, revision).name == ADAPTER_CONFIG
    return (Path(model).expanduser() / ADAPTER_CONFIG).is_file()


def base_of_adapter(model: str | os.PathLike, revision: str | None = None) -> str:
    """The path or Hub id of the checkpoint that an adapter stands on."""
    base = read_adapter_config(model, revision)["base_model_name_or_path"]
    if Path(base).is_absolute() and not Path(base).is_dir():
        raise ValueError(
            f"{model}/adapter_config.json: base_model_name_or_path is {base}, which does not exist. Put the base "
            "model back there, or write its new path into that field."
        )
    return base


def revision_of_base(model: str | os.PathLike, revision: str | None = None) -> str | None:
    """The commit of the base that an adapter was made for, if its configuration names one."""
    return read_adapter_config(model, revision).get("revision")


def read_adapter_config(model: str | os.PathLike, revision: str | None = None) -> dict:
    return json.loads(find_config(model, revision).read_text())
