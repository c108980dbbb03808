"""Streaming: the text comes piece by piece, and closing the iterator stops the generation."""

import threading

import pytest

from tests import tiny
from tests.assistants import record_passes


@pytest.fixture
def prompts(assistant, monkeypatch) -> list[dict]:
    """The arguments of each call of `generate`."""
    calls, generate = [], assistant.model.generate
    monkeypatch.setattr(assistant.model, "generate", lambda **inputs: calls.append(inputs) or generate(**inputs))
    return calls


def test_pieces_together_are_the_answer(assistant):
    pieces = list(assistant.stream(tiny.picture(), "What is it?", max_new_tokens=30))
    assert len(pieces) > 1
    assert "".join(pieces).strip() == assistant.answer(tiny.picture(), "What is it?", max_new_tokens=30)


def test_question_is_asked_after_the_vusr_token(assistant, prompts):
    list(assistant.stream(tiny.picture(), "What is it?", max_new_tokens=2, ask=True))
    assert prompts[0]["input_ids"][0, -1] == assistant.processor.vusr_token_id


def test_closing_ends_the_generation_at_its_next_token(assistant, monkeypatch):
    passes = record_passes(assistant, monkeypatch)
    num_threads = threading.active_count()
    pieces = assistant.stream(tiny.picture(), "What is it?", max_new_tokens=900)
    next(pieces)
    pieces.close()
    assert len(passes["tokens"]) < 300  # a piece ends with a word: a few tokens
    assert threading.active_count() == num_threads


def test_failure_of_the_generation_is_raised_where_it_is_read(assistant, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(assistant.model.model.language_model, "forward", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        list(assistant.stream(tiny.picture(), "What is it?"))


def test_text_ends_where_the_context_does(assistant, prompts, monkeypatch):
    text_config = assistant.model.config.text_config
    monkeypatch.setattr(text_config, "max_position_embeddings", 60)
    list(assistant.stream(tiny.picture(), "What is it?", max_new_tokens=900))
    assert prompts[0]["input_ids"].shape[1] + prompts[0]["max_new_tokens"] == 60
