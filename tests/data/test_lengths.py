"""Tokens that are counted without the images are those of the collator's batches."""

import pytest

from sq_llava.data.lengths import token_counts
from sq_llava.training.collator import SelfQuestioningCollator
from tests import tiny


@pytest.mark.parametrize("plain", [False, True])
def test_lengths_are_those_of_the_collator(any_tokenizer, plain):
    processor = tiny.tiny_processor(any_tokenizer)
    texts = ["  two  spaces ", "Größe 🙂", "\n", "line\nbreak\n", "1234567", "A dog."]
    user, assistant = {"role": "user"}, {"role": "assistant"}
    image = {"type": "image"}
    conversations = [
        [
            {**user, "content": [*[image] * number, {"type": "text", "text": text}, *[image] * (number // 2)]},
            {**assistant, "content": [{"type": "text", "text": text[::-1] + "."}]},
            {**user, "content": [{"type": "text", "text": text}]},
            {**assistant, "content": [{"type": "text", "text": text}]},
        ]
        for text in texts
        for number in range(4)
    ]
    collator = SelfQuestioningCollator(processor, plain, self_question_ratio=0.0)
    for messages, length in zip(conversations, token_counts(processor, conversations, plain)):
        images = [tiny.picture()] * sum(part["type"] == "image" for m in messages for part in m["content"])
        batch = collator([{"row_id": 0, "messages": messages, "images": images}])
        assert batch["input_ids"].shape[1] == length
