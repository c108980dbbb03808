"""Tokens of rows, and the most that a row can have, whichever turns become self-questions: counted once, kept on disk.

    >>> rows = with_length_bounds(rows, LengthBound(processor, max_length=2048))
    >>> rows[0]["length"]  # in no epoch will row 0 have more
    812

A turn has other tokens as a self-question (`[vusr] text</s>`) than as a user's (` USER: text`). Each exchange ends
with the token that ends an answer. No text may hold it, and no token reaches across it. So the tokens of a row are the
sum of the tokens of its exchanges, and two counts, one with no turn drawn and one with all, give the most of any draw.
What it does not do: read images. Each has `image_seq_length` tokens.
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
from sq_llava.data.rows import RowReader
from sq_llava.data.self_questions import draw_self_questions, first_exchange
from sq_llava.data.sources import JsonFile, Table


ROWS_AT_A_TIME = 256
# Below this number of rows, one process is faster: others would have to be started.
ROWS_FOR_PROCESSES = 20_000


def token_ids(processor: SQLlavaProcessor, conversations: list[list[dict]], plain: bool) -> list[np.ndarray]:
    """Ids as the collator will have them, except that one `<image>` stands for all tokens of an image."""
    if not conversations:
        return []
    texts = processor.apply_chat_template(conversations, plain=plain)
    return [np.array(ids) for ids in processor.tokenizer(texts, add_special_tokens=False).input_ids]


def token_counts(processor: SQLlavaProcessor, conversations: list[list[dict]], plain: bool) -> list[int]:
    """Tokens of conversations, images included, with the turns as they are flagged."""
    return [int(_sizes(processor, ids).sum()) for ids in token_ids(processor, conversations, plain)]


def prefix_lengths(processor: SQLlavaProcessor, conversations: list[list[dict]], plain: bool) -> list[np.ndarray]:
    """For each conversation: tokens of its first exchange, of its first two, and so on; images included."""
    prefixes = [
        [messages[:end] for end in range(first_exchange(messages), len(messages) + 1, 2)] for messages in conversations
    ]
    counts = token_counts(processor, [prefix for own in prefixes for prefix in own], plain)
    return np.split(np.array(counts), np.cumsum([len(own) for own in prefixes])[:-1])


def kept_exchanges(lengths: np.ndarray, max_length: int, row_id: int | str | None) -> int:
    """
    How many exchanges are kept of a row that may be too long: whole ones go from its end.

    Args:
        lengths (`np.ndarray`): Of the row, as [`prefix_lengths`] counts them.

    Raises:
        ValueError: if not even the first one fits.
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
    The most tokens that the collator can make of a row.

    Args:
        processor ([`SQLlavaProcessor`]): Of the run.
        max_length (`int`): A longer row loses its last exchanges, as in the collator.
        plain (`bool`): The caption layout of stage 1, in which nothing is drawn.
        self_question_ratio (`float`): With 0, nothing is drawn either.
    """

    processor: SQLlavaProcessor
    max_length: int
    plain: bool = False
    self_question_ratio: float = 0.5

    def of_rows(self, conversations: list[list[dict]], row_ids: list[int]) -> list[int]:
        """
        Raises:
            ValueError: for a row of which the first exchange alone does not fit into `max_length`.
        """
        bounds = []
        for row_id, (least, most) in zip(row_ids, self._of_prefixes(conversations)):
            kept = kept_exchanges(least, self.max_length, row_id)
            # A draw under which more is kept than under another is no longer than max_length either.
            bounds.append(min(self.max_length, int(most[kept - 1])))
        return bounds

    def _of_prefixes(self, conversations: list[list[dict]]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Fewest and most tokens of the first exchange, the first two, ..., over all draws, for each conversation."""
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
        """Tokens of each exchange; what stands before the first belongs to it."""
        counts = []
        for messages, ids in zip(conversations, token_ids(self.processor, conversations, plain=False)):
            # The first token of some tokenizers' texts is the one that ends an answer, too.
            ends = 1 + np.flatnonzero(ids[1:] == self.processor.tokenizer.eos_token_id)
            asked = np.array([bool(m.get("self_question")) for m in messages if m["role"] == "user"])
            last = (1 + asked).cumsum() - 1  # a self-question has an end of its own
            assert len(ends) == last[-1] + 1 and ends[-1] == len(ids) - 1, "an exchange does not end as it should"
            counts.append(np.diff(_sizes(self.processor, ids).cumsum()[ends[last]], prepend=0))
        return counts


@dataclass(frozen=True)
class CountTokens:
    """Body of `datasets.map` over the places of rows."""

    reader: RowReader
    bound: LengthBound

    def __call__(self, batch: dict[str, list[int]]) -> dict[str, list[int]]:
        conversations = [self.reader.read(*place)["messages"] for place in zip(batch["source"], batch["index"])]
        try:
            return {"length": self.bound.of_rows(conversations, batch["row_id"])}
        except TemplateError as error:
            for row_id, messages in zip(batch["row_id"], conversations):
                try:
                    token_ids(self.bound.processor, [messages], self.bound.plain)
                except TemplateError as error_of_row:
                    raise ValueError(f"Row {row_id}: {error_of_row}") from error_of_row
            raise error


def with_length_bounds(rows: datasets.Dataset, bound: LengthBound, num_proc: int | None = None) -> datasets.Dataset:
    """
    Rows of [`load_rows`] whose `length` is the most tokens that each can have, in place of a rough number.

    The lengths are kept in the cache of `datasets`, and counted again when data, tokenizer, template, `max_length` or
    the choice of rows changes.

    Args:
        num_proc (`int`, *optional*): Processes; by default one for each core, and one alone for few rows.

    Raises:
        ValueError: for a wrong row, and for one that is too long.
    """
    reader = rows.format["format_kwargs"]["transform"]
    places = rows.with_format(None).select_columns(["row_id", "source", "index"])
    key = _fingerprint(places, reader, bound)
    if num_proc is None and len(rows) >= ROWS_FOR_PROCESSES:
        num_proc = os.cpu_count()
    cache = Path(datasets.config.HF_DATASETS_CACHE) / "sq_llava_lengths"
    cache.mkdir(parents=True, exist_ok=True)
    counted = places.map(
        CountTokens(reader, bound),
        batched=True,
        batch_size=ROWS_AT_A_TIME,
        num_proc=num_proc,
        remove_columns=places.column_names,
        cache_file_name=str(cache / f"{key}.arrow"),
        new_fingerprint=key,
        desc="Counting tokens",
    )
    lengths = counted.with_format("numpy")["length"][:]
    rows = rows.with_format(None).remove_columns("length").add_column("length", lengths)
    return rows.with_transform(reader)


def _fingerprint(places: datasets.Dataset, reader: RowReader, bound: LengthBound) -> str:
    tokenizer = bound.processor.tokenizer
    settings = [bound.max_length, bound.plain, bound.self_question_ratio > 0, bound.processor.image_seq_length]
    settings += [reader.instructions]
    texts = [tokenizer.backend_tokenizer.to_str(), tokenizer.chat_template, *map(_identity, reader.sources)]
    digest = hashlib.blake2b(json.dumps([settings, texts]).encode(), digest_size=16)
    for name in ("row_id", "source", "index"):
        digest.update(places.with_format("numpy")[name][:].tobytes())
    return digest.hexdigest()


def _identity(source: JsonFile | Table) -> str:
    """Another, if the data changed. A file is known by its size and time: to read it takes as long as to count."""
    if isinstance(source, Table):
        return source.dataset._fingerprint
    stat = os.stat(source.path)
    return f"{os.path.abspath(source.path)} {stat.st_size} {stat.st_mtime_ns}"
