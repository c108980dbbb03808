"""A model's text becomes turns: usual ways of writing are read, and text that breaks a rule is left out."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sq_llava.generation.llava import KINDS, Task, read_answer, read_prompts
from sq_llava.generation.scenes import Scene
from sq_llava.generation.turns import fault_of, parse_turns
from tests.generation.commands import texts_of
from tests.generation.test_llava import CONVERSATION, DETAIL, REASONING
from tests.generation.test_text_rules import FOREIGN


def read(kind: str, text: str) -> tuple[list[str], list[tuple[str, str]]]:
    """The texts of the row, and for what is left out, kind and reason."""
    row, rejected = read_answer(Task("0", Scene("0", "0.png", ("A boat.",)), kind, "Describe it."), text)
    return texts_of(row) if row else [], [(each.step, each.reason) for each in rejected]


@pytest.mark.parametrize(
    ("kind", "text", "reason"),
    [
        ("conversation", "It is a boat.", "unparsable"),
        ("conversation", "Sure! Here it is.\nQuestion: What?\nAnswer: A boat.", "unparsable"),
        ("conversation", "Question: What?\nQuestion: Where?\nAnswer: Here.", "no alternation"),
        ("conversation", "Answer: A boat.\nQuestion: What?", "no alternation"),
        ("conversation", "Question: What?\nAnswer:", "question or answer missing"),
        ("conversation", "Question: What?\nAnswer: It is a boat that", "unfinished"),
        ("conversation", "Question: What?\nAnswer: The caption says a boat.", "mentions its sources"),
        ("conversation", "Question: Which bounding box?\nAnswer: The left one.", "mentions its sources"),
        ("conversation", "Question: Where?\nAnswer: At [0.1, 0.2, 0.3, 0.4].", "mentions its sources"),
        ("conversation", "Question: Who?\nAnswer: It is unclear.", "unsure"),
        ("conversation", "Question: Who?\nAnswer: We can’t tell from here.", "unsure"),
        ("conversation", "Question: Who?\nAnswer: That isn't mentioned.", "unsure"),
        ("conversation", "Question: Who?\nAnswer: As an AI language model, I see none.", "refusal"),
        ("conversation", "Question: What is <image>?\nAnswer: A boat.", "control token"),
        ("reasoning", CONVERSATION, "several questions"),
        ("reasoning", "Question: Why?\nAnswer: So.", "too short"),
        ("reasoning", REASONING[:-1], "unfinished"),
        ("detail", "A boat.", "too short"),
        ("detail", DETAIL + " " + DETAIL, "repeats itself"),
        ("detail", DETAIL + " The given descriptions say so.", "mentions its sources"),
    ],
)
def test_text_that_breaks_a_rule_is_left_out_with_its_reason(kind, text, reason):
    assert read(kind, text) == ([], [(kind, reason)])


@pytest.mark.parametrize("text", FOREIGN.values(), ids=FOREIGN)
def test_texts_in_other_languages_are_not_judged_by_english_words(text):
    question = "图中有什么？"
    assert read("reasoning", f"Question: {question}\nAnswer: {text}") == ([question, text], [])
    assert read("conversation", f"Question：{question}\nAnswer：{text}") == ([question, text], [])
    assert read("conversation", "Question: 这是什么？\nAnswer: 红色的小船") == (["这是什么？", "红色的小船"], [])


@pytest.mark.parametrize(
    ("rest", "reasons"),
    [
        ("Question: How many", ["question or answer missing"]),  # cut off
        (
            "Question: Who owns it?\nAnswer: That cannot be determined.\nQuestion: Why?\nAnswer: So.",
            ["unsure", "after a dropped turn"],
        ),
    ],
)
def test_conversation_ends_before_a_turn_that_breaks_a_rule(rest, reasons):
    texts, rejected = read("conversation", f"{CONVERSATION}\n\n{rest}")
    assert texts == ["What is it?", "A boat.", "What color is it?", "It is red."]
    assert rejected == [("conversation", reason) for reason in reasons]


@pytest.mark.parametrize("kind", KINDS)
def test_own_examples_pass_their_own_rules(kind):
    """The examples show the model turns as it must write them, so they must pass the rules."""
    for message in read_prompts().examples[kind][1::2]:
        texts, rejected = read(kind, message["content"])
        assert texts and rejected == []


@pytest.mark.parametrize(
    "text",
    [
        "**Question 1:** What is it?\n**Answer:** A boat.",
        "Question 1. What is it?\nAnswer 1. A boat.",
        "question: What is it?\n\nANSWER : A boat.\n",
        "- Question: What is it?\n- Answer: A boat.",
        "Sure! Here is one:\n\n---\nQuestion: What is it?\nAnswer: A boat.",
        "### Question: What is it?\n### Answer: A boat.",
        "Question: What is it?\n\n***\n\nAnswer: A boat.\n\n---",
        "###\nQuestion: What is it?\nAnswer: A boat.\n___\n\n- - -\n",
    ],
)
def test_usual_ways_to_write_turns_are_read(text):
    assert parse_turns(text) == [("What is it?", "A boat.")]


WORDS = st.lists(st.sampled_from(["boat", "the", "red", "isn't", "3"]), min_size=1, max_size=6).map(" ".join)


@given(turns=st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=5))
@settings(max_examples=50, deadline=None)
def test_written_turns_are_read_back(turns):
    text = "\n\n".join(f"Question: {question}\nAnswer: {answer}" for question, answer in turns)
    assert parse_turns(text) == turns


def test_rulers_between_turns_and_after_a_description_are_removed():
    text = CONVERSATION.replace("\n\n", "\n\n---\n\n") + "\n\n---"
    assert parse_turns(text) == parse_turns(CONVERSATION)
    assert parse_turns("Question: Why?\nAnswer: One - two.\n\n***\n\nThree.") == [("Why?", "One - two.\n\nThree.")]
    assert read("detail", f"{DETAIL}\n\n---\n") == (["Describe it.", DETAIL], [])


@pytest.mark.parametrize(
    "answer",
    [
        "A man puts a box onto another box.",
        "The driver cannot see the bicycle behind the truck.",
        "The sky is not clear.",
        "The text on the sign says stop.",
    ],
)
def test_harmless_answers_are_kept(answer):
    assert fault_of(("What is there?", answer), "conversation") is None
