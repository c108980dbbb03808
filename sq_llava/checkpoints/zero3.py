"""Loads models under DeepSpeed ZeRO-3, where each process normally holds one part of each weight."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers.integrations import deepspeed

from modeling_sq_llava import SQLlavaForConditionalGeneration


def from_pretrained(folder: Path, **kwargs) -> SQLlavaForConditionalGeneration:
    """Loads a model. Under ZeRO-3, it leaves the random generator and the names of saved weights as without ZeRO-3."""
    if not deepspeed.is_deepspeed_zero3_enabled():
        return SQLlavaForConditionalGeneration.from_pretrained(folder, **kwargs)
    # ZeRO-3 first initialises all weights at random, and then loads the saved ones.
    with torch.random.fork_rng(devices=[]):
        model = SQLlavaForConditionalGeneration.from_pretrained(folder, **kwargs)
    # When transformers saves a model, it undoes these renamings. Under ZeRO-3, the list also has unused ones.
    model._weight_conversions = [conversion for conversion in model._weight_conversions if conversion.was_used()]
    return model


@contextmanager
def loading_whole() -> Iterator[None]:
    """Inside this context, this process loads whole models, also under ZeRO-3."""
    if not deepspeed.is_deepspeed_zero3_enabled():
        yield
        return
    launched = deepspeed._hf_deepspeed_config_weak_ref()
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed.set_hf_deepspeed_config(launched)
