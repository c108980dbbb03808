"""Rows -> padded batches, with the labels of answers and self-questions.

Which turns become self-questions is drawn by `sq_llava/data/self_questions.py`.
"""

import copy
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

import torch
from jinja2 import TemplateError
from PIL import Image
from torch.nn import functional as F
from transformers import TrainerCallback

from processing_sq_llava import SQLlavaProcessor
from sq_llava.data.images import OnceEach, image_key, open_image
from sq_llava.data.self_questions import (
    ANSWER,
    IGNORE_INDEX,
    NOT_SPOKEN,
    QUESTION,
    draw_self_questions,
    first_exchange,
)


@dataclass
class SelfQuestioningCollator:
    """
    Rows -> a padded batch: `input_ids`, `attention_mask`, `pixel_values`, `labels`, `turn_kinds` (`torch.uint8` of the
    shape of `labels`: 1 on answers, 2 on self-questions, 0 elsewhere), and `row_ids` (`torch.int64`, one per row).
    An image that several rows show is opened and processed once: `pixel_values` holds it once, and `image_indices`
    (`torch.int64`, one per image of the text) says which is which.

    A row has `row_id` (int), `messages` and `images` (paths or PIL images, in the order of the image parts). Labels
    come from the chat template's own mask: nothing is tokenised twice, so nothing can disagree.

    Args:
        processor ([`SQLlavaProcessor`]): With its chat template.
        plain (`bool`): The caption layout of stage 1, without roles and self-questions.
        self_question_ratio (`float`): Probability that a turn after the first is asked by the model.
        seed (`int`): Of the draw.
        max_length (`int`, *optional*): In tokens. A longer row loses its last turns, whole ones; a row of which not
            even the first turn fits is an error.
        pad_to_multiple_of (`int`, *optional*): Pads each batch to a multiple of so many tokens; `max_length` is of the
            tokens before that.
    """

    processor: SQLlavaProcessor
    plain: bool = False
    self_question_ratio: float = 0.5
    seed: int = 0
    max_length: int | None = None
    pad_to_multiple_of: int | None = None
    # In shared memory: data loader workers that live on see the next epoch too.
    epoch: torch.Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.int64).share_memory_())

    def __post_init__(self):
        self.batch_processor = copy.copy(self.processor)
        self.batch_processor.image_processor = OnceEach(self.processor.image_processor)

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        images = {}  # rows of one batch may share them
        conversations = [self._conversation(row, images) for row in rows]
        try:
            batch = self._tokenize(conversations)
        except TemplateError as error:
            self._name_row(conversations, rows)
            raise error
        if self.max_length is not None and batch["input_ids"].shape[1] > self.max_length:
            conversations = [self._fit(conversation, row) for conversation, row in zip(conversations, rows)]
            batch = self._tokenize(conversations)
        spoken = batch.pop("assistant_masks").bool() & batch["attention_mask"].bool()
        batch["labels"] = batch["input_ids"].masked_fill(~spoken, IGNORE_INDEX)
        if self.plain:
            batch["turn_kinds"] = spoken.to(torch.uint8) * ANSWER
        else:
            kinds = [_turn_kinds(mask, messages, row) for mask, messages, row in zip(spoken, conversations, rows)]
            batch["turn_kinds"] = torch.stack(kinds)
        batch["row_ids"] = torch.tensor([row["row_id"] for row in rows])
        return self._padded(dict(batch))

    def _padded(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        missing = -batch["input_ids"].shape[1] % (self.pad_to_multiple_of or 1)
        fills = {
            "input_ids": self.processor.tokenizer.pad_token_id,
            "attention_mask": 0,
            "labels": IGNORE_INDEX,
            "turn_kinds": NOT_SPOKEN,
        }
        return batch | {name: F.pad(batch[name], (0, missing), value=fill) for name, fill in fills.items() if missing}

    def _conversation(self, row: dict[str, Any], opened: dict[Hashable, Any]) -> list[dict]:
        messages = row["messages"]
        if not self.plain:
            messages = draw_self_questions(
                messages, self.self_question_ratio, self.seed, int(self.epoch), row["row_id"]
            )
        try:
            for image in row["images"]:
                if image_key(image) not in opened:
                    opened[image_key(image)] = self._open(image)
        except ValueError as error:
            raise ValueError(f"Row {row['row_id']} (id {row.get('id')!r}): {error}") from error
        images = iter([opened[image_key(image)] for image in row["images"]])
        return [
            {
                **message,
                "content": [
                    {"type": "image", "image": next(images)} if part["type"] == "image" else part
                    for part in message["content"]
                ],
            }
            for message in messages
        ]

    def _open(self, image: str | dict[str, Any] | Image.Image) -> Any:
        return self.processor.image_processor.pad_and_resize(open_image(image))

    def _tokenize(self, conversations: list[list[dict]]) -> dict[str, torch.Tensor]:
        batch = self.batch_processor.apply_chat_template(
            conversations,
            tokenize=True,
            return_dict=True,
            # As lists: transformers makes the mask in a loop over the offsets, which is slow on tensors.
            return_tensors=None,
            return_assistant_tokens_mask=True,
            plain=self.plain,
            # The template writes the beginning of the sequence.
            processor_kwargs={"padding": True, "padding_side": "right", "add_special_tokens": False},
        )
        return batch.convert_to_tensors("pt")

    def _name_row(self, conversations: list[list[dict]], rows: list[dict[str, Any]]) -> None:
        """Says which row it is that the chat template refuses, such as for a control token in its text."""
        for conversation, row in zip(conversations, rows):
            try:
                self._tokenize([conversation])
            except TemplateError as error:
                raise ValueError(f"Row {row['row_id']} (id {row.get('id')!r}): {error}") from error

    def _fit(self, messages: list[dict], row: dict[str, Any]) -> list[dict]:
        length = len(self._tokenize([messages])["input_ids"][0])
        while length > self.max_length:
            if len(messages) <= first_exchange(messages):
                raise ValueError(
                    f"Row {row['row_id']}: its first question and answer have {length} tokens, more than max_length "
                    f"{self.max_length}. Raise max_length, or shorten the row."
                )
            messages = messages[:-2]
            length = len(self._tokenize([messages])["input_ids"][0])
        return messages


def _turn_kinds(spoken: torch.Tensor, messages: list[dict], row: dict[str, Any]) -> torch.Tensor:
    """Tells answers from self-questions: the i-th run of spoken tokens is the i-th turn that the model speaks."""
    kinds = [
        QUESTION if message["role"] == "user" else ANSWER
        for message in messages
        if message["role"] == "assistant" or message.get("self_question")
    ]
    begins = spoken & ~torch.cat([spoken.new_zeros(1), spoken[:-1]])
    if int(begins.sum()) != len(kinds):
        raise ValueError(
            f"Row {row['row_id']}: {len(kinds)} turns are in the loss, but {int(begins.sum())} were found: "
            "the tokenizer joins the end of one turn and the beginning of the next into one token."
        )
    kind_of_run = torch.tensor([NOT_SPOKEN, *kinds], dtype=torch.uint8)
    return torch.where(spoken, kind_of_run[begins.cumsum(0)], NOT_SPOKEN)


class EpochCallback(TrainerCallback):
    """Tells the collator which epoch it draws self-questions for."""

    def __init__(self, collator: SelfQuestioningCollator):
        self.collator = collator

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.collator.epoch.fill_(int(state.epoch or 0))
