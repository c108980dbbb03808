"""Comparison of two runs: pairs by id, intervals with the right coverage, changed examples."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from sq_llava.cli import evaluate as command
from sq_llava.evaluation.comparison import Difference, compare, compare_task, difference_interval
from sq_llava.evaluation.results import TaskResult
from sq_llava.evaluation.run import find_task
from sq_llava.evaluation.task import Example, Metric, Record, Score, Task
from tests import tiny
from tests.evaluation_layouts import (
    assess_answers,
    run_evaluate,
    stored,
    write_easy_vqa,
    write_json,
    write_jsonl,
    write_split,
)
from tests.processes import lines_of


def write_results(folder, **changes):
    """`results.json` about the tasks that have an `examples.jsonl`."""
    changes = {"data_hashes": {path.parent.name: "-" for path in sorted(folder.glob("*/examples.jsonl"))}} | changes
    about = {"model": "org/model", "model_hash": None, "code_hash": "c" * 64, "seed": 0, "date": "2026-01-01"}
    write_json(folder / "results.json", {**about, "command": "sq-llava evaluate", "results": [], **changes})


def write_run(folder, task, scores, **changes):
    """`results.json`, and `examples.jsonl` with these `{id: value}` of accuracy, which an ungraded answer lacks."""
    is_graded = "judge_error" not in changes
    lines = [
        {
            "id": id, "prompt": f"USER: {id}?", "images": [], "answer": f"said {value}", "prediction": value,
            "reference": "yes", "scores": {"accuracy": value} if is_graded else {}, "parsed": True,
            "judge_error": None, "error": None,
            "details": {"kind": "shape"}, **changes,
        }
        for id, value in scores.items()
    ]  # fmt: skip
    write_jsonl(folder / task / "examples.jsonl", lines)
    write_results(folder)


def test_difference_is_that_of_the_same_examples(tmp_path):
    first = {f"q{number}": float(number % 2) for number in range(40)}
    write_run(tmp_path / "a", "easy_vqa", first)
    write_run(tmp_path / "b", "easy_vqa", dict.fromkeys(reversed(first), 1.0))
    [difference, of_shape] = compare(tmp_path / "a", tmp_path / "b")
    assert (difference.first, difference.second, difference.difference, difference.num) == (0.5, 1.0, 0.5, 40)
    # Half of the differences are 1: the mean of 40 has a standard error of 0.079.
    assert difference.low == pytest.approx(0.5 - 1.96 * 0.079, abs=0.03)
    assert difference.high == pytest.approx(0.5 + 1.96 * 0.079, abs=0.03)
    assert compare(tmp_path / "a", tmp_path / "b") == [difference, of_shape]
    assert of_shape == replace(difference, metric="shape/accuracy")
    assert "about one in twenty is clear by chance" in (tmp_path / "b" / "comparison" / "comparison.md").read_text()
    [same, _] = compare(tmp_path / "a", tmp_path / "a", tmp_path / "out")
    assert (same.low, same.difference, same.high, same.is_clear) == (0, 0, 0, False)


def test_paired_interval_is_narrower_than_the_errors_of_single_runs(tmp_path):
    first = {f"q{number}": float(number % 2) for number in range(100)}
    write_run(tmp_path / "a", "easy_vqa", first)
    write_run(tmp_path / "b", "easy_vqa", {**first, "q0": 1.0, "q2": 1.0, "q4": 1.0, "q6": 1.0, "q8": 1.0})
    [difference, _] = compare(tmp_path / "a", tmp_path / "b")
    assert difference.is_clear  # 5% better, although the standard error of one run is 5%


@pytest.mark.parametrize(
    "differences, units, expected",
    [
        ([1.0], "a", None),
        ([0.0], "a", None),
        ([1.0, 0.0], "aa", None),  # one unit
        ([0.3, 0.9 - 0.6, 0.3], "abc", None),  # all changed alike, except for rounding errors
        ([0.0, 0.0], "ab", (0, 0)),
        ([1.0, 0.0], "ab", (0, 1)),
    ],
)
def test_units_that_do_not_differ_show_no_interval(differences, units, expected):
    assert difference_interval(np.array(differences), 200, 0, list(units)) == expected


def test_difference_without_an_interval_is_shown_without_one(tmp_path, capsys):
    write_run(tmp_path / "a", "easy_vqa", {"q1": 0.0, "q2": 0.0})
    write_run(tmp_path / "b", "easy_vqa", {"q1": 1.0, "q2": 1.0})
    [difference, _] = differences = compare(tmp_path / "a", tmp_path / "b", tmp_path / "out")
    assert (difference.difference, difference.low, difference.high, difference.is_clear) == (1, None, None, False)
    assert "| 0.0000 | 1.0000 | +1.0000 |  | no | 2 |" in (tmp_path / "out" / "comparison.md").read_text()
    assert json.loads((tmp_path / "out" / "comparison.json").read_text())["differences"][0]["low"] is None
    command.show_differences(differences, tmp_path)
    assert " to " not in capsys.readouterr().out


def test_corpus_metric_of_units_that_changed_alike_has_no_interval():
    task = Task("t", "", None, None, None, "f", corpus_metrics=lambda records: {"f": records[0].score.prediction})
    pair = tuple(Record(Example("", "", [], None), "", "", score=Score({}, prediction=value)) for value in (0.0, 1.0))
    for num in (1, 3):
        pairs = [tuple(replace(each, example=Example(str(n), "", [], None)) for each in pair) for n in range(num)]
        [difference] = compare_task(task, pairs, 1, 50, 0)
        assert (difference.difference, difference.low) == (1, None)


def test_only_the_tasks_of_the_run_are_compared(tmp_path):
    write_run(tmp_path / "a", "easy_vqa", {"q1": 1.0})
    write_run(tmp_path / "b", "easy_vqa", {"q1": 1.0})
    write_run(tmp_path / "a", "gqa", {"q1": 1.0})
    write_run(tmp_path / "b", "gqa", {"q2": 1.0})
    assert {each.task for each in compare(tmp_path / "a", tmp_path / "b", tasks=["easy_vqa"])} == {"easy_vqa"}
    with pytest.raises(ValueError, match="lacks 1 of the examples"):
        compare(tmp_path / "a", tmp_path / "b")


def test_changed_examples_are_listed(tmp_path):
    write_run(tmp_path / "a", "easy_vqa", {"q1": 1.0, "q2": 0.0, "q3": 1.0})
    write_run(tmp_path / "b", "easy_vqa", {"q3": 0.5, "q1": 1.0, "q2": 1.0})
    compare(tmp_path / "a", tmp_path / "b", tmp_path / "out")
    lines = lines_of(tmp_path / "out" / "easy_vqa.flipped.jsonl")
    assert [(line["id"], line["change"], line["first"], line["second"]) for line in lines] == [
        ("q2", 1.0, "said 0.0", "said 1.0"),
        ("q3", -0.5, "said 1.0", "said 0.5"),
    ]
    report = (tmp_path / "out" / "comparison.md").read_text()
    assert "easy_vqa: 1 examples better, 1 worse" in report
    assert "| easy_vqa | accuracy | 0.6667 | 0.8333 | +0.1667 |" in report


@pytest.mark.parametrize(
    "task, second, changes, message",
    [
        ("easy_vqa", {"q1": 1.0, "q3": 1.0}, {}, "lacks 1 of the examples in .*, such as 'q3'"),
        ("easy_vqa", {"q1": 1.0}, {}, "lacks 1 of the examples in .*, such as 'q2'"),
        ("easy_vqa", {"q1": 1.0, "q2": 1.0}, {"reference": "no"}, "'q1' has a different reference"),
        ("pope", {"q1": 1.0, "q2": 1.0}, {}, "have no task in common"),
    ],
)
def test_runs_on_other_examples_are_refused(tmp_path, task, second, changes, message):
    write_run(tmp_path / "a", "easy_vqa", {"q1": 1.0, "q2": 0.0})
    write_run(tmp_path / "b", task, second, **changes)
    with pytest.raises(ValueError, match=message):
        compare(tmp_path / "a", tmp_path / "b")


def test_corpus_metrics_are_computed_for_each_resample(tmp_path):
    same = {"question": "Is it?", "image": stored()}
    rows = [
        {**same, "question_id": str(number), "answer": "yes" if number % 2 else "no", "category": category}
        for category in ("random", "popular")
        for number in range(20)
    ]
    write_split(tmp_path / "data", "test", rows)
    right = {f"{row['category']}/{row['question_id']}": row["answer"] for row in rows}
    for name, answers in (("a", dict.fromkeys(right, "yes")), ("b", right)):
        assess_answers("pope", tmp_path / "data", answers, tmp_path / name)
        write_results(tmp_path / name)
    found = {each.metric: each for each in compare(tmp_path / "a", tmp_path / "b", num_corpus_resamples=100)}
    assert found["random/llava/f1"].first == found["popular/lmms_eval/f1"].first == pytest.approx(2 / 3)
    assert found["llava/f1"].first == pytest.approx(2 / 3)
    assert found["llava/f1"].second == found["llava/mean_f1"].second == 1
    # All answers are yes: F1 is 2 p / (p + 1) for a share p of yes among the labels; p has a standard error of 0.079.
    assert found["llava/f1"].low == pytest.approx(1 - 2 * 0.655 / 1.655, abs=0.04)
    assert found["llava/f1"].high == pytest.approx(1 - 2 * 0.345 / 1.345, abs=0.04)


def test_rows_of_one_question_are_resampled_together():
    pairs = []
    for question in range(30):
        for rotation in range(2):
            example = Example(str(question + rotation * 1_000_000), "", [], "A", {"num_rows": 2, "category": "c"})
            options = ("A" if rotation == 0 or question % 3 else "B", "A")
            pairs.append(tuple(Record(example, "", "", score=Score({}, prediction=option)) for option in options))
    [difference, of_category] = compare_task(find_task("mmbench"), pairs, 200, 100, 0)
    assert (difference.metric, difference.second, difference.num) == ("circular/accuracy", 1, 30)
    assert of_category == replace(difference, metric="c/circular/accuracy")
    assert difference.first == pytest.approx(2 / 3)
    # A third of 30 questions differ: a standard error of 0.086.
    assert difference.high - difference.low == pytest.approx(2 * 1.96 * 0.086, rel=0.3)


def test_grades_of_different_judges_are_not_compared(tmp_path):
    for name, judge in (("a", "gpt"), ("b", "llama")):
        write_run(tmp_path / name, "mmvet", {"q1": 1.0})
        write_results(tmp_path / name, results=[{"task": "mmvet", "judge": {"model": judge}}])
    with pytest.raises(ValueError, match="mmvet was graded by gpt, but the other run uses llama"):
        compare(tmp_path / "a", tmp_path / "b")


def test_comparison_says_how_to_repeat_both_runs_and_what_has_no_metric(tmp_path):
    for name in ("a", "b"):
        write_run(tmp_path / name, "easy_vqa", {"q1": 1.0})
        write_run(tmp_path / name, "mmvet", {"q1": 1.0}, judge_error="no grade")
        write_results(tmp_path / name, model_hash=name * 64, command=f"sq-llava evaluate {name}")
    compare(tmp_path / "a", tmp_path / "b", tmp_path / "out")
    content = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert [run["model_hash"] for run in content["runs"]] == ["a" * 64, "b" * 64]
    report = (tmp_path / "out" / "comparison.md").read_text()
    assert f"(hash {'a' * 64}), code cccccccccccc, seed 0, 2026-01-01: `sq-llava evaluate a`" in report
    assert "## mmvet: nothing to compare" in report


@pytest.mark.parametrize(
    "options, message",
    [
        ({"limit": 2}, "such as 'q1'"),
        ({"tasks": "easy_vqa,pope"}, "has no results for pope"),
        ({"out": "."}, "this run writes to the same folder"),
        ({"tasks": "mmvet"}, "has no results for mmvet"),  # its judge is not known
        ({"judge_model": "other"}, "easy_vqa was graded by judge, but the other run uses other"),
    ],
)
def test_run_that_cannot_be_compared_does_not_start(tmp_path, monkeypatch, options, message):
    data = write_easy_vqa(tmp_path / "data", ["is it?"] * 4)
    write_json(tmp_path / "model" / "config.json", {})
    write_run(tmp_path / "a", "easy_vqa", {f"q{number}": 1.0 for number in range(4)})
    write_run(tmp_path / "a", "mmvet", {"q1": 1.0})
    judged = [{"task": "easy_vqa", "judge": {"model": "judge"}}]
    write_results(tmp_path / "a", results=judged, data_hashes={"easy_vqa": "-"})
    monkeypatch.chdir(tmp_path / "a")
    defaults = {"model": tmp_path / "model", "data": data, "tasks": "easy_vqa", "out": "b", "against": tmp_path / "a"}
    done = run_evaluate(**{**defaults, **options})
    assert done.exit_code == 1
    assert message in done.output
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["easy_vqa", "mmvet", "results.json"]


def test_values_are_not_cut_on_a_narrow_terminal(capsys, monkeypatch):
    monkeypatch.setattr(command.console, "width", 80)
    name = "complex/both_orders/relative_score"
    metric = Metric(name, 104.16666, 12345, 0.12345, (103.9247, 104.4086))
    command.show([TaskResult("llava_bench", "data", "", 12345, 2, 0.998, [metric])])
    difference = Difference("llava_bench", name, 104.1667, 133.3333, 29.1667, -10.1234, 110.4321, 12345)
    command.show_differences([difference], Path("out"))
    shown = capsys.readouterr().out
    for figure in (
        "104.1667",
        "0.1235",
        "103.9247 to 104.4086",
        "12,345",
        "133.3333",
        "+29.1667",
        "-10.1234 to +110.4321",
        "99.8% parsed",
    ):
        assert figure in shown
    assert max(map(len, shown.splitlines())) <= 80
    folded = shown.partition("compared with the other")[2].splitlines()
    assert name in "".join(line[1:14].strip() for line in folded)


@pytest.mark.parametrize(
    "models, out, folders",
    [
        (["runs/a/model"], "out", ["out"]),
        (["runs/a/model"], None, ["runs/evaluation/model"]),
        (["org/one", "two"], "out", ["out/one", "out/two"]),
        (["org/one", "two", "two"], None, ["runs/evaluation/one", "runs/evaluation/two"]),
        (["runs/a/model", "/b/model"], "out", ["out/runs-a-model", "out/b-model"]),
    ],
)
def test_each_of_several_models_has_its_own_folder(models, out, folders):
    found = command.output_folders(models, out and Path(out))
    assert list(map(str, found.values())) == folders


@pytest.mark.slow
def test_command_compares_with_a_folder_or_with_another_model(tmp_path):
    one, other = (tiny.save_model(tmp_path / name) for name in ("one", "other"))
    same = {"tasks": "easy_vqa", "data": write_easy_vqa(tmp_path / "data", ["is it?"] * 4)}
    done = run_evaluate(model=one, out=tmp_path / "a", against=other, **same)
    assert done.exit_code == 0, done.output
    assert (tmp_path / "a" / "against" / "results.json").is_file()
    content = json.loads((tmp_path / "a" / "comparison" / "comparison.json").read_text())
    assert (content["first"], content["second"]) == (str(tmp_path / "a" / "against"), str(tmp_path / "a"))
    assert "easy_vqa, compared with the other" in done.output
    done = run_evaluate(model=other, out=tmp_path / "b", against=tmp_path / "a", **same)
    assert done.exit_code == 0, done.output
    assert (tmp_path / "b" / "comparison" / "comparison.md").is_file()
    assert not (tmp_path / "b" / "against").exists()


def coverage(num_sets: int, interval_of) -> float:
    return sum(low <= truth <= high for low, high, truth in map(interval_of, range(num_sets))) / num_sets


@pytest.mark.long
@pytest.mark.slow
def test_interval_of_a_mean_covers_the_truth_in_95_of_100_datasets():
    def interval_of(seed):
        draw = np.random.default_rng(1000 + seed)
        skill = draw.random(150)  # both runs find the same questions hard
        first, second = (draw.random(150) < skill), (draw.random(150) < np.minimum(1, skill + 0.1))
        return *difference_interval(second.astype(float) - first, 400, seed), 0.1 - 0.1**2 / 2

    assert 0.92 <= coverage(300, interval_of) <= 0.98


@pytest.mark.long
@pytest.mark.slow
def test_interval_of_a_ratio_covers_the_truth_in_95_of_100_datasets():
    def ratio(records):
        parts, sizes = zip(*(record.score.prediction for record in records))
        return {"ratio": math.fsum(parts) / math.fsum(sizes)}

    task = Task("ratio", "", None, None, None, "ratio", corpus_metrics=ratio)

    def interval_of(seed):
        draw = np.random.default_rng(seed)
        pairs = []
        for number in range(80):
            example = Example(str(number), "", [], None)
            size = draw.exponential() + 0.2
            parts = [(size * draw.random() * scale, size) for scale in (1.0, 1.4)]
            pairs.append(tuple(Record(example, "", "", score=Score({}, prediction=part)) for part in parts))
        [difference] = compare_task(task, pairs, 1, 200, seed)
        return difference.low, difference.high, 0.2

    assert 0.89 <= coverage(200, interval_of) <= 0.98
