"""Rows -> padded batches, with labels on answers and self-questions.

`sq_llava/data/self_questions.py` draws at random which turns become self-questions.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jinja2 import TemplateError
from PIL import Image
from transformers import TrainerCallback
from transformers.utils.chat_template_utils import render_jinja_template

from processing_sq_llava import SQLlavaProcessor
from sq_llava.data.images import image_key, open_image
from sq_llava.data.lengths import kept_exchanges, prefix_lengths
from sq_llava.data.self_questions import ANSWER, IGNORE_INDEX, NOT_SPOKEN, QUESTION, draw_self_questions


@dataclass
class SelfQuestioningCollator:
    """
    Turns rows into a padded batch.

    A row has `row_id` (int), `messages`, and `images` (paths or PIL images, in the order of the image parts). The
    chat template renders the text and the mask of the labels together, so the two always agree.

    Args:
        processor ([`SQLlavaProcessor`]): The model's processor, with its chat template.
        plain (`bool`): Use the caption layout of stage 1, without roles and self-questions.
        self_question_ratio (`float`): Probability that a turn after the first is asked by the model.
        seed (`int`): Random seed for drawing self-questions.
        max_length (`int`, *optional*): Maximum tokens of a row. Whole exchanges are cut from the end of a longer row;
            a row whose first exchange does not fit is an error.
        pad_to_multiple_of (`int`, *optional*): Pad each batch to a multiple of this. Padding may exceed `max_length`.

    Returns (from a call):
        `dict` of tensors:
            - `input_ids`, `attention_mask`, `labels` (`torch.int64`, `(batch_size, sequence_length)`).
            - `turn_kinds` (`torch.uint8`, same shape): 1 on answers, 2 on self-questions, 0 elsewhere.
            - `row_ids` (`torch.int64`, `(batch_size,)`).
            - `pixel_values` (`torch.float32`, `(num_images, 3, image_size, image_size)`), if there are images. An
              image that several rows show is opened and processed once, and appears here once.
            - `image_indices` (`torch.int64`, one for each image in the text), if an image repeats: its place in
              `pixel_values`.
    """

    processor: SQLlavaProcessor
    plain: bool = False
    self_question_ratio: float = 0.5
    seed: int = 0
    max_length: int | None = None
    pad_to_multiple_of: int | None = None
    # In shared memory, so that persistent dataloader workers see when the epoch changes.
    epoch: torch.Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.int64).share_memory_())

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        samples = [self._sample(row) for row in rows]
        kinds = [kinds for _, kinds, _ in samples]
        labels = [np.where(kinds == NOT_SPOKEN, IGNORE_INDEX, ids) for ids, kinds, _ in samples]
        return {
            "input_ids": self._pad([ids for ids, _, _ in samples], self.processor.tokenizer.pad_token_id),
            "attention_mask": self._pad([np.ones_like(ids) for ids, _, _ in samples], 0),
            "labels": self._pad(labels, IGNORE_INDEX),
            "turn_kinds": self._pad(kinds, NOT_SPOKEN).to(torch.uint8),
            "row_ids": torch.tensor([row["row_id"] for row in rows]),
            **self._pixels(rows, [images for _, _, images in samples]),
        }

    def _sample(self, row: dict[str, Any]) -> tuple[np.ndarray, np.ndarray, list]:
        """Returns a row's token ids, cut to `max_length`, the kind of turn of each token, and the images shown."""
        messages = row["messages"]
        if not self.plain:
            messages = draw_self_questions(
                messages, self.self_question_ratio, self.seed, int(self.epoch), row["row_id"]
            )
        ids, spoken = self._tokenize(messages, row)
        if self.max_length is not None and len(ids) > self.max_length:
            [lengths] = prefix_lengths(self.processor, [messages], self.plain)
            kept = kept_exchanges(lengths, self.max_length, row["row_id"])
            messages = messages[: len(messages) - 2 * (len(lengths) - kept)]
            ids, spoken = self._tokenize(messages, row)
        kinds = spoken * ANSWER if self.plain else _turn_kinds(spoken, messages, row)
        num_images = sum(part["type"] == "image" for message in messages for part in message["content"])
        assert num_images <= len(row["images"]), f"row {row['row_id']} shows more images than it has"
        return ids, kinds, row["images"][:num_images]

    def _tokenize(self, messages: list[dict], row: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
        """Returns the token ids of a conversation, and for each token whether the model says it."""
        tokenizer = self.processor.tokenizer
        try:
            [text], [spans] = render_jinja_template(
                [messages],
                chat_template=tokenizer.get_chat_template(),
                return_assistant_tokens_mask=True,
                plain=self.plain,
                **tokenizer.special_tokens_map,
            )
        except TemplateError as error:
            raise ValueError(f"{_name(row)}: {error}") from error
        # The template already writes the beginning-of-sequence token.
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids, offsets = np.array(encoded["input_ids"]), np.array(encoded["offset_mapping"])
        spoken = np.zeros(len(ids), dtype=bool)
        for begin, end in spans:
            spoken |= (offsets[:, 0] < end) & (offsets[:, 1] > begin)
        sizes = np.where(ids == self.processor.image_token_id, self.processor.image_seq_length, 1)
        return ids.repeat(sizes), spoken.repeat(sizes)

    def _pad(self, sequences: list[np.ndarray], fill: int) -> torch.Tensor:
        multiple = self.pad_to_multiple_of or 1
        width = -(-max(map(len, sequences)) // multiple) * multiple
        padded = torch.full((len(sequences), width), fill)
        for row, sequence in zip(padded, sequences):
            row[: len(sequence)] = torch.from_numpy(sequence)
        return padded

    def _pixels(self, rows: list[dict[str, Any]], images_of_rows: list[list]) -> dict[str, torch.Tensor]:
        """Returns `pixel_values` of the distinct images, and `image_indices` if an image repeats."""
        places, opened, indices = {}, [], []
        for row, images in zip(rows, images_of_rows):
            for image in images:
                key = image_key(image)
                if key not in places:
                    places[key] = len(opened)
                    opened.append(self._open(image, row))
                indices.append(places[key])
        if not opened:
            return {}
        pixels = {"pixel_values": self.processor.image_processor(opened, return_tensors="pt")["pixel_values"]}
        return pixels | ({"image_indices": torch.tensor(indices)} if len(opened) < len(indices) else {})

    def _open(self, image: str | dict[str, Any] | Image.Image, row: dict[str, Any]) -> Image.Image:
        try:
            return self.processor.image_processor.pad_and_resize(open_image(image))
        except ValueError as error:
            raise ValueError(f"{_name(row)}: {error}") from error


def _name(row: dict[str, Any]) -> str:
    return f"Row {row['row_id']} (id {row.get('id')!r})"


def _turn_kinds(spoken: np.ndarray, messages: list[dict], row: dict[str, Any]) -> np.ndarray:
    """Marks each spoken token as answer or self-question. The i-th run of spoken tokens is the model's i-th turn."""
    kinds = [
        QUESTION if message["role"] == "user" else ANSWER
        for message in messages
        if message["role"] == "assistant" or message.get("self_question")
    ]
    begins = np.diff(spoken, prepend=False) & spoken
    if begins.sum() != len(kinds):
        raise ValueError(
            f"Row {row['row_id']}: expected {len(kinds)} turns in the loss, but found {begins.sum()} in the tokens. "
            "The tokenizer merges the end of one turn and the beginning of the next into one token. Use another "
            "prompt_layout or tokenizer."
        )
    return np.where(spoken, np.array([NOT_SPOKEN, *kinds])[begins.cumsum()], NOT_SPOKEN)


class EpochCallback(TrainerCallback):
    """Sets the collator's epoch, on which the draw of self-questions depends."""

    def __init__(self, collator: SelfQuestioningCollator):
        self.collator = collator

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.collator.epoch.fill_(int(state.epoch or 0))
