"""A model for the page that says what a test wants, and a photo."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from sq_llava.inference.assistant import Assistant
from tests import tiny


class Scripted(Assistant):
    """A tiny model that sees the pictures, but says what the test wants, word by word."""

    answer_text = "A dog."
    seconds = seconds_before_first_word = 0.0
    num_closed = 0
    images = seen = sampling = None

    def stream(self, images, messages, max_new_tokens=512, ask=False, **generate_kwargs) -> Iterator[str]:
        self.images, self.seen = images, messages
        if not ask:
            self.sampling = {"max_new_tokens": max_new_tokens, **generate_kwargs}
        if "</s>" in messages[-1]["content"][-1]["text"]:
            raise ValueError("contains '</s>', which is a control token of this model: remove it.")
        num_asked = sum(message["role"] == "vusr" for message in messages)
        text = f"What is number {num_asked}?" if ask else self.answer_text
        try:
            time.sleep(self.seconds_before_first_word)
            for word in text.split(" "):
                time.sleep(self.seconds)
                yield word + " "
        except GeneratorExit:
            self.num_closed += 1
            raise


@pytest.fixture(scope="module")
def assistant() -> Scripted:
    processor = tiny.tiny_processor()
    return Scripted(tiny.tiny_model_for(processor), processor)


@pytest.fixture(autouse=True)
def fast_again(assistant):
    yield
    assistant.seconds = assistant.seconds_before_first_word = 0.0
    assistant.answer_text, assistant.num_closed = "A dog.", 0


@pytest.fixture
def photo(tmp_path) -> Path:
    file = tmp_path / "photo.png"
    tiny.picture(width=90, height=60).save(file)
    return file
