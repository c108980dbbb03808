"""Turns conversations into model inputs, and generated tokens into text. It does not run the model.

    >>> prompts = token_ids(processor, conversations)
    >>> model.generate(**model_inputs(model, processor, prompts, images))

A conversation is a list of messages with its images in place (`sq_llava/data/messages.py`).
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
    The token ids of the prompts, with the placeholder tokens of their images. Images are not processed.

    Args:
        ask (`bool`): Let the model ask next instead of answering: the prompt ends with `[vusr]`.

    Returns:
        One list of token ids for each conversation.

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
    """Preprocessed images: float tensor of shape `(num_images, channels, height, width)`, on the CPU."""
    return processor.image_processor(images, return_tensors="pt")["pixel_values"]


def pixel_inputs(
    model: PreTrainedModel, processor: SQLlavaProcessor, images: list[Image.Image]
) -> dict[str, torch.Tensor]:
    """`pixel_values` on the model's device. The dictionary is empty if there are no images."""
    return {"pixel_values": pixel_values(processor, images).to(model.device)} if images else {}


def model_inputs(
    model: PreTrainedModel, processor: SQLlavaProcessor, prompts: list[list[int]], images: list[Image.Image]
) -> dict[str, torch.Tensor]:
    """
    Inputs for `generate`, on the model's device.

    Args:
        prompts (`list[list[int]]`): Token ids, as from [`token_ids`].
        images: All images of all prompts, in order.

    Returns:
        `input_ids` and `attention_mask` of shape `(num_prompts, longest)`, padded on the left, and `pixel_values` of
        shape `(num_images, channels, height, width)` if there are images.
    """
    input_ids, attention_mask = pad_left(prompts, processor.tokenizer.pad_token_id)
    return {
        "input_ids": input_ids.to(model.device),
        "attention_mask": attention_mask.to(model.device),
        **pixel_inputs(model, processor, images),
    }


def decode(processor: SQLlavaProcessor, generated: torch.Tensor) -> list[str]:
    """The stripped texts of generated token ids `(num_rows, length)`, without special tokens."""
    return [text.strip() for text in processor.batch_decode(generated, skip_special_tokens=True)]


def context_length(model: PreTrainedModel) -> int:
    """Maximum number of tokens in a prompt and its answer. Without a limit (Mamba), it is `sys.maxsize`."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None) or sys.maxsize


def room_in_context(model: PreTrainedModel, prompt_lengths: list[int], max_new_tokens: int) -> int:
    """
    Number of new tokens that fit into the model's context after prompts of these lengths: at most `max_new_tokens`.

    Args:
        prompt_lengths (`list[int]`): In tokens. For a single prompt, the result may be less than `max_new_tokens`.

    Raises:
        ValueError: if a prompt fills the context; or if one of several prompts leaves less room than
            `max_new_tokens`, because the other answers would be cut short too.
    """
    length, limit = max(prompt_lengths), context_length(model)
    if length >= limit:
        raise ValueError(
            f"The conversation has {length:,} tokens, but this model reads at most {limit:,}. Shorten it, or start a "
            "new one."
        )
    if len(prompt_lengths) > 1 and length + max_new_tokens > limit:
        raise ValueError(
            f"The longest of {len(prompt_lengths)} conversations has {length:,} tokens. Together with "
            f"max_new_tokens={max_new_tokens:,}, that is more than the {limit:,} tokens of this model's context. "
            "Shorten the conversation, lower max_new_tokens, or give the conversations one by one."
        )
    return min(max_new_tokens, limit - length)
