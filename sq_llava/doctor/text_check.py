"""Checks the texts of a row for what the tokenizer or the prompt would misread.

    >>> list(TextCheck(processor).faults(messages))
    [Fault(code="control_token", message="turn 0 has control tokens of this model: '</s>'.", ...)]

The meaning of a text is not judged.
"""

import re
from collections.abc import Iterator

import numpy as np

from processing_sq_llava import PROMPT_LAYOUTS, SQLlavaProcessor
from sq_llava.data.images import Fault


# Control characters except tab and line breaks.
CONTROL_CHARACTER = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")
CONTROL_BYTES = bytes(byte for byte in range(128) if CONTROL_CHARACTER.match(chr(byte)))
# From this share of unknown tokens on, a row is reported.
MOSTLY = 0.5


class TextCheck:
    """
    Args:
        processor ([`SQLlavaProcessor`]): The processor of the model to train.
        plain (`bool`): The caption template of stage 1, which uses only the answers.
    """

    def __init__(self, processor: SQLlavaProcessor, plain: bool = False):
        self.processor, self.plain = processor, plain
        self._markers = [] if plain else _turn_markers(processor)
        # A text without any of these characters has no control token. This fast test is enough for most texts.
        self._first_characters = {token[0] for token in processor.control_tokens}
        tokenizer = processor.tokenizer
        others = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
        # Byte-level tokenizers know every text, and name another special token as the unknown one.
        self._unknown_id = None if tokenizer.unk_token_id in others else tokenizer.unk_token_id

    def faults(self, messages: list[dict]) -> Iterator[Fault]:
        """Yields control characters, control tokens and role markers in the texts of a row."""
        texts = _texts_of(messages)
        whole = "\n".join(texts)
        encoded = whole.encode()
        # A fast test: the slower regular expression then runs on few rows only.
        if b"\xc2" in encoded or len(encoded.translate(None, CONTROL_BYTES)) < len(encoded):
            for index, text in enumerate(texts):
                if found := sorted(set(CONTROL_CHARACTER.findall(text))):
                    yield Fault(
                        "control_character",
                        f"turn {index} has control characters: {', '.join(map(ascii, found))}.",
                        "Remove them.",
                        "warning",
                    )
        if not any(beginning in whole for beginning in (*self._first_characters, *self._markers)):
            return
        for index, text in enumerate(texts):
            if found := [token for token in self.processor.control_tokens if token in text]:
                yield Fault(
                    "control_token",
                    f"turn {index} has control tokens of this model: {', '.join(map(repr, found))}.",
                    "Remove them or write them differently.",
                )
            if found := [marker for marker in self._markers if marker in text]:
                yield Fault(
                    "role_marker",
                    f"turn {index} has markers of turns: {', '.join(map(repr, found))}.",
                    "Split the text into turns, or write the markers differently.",
                    "warning",
                )

    def unknown_faults(self, messages: list[dict], ids: np.ndarray) -> Iterator[Fault]:
        """
        Yields a fault if at least half of the tokens of a row's texts are unknown to the tokenizer.

        Args:
            messages (`list[dict]`): The messages of the row.
            ids (`np.ndarray` of shape `(num_tokens,)`): The tokens of the row with its template.
        """
        if self._unknown_id is None or self._unknown_id not in ids:
            return
        used = [message for message in messages if message["role"] == "assistant"] if self.plain else messages
        tokenizer = self.processor.tokenizer
        tokens = tokenizer("\n".join(_texts_of(used)), add_special_tokens=False).input_ids
        num_unknown = tokens.count(self._unknown_id)
        if num_unknown and num_unknown >= MOSTLY * len(tokens):
            yield Fault(
                "unknown_tokens",
                f"{num_unknown} of the {len(tokens)} tokens of its texts are {tokenizer.unk_token!r}: the tokenizer "
                "does not know these words.",
                "Check that this is the language model that you want, and that it knows the language of the texts.",
                "warning",
            )


def _turn_markers(processor: SQLlavaProcessor) -> list[str]:
    """What marks a turn, in this model's prompts or in those of others, and is no control token of this model."""
    own = [processor.user_marker, processor.assistant_marker]
    if processor.turn_format["turn_begin"]:  # then a marker alone is no more than the name of a role
        own = []
    others = [
        text
        for layout in PROMPT_LAYOUTS.values()
        if (begin := layout["turn_format"]["turn_begin"])
        for text in (begin, layout["delimiter"])
        if text not in processor.control_tokens
    ]
    return own + others


def _texts_of(messages: list[dict]) -> list[str]:
    # Joined without the images, as in the chat template, which refuses a row with a control token.
    return ["".join([part["text"] for part in m["content"] if part["type"] == "text"]) for m in messages]
