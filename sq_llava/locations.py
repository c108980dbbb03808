"""Where a model is: a folder on this machine, or the Hub's repository of that id.

    >>> is_adapter("runs/demo/stage2"), base_of_adapter("runs/demo/stage2")
    (True, 'runs/demo/base')
    >>> fetch("org/sq-llava-7b", revision="v1.0")
    PosixPath('.../models--org--sq-llava-7b/snapshots/0123...')

Only configurations are read. What it does not do: look into weights, import a large library before it is needed.
"""

import json
import os
from pathlib import Path


ADAPTER_CONFIG = "adapter_config.json"
# Of a SQ-LLaVA and its adapters, without the code: the library's own classes are used.
MODEL_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.yaml", "*.jinja"]
# Chat templates with a name have a folder of their own; other folders are not the model's.
IN_FOLDERS = [f"*/{pattern}" for pattern in MODEL_FILES if pattern != "*.jinja"]


def is_missing_folder(path: str | os.PathLike) -> bool:
    """Whether a path is none of the Hub's ids (`org/name`), but of a folder that is not there."""
    path = str(path)
    folder = Path(path).expanduser()
    return not folder.is_dir() and (path.count("/") != 1 or path[0] in "./~" or folder.parent.is_dir())


def require_folder_or_id(name: str | os.PathLike, role: str | None = None) -> None:
    """
    Raises:
        ValueError: if a name is neither a folder's nor can be a Hub id.
    """
    if is_missing_folder(name):
        name = f"{name} ({role})" if role else name
        raise ValueError(f"{name}: no such folder. Give one with a model, or a Hub id such as org/name.")


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
    folder = Path(model).expanduser()
    if folder.is_dir():
        for name in (ADAPTER_CONFIG, "config.json"):
            if (folder / name).is_file():
                return folder / name
        raise ValueError(f"{model} holds neither config.json nor adapter_config.json: give a folder with a model.")
    require_folder_or_id(model)
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    try:
        try:
            return Path(hf_hub_download(str(model), ADAPTER_CONFIG, revision=revision))
        except EntryNotFoundError:
            return Path(hf_hub_download(str(model), "config.json", revision=revision))
    except (OSError, ValueError) as error:
        place = str(model) if revision is None else f"{model}, revision {revision}"
        reason = " ".join(str(error).split())  # some have several lines
        raise ValueError(f"{place}: not in the cache, and not to be had from the Hub: {reason}") from error


def fetch(model: str | os.PathLike, revision: str | None = None) -> Path:
    """
    The folder that a model is in, as it was given; of a Hub id its snapshot in the cache, fetched before if needed. It
    is called for a model whose configuration was found: see [`find_config`].

    Raises:
        ValueError: if the Hub and its cache have none of this id.
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder
    require_folder_or_id(model)
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(str(model), revision=revision, allow_patterns=MODEL_FILES, ignore_patterns=IN_FOLDERS)
        )
    except (OSError, ValueError, RuntimeError) as error:  # hf_xet raises RuntimeError
        raise ValueError(f"{model}: not to be had from the Hub: {error}") from error


def is_adapter(model: str | os.PathLike, revision: str | None = None) -> bool:
    """Whether a folder or Hub id holds a PEFT adapter rather than a whole checkpoint."""
    folder = Path(model).expanduser()
    if folder.is_dir() or is_missing_folder(model):
        return (folder / ADAPTER_CONFIG).is_file()
    return find_config(model, revision).name == ADAPTER_CONFIG


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
