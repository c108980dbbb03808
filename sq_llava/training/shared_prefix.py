"""Attention over rows that share a prefix: each row sees its prefix and itself, as if it stood alone.

A pack holds `prefix, rest of row 1, rest of row 2, ...`. The positions of each rest go on behind the prefix. So the
hidden states, the losses and the gradients are those of the rows alone.

- SDPA, eager and flex attention get a mask (`attention_mask`).
- FlashAttention has no such mask. It is called twice (`shared_prefix_attention`): for the prefixes, and for the rests,
  whose keys are those of their prefix and their own. The mask is then causal in both calls.

Sliding windows are kept: they count positions, which are those of the rows alone.
"""

from functools import partial
from typing import Any

import numpy as np
import torch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from transformers import AttentionInterface, PretrainedConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


def branches(begins: list[int], prefixes: list[int], width: int) -> torch.Tensor:
    """
    Numbers the tokens of rows by group and branch.

    Args:
        begins (`list[int]`): For each row, the number of leading tokens that it takes from the row before it.
        prefixes (`list[int]`): For each row, the tokens of its prefix, if other rows share it; else 0.
        width (`int`): Tokens of the longest row.

    Returns:
        `torch.Tensor` of shape `(num_rows, width, 2)`, `torch.int64`. Rows with the same prefix are a group. A token
        of the prefix has branch 0, other tokens have the branch of their row.
    """
    group, groups = 0, []
    for row, begin in enumerate(begins):
        group = group if begin else row
        groups.append(group)
    positions = torch.arange(width)
    own = torch.arange(1, len(begins) + 1).unsqueeze(1) * (positions >= torch.tensor(prefixes).unsqueeze(1))
    own *= torch.tensor(prefixes).unsqueeze(1) > 0  # a row that shares nothing has a single branch
    return torch.stack([torch.tensor(groups).unsqueeze(1).expand_as(own), own], dim=-1)


def attention_mask(
    numbers: torch.Tensor, positions: torch.Tensor, config: PretrainedConfig, dtype: torch.dtype
) -> torch.Tensor | BlockMask | dict[str, torch.Tensor | BlockMask]:
    """
    Makes the mask of a packed batch, in the form that the attention implementation of the language model takes.

    Args:
        numbers (`torch.Tensor` of shape `(batch_size, sequence_length, 2)`): From [`branches`], packed.
        positions (`torch.Tensor` of shape `(batch_size, sequence_length)`): `position_ids`.
        config (`PretrainedConfig`): Configuration of the language model.
        dtype (`torch.dtype`): Precision of its attention scores; eager attention adds the mask to them.

    Returns:
        A mask for all layers, or a `dict` with one for each kind of layer.
    """
    kinds = set(getattr(config, "layer_types", None) or [])
    window = getattr(config, "sliding_window", None)
    make = partial(_mask, numbers, positions, config._attn_implementation, dtype)
    if window is None or kinds == {"full_attention"}:
        return make(None)
    if len(kinds) > 1:
        return {"full_attention": make(None), "sliding_attention": make(window)}
    return make(window)


def _mask(numbers, positions, implementation: str, dtype: torch.dtype, window: int | None) -> torch.Tensor | BlockMask:
    group, branch = numbers.unbind(-1)
    batch_size, width = group.shape

    def sees(batch, head, query, key):
        seen = (query >= key) & (group[batch, query] == group[batch, key])
        seen &= (branch[batch, key] == 0) | (branch[batch, key] == branch[batch, query])
        return seen if window is None else seen & (positions[batch, query] - positions[batch, key] < window)

    if implementation == "flex_attention":
        return create_block_mask(sees, batch_size, None, width, width, device=group.device)
    places = torch.arange(width, device=group.device)
    each = torch.arange(batch_size, device=group.device).view(-1, 1, 1, 1)
    seen = sees(each, None, places.view(1, 1, -1, 1), places.view(1, 1, 1, -1))
    if implementation == "eager":
        return torch.zeros_like(seen, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)
    return seen


def borders(begins: list[int], prefixes: list[int], lengths: list[int]) -> dict[str, Any]:
    """
    The inputs of [`shared_prefix_attention`] for a batch in one flat row, without padding.

    Args:
        begins, prefixes (`list[int]`): See [`branches`].
        lengths (`list[int]`): Tokens of each row, with its prefix.

    Returns:
        `dict` with the keywords of two calls of FlashAttention (`first` for prefixes and rows that share nothing,
        `second` for the rests), the positions of their queries and keys in the flat row, and `order`, which puts the
        outputs of both calls back into the order of the flat row.
    """
    first, second, keys = [], [], []
    at, prefix = 0, np.empty(0, dtype=np.int64)
    for begin, size, length in zip(begins, prefixes, lengths):
        places = np.arange(at, at + length - begin)
        at += len(places)
        if not begin:
            prefix = places[:size] if size else places
            first.append(prefix)
            places = places[len(prefix) :]
        if size:
            second.append(places)
            keys.append(np.concatenate([prefix, places]))
    queries = np.concatenate(first + second)
    return {
        "first": {"queries": torch.from_numpy(np.concatenate(first)), **_varlen(first, first)},
        "second": {
            "queries": torch.from_numpy(np.concatenate(second)),
            "keys": torch.from_numpy(np.concatenate(keys)),
            **_varlen(second, keys),
        }
        if second
        else {},
        "order": torch.from_numpy(np.argsort(queries)),
    }


def _varlen(queries: list[np.ndarray], keys: list[np.ndarray]) -> dict[str, torch.Tensor | int]:
    inputs = {}
    for name, pieces in (("q", queries), ("k", keys)):
        sizes = [len(piece) for piece in pieces]
        inputs[f"cu_seq_lens_{name}"] = torch.tensor([0, *np.cumsum(sizes).tolist()], dtype=torch.int32)
        inputs[f"max_length_{name}"] = max(sizes)
    return inputs


def register_shared_prefix(implementation: str) -> None:
    """Lets an implementation of FlashAttention take `shared_prefix`. Calls without it are as before."""
    attention = ALL_ATTENTION_FUNCTIONS[implementation]
    if getattr(attention, "takes_shared_prefix", False):
        return

    def shared_prefix_attention(module, query, key, value, attention_mask, shared_prefix=None, **kwargs):
        if shared_prefix is None:
            return attention(module, query, key, value, attention_mask, **kwargs)
        outputs = []
        for call in (shared_prefix["first"], shared_prefix["second"]):
            if not call:
                continue
            inputs = dict(call)
            places = inputs.pop("queries")
            key_places = inputs.pop("keys", places)
            states = (query[:, :, places], key[:, :, key_places], value[:, :, key_places])
            outputs.append(attention(module, *states, None, **kwargs | inputs)[0])
        return torch.cat(outputs, dim=1)[:, shared_prefix["order"]], None

    shared_prefix_attention.takes_shared_prefix = True
    AttentionInterface.register(implementation, shared_prefix_attention)
