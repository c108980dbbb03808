"""What several prompts have in common goes through the model once: an image's tokens for all questions about it.

    cache = PrefixCache(model, num_rows=1)
    cache.read([prompt], {"pixel_values": pixels})     # all tokens but the last
    shared = cache.select([0, 0, 0])              # three rows, without another pass
    inputs = shared.continue_with([prompt + a, prompt + b, prompt + c])
    model.generate(**inputs, **{CACHE_NAME: shared.states})

New tokens stand behind the cached ones, padded on the left: so padding may stand between the two. It is masked, and
positions are counted without it, so each row gives what its prompt gives alone. What this module does not do: cache
the states of recurrent layers, which cannot be cut or shared; a cache of such a model stays empty.
"""

import copy
from collections.abc import Sequence

import torch
from transformers import DynamicCache, PreTrainedModel


class PrefixCache:
    """
    The attention states of rows of tokens, and which tokens they are of.

    Args:
        model (`PreTrainedModel`): Whose states they are.
        num_rows (`int`): Rows of the batch, all of them empty.

    `states` is `None` where nothing can be kept (`is_recurrent`).
    """

    def __init__(self, model: PreTrainedModel, num_rows: int):
        self.model = model
        self.states = None if is_recurrent(model) else DynamicCache()
        # [num_rows, width], on the CPU: rows are compared with prompts there.
        self.tokens = torch.zeros(num_rows, 0, dtype=torch.long)
        self.mask = torch.zeros_like(self.tokens)

    @property
    def is_empty(self) -> bool:
        return self.tokens.shape[1] == 0

    def continue_with(self, prompts: Sequence[list[int]]) -> dict[str, torch.Tensor]:
        """
        Keeps of each row what it has in common with its whole prompt, from the beginning on.

        Returns:
            `input_ids` and `attention_mask` `(num_rows, cached + new tokens)` for `generate`, at least one token new.
        """
        new_tokens = []
        for row, prompt in enumerate(prompts):
            columns = self.mask[row].nonzero().squeeze(1)
            common = min(common_length(self.tokens[row, columns].tolist(), prompt), len(prompt) - 1)
            # Text is not always split into the tokens that it was generated as.
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
        """Runs the model over all but the last token of each prompt. Returns inputs as `continue_with`."""
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
        """Says of which tokens the states are, after the model has added to them."""
        if self.states is not None:
            self.tokens, self.mask = tokens.cpu(), mask.cpu()

    def select(self, rows: Sequence[int]) -> "PrefixCache":
        """Copies of rows, also several of one, as a cache of their own."""
        selected = copy.copy(self)
        selected.tokens, selected.mask = self.tokens[rows], self.mask[rows]
        if self.states is None:
            return selected
        selected.states = copy.copy(self.states)
        selected.states.layers = [copy.copy(layer) for layer in self.states.layers]
        selected.states.batch_select_indices(torch.tensor(rows, device=self.model.device))
        return selected


def common_length(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two rows have in common, from the beginning on."""
    differ = (index for index, (left, right) in enumerate(zip(one, other)) if left != right)
    return next(differ, min(len(one), len(other)))


def pad_left(rows: Sequence[list[int]], pad_token_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and mask `(len(rows), longest)`."""
    longest = max(map(len, rows))
    tokens = torch.tensor([[pad_token_id] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    return tokens, mask


def is_recurrent(model: PreTrainedModel) -> bool:
    """Whether a layer of the language model keeps anything else than keys and values of each token."""
    layer_types = set(getattr(model.config.get_text_config(), "layer_types", None) or [])
    attention = {"full_attention", "sliding_attention", "chunked_attention"}
    parts = (module for module in model.modules() if isinstance(module, PreTrainedModel))
    return not layer_types <= attention or any(part._is_stateful for part in parts)


def allows_gaps(model: PreTrainedModel, length: int) -> bool:
    """
    Whether padding between the tokens of a row changes nothing in `length` columns: not in layers that are recurrent,
    nor where a window of attention, which is counted in columns, is shorter.
    """
    text_config = model.config.get_text_config()
    layer_types = set(getattr(text_config, "layer_types", None) or [])
    window = getattr(text_config, "sliding_window", None)
    is_whole = "chunked_attention" not in layer_types and (window is None or length <= window)
    return not is_recurrent(model) and is_whole
