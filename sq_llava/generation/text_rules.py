"""Rules that leave out faulty descriptions, each with a reason: pure functions of the text.

    >>> first_fault("A cat sleeps on the mat. A cat sleeps on the mat.")
    'a sentence is repeated'
    >>> first_fault("A cat sleeps on the mat.")

Words, lengths and ends of sentences are found in every script, also where no space divides words and where a word is
longer than in English. Refusals, apologies and doubts are recognised in English only.

The rules cannot tell whether a text is true, or which language it is in.
"""

import re
import unicodedata
from collections.abc import Callable
from itertools import pairwise

import regex


MIN_LETTER_SHARE = 0.6
LONGEST_WORD = 40
# A phrase of up to LONGEST_PHRASE words must not occur NUM_REPEATS times in a row.
LONGEST_PHRASE = 8
NUM_REPEATS = 3
SHORTEST_SENTENCE = 3
# Letters, vowel signs included, that take the place of an English word. Arabic and Hebrew do not write most vowels.
LETTERS_PER_WORD = {
    regex.compile(r"\p{Han}"): 1.5,
    regex.compile(r"[\p{Hiragana}\p{Katakana}\p{Hangul}]"): 2,
    regex.compile(r"[\p{Arabic}\p{Hebrew}]"): 3,
    regex.compile(r"[[\p{L}\p{M}]--[\p{Han}\p{Hiragana}\p{Katakana}\p{Hangul}\p{Arabic}\p{Hebrew}]]", regex.V1): 5,
}

CLOSING = r"['\")\]\u2019\u201d\u00bb\u300d\u300f\uff09\u3011\u300b]"
SENTENCE_END = regex.compile(rf"\p{{Sentence_Terminal}}{CLOSING}*$")
# Chinese and Japanese put no space after a sentence.
BETWEEN_SENTENCES = regex.compile(
    rf"(?<=\p{{Sentence_Terminal}}){CLOSING}*\s+|(?<=[\u3002\uff01\uff1f]){CLOSING}*(?=\S)"
)
# Scripts that put no space between words. Each letter counts as a word there.
_UNSPACED = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"
_LETTER = rf"[[\p{{L}}\p{{N}}\p{{M}}]--[{_UNSPACED}]]"
WORD = regex.compile(rf"[{_UNSPACED}]\p{{M}}*|{_LETTER}+(?:['\u2019\-]{_LETTER}+)*", regex.V1)
UNSPACED = regex.compile(rf"[{_UNSPACED}]")
# Thai and Lao do not mark the end of a sentence.
WITHOUT_SENTENCE_END = regex.compile(r"[\p{Thai}\p{Lao}]\p{M}*\s*$")
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
    """The words of a text in lower case; each letter, where no space divides words."""
    return [word.lower() for word in WORD.findall(text)]


def count_words(text: str) -> int:
    """
    The length of a text in words, of about the same content in each language: the number of words between spaces, or
    what the letters would make in English if that is more.
    """
    num_spaced = len(WORD.findall(UNSPACED.sub("", text)))
    return max(num_spaced, int(sum(len(letter.findall(text)) / size for letter, size in LETTERS_PER_WORD.items())))


def _is_letter(character: str) -> bool:
    return unicodedata.category(character)[0] in "LM"  # M: the vowel signs of Hindi, Thai and others


def is_unfinished(text: str) -> bool:
    text = text.rstrip()
    return SENTENCE_END.search(text) is None and WITHOUT_SENTENCE_END.search(text) is None


def repeats_sentence(text: str) -> bool:
    """True if a sentence of three words or more occurs twice. Case and punctuation do not matter."""
    sentences = [sentence for sentence in BETWEEN_SENTENCES.split(text) if sentence]
    long = [tuple(words_of(each)) for each in sentences if count_words(each) >= SHORTEST_SENTENCE]
    return len(set(long)) < len(long)


def repeats_phrase(text: str) -> bool:
    """True if a word or a phrase occurs three times in a row, as when a model runs into a loop."""
    words = words_of(text)
    is_unspaced = UNSPACED.search(text) is not None
    # A letter may well occur three times in a row, and a phrase has more letters than words.
    lengths = range(2, NUM_REPEATS * LONGEST_PHRASE + 1) if is_unspaced else range(1, LONGEST_PHRASE + 1)
    for length in lengths:
        run = 0  # number of successive words that equal the word `length` places before
        for word, earlier in zip(words[length:], words):
            run = run + 1 if word == earlier else 0
            if run == length * (NUM_REPEATS - 1):
                return True
    return False


def is_no_language(text: str) -> bool:
    """True if a text has broken characters, hardly any letters, endless words, or words that mix two alphabets."""
    seen = [character for character in text if not character.isspace()]
    if any(unicodedata.category(character) in ("Cc", "Cn", "Co", "Cs") or character == "\ufffd" for character in seen):
        return True
    if sum(map(_is_letter, seen)) < MIN_LETTER_SHARE * len(seen):
        return True
    return any(len(word) > LONGEST_WORD or _mixes_scripts(word) for word in words_of(text))


def _mixes_scripts(word: str) -> bool:
    """
    True if Latin letters and letters of another alphabet are neighbours, as in broken encodings. Korean puts its
    endings behind Latin words.
    """
    names = [unicodedata.name(letter, "") for letter in word if letter.isalpha()]
    is_latin = [name.startswith("LATIN") for name in names if not name.startswith("HANGUL")]
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
    "it ends with a question": lambda text: text.rstrip("'\")]\u2019\u201d \n").endswith(("?", "\uff1f", "\u061f")),
}


def first_fault(text: str) -> str | None:
    """The reason to leave a text out, or `None` for a sound text."""
    return next((reason for reason, applies in RULES.items() if applies(text)), None)


def share_of_new_words(text: str, original: str) -> float:
    """The share of a text's words that do not occur in the original."""
    words, known = words_of(text), set(words_of(original))
    return sum(word not in known for word in words) / len(words) if words else 0.0
