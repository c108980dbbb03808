"""Standard errors and intervals: known formulas, the right coverage, units of examples that belong together."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sq_llava.evaluation.task import Example, Record, Score, Task, summarize
from sq_llava.evaluation.uncertainty import (
    corpus_interval,
    mean_interval,
    repeat,
    resampled,
    share_interval,
    standard_error,
)


SHARES = st.lists(st.sampled_from([0.0, 1.0]), min_size=2, max_size=50)


@given(SHARES)
def test_standard_error_of_right_and_wrong_is_that_of_a_share(values):
    share = sum(values) / len(values)
    assert standard_error(values) == pytest.approx(math.sqrt(share * (1 - share) / (len(values) - 1)))


# R: prop.test(right, num, correct = FALSE)$conf.int
@pytest.mark.parametrize(
    "right, num, low, high",
    [(60, 60, 0.9398, 1), (0, 10, 0, 0.2775), (9, 10, 0.5958, 0.9821), (50, 100, 0.4038, 0.5962)],
)
def test_interval_of_a_share_is_that_of_wilson(right, num, low, high):
    assert share_interval(right / num, num) == pytest.approx((low, high), abs=1e-4)
    assert mean_interval([1.0] * right + [0.0] * (num - right)) == share_interval(right / num, num)


@given(SHARES, st.integers(1, 8))
def test_interval_of_a_share_holds_it_and_stays_between_0_and_1(values, num_units):
    units = [number % num_units for number in range(len(values))]
    for interval in (mean_interval(values), mean_interval(values, units)):
        if interval is not None:
            low, high = interval
            assert 0 <= low <= sum(values) / len(values) <= high <= 1
            assert low < high


def test_interval_of_other_values_is_cut_only_if_they_are_from_0_to_1():
    assert mean_interval([0.9, 1.0, 1.0])[1] == 1
    low, high = mean_interval([9.0, 10.0, 10.0])
    assert (low + high) / 2 == pytest.approx(29 / 3)
    assert high > 10


def test_scores_that_are_no_shares_have_no_interval_of_a_share():
    task = Task("t", "", None, None, None, "score", corpus_metrics=lambda records: {"bias": 0.0})
    records = [Record(Example(str(number), "", [], 0), "", "", score=Score({"score": 1.0})) for number in range(9)]
    assert [metric.interval for metric in summarize(task, records)] == [share_interval(1, 9), share_interval(0, 9)]
    task = replace(task, metrics_are_shares=False)
    assert [metric.interval for metric in summarize(task, records)] == [None, None]
    assert mean_interval([0.3, 0.3, 0.3]) is None


def test_examples_of_one_unit_count_less_than_independent_ones():
    values, images = [1.0, 1.0, 0.0, 0.0] * 25, [number // 2 for number in range(100)]
    # The two questions about an image have the same score: as 50 independent images.
    assert standard_error(values, images) == pytest.approx(standard_error(values[::2]))
    low, high = mean_interval(values, images)
    assert high - low == pytest.approx(np.subtract(*share_interval(0.5, 49)[::-1]), abs=1e-3)
    # If all are right, the images count.
    assert mean_interval([1.0] * 100, images) == share_interval(1.0, 50)


def test_one_unit_has_no_standard_error():
    assert standard_error([1.0]) is mean_interval([1.0]) is None
    assert standard_error([1.0, 0.0], ["image", "image"]) is None


def mean(values):
    return {"mean": sum(values) / len(values)}


def test_bootstrap_finds_the_standard_error_of_a_mean():
    values = [0.0, 1.0] * 50  # analytically 0.5 / sqrt(100)
    drawn = resampled(repeat(mean, values), range(100), 1000)["mean"]
    assert drawn.std() == pytest.approx(0.05, rel=0.1)
    drawn = resampled(repeat(mean, values), [number // 4 for number in range(100)], 100)["mean"]
    assert drawn.std() == 0  # each unit has as many zeros as ones


def test_metric_that_no_resample_changes_has_the_interval_of_a_share_or_none():
    assert corpus_interval(1.0, np.ones(10), 60) == share_interval(1.0, 60)
    assert corpus_interval(10.0, np.full(10, 10.0), 60) is None
    assert corpus_interval(0.0, np.zeros(10), None) is None  # no bias of the judge is no share
    low, high = corpus_interval(0.5, np.linspace(0, 1, 101), 60)
    assert (low, high) == pytest.approx((0.025, 0.975))


def test_metrics_over_units_are_shares_of_units():
    def all_right(records):
        return {"all": float(all(record.score.values["right"] for record in records))}

    task = Task("t", "", None, None, None, "all", unit=lambda example: example.reference, score_unit=all_right)
    records = [
        Record(Example(f"{unit}/{part}", "", [], unit), "", "", score=Score({"right": float(unit < 6 or part)}))
        for unit in range(8)
        for part in range(2)
    ]
    right, whole = summarize(task, records)
    assert (right.name, right.value, right.num) == ("right", 14 / 16, 16)
    assert right.standard_error == pytest.approx(standard_error([1.0] * 6 + [0.5] * 2))
    assert (whole.name, whole.value, whole.num) == ("all", 6 / 8, 8)
    assert whole.interval == share_interval(6 / 8, 8)


@pytest.mark.long
@pytest.mark.slow
def test_interval_of_grouped_answers_covers_the_truth_in_95_of_100_datasets():
    def covers(seed):
        draw = np.random.default_rng(seed)
        skill = np.repeat(draw.beta(4, 1, size=80), 6)  # six questions about each of 80 images
        low, high = mean_interval(list((draw.random(480) < skill).astype(float)), list(np.arange(480) // 6))
        return low <= 0.8 <= high

    assert 0.92 <= sum(map(covers, range(400))) / 400 <= 0.98
