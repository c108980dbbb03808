"""A key-value cache for prompts with a common prefix, such as several questions about one image.

    cache = PrefixCache(model, num_rows=1)
    cache.read([prompt], {"pixel_values": pixels})  # all tokens but the last
    shared = cache.select([0, 0, 0])                # three rows, without another pass
    inputs = shared.continue_with([prompt + a, prompt + b, prompt + c])
    model.generate(**inputs, **{CACHE_NAME: shared.states})

New tokens are padded on the left and go after the cached ones, so there may be padding between the two. The padding is
masked and does not count in the positions, so each row gives the same result as its prompt alone. The states of
recurrent layers cannot be cut or shared: the cache of a model with such layers stays empty.
"""

import copy
from collections.abc import Sequence

import torch
from transformers import DynamicCache, PreTrainedModel


class PrefixCache:
    """
    The keys and values of a batch of rows, and the tokens that they belong to.

    Args:
        model (`PreTrainedModel`): The model that computes them.
        num_rows (`int`): Number of rows in the batch. They are empty at first.

    `states` is `None` if nothing can be cached (see [`is_recurrent`]).
    """

    def __init__(self, model: PreTrainedModel, num_rows: int):
        self.model = model
        self.states = None if is_recurrent(model) else DynamicCache()
        # [num_rows, width], on the CPU, where rows are compared with prompts.
        self.tokens = torch.zeros(num_rows, 0, dtype=torch.long)
        self.mask = torch.zeros_like(self.tokens)

    @property
    def is_empty(self) -> bool:
        return self.tokens.shape[1] == 0

    def continue_with(self, prompts: Sequence[list[int]]) -> dict[str, torch.Tensor]:
        """
        Prepares a new prompt for each row. The cache keeps only the prefix that it shares with the new prompt.

        Args:
            prompts (`Sequence[list[int]]`): Token ids of one whole prompt for each row.

        Returns:
            `input_ids` and `attention_mask` for `generate`, of shape `(num_rows, cached + new tokens)`. Each row has
            at least one new token.
        """
        new_tokens = []
        for row, prompt in enumerate(prompts):
            columns = self.mask[row].nonzero().squeeze(1)
            common = min(common_length(self.tokens[row, columns].tolist(), prompt), len(prompt) - 1)
            # Decoded and tokenized again, generated tokens can become other tokens.
            self.mask[row, columns[common:]] = 0
            new_tokens.append(prompt[common:])
        used = self.mask.any(dim=0).nonzero()
        width = int(used[-1]) + 1 if len(used) else 0
        if width == 0:
            self.states = None if self.states is None else DynamicCache()
        elif width < self.tokens.shape[1]:
            self.states.crop(width - self.tokens.shape[1])
        self.tokens, self.mask = self.tokens[:, :width], self.mask[:, :width]
        new, new_mask = pad_left(new_tokens, self.model.generation_config.pad_token_id or 0)
        return {
            "input_ids": torch.cat([self.tokens, new], dim=1).to(self.model.device),
            "attention_mask": torch.cat([self.mask, new_mask], dim=1).to(self.model.device),
        }

    def read(self, prompts: Sequence[list[int]], images: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """
        Runs the model on all tokens of each prompt but the last, and caches them.

        Args:
            prompts (`Sequence[list[int]]`): Token ids of one whole prompt for each row.
            images (`dict[str, torch.Tensor]`): `pixel_values` of the images in the new tokens; empty for no images.

        Returns:
            The same inputs as [`PrefixCache.continue_with`].
        """
        inputs = self.continue_with(prompts)
        width = self.tokens.shape[1]
        if self.states is not None and inputs["input_ids"].shape[1] > width + 1:
            mask = inputs["attention_mask"][:, :-1]
            position_ids = (mask.cumsum(dim=1) - 1).clamp_min(0)
            self.model(
                input_ids=inputs["input_ids"][:, width:-1],
                attention_mask=mask,
                position_ids=position_ids[:, width:],
                cache=self.states,
                logits_to_keep=1,
                **images,
            )
            self.remember(inputs["input_ids"][:, :-1], mask)
        return inputs

    def remember(self, tokens: torch.Tensor, mask: torch.Tensor) -> None:
        """Notes which tokens `(num_rows, width)` the states belong to, after the model has added to them."""
        if self.states is not None:
            self.tokens, self.mask = tokens.cpu(), mask.cpu()

    def select(self, rows: Sequence[int]) -> "PrefixCache":
        """A new cache with copies of these rows. A row may be taken several times."""
        selected = copy.copy(self)
        selected.tokens, selected.mask = self.tokens[rows], self.mask[rows]
        if self.states is None:
            return selected
        selected.states = copy.copy(self.states)
        selected.states.layers = [copy.copy(layer) for layer in self.states.layers]
        selected.states.batch_select_indices(torch.tensor(rows, device=self.model.device))
        return selected


def common_length(one: Sequence[int], other: Sequence[int]) -> int:
    """Length of the common prefix of two token sequences."""
    differ = (index for index, (left, right) in enumerate(zip(one, other)) if left != right)
    return next(differ, min(len(one), len(other)))


def pad_left(rows: Sequence[list[int]], pad_token_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Pads rows on the left. Returns token ids and mask of shape `(len(rows), longest)`."""
    longest = max(map(len, rows))
    tokens = torch.tensor([[pad_token_id] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    return tokens, mask


def is_recurrent(model: PreTrainedModel) -> bool:
    """`True` if a layer of the language model keeps other states than the keys and values of each token."""
    layer_types = set(getattr(model.config.get_text_config(), "layer_types", None) or [])
    attention = {"full_attention", "sliding_attention", "chunked_attention"}
    parts = (module for module in model.modules() if isinstance(module, PreTrainedModel))
    return not layer_types <= attention or any(part._is_stateful for part in parts)


def allows_gaps(model: PreTrainedModel, length: int) -> bool:
    """
    `True` if padding between the tokens of a row leaves the result unchanged, for rows of `length` columns. `False` if
    the model has recurrent layers, or an attention window shorter than `length`: windows count padding too.
    """
    text_config = model.config.get_text_config()
    layer_types = set(getattr(text_config, "layer_types", None) or [])
    window = getattr(text_config, "sliding_window", None)
    is_whole = "chunked_attention" not in layer_types and (window is None or length <= window)
    return not is_recurrent(model) and is_whole
