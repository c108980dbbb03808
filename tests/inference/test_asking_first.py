"""The model asks itself before it answers."""

import pytest

from sq_llava.data.messages import place_images, place_images_of_all
from sq_llava.inference.dialogues import DESCRIBE
from sq_llava.inference.settings import SelfQuestioning
from tests import tiny
from tests.assistants import HISTORIES, prompt_length, record_passes


LAST = {"role": "user", "content": "And what colour?"}


@pytest.mark.parametrize("history", [[], HISTORIES[0]], ids=["description", "history"])
def test_answer_has_the_models_own_questions_in_view(assistant, history):
    image = tiny.picture()
    [result] = assistant.consider_batch([(image, [*history, LAST])], SelfQuestioning(2, own_tokens=6), 6, seeds=[1])
    expected = assistant.converse(image, num_turns=2, history=history or None, max_new_tokens=6, seed=1)
    asked = [message["content"] for message in expected[-4:]]
    [pairs] = result.asked
    assert [text for pair in pairs for text in pair.values()] == asked
    assert result.answer == assistant.answer(None, [*expected, LAST], 6)


@pytest.mark.parametrize("num_earlier", [0, 1], ids=["first image", "another image"])
def test_image_of_a_later_turn_is_described_before_the_questions(assistant, num_earlier):
    def user(text: str, num_images: int) -> dict:
        return {"role": "user", "content": [*[{"type": "image"}] * num_images, {"type": "text", "text": text}]}

    images = [tiny.picture(number) for number in range(num_earlier + 1)]
    history = [user("What is it?", num_earlier), HISTORIES[0][1]]
    request = (images, [*history, user(LAST["content"], 1)])
    [result] = assistant.consider_batch([request], SelfQuestioning(1, own_tokens=6), 6, seeds=[1])
    described = place_images(images, [*history, user(DESCRIBE, 1)])
    described.append({"role": "assistant", "content": assistant.answer(None, described, 6)})
    expected = assistant.converse(None, num_turns=1, history=described, max_new_tokens=6, seed=1)
    assert [list(pair.values()) for pair in result.asked[0]] == [[message["content"] for message in expected[-2:]]]
    assert result.answer == assistant.answer(None, [*expected, LAST], 6)


def test_image_goes_through_the_model_once(assistant, monkeypatch):
    passes = record_passes(assistant, monkeypatch)
    assistant.consider_batch([(tiny.picture(), "Why?")], SelfQuestioning(2, votes=3, own_tokens=4), 4, seeds=[0])
    assert passes["images"] == [1]


def test_batch_equals_one_by_one(assistant):
    requests = [(tiny.picture(0), "Why?"), (tiny.picture(1), [*HISTORIES[1], LAST]), (tiny.picture(2), "Where?")]
    settings, seeds = SelfQuestioning(2, votes=2, own_tokens=6), [0, 1, 2]
    together = assistant.consider_batch(requests, settings, 6, seeds)
    alone = [assistant.consider_batch([each], settings, 6, [seed])[0] for each, seed in zip(requests, seeds)]
    assert together == alone
    assert len({str(pairs) for result in together for pairs in result.asked}) == 6


def test_context_that_is_too_short_cuts_own_turns_and_the_answer(assistant, monkeypatch):
    """As with a plain answer, the default maximum length may be more than the model has room for."""
    requests = [(tiny.picture(0), "Why?"), (tiny.picture(1), "Where is it? " * 20)]
    context = max(prompt_length(assistant, messages) for messages in place_images_of_all(requests)) + 200
    monkeypatch.setattr(assistant.model.config.get_text_config(), "max_position_embeddings", context)
    settings, seeds = SelfQuestioning(2, votes=3), [0, 1]
    together = assistant.consider_batch(requests, settings, 512, seeds)
    alone = [assistant.consider_batch([each], settings, 512, [seed])[0] for each, seed in zip(requests, seeds)]
    assert together == alone
    assert all(result.answer for result in together)


def test_most_frequent_answer_counts(assistant, monkeypatch):
    texts = iter([["a"], ["x"] * 5, ["b", "a", "c", "a", "b"]])

    def answer(self, max_new_tokens):
        for conversation in self.messages:
            conversation.append({"role": "assistant", "content": "."})
        return next(texts)

    monkeypatch.setattr("sq_llava.inference.dialogues.Dialogues.answer", answer)
    assert assistant.answer(tiny.picture(), "Why?", self_questions=1, votes=5) == "b"


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({"votes": 2}, "votes needs self_questions"),
        ({"self_questions": -1}, "at least 0"),
        ({"self_questions": 1, "do_sample": True}, "remove do_sample"),
        ({"seed": 3}, "seed is 3, but there are no self_questions"),
    ],
    ids=str,
)
def test_settings_that_make_no_sense_are_refused(assistant, arguments, problem):
    with pytest.raises(ValueError, match=problem):
        assistant.answer(tiny.picture(), "Why?", **arguments)


def test_conversation_without_an_image_or_a_question_is_refused(assistant):
    with pytest.raises(ValueError, match="needs an image"):
        assistant.answer(None, "Why?", self_questions=1)
    with pytest.raises(ValueError, match="end with a user turn"):
        assistant.answer(tiny.picture(), HISTORIES[0], self_questions=1)
