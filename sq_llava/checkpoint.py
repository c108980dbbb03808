"""Models from parts, and adapters merged into plain checkpoints.

    >>> model, processor = compose("openai/clip-vit-large-patch14-336", "lmsys/vicuna-7b-v1.5")
    >>> model, processor = compose(blip2, "lmsys/vicuna-7b-v1.5", blip2, prototype_variant="none")  # MiniGPT-4's parts
    >>> merge_adapter("runs/sq-llava-7b/stage2", "runs/sq-llava-7b/merged")

A folder is either a plain checkpoint (`config.json`, weights, processor, code) or a PEFT adapter
(`adapter_config.json`, which names its base). What this module does not do: convert released checkpoints
(`sq_llava/convert.py`).
"""

import json
import os
from pathlib import Path

import torch
from peft import PeftModel
from transformers import (
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
from sq_llava.provenance import public_name, read_provenance, write_provenance


# The library's own classes load a checkpoint; the code inside its folder is for those who do not have the library.
AutoConfig.register("sq_llava", SQLlavaConfig, exist_ok=True)
AutoModelForImageTextToText.register(SQLlavaConfig, SQLlavaForConditionalGeneration, exist_ok=True)
AutoProcessor.register(SQLlavaConfig, SQLlavaProcessor, exist_ok=True)

# The vocabulary is padded to a multiple of this, so that the LM head's matrix product runs on whole tiles.
VOCABULARY_MULTIPLE = 64
# What the processor adds to a language model's tokenizer, at most.
NEW_TOKENS = ("<image>", "[vusr]", "<pad>")


def is_adapter(path: str | os.PathLike) -> bool:
    """Whether a local folder holds a PEFT adapter rather than a whole checkpoint."""
    return (Path(path) / "adapter_config.json").is_file()


def is_missing_folder(path: str | os.PathLike) -> bool:
    """Whether a path is none of the Hub's ids (`org/name`), but of a folder that is not there."""
    path = str(path)
    folder = Path(path).expanduser()
    return not folder.is_dir() and (path.count("/") != 1 or path[0] in "./~" or folder.parent.is_dir())


def base_of_adapter(path: str | os.PathLike) -> str:
    """The path or Hub id of the checkpoint that an adapter stands on."""
    base = json.loads((Path(path) / "adapter_config.json").read_text())["base_model_name_or_path"]
    if Path(base).is_absolute() and not Path(base).is_dir():
        raise FileNotFoundError(
            f"{path}/adapter_config.json: base_model_name_or_path is {base}, which does not exist. Put the base model "
            "back there, or write its new path into that field."
        )
    return base


def _vision_config(vision_model: str) -> PreTrainedConfig:
    config = AutoConfig.from_pretrained(vision_model)
    config = getattr(config, "vision_config", config)
    config.name_or_path = public_name(vision_model)  # the configuration is published
    return config


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
    text_config = AutoConfig.from_pretrained(text_model)
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
        text_config=AutoConfig.from_pretrained(text_model),
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
        text_model (`str`): Path or Hub id of any causal language model of transformers.
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
    text_model = AutoModelForCausalLM.from_pretrained(text_model, dtype=dtype, attn_implementation=attn_implementation)
    text_model.config.name_or_path = public_name(text_model.config.name_or_path)
    config_kwargs |= _qformer_fields(qformer_model)
    config = SQLlavaConfig(vision_config=vision_config, text_config=text_model.config, **config_kwargs)
    if len(tokenizer) > text_model.config.vocab_size:
        text_model.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=VOCABULARY_MULTIPLE)
    text_model.config.pad_token_id = tokenizer.pad_token_id
    config.image_token_id = processor.image_token_id
    config.vusr_token_id = processor.vusr_token_id

    model = SQLlavaForConditionalGeneration._from_config(
        config, dtype=text_model.dtype, attn_implementation=attn_implementation
    )
    vision_tower = load_vision_tower(vision_model, dtype=text_model.dtype)
    model.model.vision_tower.load_state_dict(vision_tower.state_dict())
    if qformer_model is not None:
        weights = _Blip2ImageSide.from_pretrained(qformer_model, dtype=text_model.dtype).state_dict()
        model.model.resampler.load_state_dict({name: weights[name] for name in model.model.resampler.state_dict()})
    model.model.language_model.load_state_dict(text_model.base_model.state_dict())
    model.lm_head.load_state_dict(text_model.get_output_embeddings().state_dict())
    model.tie_weights()
    model.generation_config.update(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=text_model.generation_config.eos_token_id or tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return model, processor


def load_checkpoint(path: str, **kwargs) -> tuple[SQLlavaForConditionalGeneration | PeftModel, SQLlavaProcessor]:
    """
    Loads a plain checkpoint (path or Hub id), or an adapter folder on its base, and the processor.

    Args:
        path (`str`): The folder, or a Hub id.
        kwargs: As for `from_pretrained` of the model: `dtype`, `device_map`, `attn_implementation`, ...
    """
    processor = SQLlavaProcessor.from_pretrained(path)
    if not is_adapter(path):
        return SQLlavaForConditionalGeneration.from_pretrained(path, **kwargs), processor
    base = SQLlavaForConditionalGeneration.from_pretrained(base_of_adapter(path), **kwargs)
    return PeftModel.from_pretrained(base, path), processor


def merge_adapter(adapter: str, output_dir: str) -> None:
    """
    Merges an adapter into its base and saves a plain checkpoint: weights, processor and the code that loads them.

    Args:
        adapter (`str`): Folder that `train_sft.py` wrote.
        output_dir (`str`): Folder for the checkpoint. It must not be the adapter's own.
    """
    if not is_adapter(adapter):
        raise ValueError(
            f"{adapter} holds no adapter_config.json: give the output_dir of a training stage. (A stage with "
            "full_finetuning needs no merge: its output_dir is a plain checkpoint.)"
        )
    if Path(output_dir).resolve() == Path(adapter).resolve():
        raise ValueError(f"{output_dir} is the adapter's own folder: give another one for the merged checkpoint.")
    model, processor = load_checkpoint(adapter)
    merged = model.merge_and_unload()
    merged.save_pretrained(output_dir)
    processor.save_pretrained(output_dir)
    write_provenance(output_dir, read_provenance(adapter))
    write_card(output_dir)
