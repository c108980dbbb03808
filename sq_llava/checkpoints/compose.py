"""Composes an SQ-LLaVA from a vision model and a causal language model. Prototype extractor and projector are new.

>>> model, processor = compose("openai/clip-vit-large-patch14-336", "lmsys/vicuna-7b-v1.5")
>>> blip2 = "Salesforce/blip2-flan-t5-xxl"  # for MiniGPT-4
>>> model, processor = compose(blip2, "lmsys/vicuna-7b-v1.5", blip2, prototype_variant="none")
"""

from pathlib import Path

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    Blip2VisionModelWithProjection,
    PreTrainedConfig,
    PreTrainedModel,
)

from configuration_sq_llava import SQLlavaConfig
from modeling_sq_llava import SQLlavaForConditionalGeneration
from processing_sq_llava import SQLlavaProcessor
from sq_llava.checkpoints.chat_templates import check_template
from sq_llava.checkpoints.config_checks import named_errors, require_fitting
from sq_llava.checkpoints.prompt_layouts import layout_settings
from sq_llava.checkpoints.provenance import public_name
from sq_llava.checkpoints.trust import without_remote_code
from sq_llava.console import print_in_first_process


# The vocabulary is padded to a multiple of this: the matrix product of the LM head is faster on whole tiles.
VOCABULARY_MULTIPLE = 64
# Tokens that the processor adds if the tokenizer of the language model lacks them.
NEW_TOKENS = ("<image>", "[vusr]", "<pad>")


def stop_token_ids(own: int | list[int] | None, processor: SQLlavaProcessor) -> int | list[int]:
    """
    Token ids at which generation stops: the delimiter that the chat template writes after each answer, and the
    language model's own stop tokens. They can differ: a base model has an end-of-text token, Llama 3 has three.

    Args:
        own (`int` or `list[int]`, *optional*): `eos_token_id` of the language model's generation config.
    """
    own = [] if own is None else [own] if isinstance(own, int) else own
    ids = list(dict.fromkeys([processor.tokenizer.eos_token_id, *own]))
    return ids[0] if len(ids) == 1 else ids


def set_special_tokens(
    model: SQLlavaForConditionalGeneration, processor: SQLlavaProcessor, own: int | list[int] | None
) -> None:
    """Writes the tokens of begin, stop and padding into the generation config; `own` as in [`stop_token_ids`]."""
    model.generation_config.update(
        bos_token_id=processor.tokenizer.bos_token_id,
        eos_token_id=stop_token_ids(own, processor),
        pad_token_id=processor.tokenizer.pad_token_id,
    )


def padded_size(num_tokens: int) -> int:
    """The size of a vocabulary for this number of tokens."""
    return -(-num_tokens // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE


def config_of(model: str | Path) -> PreTrainedConfig:
    """The configuration of a model whose code is in transformers; others are a ValueError."""
    with without_remote_code(model):
        return AutoConfig.from_pretrained(model, trust_remote_code=False)


@named_errors
def _vision_config(vision_model: str) -> PreTrainedConfig:
    config = config_of(vision_model)
    config = getattr(config, "vision_config", config)
    config.name_or_path = public_name(vision_model)  # may be published: no path of this machine
    return config


@named_errors
def text_config_of(text_model: str) -> PreTrainedConfig:
    """
    The configuration of a causal language model. Multimodal models that transformers can load as one, such as Gemma 3
    or Llama 4, give the configuration of their text part.

    Raises:
        ValueError: if transformers cannot load it as a causal language model, or if its layers read token ids.
    """
    config = config_of(text_model)
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(
            f"The language model {text_model} is a {config.model_type}, which transformers cannot load as a causal "
            "language model (AutoModelForCausalLM). Give a causal language model, or a multimodal model that loads as "
            "one, such as Gemma 3."
        )
    text_config = config.get_text_config(decoder=True)
    if getattr(text_config, "hidden_size_per_layer_input", None):  # Gemma 3n and the small ones of Gemma 4
        raise ValueError(
            f"The language model {text_model} is a {config.model_type}, whose layers read token ids. Images have no "
            "token ids, only embeddings. Give another language model."
        )
    if text_config is not config:
        text_config.name_or_path = config.name_or_path
        text_config.dtype = text_config.dtype or config.dtype
    return text_config


@named_errors
def _qformer_fields(qformer_model: str | None) -> dict:
    """Fields of [`SQLlavaConfig`] for the Q-Former of a BLIP-2 model; empty without one."""
    if qformer_model is None:
        return {}
    config = config_of(qformer_model)
    if config.model_type != "blip-2":
        raise ValueError(
            f"qformer_model_name_or_path is {str(qformer_model)!r}, a {config.model_type}. Give a BLIP-2 model in "
            "the format of transformers, such as Salesforce/blip2-flan-t5-xxl."
        )
    return {
        "resampler": "qformer",
        "qformer_config": config.qformer_config,
        "num_query_tokens": config.num_query_tokens,
    }


class _Blip2ImageSide(Blip2VisionModelWithProjection):
    """Vision tower, queries and Q-Former of any BLIP-2. Its language model, which can be large, is not loaded."""

    _keys_to_ignore_on_load_unexpected = [r"^(language_|text_|embeddings|itm_head)"]
    _keys_to_ignore_on_load_missing = [r"^vision_projection"]


@named_errors
def load_vision_tower(vision_model: str, attn_implementation: str | None = None, **kwargs) -> torch.nn.Module:
    """Loads the pretrained vision tower of a vision model or a BLIP-2; `kwargs` go to `from_pretrained`."""
    if config_of(vision_model).model_type == "blip-2":
        tower = _Blip2ImageSide.from_pretrained(vision_model, **kwargs).vision_model
        # Only for the tower: the Q-Former, which is loaded with it, does not support FlashAttention.
        if attn_implementation is not None:
            tower.set_attn_implementation(attn_implementation)
        return tower
    model = AutoModel.from_pretrained(
        vision_model, attn_implementation=attn_implementation, trust_remote_code=False, **kwargs
    )
    return getattr(model, "vision_model", model)


@named_errors
def _image_processor_of(vision_model: str):
    with without_remote_code(vision_model):
        return AutoImageProcessor.from_pretrained(vision_model, trust_remote_code=False)


@named_errors
def _tokenizer_of(text_model: str):
    with without_remote_code(text_model):
        return AutoTokenizer.from_pretrained(text_model, trust_remote_code=False)


@named_errors
def _load_text_model(text_model: str, **kwargs) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(text_model, trust_remote_code=False, **kwargs)


def compose_config(
    vision_model: str, text_model: str, qformer_model: str | None = None, **config_kwargs
) -> SQLlavaConfig:
    """
    The configuration of the model that [`compose`] builds, without loading tokenizer or weights: for planning. The
    vocabulary always grows by the new tokens, even where the language model already has free rows.
    """
    text_config = text_config_of(text_model)
    image_token_id = text_config.vocab_size
    text_config.vocab_size = padded_size(image_token_id + len(NEW_TOKENS))
    return SQLlavaConfig(
        vision_config=_vision_config(vision_model),
        text_config=text_config,
        image_token_id=image_token_id,
        vusr_token_id=image_token_id + 1,
        **_qformer_fields(qformer_model),
        **config_kwargs,
    )


def compose_processor(
    vision_model: str,
    text_model: str,
    qformer_model: str | None = None,
    prompt_layout: str | None = None,
    **processor_kwargs,
) -> SQLlavaProcessor:
    """
    The processor that [`compose`] returns, without loading weights.

    Args:
        prompt_layout (`str`, *optional*): A name in `PROMPT_LAYOUTS`. Default: `"auto"`, the layout of the language
            model's own chat template, or Vicuna's if it has none that is known. A line says which was taken.
        processor_kwargs: Settings of [`SQLlavaProcessor`]. They replace those of the layout.
    """
    processor, _ = _processor_and_own_end(vision_model, text_model, qformer_model, prompt_layout, **processor_kwargs)
    return processor


def _processor_and_own_end(
    vision_model: str, text_model: str, qformer_model: str | None, prompt_layout: str | None = None, **processor_kwargs
) -> tuple[SQLlavaProcessor, int | None]:
    """The processor, and the end token of the language model's tokenizer, which the layout may replace."""
    config = SQLlavaConfig(
        vision_config=_vision_config(vision_model),
        text_config=text_config_of(text_model),
        prototype_variant="none",  # does not change image_seq_length
        **_qformer_fields(qformer_model),
    )
    tokenizer = _tokenizer_of(text_model)
    own_end = tokenizer.eos_token_id
    layout = {}
    if prompt_layout is not None or not processor_kwargs.keys() & {"turn_format", "chat_template"}:
        layout, sentence = layout_settings(prompt_layout, tokenizer, str(text_model))
        print_in_first_process(sentence)
    processor = SQLlavaProcessor(
        _image_processor_of(vision_model),
        tokenizer,
        image_seq_length=config.image_seq_length,
        **{**layout, **processor_kwargs},
    )
    check_template(processor)
    require_fitting(processor, config)
    return processor, own_end


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
    Builds an SQ-LLaVA from a vision model and a causal language model. Extractor and projector get new random weights.

    Args:
        vision_model (`str`): Folder or Hub id of a CLIP or SigLIP (complete, or its vision part), or of a BLIP-2.
        text_model (`str`): Folder or Hub id of a causal language model, or of a multimodal model that transformers
            loads as one, such as Gemma 3 or Llama 4. Only the text part of such a model is used.
        qformer_model (`str`, *optional*): Folder or Hub id of a BLIP-2 model whose Q-Former is used.
        dtype, attn_implementation: As for `from_pretrained`.
        processor_kwargs (`dict`, *optional*): Arguments of [`compose_processor`]: `prompt_layout`,
            `image_aspect_ratio`, ...
        config_kwargs: Fields of [`SQLlavaConfig`]: `prototype_variant`, `num_prototypes`, ...

    Returns:
        The model, on the CPU, and its processor.

    Raises:
        ValueError: if one of the models is of a kind that cannot be used.
    """
    processor, own_end = _processor_and_own_end(vision_model, text_model, qformer_model, **(processor_kwargs or {}))
    # A multimodal model is loaded completely; only its text part is used.
    whole = _load_text_model(text_model, dtype=dtype, attn_implementation=attn_implementation)
    config = SQLlavaConfig(
        vision_config=_vision_config(vision_model),
        text_config=_text_config_for(whole, processor),
        **(config_kwargs | _qformer_fields(qformer_model)),
    )
    config.image_token_id = processor.image_token_id
    config.vusr_token_id = processor.vusr_token_id
    processor.image_seq_length = config.image_seq_length  # with vision_feature_select_strategy "full", one more
    model = SQLlavaForConditionalGeneration._from_config(
        config, dtype=whole.dtype, attn_implementation=attn_implementation
    )
    _copy_weights(model, vision_model, whole, qformer_model)
    own = whole.generation_config.eos_token_id
    own = own if isinstance(own, list) else [own]
    set_special_tokens(model, processor, [token for token in (*own, own_end) if token is not None])
    return model, processor


def _text_config_for(whole: PreTrainedModel, processor: SQLlavaProcessor) -> PreTrainedConfig:
    """The configuration of a loaded language model. Its embeddings grow if the processor has more tokens."""
    text_config = whole.config.get_text_config(decoder=True)
    text_config.name_or_path = public_name(whole.config.name_or_path)
    text_config.tie_word_embeddings = whole.config.tie_word_embeddings
    if len(processor.tokenizer) > text_config.vocab_size:
        whole.resize_token_embeddings(len(processor.tokenizer), pad_to_multiple_of=VOCABULARY_MULTIPLE)
    text_config.pad_token_id = processor.tokenizer.pad_token_id
    return text_config


def _copy_weights(
    model: SQLlavaForConditionalGeneration, vision_model: str, whole: PreTrainedModel, qformer_model: str | None
) -> None:
    inner = model.model
    inner.vision_tower.load_state_dict(load_vision_tower(vision_model, dtype=whole.dtype).state_dict())
    if qformer_model is not None:
        weights = _Blip2ImageSide.from_pretrained(qformer_model, dtype=whole.dtype).state_dict()
        inner.resampler.load_state_dict({name: weights[name] for name in inner.resampler.state_dict()})
    text_part = next(module for module in whole.modules() if type(module) is type(inner.language_model))
    inner.language_model.load_state_dict(text_part.state_dict())
    model.lm_head.load_state_dict(whole.get_output_embeddings().state_dict())
    model.tie_weights()
