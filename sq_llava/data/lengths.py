"""Counts the tokens of rows, and the largest number that a row can have in any epoch. Counts are cached on disk.
Also finds the rows that begin with the same text and image (`sq_llava/data/shared_images.py`).

    >>> rows = with_length_bounds(rows, LengthBound(processor, max_length=2048))
    >>> rows[0]["length"]  # row 0 never has more tokens than this
    812

Different turns become self-questions in each epoch. A turn has different tokens as a self-question (`[vusr] text</s>`)
and as a user's turn (` USER: text`). Each exchange (a question and its answer) ends with the end-of-sequence token,
and in some prompt layouts with a line break behind it. No text may contain that token, and tokenizers never join it
with other text. So the tokens of a row are the sum of the tokens of its exchanges. Two counts are enough to find the
largest number: one with no turn drawn, one with all turns drawn.

No image is read: each has `image_seq_length` tokens.
"""

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
from jinja2 import TemplateError

from processing_sq_llava import SQLlavaProcessor
from sq_llava.data.json_file import JsonFile
from sq_llava.data.rows import RowReader
from sq_llava.data.self_questions import draw_self_questions, first_exchange
from sq_llava.data.shared_images import image_prefix, prefix_number
from sq_llava.data.sources import Table


ROWS_AT_A_TIME = 256
# Below this number of rows, one process is faster than starting others.
ROWS_FOR_PROCESSES = 20_000


def token_ids(processor: SQLlavaProcessor, conversations: list[list[dict]], plain: bool) -> list[np.ndarray]:
    """
    Tokenizes conversations as the collator does, except that each image is one `<image>` token.

    Args:
        conversations (`list[list[dict]]`): Messages of each row.
        plain (`bool`): Whether to use the caption template of stage 1.

    Returns:
        Token ids of each conversation: arrays of shape `(num_tokens,)`.
    """
    if not conversations:
        return []
    texts = processor.apply_chat_template(conversations, plain=plain)
    return [np.array(ids) for ids in processor.tokenizer(texts, add_special_tokens=False).input_ids]


def token_counts(processor: SQLlavaProcessor, conversations: list[list[dict]], plain: bool) -> list[int]:
    """Counts the tokens of each conversation, images included. Turns flagged as self-questions count as such."""
    return [count_tokens(processor, ids) for ids in token_ids(processor, conversations, plain)]


def count_tokens(processor: SQLlavaProcessor, ids: np.ndarray) -> int:
    """Counts the tokens of a conversation of [`token_ids`], images included."""
    return int(_sizes(processor, ids).sum())


def prefix_lengths(processor: SQLlavaProcessor, conversations: list[list[dict]], plain: bool) -> list[np.ndarray]:
    """Counts, for each conversation, the tokens of its first exchange, of its first two, and so on, with images."""
    prefixes = [
        [messages[:end] for end in range(first_exchange(messages), len(messages) + 1, 2)] for messages in conversations
    ]
    counts = token_counts(processor, [prefix for own in prefixes for prefix in own], plain)
    return np.split(np.array(counts), np.cumsum([len(own) for own in prefixes])[:-1])


def kept_exchanges(lengths: np.ndarray, max_length: int, row_id: int | str | None) -> int:
    """
    Returns how many exchanges of a row fit into `max_length`. The later ones are cut off.

    Args:
        lengths (`np.ndarray` of shape `(num_exchanges,)`): From [`prefix_lengths`].
        max_length (`int`): In tokens.
        row_id (`int` or `str`, *optional*): Names the row in the error.

    Raises:
        ValueError: if the first exchange alone does not fit.
    """
    if lengths[0] > max_length:
        raise ValueError(
            f"Row {row_id}: its first question and answer have {lengths[0]} tokens, more than max_length "
            f"{max_length}. Raise max_length, or shorten the row."
        )
    return int((lengths <= max_length).sum())


def _sizes(processor: SQLlavaProcessor, ids: np.ndarray) -> np.ndarray:
    return np.where(ids == processor.image_token_id, processor.image_seq_length, 1)


@dataclass(frozen=True)
class LengthBound:
    """
    Computes the largest number of tokens that a row can have in the collator.

    Args:
        processor ([`SQLlavaProcessor`]): The processor of the run.
        max_length (`int`): In tokens. A longer row loses its last exchanges, as in the collator.
        plain (`bool`): The caption template of stage 1, which has no self-questions.
        self_question_ratio (`float`): With 0, there are no self-questions either.
    """

    processor: SQLlavaProcessor
    max_length: int
    plain: bool = False
    self_question_ratio: float = 0.5

    def of_rows(self, conversations: list[list[dict]], row_ids: list[int]) -> list[int]:
        """
        Returns the largest number of tokens of each row, at most `max_length`.

        Raises:
            ValueError: for a row whose first exchange alone does not fit into `max_length`.
        """
        bounds = []
        for row_id, (least, most) in zip(row_ids, self._of_prefixes(conversations)):
            kept = kept_exchanges(least, self.max_length, row_id)
            # Another draw of turns may keep more exchanges, but never more than max_length tokens.
            bounds.append(min(self.max_length, int(most[kept - 1])))
        return bounds

    def _of_prefixes(self, conversations: list[list[dict]]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Returns, for each conversation, the fewest and most tokens of its first exchange, first two, and so on."""
        if self.plain:
            return [(lengths, lengths) for lengths in prefix_lengths(self.processor, conversations, plain=True)]
        ratio = float(self.self_question_ratio > 0)
        drawn = [draw_self_questions(messages, ratio, seed=0, epoch=0, row_id=0) for messages in conversations]
        undrawn_counts, drawn_counts = self._by_exchange(conversations), self._by_exchange(drawn)
        return [
            (np.minimum(none, every).cumsum(), np.maximum(none, every).cumsum())
            for none, every in zip(undrawn_counts, drawn_counts)
        ]

    def _by_exchange(self, conversations: list[list[dict]]) -> list[np.ndarray]:
        """Counts the tokens of each exchange. A system message is counted with the first exchange."""
        processor = self.processor
        if not processor.writes_template:  # nothing is known of a user's own template
            return [np.diff(lengths, prepend=0) for lengths in prefix_lengths(processor, conversations, plain=False)]
        delimiter, turns = processor.tokenizer.eos_token, processor.turn_format
        after = len(processor.tokenizer(delimiter + turns["turn_separator"], add_special_tokens=False).input_ids) - 1
        counts = []
        for messages, ids in zip(conversations, token_ids(processor, conversations, plain=False)):
            # Some tokenizers begin a text with the end-of-sequence token. That one ends no turn.
            ends = 1 + np.flatnonzero(ids[1:] == processor.tokenizer.eos_token_id)
            # A question ends with the delimiter if the model asks it, or if in this layout every turn does.
            asked = np.array([bool(m.get("self_question")) for m in messages if m["role"] == "user"])
            per_exchange = 1 + (asked | (delimiter in turns["user_end"]))
            # The delimiters of the system message, if any, are the first ones.
            last = len(ends) - per_exchange.sum() + per_exchange.cumsum() - 1
            ends = ends[last] + after
            assert ends[-1] == len(ids) - 1, "an exchange has no end token"
            counts.append(np.diff(_sizes(processor, ids).cumsum()[ends], prepend=0))
        return counts


@dataclass(frozen=True)
class CountTokens:
    """
    Counts the tokens of a batch of rows; the function that `datasets.map` calls. With `prefixes`, it also finds the
    rows that begin alike.
    """

    reader: RowReader
    bound: LengthBound
    prefixes: bool = False

    def __call__(self, batch: dict[str, list[int]]) -> dict[str, list[int]]:
        rows = [self.reader.read(*place) for place in zip(batch["source"], batch["index"])]
        conversations = [row["messages"] for row in rows]
        try:
            columns = {"length": self.bound.of_rows(conversations, batch["row_id"])}
            if self.prefixes:
                openings = zip(self._openings(conversations), rows)
                prefixes = [self._prefix(ids, row["images"]) for ids, row in openings]
                columns["image_group"], columns["prefix_length"] = map(list, zip(*prefixes))
            return columns
        except TemplateError as error:
            for row_id, messages in zip(batch["row_id"], conversations):
                try:
                    token_ids(self.bound.processor, [messages], self.bound.plain)
                except TemplateError as error_of_row:
                    raise ValueError(f"Row {row_id}: {error_of_row}") from error_of_row
            raise error

    def _openings(self, conversations: list[list[dict]]) -> list[np.ndarray]:
        """Returns the token ids of each row up to its first answer. Each image is one token."""
        openings = [messages[: first_exchange(messages)] for messages in conversations]
        return token_ids(self.bound.processor, openings, self.bound.plain)

    def _prefix(self, ids: np.ndarray, images: list) -> tuple[int, int]:
        """Returns the number of a row's prefix ([`prefix_number`]) and its tokens; zeros without an image."""
        prefix = ids[: image_prefix(ids, self.bound.processor.image_token_id)]
        if not len(prefix):
            return 0, 0
        num_images = int((prefix == self.bound.processor.image_token_id).sum())
        return prefix_number(prefix, images[:num_images]), int(_sizes(self.bound.processor, prefix).sum())


def with_length_bounds(
    rows: datasets.Dataset, bound: LengthBound, num_proc: int | None = None, prefixes: bool = False
) -> datasets.Dataset:
    """
    Replaces the estimated `length` of each row by the largest number of tokens that it can have.

    The counts are kept in the cache of `datasets`. They are computed again when the data, the tokenizer, its chat
    template, `max_length` or the choice of rows changes.

    Args:
        rows (`datasets.Dataset`): From [`load_rows`].
        bound ([`LengthBound`]): How to count.
        num_proc (`int`, *optional*): Number of processes. Default: one per core, or one if there are few rows.
        prefixes (`bool`): Also add the columns `image_group` and `prefix_length`, which rows with shared images need:
            the number of the row's prefix, and its tokens ([`~sq_llava.data.shared_images.ImageSharing`]).

    Raises:
        ValueError: for a row that is wrong or too long.
    """
    reader = rows.format["format_kwargs"]["transform"]
    places = rows.with_format(None).select_columns(["row_id", "source", "index"])
    key = _fingerprint(places, reader, bound, prefixes)
    if num_proc is None and len(rows) >= ROWS_FOR_PROCESSES:
        num_proc = os.cpu_count()
    cache = Path(datasets.config.HF_DATASETS_CACHE) / "sq_llava_lengths"
    cache.mkdir(parents=True, exist_ok=True)
    counted = places.map(
        CountTokens(reader, bound, prefixes),
        batched=True,
        batch_size=ROWS_AT_A_TIME,
        num_proc=num_proc,
        remove_columns=places.column_names,
        cache_file_name=str(cache / f"{key}.arrow"),
        new_fingerprint=key,
        desc="Counting tokens",
    )
    counts = counted.with_format("numpy")[:]
    rows = rows.with_format(None).remove_columns("length")
    for name in counted.column_names:
        rows = rows.add_column(name, counts[name])
    return rows.with_transform(reader)


def _fingerprint(places: datasets.Dataset, reader: RowReader, bound: LengthBound, prefixes: bool) -> str:
    tokenizer = bound.processor.tokenizer
    settings = [bound.max_length, bound.plain, bound.self_question_ratio > 0, bound.processor.image_seq_length]
    settings += ["prefixes"] if prefixes else []
    settings += [reader.instructions]
    texts = [tokenizer.backend_tokenizer.to_str(), tokenizer.chat_template, *map(_identity, reader.sources)]
    digest = hashlib.blake2b(json.dumps([settings, texts]).encode(), digest_size=16)
    for name in ("row_id", "source", "index"):
        digest.update(places.with_format("numpy")[name][:].tobytes())
    return digest.hexdigest()


def _identity(source: JsonFile | Table) -> str:
    """Returns a text that changes with the data: path, size and time of a JSON file, which would be slow to read."""
    if isinstance(source, Table):
        return source.dataset._fingerprint
    stat = os.stat(source.path)
    return f"{os.path.abspath(source.path)} {stat.st_size} {stat.st_mtime_ns}"
