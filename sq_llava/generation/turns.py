"""A language model's text -> questions and answers, and the rules that they must follow.

    >>> parse_turns("Question: What is it?\\nAnswer: A dog.")
    [('What is it?', 'A dog.')]

Each rule has a short name, which the data card counts. Lengths and ends of sentences are found in every script; doubts
and refusals are recognised in English only.
"""

import re
from collections.abc import Sequence
from itertools import zip_longest

from sq_llava.generation.text_rules import REFUSAL, count_words, is_unfinished, repeats_phrase, repeats_sentence


Turn = tuple[str, str]

# The start of a line of a turn. Models like to add numbers and bold type.
_LABEL = re.compile(r"^[ \t]*[*#>\-]*[ \t]*(question|answer)[ \t]*\d*[ \t]*\**[ \t]*[:.\uff1a][ \t]*\**", re.I | re.M)
# A line before the turns, such as "Here is the conversation:".
_PREAMBLE = re.compile(r"\s*(?:[^\n]*:\W*)?|\W*")
# Markdown rulers between turns.
_RULER = re.compile(r"^[ \t]*[-_#*][-_#* \t]*$\s*", re.M)
# Words about the captions and boxes that the model read. A user who sees only the image does not know these.
_SOURCES = re.compile(
    r"\bcaptions?\b|\bbounding[ -]?box|\bcoordinates?\b|\bannotations?\b|\[\s*[01]?\.\d+|"
    r"\b(?:list of objects|object list|listed objects|these sentences|the descriptions?)\b|"
    r"\b(?:given|provided) (?:sentences|list|descriptions?|text|information|context|details|data|input)\b",
    re.I,
)
_UNSURE = re.compile(
    r"\b(?:can(?:not|'t|’t)|could(?: not|n't|n’t)|(?:im|not )possible to|difficult to|hard to|unable to|no way to) "
    r"(?:be )?(?:determined?|tell|told|say|said|know|known|identify|identified|infer|inferred)\b|"
    r"(?:\bnot|n't|n’t) (?:specif(?:y|ied)|mention(?:ed)?|stated?|provided|given|known|sure|certain)\b|"
    r"(?:\bnot|n't|n’t) clear (?:if|how|wh\w+)\b|\b(?:unclear|unknown|uncertain|unspecified)\b|"
    r"\b(?:not enough|no|insufficient) (?:information|details|context)\b",
    re.I,
)
# Texts that a tokenizer may read as control tokens.
_CONTROL = re.compile(r"<image>|\[vusr\]|</?s>|<\|", re.I)
# An answer with more words than this must be a complete sentence.
LONGEST_PHRASE = 3
FEWEST_WORDS = {"conversation": 1, "detail": 30, "reasoning": 15}


def without_rulers(text: str) -> str:
    return _RULER.sub("", text).strip()


def parse_turns(text: str) -> list[Turn]:
    """
    The turns of a text. If the text ends with a question, for example because it was cut off, its answer is empty.

    Raises:
        ValueError: With the name of the rule that the text breaks: `unparsable` or `no alternation`.
    """
    text = without_rulers(text)
    found = list(_LABEL.finditer(text))
    if not found or not _PREAMBLE.fullmatch(text[: found[0].start()]):
        raise ValueError("unparsable")
    labels = [each[1].lower() for each in found]
    if labels != (["question", "answer"] * len(labels))[: len(labels)]:
        raise ValueError("no alternation")
    ends = [*(each.start() for each in found[1:]), len(text)]
    pieces = [text[each.end() : end].strip(" \t\r\n*=`") for each, end in zip(found, ends)]
    return list(zip_longest(pieces[::2], pieces[1::2], fillvalue=""))


def fault_of(turn: Turn, kind: str, earlier: Sequence[Turn] = ()) -> str | None:
    """
    The name of the first rule that a turn breaks, or `None`.

    Args:
        turn (`tuple[str, str]`): Question and answer.
        kind (`str`): Kind of the row: conversation, detail or reasoning.
        earlier (`Sequence`): The turns before this one in the same row.
    """
    question, answer = turn
    # The user wrote the requests for a description, so only the answer is checked.
    written = answer if kind == "detail" else f"{question}\n{answer}"
    if not question or not answer:
        return "question or answer missing"
    num_words = count_words(answer)
    if num_words < FEWEST_WORDS[kind]:
        return "too short"
    if _CONTROL.search(written):
        return "control token"
    if _SOURCES.search(written):
        return "mentions its sources"
    if _UNSURE.search(answer):
        return "unsure"
    if REFUSAL.search(answer):
        return "refusal"
    if num_words > LONGEST_PHRASE and is_unfinished(answer):
        return "unfinished"
    if repeats_sentence(answer) or repeats_phrase(answer):
        return "repeats itself"
    if _normal(question) in {_normal(each) for each, _ in earlier}:
        return "asked twice"
    return None


def _normal(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.lower()))
