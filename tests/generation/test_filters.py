"""Filters of self-generated turns: each filter by an example, and properties that hold for any turns."""

from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sq_llava.generation import self_generation
from sq_llava.generation.filters import FilterSettings, Turn, filter_turns, normalised, overlap
from sq_llava.generation.settings import SelfGeneration
from sq_llava.llm_client.asking import Asked


OFF = FilterSettings("off", 0.0, None, None, None, None, None)


def turn(question="Is there a dog?", answer="yes", blank_answer="no", picture="a.png", number=0, **scores) -> Turn:
    scores = {"log_probability": -0.1, "blank_log_probability": -3.0, **scores}
    return Turn(picture, number, question, answer, blank_answer, **scores)


def rules(turns, settings=OFF) -> list[tuple[str, str] | None]:
    return [outcome.step and (outcome.step, outcome.reason) for outcome in filter_turns(turns, settings)]


@pytest.mark.parametrize(
    ("turn", "rule"),
    [
        (turn(), None),
        (turn(question="Describe the dog."), None),
        (turn(question="\u72d7\u5728\u54ea\u91cc\uff1f"), None),
        (turn(question="??"), ("text", "no words")),
        (turn(answer=" ."), ("text", "no words")),
        (turn(question="Is there a dog and"), ("text", "unfinished question")),
        (turn(is_cut=True), ("text", "answer cut off")),
        (turn(question="Is the <image> red?"), ("text", "marker of an image or a turn")),
    ],
)
def test_faulty_text_is_left_out(turn, rule):
    assert rules([turn]) == [rule]


def test_answer_that_is_the_same_with_a_blank_image_is_left_out():
    turns = [turn(), turn("What is 2 + 2?", "Four.", "four"), turn("Why?", "so", "no", blank_log_probability=0.0)]
    settings = replace(OFF, blank_test="turn")
    same = ("image", "same answer to a blank image")
    assert rules(turns, settings) == [None, same, same]  # the last answer differs, but is likelier without the image
    assert rules(turns, replace(settings, min_drop=3.0)) == [same, same, same]


def test_no_is_kept_if_the_same_question_needs_another_image():
    turns = [turn(), turn(answer="no", picture="b.png"), turn("is there a sky", "no", picture="b.png", number=1)]
    turns.append(turn("Is there a moon?", "no", picture="b.png", number=2))
    unneeded = ("image", "question with the same answer to any image and a blank one")
    settings = replace(OFF, blank_test="question")
    assert rules(turns, settings) == [None, None, ("text", "unfinished question"), unneeded]
    assert rules(turns, replace(OFF, blank_test="turn"))[1] == ("image", "same answer to a blank image")


def test_score_equal_to_the_threshold_passes_and_nan_does_not():
    turns = [turn(log_probability=-0.5, clip_score=0.6), turn(log_probability=-0.51), turn(clip_score=0.59)]
    turns.append(turn(log_probability=float("nan")))
    settings = replace(OFF, min_log_probability=-0.5, min_clip_score=0.6)
    unsure = ("confidence", "low log-probability")
    assert rules(turns, settings) == [None, unsure, ("clip", "low CLIPScore"), unsure]


def test_second_of_two_similar_questions_about_an_image_is_left_out():
    turns = [turn(), turn("is there a  DOG!", number=1), turn("What is it doing?", number=2), turn(picture="b.png")]
    like = ("duplicate", "like another of the image")
    assert rules(turns, replace(OFF, max_overlap=0.7)) == [None, like, None, None]


def test_later_turn_is_no_duplicate_of_one_that_was_left_out():
    turns = [turn(log_probability=-9.0), turn(number=1)]
    settings = replace(OFF, max_overlap=0.7, min_log_probability=-1.0)
    assert rules(turns, settings) == [("confidence", "low log-probability"), None]


def test_question_is_kept_up_to_the_maximum_number_of_times():
    turns = [turn(picture=f"{number}.png") for number in range(4)]
    often = ("duplicate", "too often in the set")
    assert rules(turns, replace(OFF, max_repeats=2)) == [None, None, often, often]


def test_set_overlap_counts_questions_about_earlier_images_only():
    turns = [turn("Is there a dog?"), turn("Is there a cat?", number=1), turn("Is there a dog or cat?", picture="b")]
    outcomes = filter_turns(turns, replace(OFF, max_set_overlap=0.5))
    # Three of its five pairs are known: is-there, there-a, a-dog. Not known are dog-or and or-cat.
    assert [outcome.scores["set_overlap"] for outcome in outcomes] == [0.0, 0.0, 0.6]
    assert outcomes[2].reason == "words of earlier questions"


def test_overlap_by_hand():
    # In common: 3 of 5 words (is, there, a) and 2 of 4 pairs (is-there, there-a).
    assert overlap("Is there a dog?", "is there a cat") == pytest.approx(5 / 9)
    assert overlap("Is there a dog?", "is there, a dog") == 1.0
    assert overlap("red", "blue") == 0.0


def test_types_are_balanced_by_the_seed():
    turns = [turn(f"Is there a thing of kind {number}?", number=number) for number in range(20)]
    turns += [turn("What is it?", number=20)]
    kept = [rules(turns, replace(OFF, max_per_type=5, seed=seed)) for seed in (0, 0, 1)]
    assert kept[0] == kept[1] != kept[2]
    assert kept[0].count(("balance", "too many of its type")) == 15 and kept[0][-1] is None


def test_more_frequent_answer_is_thinned_out():
    turns = [turn(answer="Yes, it is.", number=number) for number in range(6)]
    turns += [turn(answer="no", number=6), turn("What is it?", "A dog.", number=7), turn(answer="No.", number=8)]
    kept = [rules(turns, replace(OFF, balance_yes_no=True, seed=seed)) for seed in (0, 0, 1)]
    assert kept[0] == kept[1] != kept[2]
    assert kept[0][:6].count(("balance", "too many of its answer")) == 4 and kept[0][6:] == [None] * 3


def test_answers_are_balanced_again_after_the_judge(tmp_path, monkeypatch):
    turns = [turn(answer=("yes", "no")[number % 2], number=number) for number in range(6)]
    run = SelfGeneration("model", str(tmp_path), tmp_path, filters=replace(OFF, balance_yes_no=True))

    def judge_turns(client, prompt, exhibits):
        return Asked({id: id != "a.png#1" for id in exhibits}, {}, 0)  # rejects a "no"

    monkeypatch.setattr(self_generation, "judge_turns", judge_turns)
    outcomes, _ = self_generation.judge(run, None, filter_turns(turns, run.filters))
    assert Counter(outcome.turn.answer for outcome in outcomes if outcome.is_kept) == {"yes": 2, "no": 2}
    assert Counter(outcome.reason for outcome in outcomes) == {None: 4, "rejected": 1, "too many of its answer": 1}


def test_unknown_blank_test_is_named():
    with pytest.raises(ValueError, match=r"--blank-test is 'both': choose one of turn, question, off\."):
        FilterSettings("both")


SCORES = st.floats(min_value=-3, max_value=0)
QUESTIONS = st.lists(st.sampled_from(["what", "is", "a", "red", "dog", "cat"]), min_size=1, max_size=5)
TURNS = st.lists(
    st.builds(
        Turn,
        picture=st.sampled_from("abc"),
        number=st.just(0),
        question=QUESTIONS.map(lambda words: " ".join(words) + "?"),
        answer=st.sampled_from(["yes", "no"]),
        blank_answer=st.sampled_from(["yes", "no"]),
        log_probability=SCORES,
        blank_log_probability=SCORES,
        clip_score=st.floats(min_value=0, max_value=1),
    ),
    max_size=12,
).map(lambda turns: [replace(each, number=n) for n, each in enumerate(sorted(turns, key=lambda each: each.picture))])
SETTINGS = st.builds(
    FilterSettings,
    blank_test=st.sampled_from(["turn", "question", "off"]),
    min_drop=st.floats(min_value=-1, max_value=1),
    min_log_probability=st.none() | SCORES,
    min_clip_score=st.none() | st.floats(min_value=0, max_value=1),
    max_overlap=st.none() | st.floats(min_value=0, max_value=1),
    max_set_overlap=st.none() | st.floats(min_value=0, max_value=1),
    max_repeats=st.none() | st.integers(1, 3),
    max_per_type=st.none() | st.integers(1, 3),
    balance_yes_no=st.booleans(),
    seed=st.integers(0, 3),
)


@pytest.mark.slow
@given(TURNS, SETTINGS)
def test_each_turn_has_one_outcome_in_order_and_kept_turns_obey_the_filters(turns, settings):
    outcomes = filter_turns(turns, settings)
    assert [outcome.turn for outcome in outcomes] == turns
    assert all((outcome.step is None) == (outcome.reason is None) for outcome in outcomes)
    kept = [outcome.turn for outcome in outcomes if outcome.is_kept]
    if settings.max_overlap is not None:
        pairs = [(one, other) for one in kept for other in kept if one.number < other.number]
        assert all(
            overlap(one.question, other.question) <= settings.max_overlap + 1e-4
            for one, other in pairs
            if one.picture == other.picture
        )
    if settings.max_repeats is not None:
        counts = Counter(normalised(each.question) for each in kept)
        assert all(count <= settings.max_repeats for count in counts.values())
    if settings.max_per_type is not None:
        types = Counter(outcome.scores["type"] for outcome in outcomes if outcome.is_kept)
        assert all(count <= settings.max_per_type for count in types.values())
    if settings.balance_yes_no:
        answers = [each.answer for each in kept]
        assert answers.count("yes") == answers.count("no")


@pytest.mark.slow
@given(TURNS, SETTINGS)
def test_kept_turns_stay_when_they_are_filtered_again(turns, settings):
    # With the test by question, a turn may need another one that another filter left out.
    settings = replace(settings, blank_test="turn" if settings.blank_test == "question" else settings.blank_test)
    kept = [outcome.turn for outcome in filter_turns(turns, settings) if outcome.is_kept]
    assert all(outcome.is_kept for outcome in filter_turns(kept, settings))


@pytest.mark.slow
@given(TURNS, SETTINGS)
def test_blank_test_by_question_keeps_at_least_what_the_test_by_turn_keeps(turns, settings):
    settings = replace(settings, max_overlap=None, max_set_overlap=None, max_repeats=None, max_per_type=None)
    settings = replace(settings, balance_yes_no=False)
    by_turn, by_question, without = (
        {outcome.turn for outcome in filter_turns(turns, replace(settings, blank_test=test)) if outcome.is_kept}
        for test in ("turn", "question", "off")
    )
    assert by_turn <= by_question <= without
