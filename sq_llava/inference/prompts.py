"""From conversations to what a model takes, and from its tokens to text.

    >>> prompts = token_ids(processor, conversations)
    >>> model.generate(**model_inputs(model, processor, prompts, images))

A conversation is a list of messages with its images in their places (`sq_llava/data/messages.py`). What this module
does not do: run the model.
"""

import sys

import torch
from jinja2 import TemplateError
from PIL import Image
from transformers import PreTrainedModel

from processing_sq_llava import SQLlavaProcessor
from sq_llava.inference.prefix_cache import pad_left


def token_ids(processor: SQLlavaProcessor, conversations: list[list[dict]], ask: bool = False) -> list[list[int]]:
    """
    The prompts of conversations, with the placeholders of their images; no image is processed.

    Args:
        ask (`bool`): The model is to ask a question next, instead of answering.

    Raises:
        ValueError: if the chat template refuses a conversation.
    """
    try:
        texts = processor.apply_chat_template(conversations, add_generation_prompt=True, ask=ask, tokenize=False)
    except TemplateError as error:
        raise ValueError(str(error)) from error
    placeholders = processor.image_token * processor.image_seq_length
    texts = [text.replace(processor.image_token, placeholders) for text in texts]
    return processor.tokenizer(texts, add_special_tokens=False)["input_ids"]


def pixel_values(processor: SQLlavaProcessor, images: list[Image.Image]) -> torch.Tensor:
    """`(num_images, channels, height, width)`, on the CPU."""
    return processor.image_processor(images, return_tensors="pt")["pixel_values"]


def pixel_inputs(
    model: PreTrainedModel, processor: SQLlavaProcessor, images: list[Image.Image]
) -> dict[str, torch.Tensor]:
    """`pixel_values` on the model's device; nothing for no images."""
    return {"pixel_values": pixel_values(processor, images).to(model.device)} if images else {}


def model_inputs(
    model: PreTrainedModel, processor: SQLlavaProcessor, prompts: list[list[int]], images: list[Image.Image]
) -> dict[str, torch.Tensor]:
    """`input_ids` and `attention_mask` `(num_prompts, longest)`, padded on the left, and the pixels of all images."""
    input_ids, attention_mask = pad_left(prompts, processor.tokenizer.pad_token_id)
    return {
        "input_ids": input_ids.to(model.device),
        "attention_mask": attention_mask.to(model.device),
        **pixel_inputs(model, processor, images),
    }


def decode(processor: SQLlavaProcessor, generated: torch.Tensor) -> list[str]:
    """The texts of generated tokens `(num_rows, length)`, without special tokens, stripped."""
    return [text.strip() for text in processor.batch_decode(generated, skip_special_tokens=True)]


def context_length(model: PreTrainedModel) -> int:
    """Tokens that the language model reads and writes at most; without a bound, as of Mamba, the largest integer."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None) or sys.maxsize


def room_in_context(model: PreTrainedModel, prompt_lengths: list[int], max_new_tokens: int) -> int:
    """
    How many tokens are generated behind prompts of these lengths: `max_new_tokens`, or for one prompt fewer, where the
    model's context ends before.

    Raises:
        ValueError: if a prompt fills the context, or one of several leaves no room for `max_new_tokens`: the others
            would be cut off too.
    """
    length, limit = max(prompt_lengths), context_length(model)
    if length >= limit:
        raise ValueError(
            f"The conversation has {length:,} tokens, but this model reads at most {limit:,}: shorten it, or begin a "
            "new one."
        )
    if len(prompt_lengths) > 1 and length + max_new_tokens > limit:
        raise ValueError(
            f"The longest of {len(prompt_lengths)} conversations has {length:,} tokens. With {max_new_tokens:,} to be "
            f"generated (max_new_tokens) these are more than the {limit:,} that this model reads: shorten it, give a "
            "smaller max_new_tokens, or give the conversations one by one."
        )
    return min(max_new_tokens, limit - length)
