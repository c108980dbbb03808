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
from sq_llava.data.shared_images import ImageSharing, image_prefix
from sq_llava.training.collator import SelfQuestioningCollator
from sq_llava.training.shared_prefix import attention_mask, borders, branches


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
        sharing ([`ImageSharing`], *optional*): Rows that share an image are put into one pack. Default: none are.

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
        sharing: ImageSharing | None = None,
    ):
        self.lengths = np.asarray(lengths).tolist()
        self.sharing = sharing
        self.max_length = max_length
        self.packs_per_batch = packs_per_batch
        self.packs_per_step = packs_per_step
        self.seed = seed
        self.epoch = epoch
        self.kept: list[list[int]] | None = None
        first = self._pack(epoch=0, attempt=0)
        self.num_unsplit = len(first)
        self.num_tokens = sum(self.size(item) for pack in first for item in pack)
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
        packs = [[row for item in pack for row in item] for pack in split_packs(packs, self.num_packs)]
        return [
            packs[number] for number in np.random.default_rng([self.seed, epoch, ATTEMPTS]).permutation(len(packs))
        ]

    def _pack(self, epoch: int, attempt: int) -> list[list[list[int]]]:
        """Packs items: single rows, or rows that share an image. Returns the items of each pack."""
        order = np.random.default_rng([self.seed, epoch, attempt]).permutation(len(self.lengths))
        if self.sharing is None:
            items = [[row] for row in order.tolist()]
        else:
            items = self.sharing.items(order, self.lengths, self.max_length)
        sizes = [self.size(item) for item in items]
        packs = pack_in_windows(np.arange(len(items)), sizes, self.max_length)
        return [[items[number] for number in pack] for pack in packs]

    def size(self, pack: list[int]) -> int:
        """Returns the maximum tokens of a pack."""
        if self.sharing is None:
            return sum(self.lengths[row] for row in pack)
        return self.sharing.size(pack, self.lengths)

    def keep_fullest(self) -> None:
        """Reduces each epoch to one step on the packs with the most tokens, to measure its memory."""
        fullest = sorted(self.packs(0), key=lambda pack: -self.size(pack))
        self.kept = fullest[: self.packs_per_step]
        self.num_packs = len(self.kept)

    def describe(self) -> str:
        """Describes how full the packs are, and why they are not fuller."""
        rows, tokens, alone, passes = len(self.lengths), self.num_tokens, sum(self.lengths), ""
        if self.sharing is not None:
            passes = (
                f" Rows about the same image share its pass: {tokens:,} tokens are computed in place of {alone:,} "
                f"({alone / tokens:.2f} times fewer)."
            )
        fill, unsplit_fill = (tokens / (packs * self.max_length) for packs in (self.num_packs, self.num_unsplit))
        return (
            f"Packing: {rows:,} rows in {self.num_packs:,} packs of at most {self.max_length:,} tokens, "
            f"{rows / self.num_packs:.2f} rows per pack, about {self.packs_per_step * rows / self.num_packs:.0f} rows "
            f"per step; fill {fill:.3f} ({unsplit_fill:.3f} before some packs are split to make whole steps). Rows "
            f"are not cut, which limits the fill: they have {tokens / rows:.0f} tokens on average and at least "
            f"{min(self.lengths):,}. These are maximum lengths; the log gives the real fill as packing_fill.{passes}"
        )


def pack_sampler(
    rows: datasets.Dataset,
    args: SFTConfig,
    num_processes: int,
    epoch: torch.Tensor | None = None,
    max_rows_per_image: int = 1,
) -> PackSampler:
    """
    Makes the sampler of a run.

    Args:
        rows (`datasets.Dataset`): Rows whose `length` is an upper bound, from `with_length_bounds`. An approximate
            `length` is enough to estimate the number of packs.
        args (`SFTConfig`): Settings of the run.
        num_processes (`int`): Number of processes.
        epoch (`torch.Tensor`, `()`, *optional*): The collator's epoch.
        max_rows_per_image (`int`): Most rows that share the pass over their image. 1 for no sharing.
    """
    sharing = None
    if max_rows_per_image > 1:
        columns = rows.with_format("numpy", columns=["image_group", "prefix_length"])[:]
        sharing = ImageSharing(columns["image_group"], columns["prefix_length"], max_rows_per_image)
    lengths = np.minimum(rows.with_format("numpy", columns=["length"])[:]["length"], args.max_length)
    size = args.per_device_train_batch_size
    steps = size * args.gradient_accumulation_steps * num_processes
    epoch = torch.zeros(()) if epoch is None else epoch
    return PackSampler(lengths, args.max_length, size, steps, args.seed, epoch, sharing)


@torch.no_grad()
def require_separation(language_model: PreTrainedModel, share_images: bool = False) -> None:
    """
    Checks that the language model keeps the conversations of a packed row apart: by their positions, or by the mask of
    rows that share a prefix.

    FlashAttention needs a GPU, so it is replaced by eager attention for this check, which still finds other layers
    that mix conversations.

    Args:
        language_model ([`~transformers.PreTrainedModel`]): The language model, without its head.
        share_images (`bool`): Whether the conversations of a packed row share prefixes.

    Raises:
        ValueError: if its hidden states for one conversation depend on the conversation before it. Recurrent layers
            and convolutions do that, and some older models build their attention mask without positions.
    """
    config = language_model.config
    if share_images and "chunked_attention" in (getattr(config, "layer_types", None) or []):
        raise ValueError(
            f"share_images is true, but a model of type {config.model_type!r} attends in chunks of positions, "
            "for which there is no mask of shared prefixes. Remove share_images."
        )
    generator = torch.Generator().manual_seed(0)
    one, other, second = torch.randn(3, 1, 4, config.hidden_size, generator=generator)
    prefix = torch.randn(1, 2, config.hidden_size, generator=generator)[:, : 2 * share_images]
    begin = prefix.shape[1]
    positions = torch.tensor([[*range(begin), *[*range(begin, begin + 4)] * 2]], device=language_model.device)
    numbers = branches([0, begin], [begin, begin], begin + 4)
    numbers = torch.cat([numbers[0], numbers[1, begin:]]).unsqueeze(0).to(language_model.device)
    training, attention = language_model.training, config._attn_implementation
    language_model.eval()  # without dropout
    if "flash" in attention:
        config._attn_implementation = "eager"
    states = []
    mask = attention_mask(numbers, positions, config, language_model.dtype) if share_images else None
    for first in (one, other):
        embeddings = torch.cat([prefix, first, second], dim=1).to(language_model.device, language_model.dtype)
        outputs = language_model(
            inputs_embeds=embeddings, position_ids=positions, attention_mask=mask, use_cache=False
        )
        states.append(outputs.last_hidden_state[:, -4:].float())
    language_model.train(training)
    config._attn_implementation = attention
    # A tolerance, because the activation scales of 8-bit layers depend on the whole batch.
    if (states[0] - states[1]).norm() > 0.02 * states[0].norm():
        raise ValueError(
            f"packing is true, but a language model of type {config.model_type!r} does not keep the conversations of "
            f"a packed row apart. Remove {'share_images' if share_images else 'packing'}"
            f"{'' if share_images else ', and set train_sampling_strategy to group_by_length'}."
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
    `(batch_size, sequence_length)`) in place of `attention_mask`. `row_ids` has one number for each conversation, and
    `num_tokens` (`torch.int64`, `()`) is the number of tokens without padding.

    Args:
        collator ([`SelfQuestioningCollator`]): Tokenizes the conversations. Its `max_length` is the size of a pack.
        flat (`bool`): For FlashAttention: put all packs into a single row without padding, and add the start of each
            conversation (`cu_seq_lens_q`, ...), which each layer would otherwise compute again.
        share_images (`bool`): Neighbours in a pack that begin with the same text and image share this prefix: it
            comes once. The batch then has `branches` too (`torch.int64`, `(batch_size, sequence_length, 2)`, or
            `shared_prefix` if `flat`), from which `sq_llava/training/shared_prefix.py` makes the attention mask.
    """

    collator: SelfQuestioningCollator
    flat: bool = False
    share_images: bool = False

    def __call__(self, packs: list[list[dict]]) -> dict[str, torch.Tensor | int]:
        batch = self.collator([row for pack in packs for row in pack])
        sizes = [len(pack) for pack in packs]
        lengths = batch.pop("attention_mask").sum(dim=1).tolist()
        begins, prefixes = [0] * len(lengths), [0] * len(lengths)
        if self.share_images:
            begins, prefixes = self._share(batch, lengths, sizes)
        pieces = [slice(begin, length) for begin, length in zip(begins, lengths)]
        counts = [length - begin for begin, length in zip(begins, lengths)]
        ends = np.cumsum(sizes).tolist()
        longest = max(sum(counts[end - size : end]) for end, size in zip(ends, sizes))
        assert longest <= self.collator.max_length, f"a pack has {longest} tokens"
        batch["labels"][:, 0] = IGNORE_INDEX
        batch["turn_kinds"][:, 0] = NOT_SPOKEN
        batch["position_ids"] = torch.arange(batch["input_ids"].shape[1]).expand_as(batch["input_ids"])
        if self.share_images:
            batch["branches"] = branches(begins, prefixes, batch["input_ids"].shape[1])
        # All padding has position 0 and branch -1, so each padding token is a conversation of its own.
        fills = {
            "input_ids": self.collator.processor.tokenizer.pad_token_id,
            "labels": IGNORE_INDEX,
            "turn_kinds": NOT_SPOKEN,
            "position_ids": 0,
            "branches": -1,
        }
        if self.flat:
            sizes, ends = [sum(sizes)], ends[-1:]
        for name in fills.keys() & batch.keys():
            rows = [values[piece] for values, piece in zip(batch[name], pieces)]
            packed = [torch.cat(rows[end - size : end]) for end, size in zip(ends, sizes)]
            batch[name] = pad_sequence(packed, batch_first=True, padding_value=fills[name])
        batch["num_tokens"] = torch.tensor(sum(counts))
        if self.flat:
            batch |= self._flat_inputs(batch, begins, prefixes, lengths)
        return batch

    def _share(self, batch: dict, lengths: list[int], sizes: list[int]) -> tuple[list[int], list[int]]:
        """
        Finds the rows that share the prefix of the row before them, and removes their images from the batch.

        Returns:
            For each row, where its own tokens begin (0 for the first row of a prefix), and the tokens of its prefix if
            another row shares it, else 0.
        """
        processor = self.collator.processor
        starts = set(np.cumsum([0, *sizes]).tolist())
        ids = [row[:length].numpy() for row, length in zip(batch["input_ids"], lengths)]
        counts = [int((row == processor.image_token_id).sum()) // processor.image_seq_length for row in ids]
        indices = batch.pop("image_indices", torch.arange(sum(counts))).split(counts)
        begins, prefixes, kept, size = [], [0] * len(ids), [], 0
        for row, images in enumerate(indices):
            spoken = (batch["turn_kinds"][row] != NOT_SPOKEN).int()
            # A token with loss is never shared.
            size_before, size = size, image_prefix(ids[row][: int(spoken.argmax())], processor.image_token_id)
            num_images = int((ids[row][:size] == processor.image_token_id).sum()) // processor.image_seq_length
            shared = (
                size == size_before > 0
                and row not in starts
                and np.array_equal(ids[row - 1][:size], ids[row][:size])
                and torch.equal(indices[row - 1][:num_images], images[:num_images])
            )
            if shared:
                prefixes[row - 1] = prefixes[row] = size
            begins.append(size if shared else 0)
            kept.append(images[num_images:] if shared else images)
        used = torch.cat(kept)
        if not torch.equal(used, torch.arange(len(used))):
            batch["image_indices"] = used
        return begins, prefixes

    def _flat_inputs(
        self, batch: dict, begins: list[int], prefixes: list[int], lengths: list[int]
    ) -> dict[str, torch.Tensor | int | dict]:
        """The borders of the conversations, for FlashAttention."""
        if self.share_images:
            batch.pop("branches")
            return {"shared_prefix": borders(begins, prefixes, lengths)}
        sequence_borders = torch.tensor([0, *np.cumsum(lengths).tolist()], dtype=torch.int32)
        return {
            "cu_seq_lens_q": sequence_borders,
            "cu_seq_lens_k": sequence_borders,
            "max_length_q": max(lengths),
            "max_length_k": max(lengths),
        }
