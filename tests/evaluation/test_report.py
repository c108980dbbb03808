"""The report of a run: what was run, all metrics, the paper's results, examples with images, entries for the Hub."""

import json
from dataclasses import replace

import pytest
import yaml
from huggingface_hub import parse_eval_result_entries
from PIL import Image

from sq_llava.evaluation.report import choose, reach, save_pictures, write_report
from sq_llava.evaluation.results import write_results
from sq_llava.evaluation.run import IDENTITY, TASKS, Evaluation, describe
from sq_llava.evaluation.task import Example, Record, Score
from sq_llava.inference.settings import SelfQuestioning
from sq_llava.resumable.run_note import RunNote
from tests.evaluation_layouts import assess_answers, examples_of, stored, write_split


ANSWERS = {"popular/1": "Yes.", "popular/2": "no | <b>\n# bold", "random/1": "no", "random/2": None}


@pytest.fixture
def run(tmp_path, monkeypatch):
    """POPE with one right answer in each category, one wrong and one that failed."""
    question = {"question": "Is it?", "answer": "yes"}
    rows = [
        {**question, "question_id": str(number), "category": category, "image": stored(number)}
        for category in ("popular", "random")
        for number in (1, 2)
    ]
    write_split(tmp_path / "data", "test", rows)
    monkeypatch.setattr("sq_llava.evaluation.run.hash_of_model", lambda model: "0" * 40)  # org/model does not exist

    def write(num_left_out=0, graded=None, **changes):
        out = tmp_path / "out"
        result = assess_answers("pope", tmp_path / "data", ANSWERS, out)
        metrics = [replace(metric, num=metric.num - num_left_out) for metric in result.metrics]
        result = replace(result, metrics=metrics)
        evaluation = replace(Evaluation("org/model", ["pope"], str(tmp_path / "data"), out), **changes)
        write_results(
            [replace(result, data_hash="d" * 64, **(graded or {}))], out, describe(evaluation, {"pope": "d" * 64})
        )
        save_pictures(TASKS["pope"], examples_of("pope", tmp_path / "data"), out / "pope")
        return write_report(out, TASKS)

    return write


def test_report_says_what_was_run(run):
    text = run(system_message="Be *brief*.").read_text()
    for expected in (
        "| model | org/model",
        "torch 2",
        "| data | pope dddddddddddd |",
        "| examples | all |",
        "auto, 8, 0",
    ):
        assert expected in text
    assert "| system message | Be \\*brief\\*. |" in text


def test_report_has_every_metric(run):
    path = run(limit=4)
    text = path.read_text()
    results = json.loads((path.parent / "results.json").read_text())["results"]
    assert len(results) > 10
    for each in results:
        assert f"| pope | {each['metric'].replace('_', chr(92) + '_')} | {each['value']:.4f} |" in text
    assert "| 4 | 75.0% | 1 |" not in text  # two of four can be parsed: one is odd, one failed
    assert "| 4 | 50.0% | 1 | 0 |" in text
    assert "**at most 4 per task**" in text
    assert "- `lmms_eval/` follows lmms-eval 0.7.3." in text
    assert {each["follows"] for each in results if "lmms_eval/" in each["metric"]} == {"lmms-eval 0.7.3"}


def test_bars_do_not_pass_the_largest_value(run):
    results = json.loads((run().parent / "results.json").read_text())["results"]
    for each in results:
        if each["interval"] is not None:
            low, high = each["interval"]
            assert 0 <= low <= high <= 1
            assert reach(each).tolist() == pytest.approx([max(0, each["value"] - low), max(0, high - each["value"])])


def test_results_of_the_paper_are_labelled(run):
    text = run().read_text()
    assert "| **this run** | 33.3 |" in text  # F1: 2/3 of popular, 0 of random
    assert "| SQ-LLaVA-7B, LLaVA data (paper) | 87.7 |" in text
    assert all("(paper)" in line for line in text.splitlines() if "SQ-LLaVA-7B" in line)
    assert "not measured here" in text


def test_report_has_best_and_worst_examples(run):
    text = run().read_text()
    right, wrong = text.split("### Best examples (score 1)")[1].split("### Worst examples (score 0)")
    assert "`popular/1`" in right
    assert all(f"`{id}`" in wrong for id in ("popular/2", "random/1", "random/2"))


@pytest.mark.slow
def test_answers_are_escaped(run):
    text = run().read_text()
    assert "no \\| \\<b\\> \\# bold" in text
    assert "it broke" in text


def test_charts_and_pictures_are_images(run):
    path = run()
    names = ["figures.png", "pope/breakdown.png", "pope/pictures/0.jpg"]
    assert all(Image.open(path.parent / name).size[0] >= 8 for name in names)
    assert all(f"]({name})" in path.read_text() for name in names)
    assert not (path.parent / "pope/pictures/3.jpg").exists()  # its example failed


def test_best_and_worst_are_chosen_by_the_main_metric():
    task = replace(TASKS["easy_vqa"], main_metric="main")
    scores = [{"other": 1 - value, "main": value} for value in (0.3, 1.0, 0.0, 1.0, 0.0, 1.0, 1.0)]
    records = [Record(Example("", "", [], None), "", "", score=Score(each)) for each in scores]
    without = Record(Example("", "", [], None), "", "")
    assert choose(task, [without, *records]) == {
        "Best examples (score 1)": [2, 4, 6],
        "Worst examples (score 0)": [3, 5],
    }
    assert choose(task, [without] * 3) == {"Examples": [0, 1, 2]}
    assert choose(task, [records[1]] * 2) == {"Examples (all score 1)": [0, 1]}


def test_entry_for_the_hub_can_be_read_by_its_library(run):
    path = run().parent / ".eval_results" / "pope.yaml"
    [entry] = parse_eval_result_entries(yaml.safe_load(path.read_text()))
    assert (entry.dataset_id, entry.task_id, entry.value) == ("lmms-lab-encoder/POPE", "pope", 33.3333)
    assert entry.notes.startswith("llava/mean_f1 (follows LLaVA 1.2.2); 4 examples, 1 failed; hashes: model 0000")


@pytest.mark.slow
def test_entry_for_the_hub_says_how_to_repeat_the_run_and_who_graded(run):
    out = run(split="validation", seed=5).parent
    content = json.loads((out / "results.json").read_text())
    content |= {"model_hash": "m" * 64, "command": "sq-llava evaluate --tasks pope"}
    for each in content["results"]:
        each["judge"] = {"answered_by": ["gpt-2026"], "dates": ["2026-01-01"]}
    (out / "results.json").write_text(json.dumps(content))
    write_report(out, TASKS)
    [entry] = parse_eval_result_entries(yaml.safe_load((out / ".eval_results" / "pope.yaml").read_text()))
    assert "; split validation; graded by gpt-2026; hashes: model mmm" in entry.notes
    assert f"code {content['code_hash']}, data {'d' * 64}; Python {content['python']}, torch " in entry.notes
    assert entry.notes.endswith("seed 5; sq-llava evaluate --tasks pope")


@pytest.mark.parametrize(("num_unjudged", "is_told"), [(0, False), (1, True)])
def test_ungraded_answers_are_in_the_first_line_and_no_figure_is_beside_the_papers(num_unjudged, is_told, run):
    judge = {"model": "gpt-2026", "answered_by": ["gpt-2026"], "dates": ["2026-01-01"]}
    text = run(num_unjudged, graded={"judge": judge, "num_unjudged": num_unjudged}).read_text()
    first = text.partition("\n")[0]
    warning = "**1 of 4 answers of POPE have no grade. Figures that need a grade are only about the others.**"
    assert first == (warning if is_told else "# Evaluation of org/model")
    assert ("| **this run** | - |" in text) == is_told and ("![Main metric" not in text) == is_told


def test_part_of_a_benchmark_gets_no_entry_for_the_hub(run):
    assert not (run(limit=4).parent / ".eval_results").exists()


def test_task_without_a_metric_says_why(tmp_path, run):
    out = run().parent
    content = json.loads((out / "results.json").read_text())
    content |= {"results": [], "missing": {"pope": "graded by a judge: set --judge-model"}}
    (out / "results.json").write_text(json.dumps(content))
    assert "**No metrics**: graded by a judge" in write_report(out, TASKS).read_text()


def test_another_seed_is_refused_only_if_answers_depend_on_it(tmp_path):
    def note(seed, num_questions, out):
        thinking = SelfQuestioning(num_questions)
        evaluation = Evaluation(str(tmp_path), ["easy_vqa"], "data", tmp_path / out, seed=seed, thinking=thinking)
        return RunNote(evaluation.out, describe(evaluation, {}), IDENTITY)

    note(0, 0, "greedy").write()
    note(1, 0, "greedy")
    note(0, 1, "sampled").write()
    with pytest.raises(ValueError, match=r"self_questioning '1 self-questions, 1 votes, seed 0', .* seed 1'"):
        note(1, 1, "sampled")
