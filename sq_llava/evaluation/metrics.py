"""Metrics of single answers: pure functions of (prediction, references), without a model or a dataset.

    >>> vqa_accuracy("Red.", ["red"] * 3 + ["crimson"] * 7, normalize=normalize_m4c)
    0.9

Three ways to normalize answers are in use: `m4c` (EvalAI; LLaVA's results for TextVQA, VQAv2 and VizWiz), `official`
(the evaluation code of VQA v2) and `lmms_eval` (lmms-eval's VQA v2). The choice can turn a score of 1 into 0, so
metric names include it. This module does not parse answers beyond the rules of a metric: each task's module has its
own parser.
"""

import math
import re
from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np


# Correct spellings from the official VQA evaluation. A word that lacks exactly one of its apostrophes is corrected.
# The official entries with a capital I are left out: they never match, because the text is lower-cased before.
CONTRACTIONS = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's
how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've o'clock
oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd
someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've there're there's
they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's
where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've
y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""
MISSPELLINGS = {
    word[: match.start()] + word[match.end() :]: word
    for word in CONTRACTIONS.split()
    for match in re.finditer("'", word)
}
# An error in the official table, kept for equal results: it removes the apostrophe.
MISSPELLINGS["somebody'd"] = "somebodyd"
NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
NUMBERS = {"none": "0", **{word: str(number) for number, word in enumerate(NUMBER_WORDS)}}
ARTICLES = {"a", "an", "the"}
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'


# The official code passes a regular expression's flag (32) as its `count` by mistake. Kept for equal results.
MAX_PERIODS = 32


def _apply_rules(text: str, grouped_digits: str = r"\d,\d") -> str:
    """The steps that all normalizers share: punctuation, periods, numbers, articles, contractions."""
    result = text
    has_grouped_digits = re.search(grouped_digits, text) is not None
    for mark in PUNCTUATION:
        is_deleted = has_grouped_digits or f"{mark} " in text or f" {mark}" in text
        result = result.replace(mark, "" if is_deleted else " ")
    result = re.sub(r"\.(?!\d)", "", result, count=MAX_PERIODS)
    words = [NUMBERS.get(word, word) for word in result.lower().split()]
    return " ".join(MISSPELLINGS.get(word, word) for word in words if word not in ARTICLES)


# Cached because answers repeat: the validation split of VQA v2 has two million.
@lru_cache(maxsize=2**16)
def normalize_m4c(answer: str) -> str:
    """
    Normalizes an answer as EvalAI and the TextVQA code (m4c) do.

        >>> normalize_m4c("red,blue"), normalize_m4c("it's"), normalize_m4c("$1,000")
        ('redblue', "it 's", '$1000')
    """
    answer = answer.lower().replace(",", "").replace("?", "").replace("'s", " 's")
    return _apply_rules(" ".join(answer.split()))


@lru_cache(maxsize=2**16)
def normalize_official(answer: str) -> str:
    """
    Normalizes an answer as the official VQA evaluation does, if the human answers differ.

        >>> normalize_official("red,blue"), normalize_official("it's"), normalize_official("1,2-3")
        ('red blue', "it's", '123')
    """
    return _apply_rules(_strip_official(answer))


@lru_cache(maxsize=2**16)
def normalize_lmms_eval(answer: str) -> str:
    """
    Normalizes an answer as lmms-eval 0.7.3 does for VQA v2: like the official code, but several commas between digits
    count as one. Unlike the official code, it also normalizes if all human answers are the same.

        >>> normalize_lmms_eval("1,,000-2"), normalize_official("1,,000-2")
        ('10002', '1 000 2')
    """
    return _apply_rules(_strip_official(answer), grouped_digits=r"\d,+\d")


def _strip_official(answer: str) -> str:
    return answer.replace("\n", " ").replace("\t", " ").strip()


def leave_one_out(matches: int, num_answers: int) -> float:
    """
    VQA accuracy of a prediction that equals `matches` of `num_answers` human answers: leave out each answer in turn,
    count the matches m among the others, and average min(1, m / 3) (https://visualqa.org/evaluation.html).

        >>> [round(leave_one_out(matches, 10), 2) for matches in range(5)]
        [0.0, 0.3, 0.6, 0.9, 1.0]
    """
    without_a_match = matches * min(1, (matches - 1) / 3)
    without_another = (num_answers - matches) * min(1, matches / 3)
    return (without_a_match + without_another) / num_answers


def short_form(matches: int, num_answers: int) -> float:
    """VQA accuracy in its simplified form, min(1, matches / 3). One match gives 0.333; `leave_one_out` gives 0.3."""
    return min(1.0, matches / 3)


def vqa_accuracy(
    prediction: str,
    answers: Sequence[str],
    normalize: Callable[[str], str] = normalize_m4c,
    accuracy: Callable[[int, int], float] = leave_one_out,
) -> float:
    """
    VQA accuracy with all texts normalized, as EvalAI does for TextVQA, VQAv2 and VizWiz.

    Args:
        prediction (`str`): The model's answer.
        answers (`Sequence[str]`): Human answers, usually ten.
        normalize (`Callable`): Applied to the prediction and to each answer.
        accuracy (`Callable`): (matches, number of answers) -> accuracy.

    Returns:
        `float` from 0 to 1.

    Raises:
        ValueError: If `answers` is empty.
    """
    if not answers:
        raise ValueError("answers is empty: VQA accuracy needs at least one human answer.")
    prediction = normalize(prediction)
    matches = sum(normalize(answer) == prediction for answer in answers)
    return accuracy(matches, len(answers))


def vqa_accuracy_official(
    prediction: str, answers: Sequence[str], accuracy: Callable[[int, int], float] = leave_one_out
) -> float:
    """
    VQA accuracy as in the official code of VQA v2. If all human answers are the same, it does not normalize: "Yes."
    compared with ten times "yes" scores 0.
    """
    are_identical = len(set(map(_strip_official, answers))) == 1
    return vqa_accuracy(prediction, answers, _strip_official if are_identical else normalize_official, accuracy)


def exact_match(prediction: str, reference: str) -> float:
    """1 if the texts are equal, ignoring case, trailing periods and white space around them; else 0."""
    return float(bare(prediction) == bare(reference))


def bare(text: str) -> str:
    """A text in lower case, without trailing periods and without white space at either end."""
    while (shorter := text.strip().rstrip(".")) != text:
        text = shorter
    return text.lower()


def binary_scores(predictions: Sequence[bool], labels: Sequence[bool]) -> dict[str, float]:
    """
    The five metrics of POPE: accuracy, precision, recall and F1 of "yes", and the share of predictions that are "yes".
    Without a positive prediction (or label), precision (or recall) and F1 are 0.

    Raises:
        ValueError: If there are no labels, or not as many as predictions.
    """
    if len(predictions) != len(labels) or not labels:
        raise ValueError(f"Got {len(predictions)} predictions and {len(labels)} labels. Pass the same number, not 0.")
    says_yes = np.array(predictions, dtype=bool)
    return weighted_binary_scores(says_yes, ~says_yes, np.array(labels, dtype=bool), np.ones(len(labels), dtype=int))


def weighted_binary_scores(
    says_yes: np.ndarray, says_no: np.ndarray, labels: np.ndarray, times: np.ndarray
) -> dict[str, float]:
    """
    As [`binary_scores`], but an answer may also be neither "yes" nor "no", and each answer counts several times.

    Args:
        says_yes, says_no, labels (`np.ndarray`): Booleans of shape `(num,)`. A label is true for "yes".
        times (`np.ndarray`): How often each answer counts, of shape `(num,)`.
    """
    both, yes, missed = times @ (says_yes & labels), times @ says_yes, times @ (says_no & labels)
    precision = both / yes if yes else 0.0
    recall = both / (both + missed) if both + missed else 0.0
    num = max(1, times.sum())
    values = {
        "accuracy": (both + times @ (says_no & ~labels)) / num,
        "precision": precision,
        "recall": recall,
        "f1": 2 * precision * recall / (precision + recall) if both else 0.0,
        "yes_ratio": yes / num,
    }
    return {name: float(value) for name, value in values.items()}


def relative_score(candidate: Sequence[float], reference: Sequence[float]) -> float:
    """100 * mean(candidate) / mean(reference), for a judge's scores of a model's answers and of the references."""
    if len(candidate) != len(reference) or not reference:
        raise ValueError(f"Got {len(candidate)} and {len(reference)} scores. Pass the same number, not 0.")
    return 100 * math.fsum(candidate) / math.fsum(reference)
