"""Batches of rows with the same modality and similar length, so that batches have little padding.

A global batch is the rows of one optimizer step, over all processes and accumulation steps. It has either rows with
images or rows of text only (as in LLaVA; paper, section 4). Its rows are similar in length and sorted from long to
short. The processes take rows in turn, so at any time their batches have nearly the same length.

The order depends only on the seed and the epoch. A resumed run therefore continues in the same order, and the global
batches are the same for any number of processes. The rows that fill no whole global batch come last in an epoch.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch.utils.data import Sampler


# Number of global batches whose rows are sorted together. A larger window gives less padding and less randomness.
WINDOW = 50


class ModalityLengthSampler(Sampler[int]):
    """
    Args:
        lengths (`np.ndarray` of ints, `(num_rows,)`): Approximate number of tokens of each row, with image tokens.
        num_images (`np.ndarray` of ints, `(num_rows,)`): Number of images of each row.
        global_batch_size (`int`): Rows of one optimizer step, over all processes and accumulation steps.
        seed (`int`): Random seed of the order.
        epoch (`torch.Tensor`, `()`): The collator's epoch, read at the start of each pass.
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
