"""Which rows share an image: rows that begin with the same text and the same image have a common prefix of tokens.

    <s>SYSTEM USER: <image>     the shared prefix
    What is it? ASSISTANT: ...  the rest of one row
    Is it red? ASSISTANT: ...   the rest of another row

What a causal language model computes for the prefix does not depend on what follows. So rows with the same prefix can
be trained with a single pass over it, and over the image.
"""

from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import numpy as np

from sq_llava.data.images import image_key


@dataclass(frozen=True)
class ImageSharing:
    """
    The shared prefixes of the rows of a dataset.

    Args:
        groups (`np.ndarray` of ints, `(num_rows,)`): Rows with the same number have the same prefix.
        prefixes (`np.ndarray` of ints, `(num_rows,)`): Tokens of each row's prefix; 0 for a row without an image.
        max_rows (`int`): Most rows that share one pass.
    """

    groups: np.ndarray
    prefixes: np.ndarray
    max_rows: int

    def items(self, order: np.ndarray, lengths: list[int], max_length: int) -> list[list[int]]:
        """
        Divides rows into items: rows that share one pass, or a row alone.

        Args:
            order (`np.ndarray` of ints): The rows, shuffled.
            lengths (`list[int]`): Tokens of each row of the dataset.
            max_length (`int`): Most tokens of an item.

        Returns:
            The rows of each item. Items come in the order of their first rows.
        """
        members: dict[tuple[int, int], list[int]] = {}
        for row, group, prefix in zip(order.tolist(), self.groups[order].tolist(), self.prefixes[order].tolist()):
            members.setdefault((group, -1) if prefix else (0, row), []).append(row)
        places = np.empty(len(self.groups), dtype=np.int64)
        places[order] = np.arange(len(order))
        items = []
        for rows in members.values():
            # Items of similar size: five rows with max_rows 4 become three and two.
            for part in np.array_split(rows, -(-len(rows) // self.max_rows)):
                item, size = [], 0
                for row in part.tolist():
                    added = lengths[row] - (int(self.prefixes[row]) if item else 0)
                    if item and size + added > max_length:
                        items.append(item)
                        item, size, added = [], 0, lengths[row]
                    item.append(row)
                    size += added
                items.append(item)
        return sorted(items, key=lambda item: places[item[0]])

    def size(self, rows: list[int], lengths: list[int]) -> int:
        """Returns the tokens of a pack. A row after one of the same group adds no prefix, as in the collator."""
        total, before = 0, None
        for row in rows:
            group = int(self.groups[row]) if self.prefixes[row] else None
            total += lengths[row] - (int(self.prefixes[row]) if group is not None and group == before else 0)
            before = group
        return total


def image_prefix(opening: np.ndarray, image_token_id: int) -> int:
    """
    Returns the number of tokens up to the end of the last image, or 0 if there is none.

    Args:
        opening (`np.ndarray` of ints, `(num_tokens,)`): Token ids of a row, up to its first answer.
        image_token_id (`int`): The placeholder of the image tokens.
    """
    places = np.flatnonzero(opening == image_token_id)
    return int(places[-1]) + 1 if len(places) else 0


def prefix_number(ids: np.ndarray, images: list[Any]) -> int:
    """
    Returns a number (63 bits) that two prefixes share if they have the same tokens and the same images.

    Args:
        ids (`np.ndarray` of ints, `(num_tokens,)`): Token ids of the prefix.
        images: Its images: paths, or the `{"bytes": ..., "path": ...}` of an undecoded `datasets.Image`. Two paths are
            two images, even if the files are equal.
    """
    digest = blake2b(ids.astype(np.int64).tobytes(), digest_size=8)
    for image in images:
        key = image_key(image)
        digest.update(blake2b(key if isinstance(key, bytes) else str(key).encode()).digest())
    return int.from_bytes(digest.digest(), "big") >> 1
