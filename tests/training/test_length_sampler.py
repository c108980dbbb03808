"""Batches of one modality and similar length: every row once per epoch, in a reproducible order."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from sq_llava.training.length_sampler import ModalityLengthSampler


def mixed_rows(num_rows=5_000, text_only=0.06, seed=0) -> tuple[np.ndarray, np.ndarray]:
    """Lengths and numbers of images: long conversations with an image, and shorter ones without."""
    generator = np.random.default_rng(seed)
    num_images = (generator.random(num_rows) >= text_only).astype(int)
    return generator.gamma(2.0, 130.0, num_rows).astype(int) + 20 + 576 * num_images, num_images


def order(lengths, num_images, batch=32, seed=0, epoch=0) -> list[int]:
    return list(ModalityLengthSampler(lengths, num_images, batch, seed, torch.tensor(epoch)))


def padding_share(batches: np.ndarray, lengths: np.ndarray) -> float:
    return 1 - lengths[batches].sum() / (lengths[batches].max(axis=1) * batches.shape[1]).sum()


@given(
    rows=st.lists(st.tuples(st.integers(1, 3000), st.integers(0, 2)), max_size=300),
    batch=st.integers(1, 40),
    seed=st.integers(0, 5),
)
def test_each_epoch_has_each_row_once_and_full_batches_have_one_modality(rows, batch, seed):
    lengths, num_images = np.array(rows, dtype=int).reshape(-1, 2).T
    indices = order(lengths, num_images, batch, seed)
    assert sorted(indices) == list(range(len(rows)))
    num_with_images = int((num_images > 0).sum())
    num_whole = num_with_images // batch + (len(rows) - num_with_images) // batch
    for start in range(0, num_whole * batch, batch):
        assert len({num_images[index] > 0 for index in indices[start : start + batch]}) == 1


def test_order_is_a_function_of_seed_and_epoch():
    rows = mixed_rows()
    assert order(*rows) == order(*rows)
    assert order(*rows) != order(*rows, epoch=1)
    assert order(*rows) != order(*rows, seed=1)


def test_epoch_is_read_at_the_start_of_each_pass():
    epoch = torch.zeros((), dtype=torch.int64)
    sampler = ModalityLengthSampler(*mixed_rows(), 32, 0, epoch)
    first = list(sampler)
    epoch.fill_(1)
    assert list(sampler) != first and len(sampler) == len(first)


def test_batches_have_a_tenth_of_the_padding_of_random_ones():
    lengths, num_images = mixed_rows()
    grouped = np.array(order(lengths, num_images)[:4_800]).reshape(-1, 8)
    shuffled = np.random.default_rng(0).permutation(len(lengths))[:4_800].reshape(-1, 8)
    assert padding_share(grouped, lengths) < padding_share(shuffled, lengths) / 10


def test_processes_have_batches_of_nearly_the_same_length_at_the_same_time():
    lengths, num_images = mixed_rows()
    # Global batches of 2 accumulation steps x 4 processes x 4 rows; processes take batches in turn.
    steps = np.array(order(lengths, num_images)[:4_800]).reshape(-1, 4, 4)
    longest = lengths[steps].max(axis=2)
    imbalance = longest.max(axis=1) / longest.mean(axis=1)
    assert imbalance.mean() < 1.02
