"""Packing: several conversations in one row of at most `max_length` tokens, each as if it were alone.

    python -m train_sft --config recipes/sq-llava-7b/stage2.yaml --packing true --train_sampling_strategy random

In a packed row the positions begin at 0 with each conversation, so that none attends to another: without an attention
mask and a cache, transformers makes a block-diagonal mask of the positions (SDPA, eager and flex attention);
FlashAttention is given where each begins, by the source of transformers: no GPU was at hand to run it. Images stand in
their order, labels and draws are those of the collator, and the first token of each conversation has no label: it
would be predicted from another one. Language models that read across all the same, such as recurrent ones, are refused
where that can be tried (`require_separation`): not with weights that ZeRO-3 holds in pieces.

Rows are packed by the most tokens that each can have (`sq_llava/data/lengths.py`), best-fit decreasing, within windows
of a permutation of all rows: whole, each once an epoch. The packs are a function of the seed and the epoch alone, the
same for any number of processes; an epoch has always as many, whole optimizer steps of them. What it does not do: cut
rows to fill a pack; group by modality; pack evaluation batches.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import datasets
import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset, Sampler
from transformers import PreTrainedModel
from trl import SFTConfig

from sq_llava.data.packing import pack_in_windows, split_packs
from sq_llava.data.self_questions import IGNORE_INDEX, NOT_SPOKEN
from sq_llava.training.collator import SelfQuestioningCollator


# Permutations that an epoch tries until its packs are not more than those of the first.
ATTEMPTS = 10


class PackSampler(Sampler[list[list[int]]]):
    """
    Micro-batches of packs of row numbers. It has no `batch_size`: accelerate takes it as sized by itself then.

    Args:
        lengths (`np.ndarray` of ints, `(num_rows,)`): The most tokens of each row; none above `max_length`.
        max_length (`int`): Tokens of a pack, at most.
        packs_per_batch (`int`): Of one forward pass of one process.
        packs_per_step (`int`): Over all processes and accumulation steps; a multiple of `packs_per_batch`.
        seed (`int`): Of the packs.
        epoch (`torch.Tensor`, `()`): Read at the start of each pass; the one that the collator has.

    Raises:
        ValueError: if there are fewer rows than an epoch needs packs.
    """

    def __init__(
        self,
        lengths: np.ndarray,
        max_length: int,
        packs_per_batch: int,
        packs_per_step: int,
        seed: int,
        epoch: torch.Tensor,
    ):
        self.lengths = np.asarray(lengths).tolist()
        self.max_length = max_length
        self.packs_per_batch = packs_per_batch
        self.packs_per_step = packs_per_step
        self.seed = seed
        self.epoch = epoch
        self.kept: list[list[int]] | None = None
        self.num_unsplit = len(self._pack(epoch=0, attempt=0))
        # One in 500 more than the first epoch needs: some need a few more.
        self.num_packs = -(-(self.num_unsplit + self.num_unsplit // 500) // packs_per_step) * packs_per_step
        if self.num_packs > len(self.lengths):
            raise ValueError(
                f"packing: {len(self.lengths)} rows make {self.num_unsplit} packs of max_length {max_length}, and a "
                f"step has {packs_per_step}: there are too few rows for whole steps. Leave packing out, or lower "
                "global_batch_size (with packing, it counts packs)."
            )

    def __len__(self) -> int:
        return self.num_packs // self.packs_per_batch

    def __iter__(self) -> Iterator[list[list[int]]]:
        packs = self.packs(int(self.epoch))
        for begin in range(0, len(packs), self.packs_per_batch):
            yield packs[begin : begin + self.packs_per_batch]

    def packs(self, epoch: int) -> list[list[int]]:
        if self.kept is not None:
            return self.kept
        for attempt in range(ATTEMPTS):
            packs = self._pack(epoch, attempt)
            if len(packs) <= self.num_packs:
                break
        else:
            packs = self._pack(epoch=0, attempt=0)  # the same packs again, in another order
        packs = split_packs(packs, self.num_packs)
        return [
            packs[number] for number in np.random.default_rng([self.seed, epoch, ATTEMPTS]).permutation(len(packs))
        ]

    def _pack(self, epoch: int, attempt: int) -> list[list[int]]:
        order = np.random.default_rng([self.seed, epoch, attempt]).permutation(len(self.lengths))
        return pack_in_windows(order, self.lengths, self.max_length)

    def keep_fullest(self) -> None:
        """Leaves of each epoch one step, with the packs of the most tokens: to try what a step takes."""
        fullest = sorted(self.packs(0), key=lambda pack: -sum(self.lengths[row] for row in pack))
        self.kept = fullest[: self.packs_per_step]
        self.num_packs = len(self.kept)

    def describe(self) -> str:
        """How full the packs are, and what bounds that."""
        tokens, rows = sum(self.lengths), len(self.lengths)
        fill, unsplit_fill = (tokens / (packs * self.max_length) for packs in (self.num_packs, self.num_unsplit))
        return (
            f"Packing: {rows:,} rows in {self.num_packs:,} packs of at most {self.max_length:,} tokens, "
            f"{rows / self.num_packs:.2f} rows each, about {self.packs_per_step * rows / self.num_packs:.0f} a step; "
            f"fill {fill:.3f} ({unsplit_fill:.3f} before some are split, so that an epoch has whole steps). It is "
            f"bounded by rows staying whole: they have {tokens / rows:.0f} tokens in the mean, {min(self.lengths):,} "
            "at least. These are the most of any draw; packing_fill in the log is what was there."
        )


def pack_sampler(
    rows: datasets.Dataset, args: SFTConfig, num_processes: int, epoch: torch.Tensor | None = None
) -> PackSampler:
    """The sampler of a run on rows whose `length` is sure (or, for a plan, rough)."""
    lengths = np.minimum(rows.with_format("numpy", columns=["length"])[:]["length"], args.max_length)
    size = args.per_device_train_batch_size
    steps = size * args.gradient_accumulation_steps * num_processes
    return PackSampler(lengths, args.max_length, size, steps, args.seed, torch.zeros(()) if epoch is None else epoch)


@torch.no_grad()
def require_separation(language_model: PreTrainedModel) -> None:
    """
    Tries whether the language model keeps the conversations of a packed row apart by their positions. One with
    FlashAttention, which needs a GPU, is tried without: what reads across in other layers is seen all the same.

    Raises:
        ValueError: if what it makes of one conversation depends on the one before: recurrent layers and convolutions
            read across the border, and some older models make their attention mask without positions.
    """
    config = language_model.config
    generator = torch.Generator().manual_seed(0)
    one, other, second = torch.randn(3, 1, 4, config.hidden_size, generator=generator)
    positions = torch.arange(4).repeat(2).unsqueeze(0).to(language_model.device)
    training, attention = language_model.training, config._attn_implementation
    language_model.eval()  # without dropout
    if "flash" in attention:
        config._attn_implementation = "eager"
    states = []
    for first in (one, other):
        embeddings = torch.cat([first, second], dim=1).to(language_model.device, language_model.dtype)
        outputs = language_model(inputs_embeds=embeddings, position_ids=positions, use_cache=False)
        states.append(outputs.last_hidden_state[:, 4:].float())
    language_model.train(training)
    config._attn_implementation = attention
    # Not to the last bit: the scales of 8-bit weights are of the whole batch.
    if (states[0] - states[1]).norm() > 0.02 * states[0].norm():
        raise ValueError(
            f"packing is true, but a language model of the type {config.model_type!r} does not keep the conversations "
            "of a packed row apart. Leave packing out, and give train_sampling_strategy group_by_length."
        )


class PackedRows(Dataset):
    """Rows by packs of their numbers."""

    def __init__(self, rows: datasets.Dataset):
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, pack: list[int]) -> list[dict]:
        return self.rows.__getitems__(pack)


@dataclass
class PackingCollator:
    """
    Packs of rows -> a batch of one packed row each, with `position_ids` in place of `attention_mask`; the rest as of
    [`SelfQuestioningCollator`]. `row_ids` has one for each conversation.

    Args:
        collator ([`SelfQuestioningCollator`]): Makes the conversations; with the `max_length` of the packs.
        flat (`bool`): For FlashAttention: all packs one after another in a single row, without padding, and where each
            conversation begins (`cu_seq_lens_q`, ...): else each layer would look for it.
    """

    collator: SelfQuestioningCollator
    flat: bool = False

    def __call__(self, packs: list[list[dict]]) -> dict[str, torch.Tensor | int]:
        batch = self.collator([row for pack in packs for row in pack])
        sizes = [len(pack) for pack in packs]
        lengths = batch.pop("attention_mask").sum(dim=1)
        longest = max(int(pack.sum()) for pack in lengths.split(sizes))
        assert longest <= self.collator.max_length, f"a pack has {longest} tokens"
        batch["labels"][:, 0] = IGNORE_INDEX
        batch["turn_kinds"][:, 0] = NOT_SPOKEN
        batch["position_ids"] = torch.arange(batch["input_ids"].shape[1]).expand_as(batch["input_ids"])
        # The positions of the padding never go on: each token of it is a conversation of its own.
        fills = {
            "input_ids": self.collator.processor.tokenizer.pad_token_id,
            "labels": IGNORE_INDEX,
            "turn_kinds": NOT_SPOKEN,
            "position_ids": 0,
        }
        if self.flat:
            sizes = [sum(sizes)]
            borders = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).int()
            batch |= {"cu_seq_lens_q": borders, "cu_seq_lens_k": borders}
            batch |= {"max_length_q": int(lengths.max()), "max_length_k": int(lengths.max())}
        for name, fill in fills.items():
            conversations = [values[:length] for values, length in zip(batch[name], lengths.tolist())]
            ends = np.cumsum(sizes).tolist()
            packed = [torch.cat(conversations[end - size : end]) for end, size in zip(ends, sizes)]
            batch[name] = pad_sequence(packed, batch_first=True, padding_value=fill)
        return batch
