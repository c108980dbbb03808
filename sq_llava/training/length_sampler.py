"""Which rows make a batch: rows of one modality and of like length, so that little of a batch is padding.

A global batch, the rows of one optimizer step over all processes and accumulation steps, has rows with images or rows
of text only (paper, section 4: as LLaVA), as near in length as the rest of its window allows. Inside it the rows stand
from long to short, so that the processes, which take turns, have batches of nearly the same length at the same time.

The order is a function of the seed and the epoch alone: a resumed run goes on with it, and the global batches are the
same for any number of processes. What is left over of both modalities makes the last global batches of an epoch.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch.utils.data import Sampler


# Global batches whose rows are sorted together. More make batches more even, and less random.
WINDOW = 50


class ModalityLengthSampler(Sampler[int]):
    """
    Args:
        lengths (`np.ndarray` of ints, `(num_rows,)`): A rough number of tokens of each row, image tokens included.
        num_images (`np.ndarray` of ints, `(num_rows,)`): Images of each row.
        global_batch_size (`int`): Rows of one optimizer step, over all processes and accumulation steps.
        seed (`int`): Of the order.
        epoch (`torch.Tensor`, `()`): Read at the start of each pass; the one that the collator has.
    """

    def __init__(
        self, lengths: np.ndarray, num_images: np.ndarray, global_batch_size: int, seed: int, epoch: torch.Tensor
    ):
        self.lengths = np.asarray(lengths)
        self.has_image = np.asarray(num_images) > 0
        self.global_batch_size = global_batch_size
        self.seed = seed
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = np.random.default_rng([self.seed, int(self.epoch)])
        order = generator.permutation(len(self.lengths))
        whole, left_over = [], []
        for has_image in (True, False):
            rows = order[self.has_image[order] == has_image]
            end = len(rows) - len(rows) % self.global_batch_size
            left_over.append(rows[end:])
            window = WINDOW * self.global_batch_size
            for begin in range(0, end, window):
                batches = self._longest_first(rows[begin : min(begin + window, end)])
                whole += np.split(batches, len(batches) // self.global_batch_size)
        for index in generator.permutation(len(whole)):
            yield from whole[index].tolist()
        for rows in left_over:
            yield from self._longest_first(rows).tolist()

    def _longest_first(self, rows: np.ndarray) -> np.ndarray:
        return rows[np.argsort(-self.lengths[rows], kind="stable")]
