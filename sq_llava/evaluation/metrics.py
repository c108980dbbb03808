"""Scores of single answers: pure functions of (prediction, references), without a model or a data set.

    >>> vqa_accuracy("Red.", ["red"] * 3 + ["crimson"] * 7, normalize=normalize_m4c)
    0.9

Two normalisers of answers are in use, which can turn 1 into 0, so a figure names its own: `m4c` (EvalAI;
LLaVA's figures for TextVQA, VQAv2 and VizWiz) and `official` (the evaluation code of VQA v2). What this module does
not do: read what a model said beyond the rules of a metric; each task's module has the parser of its own answers.
"""

import math
import random
import re
import statistics
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import TypeVar


Item = TypeVar("Item")

# Right spellings of the official VQA evaluation: each is restored where exactly one of its apostrophes is missing.
# Its entries with a capital I never match, as they are looked up in lower-cased text.
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
# A slip of the official table, kept: it takes the apostrophe away.
MISSPELLINGS["somebody'd"] = "somebodyd"
NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
NUMBERS = {"none": "0", **{word: str(number) for number, word in enumerate(NUMBER_WORDS)}}
ARTICLES = {"a", "an", "the"}
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'


# By a slip, the official code gives a regular expression's flag as its count.
MAX_PERIODS = 32


def _apply_rules(text: str) -> str:
    """The steps that both normalisers have: punctuation, periods, numbers, articles, contractions."""
    result = text
    has_grouped_digits = re.search(r"\d,\d", text) is not None
    for mark in PUNCTUATION:
        is_deleted = has_grouped_digits or f"{mark} " in text or f" {mark}" in text
        result = result.replace(mark, "" if is_deleted else " ")
    result = re.sub(r"\.(?!\d)", "", result, count=MAX_PERIODS)
    words = [NUMBERS.get(word, word) for word in result.lower().split()]
    return " ".join(MISSPELLINGS.get(word, word) for word in words if word not in ARTICLES)


# Answers repeat: VQA v2 has two million of them in its validation split.
@lru_cache(maxsize=2**16)
def normalize_m4c(answer: str) -> str:
    """
    As EvalAI and the TextVQA code (m4c) normalise an answer.

        >>> normalize_m4c("red,blue"), normalize_m4c("it's"), normalize_m4c("$1,000")
        ('redblue', "it 's", '$1000')
    """
    answer = answer.lower().replace(",", "").replace("?", "").replace("'s", " 's")
    return _apply_rules(" ".join(answer.split()))


@lru_cache(maxsize=2**16)
def normalize_official(answer: str) -> str:
    """
    The steps of the official VQA evaluation; [`official_vqa_answers`] says when it takes them.

        >>> normalize_official("red,blue"), normalize_official("it's"), normalize_official("1,2-3")
        ('red blue', "it's", '123')
    """
    return _apply_rules(_strip_official(answer))


def _strip_official(answer: str) -> str:
    return answer.replace("\n", " ").replace("\t", " ").strip()


def leave_one_out(matches: int, num_answers: int) -> float:
    """
    VQA accuracy of a prediction that equals `matches` of `num_answers` human answers: the mean of min(1, m / 3), with
    m counted over all answers but one, each left out in turn (https://visualqa.org/evaluation.html).

        >>> [round(leave_one_out(matches, 10), 2) for matches in range(5)]
        [0.0, 0.3, 0.6, 0.9, 1.0]
    """
    without_a_match = matches * min(1, (matches - 1) / 3)
    without_another = (num_answers - matches) * min(1, matches / 3)
    return (without_a_match + without_another) / num_answers


def short_form(matches: int, num_answers: int) -> float:
    """VQA accuracy in the short form of its definition, min(1, matches / 3): 0.333 for one match, not 0.3."""
    return min(1.0, matches / 3)


def vqa_accuracy(
    prediction: str,
    answers: Sequence[str],
    normalize: Callable[[str], str] = normalize_m4c,
    accuracy: Callable[[int, int], float] = leave_one_out,
) -> float:
    """
    VQA accuracy with every text normalised, as EvalAI does for TextVQA, VQAv2 and VizWiz.

    Args:
        prediction (`str`): The model's answer.
        answers (`Sequence[str]`): Those of people, usually ten.

    Returns:
        `float` from 0 to 1.
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
    VQA accuracy as the official code of VQA v2 computes it: if all human answers are the same text, it compares the
    texts as they are, so that "Yes." against ten times "yes" scores 0.
    """
    are_identical = len(set(answers)) == 1
    return vqa_accuracy(prediction, answers, _strip_official if are_identical else normalize_official, accuracy)


def exact_match(prediction: str, reference: str) -> float:
    """1 if the texts are equal after case and a trailing period are dropped, as GQA's predictions are written."""
    return float(_bare(prediction) == _bare(reference))


def _bare(text: str) -> str:
    return text.strip().rstrip(".").strip().lower()


def binary_scores(predictions: Sequence[bool], labels: Sequence[bool]) -> dict[str, float]:
    """
    POPE's five: accuracy, precision, recall, F1 of "yes", and the share of predictions that say yes. Without a
    positive prediction (or label), precision (or recall) is 0, and so is F1.
    """
    if len(predictions) != len(labels) or not labels:
        raise ValueError(f"{len(predictions)} predictions and {len(labels)} labels: give as many of both, at least 1.")
    pairs = list(zip(predictions, labels))
    true_positives = sum(prediction and label for prediction, label in pairs)
    positives, actual = sum(predictions), sum(labels)
    precision = true_positives / positives if positives else 0.0
    recall = true_positives / actual if actual else 0.0
    return {
        "accuracy": sum(prediction == label for prediction, label in pairs) / len(pairs),
        "precision": precision,
        "recall": recall,
        "f1": 2 * precision * recall / (precision + recall) if true_positives else 0.0,
        "yes_ratio": positives / len(pairs),
    }


def relative_score(candidate: Sequence[float], reference: Sequence[float]) -> float:
    """A judge's scores of a model beside those of the reference answers: 100 * mean(candidate) / mean(reference)."""
    if len(candidate) != len(reference) or not reference:
        raise ValueError(f"{len(candidate)} and {len(reference)} scores: give as many of both, at least 1.")
    return 100 * math.fsum(candidate) / math.fsum(reference)


def standard_error(values: Sequence[float]) -> float | None:
    """Of the mean of independent values (the sample's standard deviation / sqrt(n)); `None` for fewer than two."""
    if len(values) < 2:
        return None
    mean = math.fsum(values) / len(values)
    variance = math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return math.sqrt(variance / len(values))


def bootstrap_errors(
    figures: Callable[[Sequence[Item]], dict[str, float]], items: Sequence[Item], num_resamples: int, seed: int = 0
) -> dict[str, float]:
    """
    Standard errors of figures that are no means, such as a ratio of two: the standard deviation of each over resamples
    of the items, drawn with replacement. Empty for fewer than two items or resamples.
    """
    if len(items) < 2 or num_resamples < 2:
        return {}
    draw = random.Random(seed)
    drawn = [figures(draw.choices(items, k=len(items))) for _ in range(num_resamples)]
    return {name: statistics.stdev(each[name] for each in drawn) for name in drawn[0]}
