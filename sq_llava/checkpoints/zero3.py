"""What loading models needs while DeepSpeed ZeRO-3 is on, which makes transformers load all models in pieces."""

from collections.abc import Iterator
from contextlib import contextmanager

from transformers.integrations import deepspeed


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
