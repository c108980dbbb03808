"""Sampling whose result does not depend on what else is in the batch.

    >>> draw = SeededDraw(temperature=1.2, top_k=300, top_p=0.95, generators=[one, another])
    >>> model.generate(**inputs, do_sample=False, logits_processor=LogitsProcessorList([draw]))

Rows that belong together draw from a generator of their own. With a generator seeded alike they get the tokens of
`generate(do_sample=True, temperature=..., top_k=..., top_p=...)` for these rows alone.
"""

from collections.abc import Sequence

import torch
from transformers import LogitsProcessor


class SeededDraw(LogitsProcessor):
    """
    Draws the next token of each row, and leaves `generate` no choice but it.

    Args:
        temperature, top_k, top_p: As of `generate`, in this order. Nucleus and softmax are taken over the `top_k`
            alone, where transformers sorts the whole vocabulary.
        generators (`Sequence[torch.Generator | None]`): Of equal shares of the rows, one after another; `None`: the
            default generator.

    Raises:
        ValueError: for a setting with which there is nothing to draw from.
    """

    def __init__(
        self, temperature: float, top_k: int, top_p: float, generators: Sequence[torch.Generator | None]
    ) -> None:
        for name, value, is_right in (
            ("temperature", temperature, temperature > 0),
            ("top_k", top_k, top_k >= 1),
            ("top_p", top_p, 0 <= top_p <= 1),
        ):
            if not is_right:
                raise ValueError(
                    f"{name} is {value}: to sample, give a temperature above 0, a top_k of at least 1 and a top_p "
                    "from 0 to 1."
                )
        self.temperature = temperature
        self.top_k = top_k
        self.top_p = top_p
        self.generators = generators

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        best, tokens = (scores / self.temperature).topk(min(self.top_k, scores.shape[-1]))
        probabilities = best.softmax(dim=-1)
        outside = probabilities.cumsum(dim=-1) - probabilities >= self.top_p
        outside[:, 0] = False
        # The one with the least waiting time is a draw (exponential race), and how `torch.multinomial` draws, which
        # is why times are drawn for the whole vocabulary: the same seed gives the same tokens.
        waiting = torch.empty_like(scores)
        for share, generator in zip(waiting.chunk(len(self.generators)), self.generators, strict=True):
            share.exponential_(generator=generator)
        race = (probabilities / waiting.gather(1, tokens)).masked_fill(outside, 0)
        chosen = tokens.gather(1, race.argmax(dim=-1, keepdim=True))
        return torch.full_like(scores, -torch.inf).scatter(1, chosen, 0.0)
