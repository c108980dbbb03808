"""Chooses which rows share a pack of at most `max_length` tokens. It needs only the lengths of the rows.

>>> pack_rows([0, 1, 2], lengths=[60, 50, 30], max_length=100)
[[0, 2], [1]]
"""

from bisect import bisect_left, insort
from heapq import heapify, heappop, heappush

import numpy as np


# Largest and smallest window: the number of rows that are packed together. A larger window fills the packs better. But
# a window of nearly all rows makes nearly the same packs in each epoch, so a small dataset is split into four windows.
LARGEST_WINDOW, SMALLEST_WINDOW = 512, 64


def pack_rows(rows: list[int], lengths: list[int], max_length: int) -> list[list[int]]:
    """
    Packs rows by best-fit decreasing: from long to short, each row goes into the pack where it leaves the least room.

    Args:
        rows (`list[int]`): Indices into `lengths`.
        lengths (`list[int]`): Tokens of each row, at most `max_length`.
        max_length (`int`): Tokens of a pack.

    Returns:
        The rows of each pack.
    """
    packs, rooms = [], []  # rooms: (tokens left, pack), sorted
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
    """Packs the rows of `order` by [`pack_rows`], one window of neighbours at a time."""
    window = min(LARGEST_WINDOW, max(SMALLEST_WINDOW, len(order) // 4))
    packs = []
    for begin in range(0, len(order), window):
        packs += pack_rows(order[begin : begin + window].tolist(), lengths, max_length)
    return packs


def split_packs(packs: list[list[list[int]]], count: int) -> list[list[list[int]]]:
    """
    Halves the packs that have the most rows until there are `count` packs.

    Args:
        packs: The items of each pack, and the rows of each item. Items are only split in packs of one item.
        count (`int`): At most the number of rows.
    """
    packs = list(packs)
    largest = [(-sum(map(len, pack)), number) for number, pack in enumerate(packs)]
    heapify(largest)
    while len(packs) < count:
        _, number = heappop(largest)
        items = packs[number] if len(packs[number]) > 1 else [[row] for row in packs[number][0]]
        # Items are sorted from long to short. Taking every second item gives two halves of similar length.
        halves = items[::2], items[1::2]
        if len(packs[number]) == 1:
            halves = tuple([[row for item in half for row in item]] for half in halves)
        packs[number] = halves[0]
        packs.append(halves[1])
        for place in (number, len(packs) - 1):
            heappush(largest, (-sum(map(len, packs[place])), place))
    return packs
