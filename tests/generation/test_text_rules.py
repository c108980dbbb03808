"""Rules for descriptions: each finds the fault that it is made for, and no rule finds one in a sound text."""

import pytest

from sq_llava.generation.text_rules import first_fault, share_of_new_words


MARKUP = "it has markup, a web address or markers of a prompt"


@pytest.mark.parametrize(
    ("reason", "text"),
    [
        ("the text is empty", " \n"),
        ("it is a refusal", "As an AI language model, I have no eyes."),
        ("it is a refusal", "I can’t see the picture, but it may be a dog."),
        ("it is a refusal", "No image was provided."),
        ("it apologises", "A dog. Sorry for the short answer."),
        ("it apologises", "I apologize. It is a dog."),
        (MARKUP, "A dog <image> runs."),
        (MARKUP, "A dog.\nUSER: What else?"),
        (MARKUP, "See https://example.org for more."),
        ("it is not readable language", "A dog \ufffd\ufffd runs."),
        ("it is not readable language", "1 2 3 4 5 6 7 8 9 dog."),
        ("it is not readable language", "A " + "o" * 41 + " runs."),
        ("it is not readable language", "A dоg runs."),  # a Cyrillic o
        ("a phrase is repeated in a row", "A dog on the grass on the grass on the grass."),
        ("a phrase is repeated in a row", "A very very very small dog."),
        ("a sentence is repeated", "A dog runs fast. It rains. a dog runs fast!"),
        ("its last sentence is unfinished", "A dog runs. Behind it"),
        ("it ends with a question", "A dog runs. Do you want to know more?"),
        (None, "A brown dog runs over a field. Behind it stands a house."),
        (None, 'A sign says "no entry."'),
        (None, "Two dogs, two cats, and two horses (all of them small)."),
        (None, "It rains. It rains."),  # a sentence of two words may be repeated
        (None, "It was built in 1999, with 12 floors and 3 lifts!"),
        (None, "Собака бежит по траве."),
        (None, "The door is red, which I cannot help but notice."),
    ],
)
def test_first_fault_of_a_text(reason, text):
    assert first_fault(text) == reason


@pytest.mark.parametrize(
    ("text", "original", "share"),
    [("A dog runs.", "a DOG runs over a field", 0), ("The text is right.", "A dog runs.", 1), ("", "A dog.", 0)],
)
def test_share_of_new_words(text, original, share):
    assert share_of_new_words(text, original) == share
