"""Which rows share a pack of at most `max_length` tokens: arithmetic on lengths alone.

>>> pack_rows([0, 1, 2], lengths=[60, 50, 30], max_length=100)
[[0, 2], [1]]
"""

from bisect import bisect_left, insort
from heapq import heapify, heappop, heappush

import numpy as np


# Rows that are packed together, at most and at least. More fill the packs better; a window of nearly all rows would
# make nearly the same packs in each epoch, so a small set has four.
LARGEST_WINDOW, SMALLEST_WINDOW = 512, 64


def pack_rows(rows: list[int], lengths: list[int], max_length: int) -> list[list[int]]:
    """Best-fit decreasing: from long to short, each row goes where it leaves the least room."""
    packs, rooms = [], []  # rooms: (tokens left, pack), in order
    for row in sorted(rows, key=lambda row: -lengths[row]):
        place = bisect_left(rooms, (lengths[row],))
        if place == len(rooms):
            packs.append([])
            rooms.append((max_length, len(packs) - 1))
        room, pack = rooms.pop(place)
        packs[pack].append(row)
        insort(rooms, (room - lengths[row], pack))
    return packs


def pack_in_windows(order: np.ndarray, lengths: list[int], max_length: int) -> list[list[int]]:
    """The rows of `order`, packed by [`pack_rows`] a window at a time."""
    window = min(LARGEST_WINDOW, max(SMALLEST_WINDOW, len(order) // 4))
    packs = []
    for begin in range(0, len(order), window):
        packs += pack_rows(order[begin : begin + window].tolist(), lengths, max_length)
    return packs


def split_packs(packs: list[list[int]], count: int) -> list[list[int]]:
    """Halves of the packs with the most rows, until there are `count`."""
    packs = list(packs)
    largest = [(-len(pack), number) for number, pack in enumerate(packs)]
    heapify(largest)
    while len(packs) < count:
        _, number = heappop(largest)
        # Every second row: they stand from long to short.
        packs[number], half = packs[number][::2], packs[number][1::2]
        packs.append(half)
        heappush(largest, (-len(packs[number]), number))
        heappush(largest, (-len(half), len(packs) - 1))
    return packs
