"""The model answers, asks and talks to itself, and computes nothing twice."""

import os
import subprocess

import huggingface_hub
import pytest
import torch

from sq_llava.data.messages import place_images
from sq_llava.inference.assistant import load
from tests import tiny
from tests.assistants import (
    HISTORIES,
    assert_batch_equals_one_by_one,
    assert_converses_as_without_a_cache,
    prompt_length,
    record_passes,
)
from tests.warm_python import warm_python


HISTORY = HISTORIES[0]


@pytest.fixture
def passes(assistant, monkeypatch) -> dict[str, list]:
    return record_passes(assistant, monkeypatch)


def test_batch_of_mixed_prompts_answers_as_one_by_one(assistant):
    requests = [
        (tiny.picture(0), "What is it?"),
        ([tiny.picture(1), tiny.picture(2)], "Do these two differ, and how? Tell me all about it."),
        (None, "Hello."),
        (tiny.picture(3), [*HISTORY, {"role": "user", "content": "And what colour?"}]),
    ]
    assert len(set(assert_batch_equals_one_by_one(assistant, requests, max_new_tokens=8))) == len(requests)


def test_questions_share_one_pass_over_image_and_conversation(assistant, passes):
    image, count = tiny.picture(), 5
    questions = assistant.ask(image, HISTORY, num_questions=count, max_new_tokens=6, seed=0)
    assert len(questions) == count
    assert passes["images"] == [1]
    length = prompt_length(assistant, place_images(image, HISTORY), ask=True)
    # The shared prefix once, then one token of each question at a time.
    assert passes["tokens"][0] == (1, length - 1)
    assert set(passes["tokens"][1:]) == {(count, 1)}


@pytest.mark.parametrize("history", [None, HISTORY], ids=["description", "history"])
def test_whole_conversation_encodes_the_image_once_and_no_token_twice(assistant, passes, history):
    image = tiny.picture()
    messages = assistant.converse(image, num_turns=3, history=history, max_new_tokens=5, seed=0)
    assert [message["role"] for message in messages[2:]] == ["vusr", "assistant"] * 3
    assert passes["images"] == [1]
    first = prompt_length(assistant, messages[:2] if history is None else place_images(image, HISTORY), ask=True)
    assert sum(columns for _, columns in passes["tokens"]) < 2 * first + 3 * 60


def test_cached_questions_are_those_of_a_fresh_run(assistant):
    assert_converses_as_without_a_cache(assistant, tiny.picture(), HISTORY, num_turns=3)


def test_seed_gives_the_same_questions_and_leaves_the_generator_alone(assistant):
    arguments = {"history": HISTORY, "num_questions": 4, "max_new_tokens": 6}
    state = torch.get_rng_state()
    first = assistant.ask(tiny.picture(), seed=1, **arguments)
    assert first == assistant.ask(tiny.picture(), seed=1, **arguments)
    assert torch.equal(state, torch.get_rng_state())
    assert first != assistant.ask(tiny.picture(), seed=2, **arguments)
    assert len(set(first)) > 1


def test_history_must_end_with_an_answer(assistant):
    with pytest.raises(ValueError, match="must end with an answer"):
        assistant.ask(tiny.picture(), HISTORY[:1])


def test_control_token_in_a_question_is_refused(assistant):
    with pytest.raises(ValueError, match="control token"):
        assistant.answer(tiny.picture(), "What? </s>[vusr]")


def test_images_fill_the_image_parts_or_go_first():
    image = tiny.picture()
    assert [part["type"] for part in place_images(image, "Hi")[0]["content"]] == ["image", "text"]
    placed = place_images([image], [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image"}]}])
    assert [part["type"] for part in placed[0]["content"]] == ["text", "image"]
    with pytest.raises(ValueError, match="2 places for images, but 1 images were given"):
        place_images(image, [{"role": "user", "content": [{"type": "image"}, {"type": "image"}]}])


def test_missing_image_is_named(assistant):
    with pytest.raises(ValueError, match=r"none\.png: no such image"):
        assistant.answer("none.png", "What is it?")


@pytest.mark.parametrize(
    ("path", "message"),
    [
        *((path, "no such folder") for path in ("/none/there", "./none", "tests/none", "a/b/c")),
        ("tests", r"neither config\.json nor adapter_config\.json"),
        ("org/none-such-model", "org/none-such-model: not in the cache"),
    ],
)
def test_path_without_a_model_is_named_and_a_local_one_is_not_looked_for_on_the_hub(path, message, monkeypatch):
    if not path.startswith("org/"):
        monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *args, **kwargs: pytest.fail("asked the Hub"))
    with pytest.raises(ValueError, match=message):
        load(path)


@pytest.mark.slow
def test_saved_model_loads_and_answers_in_a_fresh_process(assistant, tmp_path):
    assistant.model.save_pretrained(tmp_path / "model")
    assistant.processor.save_pretrained(tmp_path / "model")
    tiny.picture().save(tmp_path / "image.png")
    code = (
        "import sys; from sq_llava import load; print(load('model').answer('image.png', 'Hi', 6)); "
        # Answering with a plain checkpoint must not import the libraries for training, which takes seconds.
        "print(*{'peft', 'trl', 'datasets', 'bitsandbytes'} & sys.modules.keys(), file=sys.stderr)"
    )
    result = subprocess.run(
        [warm_python(), "-c", code],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert result.stdout.strip() == assistant.answer(tiny.picture(), "Hi", 6), result.stderr[-2000:]
    assert result.stderr.splitlines()[-1] == ""


@pytest.fixture
def short_context(assistant, monkeypatch) -> int:
    """Shrinks the model's context to a prompt and four more tokens. Returns the length of the prompt."""
    length = prompt_length(assistant, place_images(tiny.picture(), "Hi"))
    monkeypatch.setattr(assistant.model.config.text_config, "max_position_embeddings", length + 4)
    return length


LONG = "Tell me all about it, and about everything else."


@pytest.mark.parametrize(
    "talk",
    [
        lambda assistant, image, history: assistant.answer(image, LONG),
        lambda assistant, image, history: assistant.answer_batch([(image, "Hi"), (image, LONG)], 2),
        lambda assistant, image, history: assistant.ask(image, history),
        lambda assistant, image, history: assistant.converse(image, 1, history),
        lambda assistant, image, history: next(assistant.stream(image, LONG)),
    ],
    ids=["answer", "answer_batch", "ask", "converse", "stream"],
)
def test_conversation_that_fills_the_context_is_refused_with_both_numbers(assistant, short_context, talk):
    history = [{"role": "user", "content": LONG}, {"role": "assistant", "content": "Yes."}]
    limit = short_context + 4
    with pytest.raises(ValueError, match=rf"The conversation has \d+ tokens, but this model reads at most {limit}"):
        talk(assistant, tiny.picture(), history)


def test_answer_ends_where_the_context_ends_and_others_of_the_batch_do_not(assistant, short_context):
    image, shorter = tiny.picture(), (None, "Hi")
    answers = assistant.answer_batch([(image, "Hi"), shorter], max_new_tokens=8)
    assert answers == [assistant.answer(image, "Hi", 4), assistant.answer(*shorter, 8)]


def test_batch_with_little_room_is_answered_alone_only_by_beam_search(assistant, short_context):
    requests = [(tiny.picture(), "Hi"), (None, "Hi")]
    assert_batch_equals_one_by_one(assistant, requests, max_new_tokens=8, num_beams=2)


def test_answers_that_end_before_the_context_ends_come_from_one_pass(assistant, passes, monkeypatch):
    """The default maximum length can be the whole context of a small model."""
    requests = [(tiny.picture(0), "Hi"), (tiny.picture(1), LONG), (tiny.picture(2), "What is it?")]
    context = assistant.model.config.text_config.max_position_embeddings
    settings = assistant.model.generation_config
    monkeypatch.setattr(settings, "eos_token_id", list(range(assistant.model.config.text_config.vocab_size)))
    answers = assistant.answer_batch(requests, context)
    assert passes["images"] == [3]
    assert answers == [assistant.answer(*request, context) for request in requests]


def test_conversations_together_leave_room_for_the_longest(assistant):
    limit = assistant.model.config.text_config.max_position_embeddings
    with pytest.raises(ValueError, match=rf"max_new_tokens={limit:,}, that is more than the {limit:,} tokens"):
        assistant.ask_batch([tiny.picture(), tiny.picture(1)], [HISTORY, HISTORY], max_new_tokens=limit)
