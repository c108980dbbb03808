"""Text that comes piece by piece, and a generation that is given up."""

import threading

import pytest

from sq_llava.inference.assistant import Assistant
from tests import tiny


@pytest.fixture(scope="module")
def assistant() -> Assistant:
    processor = tiny.tiny_processor(system_message="Be kind.")
    return Assistant(tiny.tiny_model_for(processor), processor)


def test_pieces_together_are_the_answer(assistant):
    pieces = list(assistant.stream(tiny.picture(), "What is it?", max_new_tokens=30))
    assert len(pieces) > 1
    assert "".join(pieces).strip() == assistant.answer(tiny.picture(), "What is it?", max_new_tokens=30)


def test_question_is_asked_behind_the_vusr_token(assistant, monkeypatch):
    prompts = []
    generate = assistant.model.generate
    monkeypatch.setattr(assistant.model, "generate", lambda **inputs: prompts.append(inputs) or generate(**inputs))
    list(assistant.stream(tiny.picture(), "What is it?", max_new_tokens=2, ask=True))
    assert prompts[0]["input_ids"][0, -1] == assistant.processor.vusr_token_id


def test_closing_ends_the_generation_at_its_next_token(assistant, monkeypatch):
    num_passes = 0
    forward = assistant.model.model.language_model.forward

    def count(*args, **kwargs):
        nonlocal num_passes
        num_passes += 1
        return forward(*args, **kwargs)

    monkeypatch.setattr(assistant.model.model.language_model, "forward", count)
    num_threads = threading.active_count()
    pieces = assistant.stream(tiny.picture(), "What is it?", max_new_tokens=900)
    next(pieces)
    pieces.close()
    assert num_passes < 300  # a piece ends with a word: a few tokens
    assert threading.active_count() == num_threads


def test_failure_of_the_generation_is_raised_where_it_is_read(assistant, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(assistant.model.model.language_model, "forward", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        list(assistant.stream(tiny.picture(), "What is it?"))


def test_text_ends_where_the_context_does(assistant, monkeypatch):
    text_config = assistant.model.config.text_config
    calls = []
    generate = assistant.model.generate
    monkeypatch.setattr(assistant.model, "generate", lambda **inputs: calls.append(inputs) or generate(**inputs))
    monkeypatch.setattr(text_config, "max_position_embeddings", 60)
    list(assistant.stream(tiny.picture(), "What is it?", max_new_tokens=900))
    length = calls[0]["input_ids"].shape[1]
    assert length + calls[0]["max_new_tokens"] == 60
    monkeypatch.setattr(text_config, "max_position_embeddings", length)
    with pytest.raises(ValueError, match="start a new one"):
        list(assistant.stream(tiny.picture(), "What is it?"))
