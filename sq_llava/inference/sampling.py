"""Seeded sampling that does not depend on the rest of the batch.

    >>> draw = SeededDraw(temperature=1.2, top_k=300, top_p=0.95, generators=[one, another])
    >>> model.generate(**inputs, do_sample=False, logits_processor=LogitsProcessorList([draw]))

Each group of rows has its own random generator. With a generator of the same seed, the tokens are those that
`generate(do_sample=True, temperature=..., top_k=..., top_p=...)` gives for these rows alone.
"""

from collections.abc import Sequence

import torch
from transformers import LogitsProcessor


class SeededDraw(LogitsProcessor):
    """
    Samples the next token of each row, and sets the scores of all other tokens to minus infinity.

    Args:
        temperature, top_k, top_p: As for `generate`, applied in this order. Softmax and top-p are computed on the
            `top_k` tokens only, while transformers sorts the whole vocabulary.
        generators (`Sequence[torch.Generator | None]`): The rows are split into equal groups, in order, one for each
            generator. `None` stands for the default generator.

    Raises:
        ValueError: if a setting is out of range.
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
                    f"{name} is {value}. Sampling needs a temperature above 0, a top_k of at least 1 and a top_p "
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
        # An exponential race: the token with the shortest waiting time is the sample. `torch.multinomial` does the
        # same. To give the same tokens for the same seed, times are drawn for the whole vocabulary.
        waiting = torch.empty_like(scores)
        for share, generator in zip(waiting.chunk(len(self.generators)), self.generators, strict=True):
            share.exponential_(generator=generator)
        race = (probabilities / waiting.gather(1, tokens)).masked_fill(outside, 0)
        chosen = tokens.gather(1, race.argmax(dim=-1, keepdim=True))
        return torch.full_like(scores, -torch.inf).scatter(1, chosen, 0.0)
