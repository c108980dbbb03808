"""Metrics of the questions that a model asks: pure functions of texts.

>>> question_type("How many dogs are there?"), question_type("Is it a dog or a cat?")
('how many', 'choice')
"""

import re
from collections import Counter
from collections.abc import Iterator, Sequence

from sacrebleu.metrics import BLEU


# Regular expressions of the types. The first one that matches decides.
TYPES = {
    "request": r"^(can you |could you |please )?(describe|explain|tell|give|write|list|name|identify|provide)\b",
    "how many": r"\bhow (many|much)\b",
    "what": r"\bwhat\b",
    "why": r"\bwhy\b",
    "where": r"\bwhere\b",
    "when": r"\bwhen\b",
    "who": r"\b(who|whom|whose)\b",
    "which": r"\bwhich\b",
    "how": r"\bhow\b",
    "choice": r"^(is|are|was|were|do|does|did|can|could|will|would|should|has|have|had|may|might)\b.*\bor\b",
    "yes/no": r"^(is|are|was|were|do|does|did|can|could|will|would|should|has|have|had|may|might|am)\b",
}
WORD = re.compile(r"\w+(?:'\w+)?")


def words_of(text: str) -> list[str]:
    return WORD.findall(text.lower())


def question_type(question: str) -> str:
    """The type of a question: the first of `TYPES` that matches, or "other"."""
    text = " ".join(words_of(question))
    return next((name for name, pattern in TYPES.items() if re.search(pattern, text)), "other")


def type_shares(questions: Sequence[str]) -> dict[str, float]:
    """The share of each type among the questions, most frequent first."""
    counts = Counter(map(question_type, questions))
    return {name: count / len(questions) for name, count in counts.most_common()}


def distinct_n(texts: Sequence[str], n: int) -> float:
    """
    Number of distinct n-grams / number of all n-grams in the texts (Li et al. 2016, https://arxiv.org/abs/1510.03055),
    from 0 to 1. More texts give a lower value, so compare only equal numbers of texts.
    """
    grams = [gram for text in texts for gram in _grams(words_of(text), n)]
    return len(set(grams)) / len(grams) if grams else 0.0


def _grams(words: Sequence[str], n: int) -> Iterator[tuple[str, ...]]:
    return zip(*(words[start:] for start in range(n)))


def self_bleu(texts: Sequence[str]) -> float | None:
    """
    Mean BLEU-4 of each text with the other texts as references, from 0 to 100 (Zhu et al. 2018,
    https://arxiv.org/abs/1802.01886). A high value means that the texts are similar. `None` for fewer than two texts.
    """
    if len(texts) < 2:
        return None
    bleu = BLEU(effective_order=True, lowercase=True)
    scores = [
        bleu.sentence_score(text, [*texts[:number], *texts[number + 1 :]]).score for number, text in enumerate(texts)
    ]
    return sum(scores) / len(scores)
