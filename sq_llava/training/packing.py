"""Packing: several conversations in one row of at most `max_length` tokens, without attention between them.

    python -m train_sft --config recipes/sq-llava-7b/stage2.yaml --packing true --train_sampling_strategy random

The positions of each conversation start at 0, so that no conversation attends to another one: without an attention
mask and a cache, transformers builds a block-diagonal mask from the positions (SDPA, eager and flex attention).
FlashAttention gets the start of each conversation instead (`cu_seq_lens_q`, ...). Images, labels and self-questions
are those of the unpacked rows. Only the first token of each conversation has no label, because it would be predicted
from another conversation. Language models that ignore the positions, such as recurrent ones, are detected and refused
(`require_separation`). Under ZeRO-3 this check is not run, because the weights are held in pieces.

Each row is packed whole, once per epoch. Its size is the maximum number of tokens that it can have
(`sq_llava/data/lengths.py`). The rows are shuffled and divided into windows; each window is packed by best-fit
decreasing. The packs depend only on the seed and the epoch, not on the number of processes. Every epoch has the same
number of packs, a whole number of optimizer steps. Rows are not cut to fill a pack or grouped by modality, and
evaluation batches are not packed.
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


# Number of permutations that an epoch tries until its packs fit into `num_packs`.
ATTEMPTS = 10


class PackSampler(Sampler[list[list[int]]]):
    """
    Yields micro-batches; each is a list of packs, and each pack a list of row numbers.

    It has no `batch_size`, so that accelerate leaves the size of its batches alone.

    Args:
        lengths (`np.ndarray` of ints, `(num_rows,)`): Maximum tokens of each row; none above `max_length`.
        max_length (`int`): Maximum tokens of a pack.
        packs_per_batch (`int`): Packs in one forward pass of one process.
        packs_per_step (`int`): Packs per optimizer step, over all processes and accumulation steps; a multiple of
            `packs_per_batch`.
        seed (`int`): Random seed of the packs.
        epoch (`torch.Tensor`, `()`): The collator's epoch, read at the start of each pass.

    Raises:
        ValueError: if there are fewer rows than packs in an epoch.
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
        # 0.2% more packs than epoch 0 needs, because other epochs may need a few more.
        self.num_packs = -(-(self.num_unsplit + self.num_unsplit // 500) // packs_per_step) * packs_per_step
        if self.num_packs > len(self.lengths):
            raise ValueError(
                f"packing is true, but the dataset is too small: its {len(self.lengths)} rows make {self.num_unsplit} "
                f"packs of max_length {max_length}, and one optimizer step needs {packs_per_step} packs. Remove "
                "packing, or lower global_batch_size (with packing, it counts packs)."
            )

    def __len__(self) -> int:
        return self.num_packs // self.packs_per_batch

    def __iter__(self) -> Iterator[list[list[int]]]:
        packs = self.packs(int(self.epoch))
        for begin in range(0, len(packs), self.packs_per_batch):
            yield packs[begin : begin + self.packs_per_batch]

    def packs(self, epoch: int) -> list[list[int]]:
        """Returns the packs of an epoch, lists of row numbers, in the order of training."""
        if self.kept is not None:
            return self.kept
        for attempt in range(ATTEMPTS):
            packs = self._pack(epoch, attempt)
            if len(packs) <= self.num_packs:
                break
        else:
            packs = self._pack(epoch=0, attempt=0)  # the packs of epoch 0, in another order
        packs = split_packs(packs, self.num_packs)
        return [
            packs[number] for number in np.random.default_rng([self.seed, epoch, ATTEMPTS]).permutation(len(packs))
        ]

    def _pack(self, epoch: int, attempt: int) -> list[list[int]]:
        order = np.random.default_rng([self.seed, epoch, attempt]).permutation(len(self.lengths))
        return pack_in_windows(order, self.lengths, self.max_length)

    def keep_fullest(self) -> None:
        """Reduces each epoch to one step on the packs with the most tokens, to measure its memory."""
        fullest = sorted(self.packs(0), key=lambda pack: -sum(self.lengths[row] for row in pack))
        self.kept = fullest[: self.packs_per_step]
        self.num_packs = len(self.kept)

    def describe(self) -> str:
        """Describes how full the packs are, and why they are not fuller."""
        tokens, rows = sum(self.lengths), len(self.lengths)
        fill, unsplit_fill = (tokens / (packs * self.max_length) for packs in (self.num_packs, self.num_unsplit))
        return (
            f"Packing: {rows:,} rows in {self.num_packs:,} packs of at most {self.max_length:,} tokens, "
            f"{rows / self.num_packs:.2f} rows per pack, about {self.packs_per_step * rows / self.num_packs:.0f} rows "
            f"per step; fill {fill:.3f} ({unsplit_fill:.3f} before some packs are split to make whole steps). Rows "
            f"are not cut, which limits the fill: they have {tokens / rows:.0f} tokens on average and at least "
            f"{min(self.lengths):,}. These are maximum lengths; the log gives the real fill as packing_fill."
        )


def pack_sampler(
    rows: datasets.Dataset, args: SFTConfig, num_processes: int, epoch: torch.Tensor | None = None
) -> PackSampler:
    """
    Makes the sampler of a run.

    Args:
        rows (`datasets.Dataset`): Rows whose `length` is an upper bound, from `with_length_bounds`. An approximate
            `length` is enough to estimate the number of packs.
        args (`SFTConfig`): Settings of the run.
        num_processes (`int`): Number of processes.
        epoch (`torch.Tensor`, `()`, *optional*): The collator's epoch.
    """
    lengths = np.minimum(rows.with_format("numpy", columns=["length"])[:]["length"], args.max_length)
    size = args.per_device_train_batch_size
    steps = size * args.gradient_accumulation_steps * num_processes
    return PackSampler(lengths, args.max_length, size, steps, args.seed, torch.zeros(()) if epoch is None else epoch)


@torch.no_grad()
def require_separation(language_model: PreTrainedModel) -> None:
    """
    Checks that the language model keeps the conversations of a packed row apart by their positions.

    FlashAttention needs a GPU, so it is replaced by eager attention for this check, which still finds other layers
    that mix conversations.

    Args:
        language_model ([`~transformers.PreTrainedModel`]): The language model, without its head.

    Raises:
        ValueError: if its hidden states for one conversation depend on the conversation before it. Recurrent layers
            and convolutions do that, and some older models build their attention mask without positions.
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
    # A tolerance, because the activation scales of 8-bit layers depend on the whole batch.
    if (states[0] - states[1]).norm() > 0.02 * states[0].norm():
        raise ValueError(
            f"packing is true, but a language model of type {config.model_type!r} does not keep the conversations of "
            "a packed row apart. Remove packing, and set train_sampling_strategy to group_by_length."
        )


class PackedRows(Dataset):
    """Returns the rows of a pack, given its row numbers."""

    def __init__(self, rows: datasets.Dataset):
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, pack: list[int]) -> list[dict]:
        return self.rows.__getitems__(pack)


@dataclass
class PackingCollator:
    """
    Turns packs of rows into a batch with one packed row for each pack.

    The batch is that of [`SelfQuestioningCollator`], with `position_ids` (`torch.int64`,
    `(batch_size, sequence_length)`) in place of `attention_mask`. `row_ids` has one number for each conversation.

    Args:
        collator ([`SelfQuestioningCollator`]): Tokenizes the conversations. Its `max_length` is the size of a pack.
        flat (`bool`): For FlashAttention: put all packs into a single row without padding, and add the start of each
            conversation (`cu_seq_lens_q`, ...), which each layer would otherwise compute again.
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
        # All padding has position 0, so each padding token is a conversation of its own.
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
