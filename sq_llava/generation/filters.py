"""Decides which self-generated turns are kept, and records why the others are not: pure functions.

    outcomes = filter_turns(turns, FilterSettings(min_log_probability=-0.5))
    kept = [outcome.turn for outcome in outcomes if outcome.is_kept]

First, each turn is judged by itself: its text, whether it needs the image, how sure the model was, and how well image
and text agree. Then, in the order of the turns, a turn is dropped if its question is similar to another question about
the same image, or too frequent in the set. Last, types of question and answers that are too frequent are thinned out;
after a judge, `balance` does this again.

No model runs here. `scoring.py` computes the scores.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from processing_sq_llava import IMAGE_TOKEN, VUSR_TOKEN
from sq_llava.evaluation.question_metrics import question_type, words_of
from sq_llava.generation.settings import FilterSettings
from sq_llava.generation.text_rules import is_unfinished


@dataclass(frozen=True)
class Turn:
    """
    A question about an image, its answer, and the scores of both.

    Args:
        picture (`str`): Id of the image.
        number (`int`): Number of the question among those about the image.
        blank_answer (`str`): Answer to the same question about a blank image.
        log_probability (`float`): Mean log-probability of the answer's tokens, the end of the turn included.
        blank_log_probability (`float`): The same for the same answer with a blank image.
        is_cut (`bool`): Whether the answer was cut off at its maximum length.
        clip_score (`float`, *optional*): CLIPScore of the image and the turn.
    """

    picture: str
    number: int
    question: str
    answer: str
    blank_answer: str
    log_probability: float
    blank_log_probability: float
    is_cut: bool = False
    clip_score: float | None = None

    @property
    def drop(self) -> float:
        """How much likelier the image makes the answer, in nats per token."""
        return self.log_probability - self.blank_log_probability


@dataclass(frozen=True)
class Outcome:
    """
    The scores of a turn, and the filter (`step`) and rule (`reason`) that dropped it; both are `None` if it is kept.
    """

    turn: Turn
    scores: dict[str, Any]
    step: str | None = None
    reason: str | None = None

    @property
    def is_kept(self) -> bool:
        return self.step is None


def filter_turns(turns: Sequence[Turn], settings: FilterSettings) -> list[Outcome]:
    """
    Applies the filters.

    Args:
        turns (`Sequence[Turn]`): All turns about an image must be adjacent. Of two similar turns, the first is kept.
        settings (`FilterSettings`): The filters.

    Returns:
        An outcome for each turn, in order.
    """
    about_images = {normalised(turn.question) for turn in turns if _needs_image(turn, settings)}
    earlier = _Earlier()
    outcomes = []
    for turn in turns:
        scores = _scores(turn)
        fault = _own_fault(turn, settings, about_images)
        if fault is None:
            scores |= earlier.overlaps(turn)
            fault = earlier.fault(turn, scores, settings)
        if fault is None:
            earlier.add(turn)
        outcomes.append(Outcome(turn, scores, *(fault or (None, None))))
    return balance(outcomes, settings)


def balance(outcomes: list[Outcome], settings: FilterSettings) -> list[Outcome]:
    """Drops turns until no type of question is too frequent, and "yes" is as frequent as "no"."""
    if settings.max_per_type is not None:
        places = _places_by(outcomes, lambda outcome: outcome.scores["type"])
        outcomes = _thin_out(outcomes, places.values(), settings.max_per_type, settings.seed, "too many of its type")
    if settings.balance_yes_no:
        places = _places_by(outcomes, lambda outcome: words_of(outcome.turn.answer)[0])
        places = [places.get(answer, []) for answer in ("yes", "no")]
        outcomes = _thin_out(outcomes, places, min(map(len, places)), settings.seed, "too many of its answer")
    return outcomes


def normalised(text: str) -> str:
    """The words of a text in lower case, without punctuation."""
    return " ".join(words_of(text))


def overlap(one: str, other: str) -> float:
    """Jaccard index of the words and word pairs of two texts: 1 for the same words in the same order."""
    left, right = (set(words_of(text)) | _pairs(text) for text in (one, other))
    return len(left & right) / len(left | right) if left | right else 1.0


def _pairs(text: str) -> set[tuple[str, str]]:
    return set(pairwise(words_of(text)))


def _scores(turn: Turn) -> dict[str, Any]:
    scores = {
        "type": question_type(turn.question),
        "log_probability": turn.log_probability,
        "blank_log_probability": turn.blank_log_probability,
        "blank_answer": turn.blank_answer,
    }
    return scores if turn.clip_score is None else {**scores, "clip_score": turn.clip_score}


def _needs_image(turn: Turn, settings: FilterSettings) -> bool:
    return normalised(turn.answer) != normalised(turn.blank_answer) and turn.drop >= settings.min_drop


def _own_fault(turn: Turn, settings: FilterSettings, about_images: set[str]) -> tuple[str, str] | None:
    """Filter and reason by the turn alone. `about_images`: questions that need an image at least once in the set."""
    if not words_of(turn.question) or not words_of(turn.answer):
        return "text", "no words"
    if is_unfinished(turn.question):
        return "text", "unfinished question"
    if any(token in f"{turn.question} {turn.answer}" for token in (IMAGE_TOKEN, VUSR_TOKEN)):
        return "text", "marker of an image or a turn"
    if turn.is_cut:
        return "text", "answer cut off"
    if settings.blank_test == "turn" and not _needs_image(turn, settings):
        return "image", "same answer to a blank image"
    if settings.blank_test == "question" and normalised(turn.question) not in about_images:
        return "image", "question with the same answer to any image and a blank one"
    # Written with `not`, so that NaN does not pass.
    if settings.min_log_probability is not None and not turn.log_probability >= settings.min_log_probability:
        return "confidence", "low log-probability"
    if None not in (settings.min_clip_score, turn.clip_score) and turn.clip_score < settings.min_clip_score:
        return "clip", "low CLIPScore"
    return None


class _Earlier:
    """The questions kept so far: those about the current image, and those about earlier images."""

    def __init__(self):
        self._picture: str | None = None
        self._of_picture: list[str] = []
        self._pairs_before: set[tuple[str, str]] = set()
        self._counts: Counter[str] = Counter()

    def overlaps(self, turn: Turn) -> dict[str, float]:
        """Overlap with the most similar question about the same image, and with all questions about earlier images."""
        if turn.picture != self._picture:
            self._pairs_before.update(*map(_pairs, self._of_picture))
            self._picture, self._of_picture = turn.picture, []
        own = max((overlap(turn.question, each) for each in self._of_picture), default=0.0)
        pairs = _pairs(turn.question)
        known = len(pairs & self._pairs_before) / len(pairs) if pairs else 0.0
        return {"overlap": round(own, 4), "set_overlap": round(known, 4)}

    def fault(self, turn: Turn, scores: dict[str, Any], settings: FilterSettings) -> tuple[str, str] | None:
        if settings.max_overlap is not None and scores["overlap"] > settings.max_overlap:
            return "duplicate", "like another of the image"
        if settings.max_repeats is not None and self._counts[normalised(turn.question)] >= settings.max_repeats:
            return "duplicate", "too often in the set"
        if settings.max_set_overlap is not None and scores["set_overlap"] > settings.max_set_overlap:
            return "duplicate", "words of earlier questions"
        return None

    def add(self, turn: Turn) -> None:
        self._of_picture.append(turn.question)
        self._counts[normalised(turn.question)] += 1


def _places_by(outcomes: Sequence[Outcome], key: Callable[[Outcome], str]) -> dict[str, list[int]]:
    """The places of the kept outcomes, grouped by `key`."""
    places: dict[str, list[int]] = {}
    for place, outcome in enumerate(outcomes):
        if outcome.is_kept:
            places.setdefault(key(outcome), []).append(place)
    return places


def _thin_out(
    outcomes: Sequence[Outcome], groups: Iterable[list[int]], limit: int, seed: int, reason: str
) -> list[Outcome]:
    """Keeps `limit` outcomes of each group of places. The draw of a turn does not depend on the other turns."""
    dropped = set()
    for places in groups:
        dropped |= set(sorted(places, key=lambda place: _draw(outcomes[place].turn, seed))[limit:])
    return [
        replace(outcome, step="balance", reason=reason) if place in dropped else outcome
        for place, outcome in enumerate(outcomes)
    ]


def _draw(turn: Turn, seed: int) -> bytes:
    return hashlib.blake2b(f"{seed}:{turn.number}:{turn.picture}".encode(), digest_size=8).digest()
