"""Metrics of single answers: examples from their definitions, and properties that hold for any input."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sq_llava.evaluation.metrics import (
    CONTRACTIONS,
    MISSPELLINGS,
    binary_scores,
    exact_match,
    leave_one_out,
    normalize_lmms_eval,
    normalize_m4c,
    normalize_official,
    relative_score,
    short_form,
    vqa_accuracy,
    vqa_accuracy_official,
)
from sq_llava.evaluation.pope import says_yes


@pytest.mark.parametrize("matches, accuracy", [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (9, 1), (10, 1)])
def test_vqa_accuracy_of_ten_answers(matches, accuracy):
    assert leave_one_out(matches, 10) == pytest.approx(accuracy)
    answers = ["cat"] * matches + [f"other{number}" for number in range(10 - matches)]
    assert vqa_accuracy("cat", answers) == pytest.approx(accuracy)


@pytest.mark.parametrize("matches, accuracy", [(0, 0), (1, 1 / 3), (2, 2 / 3), (3, 1), (10, 1)])
def test_short_form_of_vqa_accuracy(matches, accuracy):
    answers = ["cat"] * matches + ["dog"] * (10 - matches)
    assert vqa_accuracy("cat", answers, accuracy=short_form) == pytest.approx(accuracy)


@pytest.mark.parametrize(
    "text, m4c, official",
    [
        ("red,blue", "redblue", "red blue"),
        ("a,b", "ab", "b"),
        ("it's", "it 's", "it's"),
        ("1,2-3", "12 3", "123"),
        ("$1,000", "$1000", "$1000"),
        ("U.S.A.", "usa", "usa"),
        ("3-4", "3 4", "3 4"),
        (".5", ".5", ".5"),
        ("10:30", "10:30", "10:30"),
        ("50%", "50%", "50%"),
        ("None", "0", "0"),
        ("The Ten cats", "10 cats", "10 cats"),
        ("dont", "don't", "don't"),
        ("somebody'd", "somebodyd", "somebodyd"),
        ("left / right", "left right", "left right"),
        ("left/right", "left right", "left right"),
        ("red\nblue", "red blue", "red blue"),
        ("", "", ""),
    ],
)
def test_normalizers_of_answers(text, m4c, official):
    assert normalize_m4c(text) == m4c
    assert normalize_official(text) == official


# What lmms-eval 0.7.3 makes of these texts in its VQA v2. `make test-peers` compares thousands.
@pytest.mark.parametrize(
    "text, normalized",
    [
        ("T-shirt", "t shirt"),
        ("on the wall", "on wall"),
        ("Two", "2"),
        ("1,000", "1000"),
        ("1,,000-2", "10002"),
        ("red,blue", "red blue"),
        ("it's", "it's"),
        ("\tYes. ", "yes"),
    ],
)
def test_lmms_eval_normalizes_answers_to_vqa_v2_in_its_own_way(text, normalized):
    assert normalize_lmms_eval(text) == normalized


def test_every_contraction_is_corrected_if_one_apostrophe_is_missing():
    assert len(MISSPELLINGS) == 114  # the official 120, without four with a capital I and two that change nothing
    for wrong, right in MISSPELLINGS.items():
        assert normalize_official(wrong) == right
    for word in CONTRACTIONS.split():
        assert normalize_official(word) in (word, MISSPELLINGS.get(word, word))


def test_official_accuracy_does_not_normalize_if_all_human_answers_agree():
    assert vqa_accuracy_official("Yes.", ["yes"] * 10) == 0
    assert vqa_accuracy_official("yes", ["yes"] * 10) == 1
    assert vqa_accuracy_official("yes\n", ["yes"] * 10) == 1
    assert vqa_accuracy_official("Yes.", ["yes", "yes "] * 5) == 0  # they agree after white space is removed
    assert vqa_accuracy_official("Yes.", ["yes"] * 9 + ["no"]) == 1
    assert vqa_accuracy("Yes.", ["yes"] * 10) == 1


def test_normalizers_can_disagree():
    answers = ["red blue"] * 5 + ["green"] * 5
    assert (vqa_accuracy("red,blue", answers), vqa_accuracy_official("red,blue", answers)) == (0, 1)


def test_vqa_accuracy_without_answers_is_refused():
    with pytest.raises(ValueError, match="answers is empty"):
        vqa_accuracy("cat", [])


ANSWERS = st.lists(st.sampled_from(["yes", "Yes.", "no", "red,blue", "red blue", "one", "1"]), min_size=1, max_size=12)
ACCURACIES = [vqa_accuracy, vqa_accuracy_official]


@pytest.mark.parametrize("accuracy", ACCURACIES)
@given(prediction=st.sampled_from(["yes", "no", "1", "red,blue", "bird"]), answers=ANSWERS, seed=st.integers(0, 99))
def test_vqa_accuracy_does_not_depend_on_the_order_of_the_answers(accuracy, prediction, answers, seed):
    shuffled = random.Random(seed).sample(answers, len(answers))
    assert accuracy(prediction, answers) == accuracy(prediction, shuffled)


@pytest.mark.parametrize("accuracy", ACCURACIES)
@given(prediction=st.text(max_size=12), answers=st.lists(st.text(max_size=12), min_size=1, max_size=12))
def test_vqa_accuracy_is_a_share(accuracy, prediction, answers):
    assert 0 <= accuracy(prediction, answers) <= accuracy(prediction, answers, accuracy=short_form) <= 1


@given(st.integers(1, 12).flatmap(lambda num: st.tuples(st.integers(0, num), st.just(num))))
def test_leave_one_out_is_the_mean_over_answers_left_out(case):
    matches, num_answers = case
    left = [matches - (number < matches) for number in range(num_answers)]
    expected = sum(min(1, each / 3) for each in left) / num_answers
    assert leave_one_out(matches, num_answers) == pytest.approx(expected)


@given(st.text(alphabet="abc 123.,?'-/", max_size=20))
def test_normalized_answers_have_no_articles_and_single_spaces(text):
    for normalize in (normalize_m4c, normalize_official):
        words = normalize(text).split(" ")
        assert not {"a", "an", "the"} & set(words)
        assert "" not in words or words == [""]


@pytest.mark.parametrize(
    "prediction, reference, matches",
    [("Yes.", "yes", 1), (" yes ", "yes", 1), ("yes . .\n", "yes", 1), ("yes, sir", "yes", 0), ("", "yes", 0)],
)
def test_exact_match_ignores_case_and_trailing_periods(prediction, reference, matches):
    assert exact_match(prediction, reference) == matches


@pytest.mark.parametrize(
    "answer, yes",
    [
        ("Yes", True),
        ("No", False),
        ("no", False),
        ("NO", True),  # the authors' parser looks only for No and no
        ("not", False),
        ("There is not a dog.", False),
        ("There isn't.", True),
        ("No, there is none", False),
        ("Yes. No.", True),  # only the first sentence counts
        ("nothing", True),
        ("", True),
    ],
)
def test_pope_answers_are_parsed_as_its_authors_do(answer, yes):
    assert says_yes(answer) == yes


LABELS = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=30)


@given(LABELS)
def test_binary_scores_agree_with_their_definitions(pairs):
    predictions, labels = zip(*pairs)
    scores = binary_scores(predictions, labels)
    assert all(0 <= value <= 1 for value in scores.values())
    hits = sum(prediction and label for prediction, label in pairs)
    assert scores["precision"] == (hits / sum(predictions) if any(predictions) else 0)
    assert scores["recall"] == (hits / sum(labels) if any(labels) else 0)
    wrong = sum(prediction != label for prediction, label in pairs)
    assert scores["f1"] == pytest.approx(2 * hits / (2 * hits + wrong) if hits else 0)
    assert scores["accuracy"] == pytest.approx(1 - wrong / len(pairs))
    assert binary_scores(predictions[::-1], labels[::-1]) == scores


def test_binary_scores_of_a_model_that_always_says_yes():
    scores = binary_scores([True] * 4, [True, False, True, False])
    assert scores == {"accuracy": 0.5, "precision": 0.5, "recall": 1, "f1": pytest.approx(2 / 3), "yes_ratio": 1}


def test_scores_of_different_numbers_are_refused():
    with pytest.raises(ValueError, match="2 predictions and 1 labels"):
        binary_scores([True, False], [True])
    with pytest.raises(ValueError, match="1 and 2 scores"):
        relative_score([1], [1, 2])


def test_relative_score_is_a_ratio_of_means():
    assert relative_score([8, 6], [10, 10]) == 70
    assert relative_score([8, 6], [8, 6]) == 100
