"""The study of when asking helps: its scenes and their truth, its statistics, and a quick study that is resumed."""

import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from benchmarks import scene_measures, scene_models, scene_report, scene_world, scenes
from benchmarks.scene_world import COMBINATIONS, CORNERS, Bits, Thing, parse
from sq_llava.data.self_questions import ANSWER, QUESTION
from sq_llava.training.collator import SelfQuestioningCollator


SCENE = (
    Thing("large", "white", "circle", 0, 0),
    Thing("small", "white", "circle", 0, 2),
    Thing("small", "red", "square", 1, 0),
    Thing("large", "blue", "cross", 2, 2),
)


@pytest.fixture(scope="module")
def pool():
    return scene_models.draw_pool(30, COMBINATIONS, 6, seed=5)


@pytest.mark.parametrize(
    "question, answer",
    [
        ("what color is the large circle?", "white"),
        ("what size is the white thing right of the red square?", "small"),
        ("is the cross a circle?", "no"),
        ("is the last thing blue?", "yes"),
        ("how many share the shape of the first thing?", "2"),
        ("do 3 share the color of the red square?", "no"),
        ("how large is the red thing next to the cross?", "smaller"),
        ("where is the square from the large white thing?", "below"),
        ("is the small circle right of the large circle?", "yes"),
        ("how often is there a white circle?", "2"),
        ("is there a green square?", "no"),
    ],
)
def test_answer_is_computed_from_the_scene(question, answer):
    assert parse(question).answer(SCENE) == answer


def test_false_ambiguous_and_malformed_questions_are_told_apart():
    false, ambiguous = parse("what color is the large square?"), parse("what size is the circle?")
    assert not false.premise_is_true(SCENE) and not ambiguous.premise_is_true(SCENE)
    assert false.answer(SCENE) is None and ambiguous.answer(SCENE) is None
    for text in ("what color is the?", "is the red square?", "what color is the first thing", ""):
        assert parse(text) is None
    undecided = parse("where is the red square from the small circle?")  # one row down, two columns to the left
    assert undecided.answer(SCENE) == "left"
    undecided = parse("where is the cross from the large circle?")  # two rows down, two columns to the right
    assert undecided.premise_is_true(SCENE) and undecided.answer(SCENE) is None


def test_facts_have_true_questions_with_one_answer_on_both_sides_of_the_first_knob(pool):
    for scene, facts in zip(*pool):
        for fact in facts:
            for corner in CORNERS:
                text, answer = fact.turns[corner]
                assert parse(text).answer(scene) == answer
            for answers in ("yes/no", "open"):
                assert fact.turns["generic", answers][1] == fact.turns["referring", answers][1]


def test_drawn_scenes_and_facts_are_read_as_they_were_written(pool):
    assert scene_world.from_json(scene_world.to_json(*pool)) == pool


def test_only_referring_questions_tell_something_about_their_picture(pool):
    bits, told = Bits(pool[0]), {}
    for corner in CORNERS:
        turns = [fact.turns[corner] for facts in pool[1] for fact in facts]
        told[corner] = sum(bits.of_question(parse(text)) for text, _ in turns) / len(turns)
    assert max(told["generic", "yes/no"], told["generic", "open"]) < 0.3
    assert min(told["referring", "yes/no"], told["referring", "open"]) > 1.5


def test_bits_are_the_share_of_scenes_that_are_left():
    other = tuple(Thing("large", "red", shape, 0, place) for place, shape in enumerate(("circle", "cross", "square")))
    bits = Bits([SCENE, other, other, other])
    assert bits.of_question(parse("is the large circle white?")) == 0
    assert bits.of_question(parse("is the blue thing a cross?")) == 2
    assert bits.of_answer(parse("is the large circle white?"), "yes") == 2


def test_pictures_with_held_out_combinations_are_asked_about_them():
    _, facts = scene_models.draw_pool(5, COMBINATIONS + 4 * scene_world.HELD_OUT, 2, 2, must_hold_out=True)
    assert all(set(fact.combinations) & set(scene_world.HELD_OUT) for of_picture in facts for fact in of_picture)
    assert not set(COMBINATIONS) & set(scene_world.HELD_OUT)


def test_asked_questions_are_checked_against_their_picture(pool):
    scene_list = [SCENE, pool[0][0]]
    asked = [["what color is the large circle?", "what color is the large square?"], ["the the?", "is there a red?"]]
    found = scene_measures.check_questions(asked, scene_list, Bits(scene_list))
    assert found["questions"] == 4 and found["well_formed"] == 0.5
    assert found["premise_true"] == 0.25 and found["answerable"] == 0.25
    assert found["bits"] == pytest.approx(Bits(scene_list).of_question(parse(asked[0][0])) / 4)
    assert found["true_elsewhere"] == sum(parse(text).premise_is_true(scene_list[1]) for text in asked[0]) / 4


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    scene_models.train_tower(scene_models.Sizes(4, 2, 1, tower_steps=1), folder / "tower")
    return scene_models.compose_base(folder / "tower", folder / "base", "none")[1]


@pytest.mark.parametrize("corner", CORNERS)
def test_fast_collator_writes_the_tokens_of_the_chat_template(processor, pool, corner):
    class Slow(scene_models.FeatureCollator):
        _tokenize = SelfQuestioningCollator._tokenize

    rows, features = scene_models.rows_of(pool[1], corner), torch.zeros(len(pool[0]), 16, 64)
    fast, slow = (each(processor, seed=1, features=features)(rows) for each in (scene_models.FeatureCollator, Slow))
    assert all(torch.equal(fast[name], slow[name]) for name in slow)
    assert processor.tokenizer.unk_token_id not in fast["input_ids"]


def test_control_has_the_loss_on_the_same_questions_without_the_marker(processor, pool):
    rows, features = scene_models.rows_of(pool[1], CORNERS[0]), torch.zeros(len(pool[0]), 16, 64)
    asking = scene_models.FeatureCollator(processor, seed=1, features=features)
    control = scene_models.FeatureCollator(processor, seed=1, features=features, with_marker=False)
    tokenizer = processor.tokenizer
    [vusr, end] = tokenizer.convert_tokens_to_ids(["[vusr]", "</s>"])
    one, other = asking(rows), control(rows)
    assert vusr in one["input_ids"] and vusr not in other["input_ids"]
    for kind in (ANSWER, QUESTION):
        words = [batch["input_ids"][batch["turn_kinds"] == kind] for batch in (one, other)]
        if kind == QUESTION:
            words[0] = words[0][words[0] != end]  # a self-question ends with the delimiter
        assert torch.equal(*words) and len(words[0]) > 0


def test_p_values_are_students():
    # t(0.975, 4) = 2.776 and t(0.975, 1) = 12.706: the tail of both is 5%.
    for quantile, values in ((2.776, [-2, -1, 0, 1, 2]), (12.706, [-1, 1])):
        count = len(values)
        spread = (sum(value**2 for value in values) / (count - 1) / count) ** 0.5
        shifted = [value + quantile * spread for value in values]
        assert scene_report.p_value(shifted) == pytest.approx(0.05, abs=1e-4)
    assert scene_report.p_value([0.1]) is None


def test_holm_multiplies_the_smallest_p_value_most_and_keeps_the_order():
    assert scene_report.holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])
    assert scene_report.holm([0.9, 0.8]) == [1.0, 1.0]


def test_calibration_error_is_the_gap_between_confidence_and_accuracy():
    sure, right = np.array([0.95, 0.95, 0.55, 0.55]), np.array([True, True, True, False])
    assert scene_measures.calibration_error(sure, right) == pytest.approx(0.5 * 0.05 + 0.5 * 0.05)


def finished(arm: str, seed: int, accuracy: float) -> dict:
    run = {"budget": "small", "corner": ["generic", "open"], "arm": arm, "seed": seed, "accuracy": accuracy}
    run |= dict.fromkeys([*scene_report.OUTCOMES, "accuracy_count"], 0.5)
    return run | dict.fromkeys(["answer_tokens", "question_tokens", "last_loss", "seconds"], 1)


def test_differences_are_paired_and_only_common_seeds_count():
    runs = [finished("baseline", seed, 0.5 + seed / 10) for seed in range(3)]
    runs += [finished("sq-1", 2, 0.73), finished("sq-1", 0, 0.51), finished("sq-1", 1, 0.9)]
    runs += [finished("instruct", 0, 0.5), finished("instruct", 2, 0.7), finished("prototypes", 2, 0.5)]
    cells = scene_report.summarize(runs, list(scenes.ARMS), scenes.FIRST_ARMS)
    assert [(cell["arm"], cell["seeds"]) for cell in cells] == [(arm, [0, 2]) for arm in scenes.FIRST_ARMS]
    assert cells[1]["minus"]["baseline"]["values"] == pytest.approx([0.01, 0.03])
    assert cells[2]["minus"].keys() == {"baseline"} and cells[1]["minus"].keys() == {"baseline", "instruct"}
    assert cells[2]["minus"]["baseline"]["p"] == cells[2]["minus"]["baseline"]["holm"] == 1


def test_main_budget_and_first_arms_are_run_first_seed_by_seed(tmp_path):
    tasks = scenes.list_tasks(tmp_path, scenes.Sizes(), [3, 4], list(scenes.BUDGETS), list(scenes.ARMS))
    assert len(tasks) == 2 * 4 * 5 * 3 and len({task.name for task in tasks}) == len(tasks)
    first = tasks[: 2 * 4 * 3]
    assert {(task.budget, task.arm) for task in first} == {(scenes.MAIN_BUDGET, arm) for arm in scenes.FIRST_ARMS}
    assert [task.seed for task in first] == [3] * 12 + [4] * 12


@pytest.mark.slow
def test_quick_study_reports_and_does_again_only_what_is_missing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(scenes, "ProcessPoolExecutor", lambda jobs, **_: ThreadPoolExecutor(1))
    monkeypatch.setattr(scenes, "BUDGETS", dict(scenes.BUDGETS))
    monkeypatch.setattr(scenes, "CORNERS", [("generic", "open"), ("referring", "yes/no")])
    work, report = tmp_path / "work", tmp_path / "report"
    command = ["--quick", "--work", str(work), "--output-dir", str(report), "--seeds", "0", "1"]
    command += ["--budgets", scenes.MAIN_BUDGET, "--arms", "baseline", "sq-1", "instruct", "prototypes"]
    scenes.main(command)
    first = json.loads((report / "scenes.json").read_text())
    assert first["finished"] == 16 and not first["missing"] and len(first["cells"]) == 8
    asker = next(cell for cell in first["cells"] if cell["arm"] == "sq-1")
    assert asker["minus"].keys() == {"baseline", "instruct"} and asker["question_tokens"] > 0
    assert asker["asked"].keys() == set(scene_report.ASKED) and first["rule"]["seeds"] == [0, 1]
    assert "| referring, yes/no | self-questions 0.5 |" in (report / "scenes.md").read_text()
    assert (report / "scenes.png").stat().st_size > 0
    gone = next(work.glob("seed-1/*-sq-1.json"))
    before = {file: file.stat().st_mtime_ns for file in work.rglob("*.json")}
    gone.unlink()
    capsys.readouterr()
    scenes.main(command)
    assert "1 of 16 to run" in capsys.readouterr().out
    assert {file for file, time in before.items() if file.stat().st_mtime_ns != time} == {gone}
    again = json.loads((report / "scenes.json").read_text())
    assert [cell["accuracies"] for cell in again["cells"]] == [cell["accuracies"] for cell in first["cells"]]
