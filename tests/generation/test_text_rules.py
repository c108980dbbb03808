"""Rules for descriptions: each finds the fault that it is made for, and no rule finds one in a sound text."""

import json

import pytest

from sq_llava.generation.text_rules import count_words, first_fault, share_of_new_words
from tests import ROOT


MARKUP = "it has markup, a web address or markers of a prompt"


# The same description in several languages.
FOREIGN = json.loads((ROOT / "tests/files/descriptions.json").read_text(encoding="utf-8"))
ENGLISH = FOREIGN.pop("English")


@pytest.mark.parametrize("text", FOREIGN.values(), ids=FOREIGN)
def test_length_of_a_text_is_about_the_same_in_each_language(text):
    assert count_words(ENGLISH) == len(ENGLISH.split()) == 36
    assert 0.75 < count_words(text) / 36 < 1.25


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
        ("its last sentence is unfinished", "一只棕色的狗在草地上奔跑。它后面"),
        ("a sentence is repeated", "一只棕色的狗在草地上奔跑。后面有一座房子。一只棕色的狗在草地上奔跑。"),
        ("a phrase is repeated in a row", "一只狗在草地上奔跑，一只狗在草地上奔跑，一只狗在草地上奔跑。"),
        ("it ends with a question", "一只狗在奔跑。你还想知道什么？"),
        ("it is not readable language", "Собaка бежит."),  # a Latin a
        *((None, text) for text in FOREIGN.values()),
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
