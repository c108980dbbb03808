"""Models from parts, and adapters merged into plain checkpoints.

    >>> model, processor = compose("openai/clip-vit-large-patch14-336", "lmsys/vicuna-7b-v1.5")
    >>> model, processor = compose(blip2, "lmsys/vicuna-7b-v1.5", blip2, prototype_variant="none")  # MiniGPT-4's parts
    >>> merge_adapter("runs/sq-llava-7b/stage2", "runs/sq-llava-7b/merged")

A folder is either a plain checkpoint (`config.json`, weights, processor, code) or a PEFT adapter
(`adapter_config.json`, which names its base). What this module does not do: convert released checkpoints
(`sq_llava/convert.py`).
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    Blip2VisionModelWithProjection,
    PreTrainedConfig,
)

from configuration_sq_llava import SQLlavaConfig
from modeling_sq_llava import SQLlavaForConditionalGeneration
from processing_sq_llava import SQLlavaProcessor
from sq_llava.card import write_card
from sq_llava.early_checks import require_new_folder
from sq_llava.inspection import TOKENIZER, inspect
from sq_llava.layouts import NAMES, recognise
from sq_llava.locations import base_of_adapter, fetch, find_config, is_adapter, revision_of_base
from sq_llava.provenance import public_name, read_provenance, write_provenance


# The library's own classes load a checkpoint; the code inside its folder is for those who do not have the library.
AutoConfig.register("sq_llava", SQLlavaConfig, exist_ok=True)
AutoModelForImageTextToText.register(SQLlavaConfig, SQLlavaForConditionalGeneration, exist_ok=True)
AutoProcessor.register(SQLlavaConfig, SQLlavaProcessor, exist_ok=True)

# The vocabulary is padded to a multiple of this, so that the LM head's matrix product runs on whole tiles.
VOCABULARY_MULTIPLE = 64
# Files without which a processor cannot be loaded, as an inspection names what is missing.
NEEDED = ("processor_config.json", TOKENIZER)
SHOWN_FAULTS = 3
# What the processor adds to a language model's tokenizer, at most.
NEW_TOKENS = ("<image>", "[vusr]", "<pad>")


def stop_token_ids(own: int | list[int] | None, processor: SQLlavaProcessor) -> int | list[int]:
    """
    The ids at which generation stops: the delimiter that the chat template writes behind each answer, and those that
    the language model names itself, which may be others (a base model's end of text, or one of three of Llama 3).
    """
    own = [] if own is None else [own] if isinstance(own, int) else own
    ids = list(dict.fromkeys([processor.tokenizer.eos_token_id, *own]))
    return ids[0] if len(ids) == 1 else ids


def _vision_config(vision_model: str) -> PreTrainedConfig:
    config = AutoConfig.from_pretrained(vision_model)
    config = getattr(config, "vision_config", config)
    config.name_or_path = public_name(vision_model)  # the configuration is published
    return config


def text_config_of(text_model: str) -> PreTrainedConfig:
    """
    The configuration of a language model, or of the text part of a multimodal one that transformers loads as a causal
    language model, such as Gemma 3 or Llama 4.

    Raises:
        ValueError: if it loads none from there, or the text part needs more than embeddings.
    """
    config = AutoConfig.from_pretrained(text_model)
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(
            f"The language model {text_model} is a {config.model_type}, from which transformers loads no causal "
            "language model (AutoModelForCausalLM). Give one, or a multimodal model whose text part it loads, such as "
            "Gemma 3."
        )
    text_config = config.get_text_config(decoder=True)
    if getattr(text_config, "hidden_size_per_layer_input", None):  # Gemma 3n and the small ones of Gemma 4
        raise ValueError(
            f"The language model {text_model} is a {config.model_type} that reads token ids in each of its layers, "
            "where an image has none. Give another one."
        )
    if text_config is not config:
        text_config.name_or_path = config.name_or_path
        text_config.dtype = text_config.dtype or config.dtype
    return text_config


def _qformer_fields(qformer_model: str | None) -> dict:
    """What the configuration says of the Q-Former of a BLIP-2 model."""
    if qformer_model is None:
        return {}
    config = AutoConfig.from_pretrained(qformer_model)
    if config.model_type != "blip-2":
        raise ValueError(
            f"qformer_model_name_or_path is {str(qformer_model)!r}, a {config.model_type}: give a BLIP-2 model of "
            "transformers, such as Salesforce/blip2-flan-t5-xxl."
        )
    return {
        "resampler": "qformer",
        "qformer_config": config.qformer_config,
        "num_query_tokens": config.num_query_tokens,
    }


class _Blip2ImageSide(Blip2VisionModelWithProjection):
    """Tower, queries and Q-Former of a BLIP-2 of any kind; its language model, which may be large, stays on disk."""

    _keys_to_ignore_on_load_unexpected = [r"^(language_|text_|embeddings|itm_head)"]
    _keys_to_ignore_on_load_missing = [r"^vision_projection"]


def load_vision_tower(vision_model: str, attn_implementation: str | None = None, **kwargs) -> torch.nn.Module:
    """The vision tower of a vision model, with pretrained weights."""
    if AutoConfig.from_pretrained(vision_model).model_type == "blip-2":
        tower = _Blip2ImageSide.from_pretrained(vision_model, **kwargs).vision_model
        # To the tower alone: the Q-Former, loaded with it, has no FlashAttention.
        if attn_implementation is not None:
            tower.set_attn_implementation(attn_implementation)
        return tower
    model = AutoModel.from_pretrained(vision_model, attn_implementation=attn_implementation, **kwargs)
    return getattr(model, "vision_model", model)


def compose_config(
    vision_model: str, text_model: str, qformer_model: str | None = None, **config_kwargs
) -> SQLlavaConfig:
    """
    The configuration that [`compose`] would give, without tokenizer and weights: for planning. The vocabulary has room
    for the new tokens, whether or not the model's own has.
    """
    text_config = text_config_of(text_model)
    image_token_id = text_config.vocab_size
    grown = image_token_id + len(NEW_TOKENS)
    text_config.vocab_size = -(-grown // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
    return SQLlavaConfig(
        vision_config=_vision_config(vision_model),
        text_config=text_config,
        image_token_id=image_token_id,
        vusr_token_id=image_token_id + 1,
        **_qformer_fields(qformer_model),
        **config_kwargs,
    )


def compose_processor(
    vision_model: str, text_model: str, qformer_model: str | None = None, **processor_kwargs
) -> SQLlavaProcessor:
    """The processor that [`compose`] would give, without any weights."""
    config = SQLlavaConfig(
        vision_config=_vision_config(vision_model),
        text_config=text_config_of(text_model),
        prototype_variant="none",  # it makes no difference to what is asked here
        **_qformer_fields(qformer_model),
    )
    return SQLlavaProcessor(
        AutoImageProcessor.from_pretrained(vision_model),
        AutoTokenizer.from_pretrained(text_model),
        image_seq_length=config.image_seq_length,
        **processor_kwargs,
    )


def compose(
    vision_model: str,
    text_model: str,
    qformer_model: str | None = None,
    dtype: torch.dtype | str = "auto",
    attn_implementation: str | None = None,
    processor_kwargs: dict | None = None,
    **config_kwargs,
) -> tuple[SQLlavaForConditionalGeneration, SQLlavaProcessor]:
    """
    Builds a SQ-LLaVA from a vision model and a causal language model; the extractor and the projector are new.

    Args:
        vision_model (`str`): Path or Hub id of a CLIP or SigLIP model, whole or its vision part, or of a BLIP-2 model.
        text_model (`str`): Path or Hub id of any causal language model of transformers, or of a multimodal model that
            it loads as one, whose text part is taken: Gemma 3, Llama 4.
        qformer_model (`str`, *optional*): Path or Hub id of a BLIP-2 model, for its Q-Former.
        dtype, attn_implementation: As for `from_pretrained`.
        processor_kwargs (`dict`, *optional*): Settings of [`SQLlavaProcessor`]: `image_aspect_ratio`, ...
        config_kwargs: Fields of [`SQLlavaConfig`]: `prototype_variant`, `num_prototypes`, ...

    Returns:
        The model, on the CPU, and its processor.
    """
    vision_config = _vision_config(vision_model)
    processor = compose_processor(vision_model, text_model, qformer_model, **(processor_kwargs or {}))
    tokenizer = processor.tokenizer
    # Of a multimodal model it is the whole, whose text part is taken below.
    whole = AutoModelForCausalLM.from_pretrained(text_model, dtype=dtype, attn_implementation=attn_implementation)
    text_config = whole.config.get_text_config(decoder=True)
    text_config.name_or_path = public_name(whole.config.name_or_path)
    text_config.tie_word_embeddings = whole.config.tie_word_embeddings
    config_kwargs |= _qformer_fields(qformer_model)
    config = SQLlavaConfig(vision_config=vision_config, text_config=text_config, **config_kwargs)
    if len(tokenizer) > text_config.vocab_size:
        whole.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=VOCABULARY_MULTIPLE)
    text_config.pad_token_id = tokenizer.pad_token_id
    config.image_token_id = processor.image_token_id
    config.vusr_token_id = processor.vusr_token_id

    model = SQLlavaForConditionalGeneration._from_config(
        config, dtype=whole.dtype, attn_implementation=attn_implementation
    )
    vision_tower = load_vision_tower(vision_model, dtype=whole.dtype)
    model.model.vision_tower.load_state_dict(vision_tower.state_dict())
    if qformer_model is not None:
        weights = _Blip2ImageSide.from_pretrained(qformer_model, dtype=whole.dtype).state_dict()
        model.model.resampler.load_state_dict({name: weights[name] for name in model.model.resampler.state_dict()})
    language_model = model.model.language_model
    text_part = next(module for module in whole.modules() if type(module) is type(language_model))
    language_model.load_state_dict(text_part.state_dict())
    model.lm_head.load_state_dict(whole.get_output_embeddings().state_dict())
    model.tie_weights()
    model.generation_config.update(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=stop_token_ids(whole.generation_config.eos_token_id, processor),
        pad_token_id=tokenizer.pad_token_id,
    )
    return model, processor


def require_kind(model: str | os.PathLike, revision: str | None = None) -> str:
    """
    `"checkpoint"` or `"adapter"`, by the configuration alone; of a Hub id nothing else is fetched.

    Raises:
        ValueError: if there is no such model, or it is one of another kind.
    """
    folder = find_config(model, revision).parent
    try:
        kind = recognise(str(folder)).kind
    except ValueError as error:
        raise ValueError(f"{model} is no SQ-LLaVA. {error}") from error
    if kind not in ("checkpoint", "adapter"):
        raise ValueError(
            f"{model} is {NAMES[kind]}, not a SQ-LLaVA of this library. Convert it first: "
            f"sq-llava convert {model} --out FOLDER"
        )
    return kind


def require_model(model: str | os.PathLike, revision: str | None = None) -> Path:
    """
    The folder of a SQ-LLaVA or an adapter, fetched from the Hub if needed. The weights are not read.

    Raises:
        ValueError: as [`require_kind`] and [`require_whole`].
    """
    kind = require_kind(model, revision)
    folder = fetch(model, revision)
    require_whole(folder, _find_base(folder).parent if kind == "adapter" else None, str(model))
    return folder


def require_whole(folder: Path, base: Path | None = None, name: str | None = None) -> None:
    """
    The check of `sq-llava inspect`, for the files that loading a SQ-LLaVA or an adapter reads.

    Args:
        base (`Path`, *optional*): Folder of the base of an adapter. Default: what it names, if that is here.
        name (`str`, *optional*): What errors call it. Default: the folder.

    Raises:
        ValueError: if files or weights are missing, of another shape or too many.
    """
    inspection = inspect(folder, base, only_loaded=True)
    faults = [*inspection.faults, *(f"{file} is missing" for file in inspection.missing if file in NEEDED)]
    if faults:
        more = f"; and {len(faults) - SHOWN_FAULTS} more" if len(faults) > SHOWN_FAULTS else ""
        raise ValueError(
            f"{name or folder} cannot be loaded: {'; '.join(faults[:SHOWN_FAULTS])}{more}. "
            f"All of it: sq-llava inspect {folder}"
        )


def load_model(
    model: str | os.PathLike, processor: SQLlavaProcessor | None = None, revision: str | None = None, **kwargs
) -> SQLlavaForConditionalGeneration:
    """
    Loads a plain checkpoint that [`require_model`] finds whole.

    Args:
        model: A folder, or a Hub id; the model keeps it as its name.
        processor ([`SQLlavaProcessor`], *optional*): The model stops at its delimiter. Default: as it was saved.
        revision (`str`, *optional*): Branch, tag or commit on the Hub.
        kwargs: As for `from_pretrained`: `dtype`, `device_map`, `attn_implementation`, ...
    """
    folder = require_model(model, revision)
    if is_adapter(folder):
        raise ValueError(f"{model} is an adapter, where a plain checkpoint is needed: merge it first.")
    return _load_plain(folder, str(model), processor, **kwargs)


def _load_plain(
    folder: Path, name: str, processor: SQLlavaProcessor | None, **kwargs
) -> SQLlavaForConditionalGeneration:
    model = SQLlavaForConditionalGeneration.from_pretrained(folder, **kwargs)
    if processor is not None:
        model.generation_config.eos_token_id = stop_token_ids(model.generation_config.eos_token_id, processor)
    # An adapter on it names its base by this: a Hub id, rather than its folder in the cache.
    model.name_or_path = model.config.name_or_path = name
    return model


def load_base_of(
    adapter: str | os.PathLike, processor: SQLlavaProcessor | None = None, **kwargs
) -> SQLlavaForConditionalGeneration:
    """Loads the plain checkpoint that an adapter stands on, at the commit that the adapter names; see `load_model`."""
    base, revision = _base_and_revision(adapter)
    with _errors_of_base(adapter):
        return load_model(base, processor, revision, **kwargs)


def _find_base(adapter: str | os.PathLike) -> Path:
    """The configuration of the checkpoint that an adapter stands on."""
    with _errors_of_base(adapter):
        return find_config(*_base_and_revision(adapter))


def _base_and_revision(adapter: str | os.PathLike) -> tuple[str, str | None]:
    base = base_of_adapter(adapter)
    # A commit is one of a repository; a folder has none.
    return base, None if Path(base).expanduser().is_dir() else revision_of_base(adapter)


@contextmanager
def _errors_of_base(adapter: str | os.PathLike) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ValueError(f"The base of the adapter {adapter}: {error}") from error


def load_checkpoint(path: str, revision: str | None = None, **kwargs) -> tuple[torch.nn.Module, SQLlavaProcessor]:
    """
    Loads a plain checkpoint, or an adapter on its base, and the processor.

    Args:
        path (`str`): The folder, or a Hub id.
        revision (`str`, *optional*): Branch, tag or commit on the Hub.
        kwargs: As for `from_pretrained` of the model: `dtype`, `device_map`, `attn_implementation`, ...

    Returns:
        A [`SQLlavaForConditionalGeneration`], or of an adapter a `PeftModel` around it; and the processor.

    Raises:
        ValueError: if it is no SQ-LLaVA, or not whole.
    """
    model, processor, adapter = load_base_and_processor(path, revision, **kwargs)
    if adapter is None:
        return model, processor
    from peft import PeftModel  # with what it imports it takes seconds, and most models need none of it

    return PeftModel.from_pretrained(model, adapter), processor


def load_base_and_processor(
    path: str, revision: str | None = None, processor_settings: dict | None = None, **kwargs
) -> tuple[SQLlavaForConditionalGeneration, SQLlavaProcessor, Path | None]:
    """
    Loads a plain checkpoint, or the one that an adapter stands on; and the processor.

    Args:
        path, revision, kwargs: As for [`load_checkpoint`].
        processor_settings (`dict`, *optional*): Settings of the processor that replace those that were saved.

    Returns:
        The model, the processor, and the folder of the adapter, if it is one.

    Raises:
        ValueError: if it is no SQ-LLaVA, or not whole.
    """
    folder = require_model(path, revision)
    processor = SQLlavaProcessor.from_pretrained(folder, **(processor_settings or {}))
    if is_adapter(folder):
        return load_base_of(folder, processor, **kwargs), processor, folder
    return _load_plain(folder, str(path), processor, **kwargs), processor, None


def merge_adapter(adapter: str, output_dir: str) -> None:
    """
    Merges an adapter into its base and saves a plain checkpoint: weights, processor and the code that loads them.

    Args:
        adapter (`str`): Folder that `train_sft.py` wrote, or a Hub id.
        output_dir (`str`): Folder for the checkpoint; it must be new or empty.
    """
    if not is_adapter(adapter):
        raise ValueError(
            f"{adapter} holds no adapter_config.json: give the output_dir of a training stage. (A stage with "
            "full_finetuning needs no merge: its output_dir is a plain checkpoint.)"
        )
    require_new_folder(output_dir)
    provenance = read_provenance(fetch(adapter))
    model, processor = load_checkpoint(adapter)
    merged = model.merge_and_unload()
    merged.save_pretrained(output_dir)
    processor.save_pretrained(output_dir)
    write_provenance(output_dir, provenance)
    write_card(output_dir)
