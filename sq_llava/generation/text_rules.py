"""Rules that leave out faulty descriptions, each with a reason: pure functions of the text.

    >>> first_fault("A cat sleeps on the mat. A cat sleeps on the mat.")
    'a sentence is repeated'
    >>> first_fault("A cat sleeps on the mat.")

The rules are made for English.

They cannot tell whether a text is true, or which language it is in.
"""

import re
import unicodedata
from collections.abc import Callable
from itertools import pairwise


MIN_LETTER_SHARE = 0.6
LONGEST_WORD = 40
# A phrase of up to LONGEST_PHRASE words must not occur NUM_REPEATS times in a row.
LONGEST_PHRASE = 8
NUM_REPEATS = 3
SHORTEST_SENTENCE = 3

SENTENCE_END = re.compile(r"[.!?]['\")\]\u2019\u201d]*$")
BETWEEN_SENTENCES = re.compile(r"(?<=[.!?])['\")\]\u2019\u201d]*\s+")
WORD = re.compile(r"[^\W_]+(?:['\u2019\-][^\W_]+)*")
APOLOGY = re.compile(r"\b(sorry|apolog(y|ies|i[sz]e))\b", re.IGNORECASE)
REFUSAL = re.compile(
    r"\bas an? (ai|artificial intelligence|(large )?language model|virtual assistant)\b"
    r"|\bi( am|['\u2019]m) (an? (ai|artificial|language)|unable|not able|not allowed)\b"
    r"|\bi (cannot|can ?not|can['\u2019]t|could not|couldn['\u2019]t|won['\u2019]t|will not|do not|don['\u2019]t) "
    r"(actually |directly |really )?"
    r"(see|view|access|open|process|describe|identify|assist|help (you|with)|comment|provide)\b"
    r"|\bno image (was|is|has been|can be) (given|provided|attached|uploaded|seen)\b",
    re.IGNORECASE,
)
MARKUP = re.compile(r"</?\w+[^>]*>|###|<\||\|>|\[/?INST\]|^\s*(USER|ASSISTANT|Human|AI):|https?://|```", re.MULTILINE)


def words_of(text: str) -> list[str]:
    return [word.lower() for word in WORD.findall(text)]


def is_unfinished(text: str) -> bool:
    return SENTENCE_END.search(text.rstrip()) is None


def repeats_sentence(text: str) -> bool:
    """True if a sentence of three words or more occurs twice. Case and punctuation do not matter."""
    sentences = [tuple(words_of(sentence)) for sentence in BETWEEN_SENTENCES.split(text)]
    long = [sentence for sentence in sentences if len(sentence) >= SHORTEST_SENTENCE]
    return len(set(long)) < len(long)


def repeats_phrase(text: str) -> bool:
    """True if a word or a phrase occurs three times in a row, as when a model runs into a loop."""
    words = words_of(text)
    for length in range(1, LONGEST_PHRASE + 1):
        run = 0  # number of successive words that equal the word `length` places before
        for word, earlier in zip(words[length:], words):
            run = run + 1 if word == earlier else 0
            if run == length * (NUM_REPEATS - 1):
                return True
    return False


def is_no_language(text: str) -> bool:
    """True if a text has broken characters, hardly any letters, endless words, or words that mix two scripts."""
    seen = [character for character in text if not character.isspace()]
    if any(unicodedata.category(character) in ("Cc", "Cn", "Co", "Cs") or character == "\ufffd" for character in seen):
        return True
    if sum(character.isalpha() for character in seen) < MIN_LETTER_SHARE * len(seen):
        return True
    return any(len(word) > LONGEST_WORD or _mixes_scripts(word) for word in words_of(text))


def _mixes_scripts(word: str) -> bool:
    """True if Latin letters and letters of another script are neighbours, as in broken encodings."""
    is_latin = [unicodedata.name(letter, "").startswith("LATIN") for letter in word if letter.isalpha()]
    return any(first != second for first, second in pairwise(is_latin))


# The first rule that applies gives the reason, so the most telling rules come first.
RULES: dict[str, Callable[[str], object]] = {
    "the text is empty": lambda text: not text.strip(),
    "it is a refusal": REFUSAL.search,
    "it apologises": APOLOGY.search,
    "it has markup, a web address or markers of a prompt": MARKUP.search,
    "it is not readable language": is_no_language,
    "a phrase is repeated in a row": repeats_phrase,
    "a sentence is repeated": repeats_sentence,
    "its last sentence is unfinished": is_unfinished,
    "it ends with a question": lambda text: text.rstrip("'\")]\u2019\u201d \n").endswith("?"),
}


def first_fault(text: str) -> str | None:
    """The reason to leave a text out, or `None` for a sound text."""
    return next((reason for reason, applies in RULES.items() if applies(text)), None)


def share_of_new_words(text: str, original: str) -> float:
    """The share of a text's words that do not occur in the original."""
    words, known = words_of(text), set(words_of(original))
    return sum(word not in known for word in words) / len(words) if words else 0.0
