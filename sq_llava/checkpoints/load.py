"""Loads checkpoints, and merges adapters into plain checkpoints.

    >>> model, processor = load_checkpoint("runs/sq-llava-7b/stage2")
    >>> merge_adapter("runs/sq-llava-7b/stage2", "runs/sq-llava-7b/merged")

A folder is either a plain checkpoint (`config.json`, weights, processor, code) or a PEFT adapter
(`adapter_config.json`, which names its base). Released checkpoints must be converted first
(`sq_llava/checkpoints/convert.py`).
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
)

from configuration_sq_llava import SQLlavaConfig
from modeling_sq_llava import SQLlavaForConditionalGeneration
from processing_sq_llava import SQLlavaProcessor
from sq_llava.checkpoints.card import write_card
from sq_llava.checkpoints.chat_templates import check_template
from sq_llava.checkpoints.compose import stop_token_ids
from sq_llava.checkpoints.config_checks import named_errors
from sq_llava.checkpoints.inspection import TOKENIZER, inspect
from sq_llava.checkpoints.layouts import NAMES, recognise
from sq_llava.checkpoints.provenance import read_provenance, write_provenance
from sq_llava.checkpoints.trust import refusal
from sq_llava.checkpoints.zero3 import from_pretrained
from sq_llava.locations import base_of_adapter, fetch, find_config, is_adapter, is_hub_id, revision_of_base
from sq_llava.output import folder_written_whole


# This library loads checkpoints with its own classes. The code in a checkpoint is for machines without this library.
AutoConfig.register("sq_llava", SQLlavaConfig, exist_ok=True)
AutoModelForImageTextToText.register(SQLlavaConfig, SQLlavaForConditionalGeneration, exist_ok=True)
AutoProcessor.register(SQLlavaConfig, SQLlavaProcessor, exist_ok=True)

# Files that loading a processor needs, as named in `Inspection.missing`.
NEEDED = ("processor_config.json", TOKENIZER)
SHOWN_FAULTS = 3


def require_kind(model: str | os.PathLike, revision: str | None = None) -> str:
    """
    The kind of a model, by its configuration. For a Hub id, only the configuration is downloaded.

    Returns:
        `"checkpoint"` or `"adapter"`.

    Raises:
        ValueError: if there is no such model, or it is of another kind.
    """
    folder = find_config(model, revision).parent
    try:
        kind = recognise(str(folder)).kind
    except ValueError as error:
        raise ValueError(f"{model} is not an SQ-LLaVA. {error}") from error
    if kind not in ("checkpoint", "adapter"):
        raise ValueError(
            f"{model} is {NAMES[kind]}, not an SQ-LLaVA of this library. Convert it first: "
            f"sq-llava convert {model} --out FOLDER"
        )
    return kind


def require_model(model: str | os.PathLike, revision: str | None = None) -> Path:
    """
    The folder of an SQ-LLaVA or an adapter, downloaded from the Hub if needed. The weights are not read.

    Raises:
        ValueError: as in [`require_kind`] and [`require_whole`].
    """
    kind = require_kind(model, revision)
    folder = fetch(model, revision)
    require_whole(folder, _find_base(folder).parent if kind == "adapter" else None, str(model))
    return folder


def require_whole(
    folder: Path, base: Path | None = None, name: str | None = None, trust_remote_code: bool = False
) -> None:
    """
    Runs the check of `sq-llava inspect` on the files that are read when an SQ-LLaVA or an adapter is loaded.

    Args:
        base (`Path`, *optional*): Folder of an adapter's base. Default: the base that the adapter names, if it is on
            this machine.
        name (`str`, *optional*): Name of the model in errors. Default: the folder.
        trust_remote_code (`bool`): Accept entries that name other code than this library's.

    Raises:
        ValueError: if files or weights are missing, or weights are superfluous or of a wrong shape; if a file names
            code that is not this library's.
    """
    inspection = inspect(folder, base, only_loaded=True)
    faults = [*inspection.faults, *(f"{file} is missing" for file in inspection.missing if file in NEEDED)]
    if faults:
        more = f"; and {len(faults) - SHOWN_FAULTS} more" if len(faults) > SHOWN_FAULTS else ""
        raise ValueError(
            f"{name or folder} cannot be loaded: {'; '.join(faults[:SHOWN_FAULTS])}{more}. "
            f"Show all: sq-llava inspect {folder}"
        )
    if inspection.foreign_code and not trust_remote_code:
        raise ValueError(refusal(name or folder, inspection.foreign_code))


def load_processor(folder: str | os.PathLike, trust_chat_template: bool = False, **settings) -> SQLlavaProcessor:
    """
    Loads the processor of a checkpoint or an adapter.

    Args:
        folder: A folder or a Hub id.
        trust_chat_template (`bool`): Accept a chat template that the processor did not write from its settings. Such
            a template is a program without limits: it can loop for hours or fill the memory.
        settings: Settings that replace the saved ones. A `chat_template` among them is trusted.

    Raises:
        ValueError: if a file is damaged or a setting wrong; or for a chat template of somebody else.
    """
    processor = named_errors(SQLlavaProcessor.from_pretrained)(folder, trust_remote_code=False, **settings)
    if not (processor.writes_template or trust_chat_template or "chat_template" in settings):
        template = processor.tokenizer.get_chat_template()
        raise ValueError(
            f"{folder} has a chat template of its own: {template[:60]!r}... It is a program, which can loop "
            "for hours or fill the memory. If you trust it, give --trust-chat-template to answer, ask, chat or serve "
            "(in Python: trust_chat_template=True). Otherwise remove the template: the processor then writes its own."
        )
    return processor


def load_model(
    model: str | os.PathLike, processor: SQLlavaProcessor | None = None, revision: str | None = None, **kwargs
) -> SQLlavaForConditionalGeneration:
    """
    Loads a plain checkpoint.

    Args:
        model: A folder or a Hub id. The model keeps it as its name.
        processor ([`SQLlavaProcessor`], *optional*): Its delimiter is added to the stop tokens. Default: the saved
            stop tokens.
        revision (`str`, *optional*): Branch, tag or commit on the Hub.
        kwargs: As for `from_pretrained`: `dtype`, `device_map`, `attn_implementation`, ...

    Raises:
        ValueError: if it is an adapter, or incomplete, see [`require_model`].
    """
    folder = require_model(model, revision)
    if is_adapter(folder):
        raise ValueError(
            f"{model} is an adapter, but a plain checkpoint is needed. Merge it first: "
            f"sq-llava merge {model} --out FOLDER"
        )
    return _load_plain(folder, str(model), processor, **kwargs)


def _load_plain(
    folder: Path, name: str, processor: SQLlavaProcessor | None, **kwargs
) -> SQLlavaForConditionalGeneration:
    model = from_pretrained(folder, **kwargs)
    if processor is not None:
        model.generation_config.eos_token_id = stop_token_ids(model.generation_config.eos_token_id, processor)
    # An adapter that is trained on this model stores this name: the base's Hub id, not a folder in the cache; or an
    # absolute path, because in another working directory a relative one would be taken for a Hub id.
    name = name if is_hub_id(name) else str(Path(name).expanduser().absolute())
    model.name_or_path = model.config.name_or_path = name
    return model


def load_base_of(
    adapter: str | os.PathLike, processor: SQLlavaProcessor | None = None, **kwargs
) -> SQLlavaForConditionalGeneration:
    """Loads the base of an adapter at the commit that the adapter names; see [`load_model`]."""
    base, revision = _base_and_revision(adapter)
    with _errors_of_base(adapter):
        return load_model(base, processor, revision, **kwargs)


def _find_base(adapter: str | os.PathLike) -> Path:
    """The configuration file of an adapter's base."""
    with _errors_of_base(adapter):
        return find_config(*_base_and_revision(adapter))


def _base_and_revision(adapter: str | os.PathLike) -> tuple[str, str | None]:
    base = base_of_adapter(adapter)
    # Only a repository on the Hub has commits, a folder has none.
    return base, revision_of_base(adapter) if is_hub_id(base) else None


@contextmanager
def _errors_of_base(adapter: str | os.PathLike) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ValueError(f"The base of the adapter {adapter}: {error}") from error


def load_checkpoint(path: str, revision: str | None = None, **kwargs) -> tuple[torch.nn.Module, SQLlavaProcessor]:
    """
    Loads the processor, and a plain checkpoint or an adapter on its base.

    Args:
        path (`str`): A folder or a Hub id.
        revision (`str`, *optional*): Branch, tag or commit on the Hub.
        kwargs: As for [`load_processor`], `trust_chat_template`; and for `from_pretrained` of the model: `dtype`,
            `device_map`, `attn_implementation`, ...

    Returns:
        A [`SQLlavaForConditionalGeneration`] (for an adapter, a `PeftModel` around it) and the processor.

    Raises:
        ValueError: if it is not an SQ-LLaVA, or incomplete.
    """
    model, processor, adapter = load_base_and_processor(path, revision, **kwargs)
    if adapter is None:
        return model, processor
    from peft import PeftModel  # the import takes seconds, and most models do not need it

    return PeftModel.from_pretrained(model, adapter), processor


def without_adapter(model: torch.nn.Module) -> SQLlavaForConditionalGeneration:
    """The model inside a `PeftModel`, whose layers still apply the adapter; or the model itself if it has none."""
    return model if isinstance(model, SQLlavaForConditionalGeneration) else model.get_base_model()


def load_base_and_processor(
    path: str,
    revision: str | None = None,
    processor_settings: dict | None = None,
    trust_chat_template: bool = False,
    **kwargs,
) -> tuple[SQLlavaForConditionalGeneration, SQLlavaProcessor, Path | None]:
    """
    Loads the processor, and a plain checkpoint or the base of an adapter.

    Args:
        path, revision, kwargs: As for [`load_checkpoint`].
        processor_settings (`dict`, *optional*): Settings that replace the saved ones of the processor.
        trust_chat_template (`bool`): As for [`load_processor`].

    Returns:
        The model, the processor, and the folder of the adapter or `None`.

    Raises:
        ValueError: if it is not an SQ-LLaVA, or incomplete.
    """
    folder = require_model(path, revision)
    processor = load_processor(folder, trust_chat_template, **(processor_settings or {}))
    check_template(processor)
    if is_adapter(folder):
        return load_base_of(folder, processor, **kwargs), processor, folder
    return _load_plain(folder, str(path), processor, **kwargs), processor, None


def merge_adapter(adapter: str, output_dir: str) -> None:
    """
    Merges an adapter into its base and saves a plain checkpoint: weights, processor and the code that loads them.

    Args:
        adapter (`str`): Folder that `train_sft.py` wrote, or a Hub id.
        output_dir (`str`): Folder for the checkpoint; it must be new or empty.

    Raises:
        ValueError: if it is not an adapter, if the folder is not empty, or if another process is writing it.
    """
    if not is_adapter(adapter):
        raise ValueError(
            f"{adapter} holds no adapter_config.json. Give the output_dir of a training stage. (A stage with "
            "full_finetuning needs no merge: its output_dir is a plain checkpoint.)"
        )
    with folder_written_whole(output_dir) as folder:
        provenance = read_provenance(fetch(adapter))
        model, processor = load_checkpoint(adapter)
        merged = model.merge_and_unload()
        merged.save_pretrained(folder)
        processor.save_pretrained(folder)
        write_provenance(folder, provenance)
        write_card(folder)
