"""Where a model is: in a folder on this machine, or in a repository on the Hub.

    >>> is_adapter("runs/demo/stage2"), base_of_adapter("runs/demo/stage2")
    (True, 'runs/demo/base')
    >>> fetch("org/sq-llava-7b", revision="v1.0")
    PosixPath('.../models--org--sq-llava-7b/snapshots/0123...')

Only configurations are read, never weights. Large libraries are imported only when they are needed.
"""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sq_llava.json_text import read_json


HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
ADAPTER_CONFIG = "adapter_config.json"
# Files of a model or adapter that are downloaded. Code is not downloaded: the library uses its own classes.
MODEL_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.yaml", "*.jinja"]
# Named chat templates (*.jinja) are in a subfolder. No other file in a subfolder belongs to the model.
IN_FOLDERS = [f"*/{pattern}" for pattern in MODEL_FILES if pattern != "*.jinja"]


def is_hub_id(name: str | os.PathLike) -> bool:
    """`True` for a Hub id (`org/name`), even if there is no such repository. `False` for a path."""
    return HUB_ID.fullmatch(str(name)) is not None and not Path(name).parent.is_dir()


def is_missing_folder(name: str | os.PathLike) -> bool:
    """`True` if this is neither an existing folder nor a Hub id."""
    return not Path(name).expanduser().is_dir() and not is_hub_id(name)


def require_folder_or_id(name: str | os.PathLike, role: str | None = None) -> Path | None:
    """
    The folder of this name with `~` expanded, or `None` for a Hub id.

    Args:
        role (`str`, *optional*): What the name stands for (e.g. `--base`), for the error message.

    Raises:
        ValueError: if it is neither an existing folder nor a Hub id.
    """
    if is_missing_folder(name):
        name = f"{name} ({role})" if role else name
        raise ValueError(f"{name}: no such folder. Give a folder with a model, or a Hub id such as org/name.")
    return None if is_hub_id(name) else Path(name).expanduser()


@contextmanager
def hub_errors(what: str) -> Iterator[None]:
    """
    Wraps a request to the Hub.

    Args:
        what (`str`): Start of the error message: which request failed.

    Raises:
        ValueError: if the request fails, with the reason in one line.
    """
    from huggingface_hub.errors import HFValidationError, HTTPError

    try:
        yield
    except (HTTPError, HFValidationError, OSError, RuntimeError) as error:  # hf_xet raises RuntimeError
        reason = " ".join(str(error).split())
        raise ValueError(f"{what}: {reason or type(error).__name__}") from error


def find_config(model: str | os.PathLike, revision: str | None = None) -> Path:
    """
    The `adapter_config.json` of an adapter, or the `config.json` of a whole model. Only this file is downloaded from
    the Hub.

    Args:
        model: A folder, or a Hub id.
        revision (`str`, *optional*): Branch, tag or commit on the Hub.

    Raises:
        ValueError: if the folder does not exist or contains no model, or neither the Hub nor its cache has the model.
    """
    folder = require_folder_or_id(model)
    if folder is not None:
        for name in (ADAPTER_CONFIG, "config.json"):
            if (folder / name).is_file():
                return folder / name
        raise ValueError(f"{model} has neither config.json nor adapter_config.json: give a folder with a model.")
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    place = str(model) if revision is None else f"{model}, revision {revision}"
    with hub_errors(f"{place}: not in the cache, and could not be downloaded from the Hub"):
        try:
            return Path(hf_hub_download(str(model), ADAPTER_CONFIG, revision=revision))
        except EntryNotFoundError:
            return Path(hf_hub_download(str(model), "config.json", revision=revision))


def fetch(model: str | os.PathLike, revision: str | None = None) -> Path:
    """
    The folder of a model. A Hub id is downloaded if needed, and its folder is the snapshot in the cache. Check the
    model with [`find_config`] first.

    Raises:
        ValueError: if neither the Hub nor its cache has the model.
    """
    return _fetch(model, revision, MODEL_FILES, IN_FOLDERS)


def fetch_code(model: str | os.PathLike, revision: str | None = None) -> Path:
    """Like [`fetch`], but only code and JSON files are downloaded, to check them. They are not run."""
    return _fetch(model, revision, ["*.json", "*.py"])


def _fetch(
    model: str | os.PathLike, revision: str | None, patterns: list[str], ignored: list[str] | None = None
) -> Path:
    folder = require_folder_or_id(model)
    if folder is not None:
        return folder
    from huggingface_hub import snapshot_download

    with hub_errors(f"{model}: could not be downloaded from the Hub"):
        return Path(snapshot_download(str(model), revision=revision, allow_patterns=patterns, ignore_patterns=ignored))


def is_adapter(model: str | os.PathLike, revision: str | None = None) -> bool:
    """`True` for a PEFT adapter, `False` for a whole checkpoint."""
    if is_hub_id(model):
        return find_config(model, revision).name == ADAPTER_CONFIG
    return (Path(model).expanduser() / ADAPTER_CONFIG).is_file()


def base_of_adapter(model: str | os.PathLike, revision: str | None = None) -> str:
    """
    The path or Hub id of an adapter's base model.

    Raises:
        ValueError: if the base is not a text, or an absolute path that does not exist.
    """
    base = read_adapter_config(model, revision).get("base_model_name_or_path")
    if not isinstance(base, str) or not base or "\0" in base:
        raise ValueError(
            f"{model}/adapter_config.json: base_model_name_or_path is {base!r}, but must be the folder or the Hub id "
            "of the base model."
        )
    if Path(base).is_absolute() and not Path(base).is_dir():
        raise ValueError(
            f"{model}/adapter_config.json: base_model_name_or_path is {base}, which does not exist. Move the base "
            "model there, or change the field to its new path."
        )
    return base


def revision_of_base(model: str | os.PathLike, revision: str | None = None) -> str | None:
    """The commit of the base model that an adapter was trained on, if its configuration names one."""
    commit = read_adapter_config(model, revision).get("revision")
    if not isinstance(commit, str | None):
        raise ValueError(f"{model}/adapter_config.json: revision is {commit!r}, but must be a branch, tag or commit.")
    return commit


def read_adapter_config(model: str | os.PathLike, revision: str | None = None) -> dict:
    return read_json(find_config(model, revision))
