"""Loads models while DeepSpeed ZeRO-3 is on: in pieces, of which each process has one, or whole."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers.integrations import deepspeed

from modeling_sq_llava import SQLlavaForConditionalGeneration


def from_pretrained(folder: Path, **kwargs) -> SQLlavaForConditionalGeneration:
    """`SQLlavaForConditionalGeneration.from_pretrained`. Under ZeRO-3, the rest of a run is like without it."""
    if not deepspeed.is_deepspeed_zero3_enabled():
        return SQLlavaForConditionalGeneration.from_pretrained(folder, **kwargs)
    # ZeRO-3 draws random weights before it loads the saved ones.
    with torch.random.fork_rng(devices=[]):
        model = SQLlavaForConditionalGeneration.from_pretrained(folder, **kwargs)
    # transformers keeps them to give saved weights their old names. Under ZeRO-3, it also keeps those it did not use.
    model._weight_conversions = [conversion for conversion in model._weight_conversions if conversion.was_used()]
    return model


@contextmanager
def loading_whole() -> Iterator[None]:
    """Loads models whole in this process, also under ZeRO-3."""
    if not deepspeed.is_deepspeed_zero3_enabled():
        yield
        return
    launched = deepspeed._hf_deepspeed_config_weak_ref()
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed.set_hf_deepspeed_config(launched)
