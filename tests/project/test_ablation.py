"""The ablation: its statistics, its report, and a quick ablation that is resumed."""

import json
import shlex
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import ablation
from tests import tiny
from tests.warm_python import warm_python


pytestmark = pytest.mark.slow


KINDS = {"shape": 0.5, "colour": 0.7}


def finished(setting: str, seed: int, accuracy: float, budget: int = 60) -> dict:
    run = {"setting": setting, "seed": seed, "budget": budget, "accuracy": accuracy, "accuracy_by_kind": KINDS}
    questions = {"questions_asked": 8, "questions_distinct": 6, "questions_valid_share": 0.5}
    return run | questions | {"training_seconds": 20.0, "test_questions": 49, "test_stride": 200, "stage1_steps": 150}


def test_interval_is_students_over_the_seeds():
    # The standard deviation is 1 and the standard error 1 / sqrt(3); t(0.975, 2) = 4.303.
    assert ablation.interval([1.0, 2.0, 3.0]) == pytest.approx({"mean": 2.0, "half_width": 2.4843}, abs=1e-4)
    # Standard deviation sqrt(2.5), standard error sqrt(0.5); t(0.975, 4) = 2.776.
    assert ablation.interval([1.0, 2.0, 3.0, 4.0, 5.0])["half_width"] == pytest.approx(1.9629, abs=1e-4)
    assert ablation.interval([0.25]) == {"mean": 0.25, "half_width": None}


def test_differences_are_taken_within_a_seed():
    runs = [finished("baseline", 0, 0.80), finished("baseline", 1, 0.60)]
    runs += [finished("sq-0.5", 1, 0.63), finished("sq-0.5", 0, 0.81)]
    (table,) = ablation.summarize(runs)
    baseline, asked = table["rows"]
    assert asked["accuracies"] == [0.81, 0.63] and baseline["differences"] == {}
    # 0.01 and 0.03: the mean is 0.02, the standard error 0.01, and t(0.975, 1) is 12.706.
    assert asked["differences"]["baseline"] == pytest.approx({"mean": 0.02, "half_width": 0.12706})


def test_only_seeds_with_all_settings_are_in_a_table():
    runs = [finished("baseline", seed, 0.8) for seed in range(3)] + [finished("paper", seed, 0.9) for seed in (0, 2)]
    runs += [finished("baseline", 0, 0.8, budget=240), finished("paper", 1, 0.9, budget=240)]
    tables = ablation.summarize(runs)
    assert [(table["budget"], table["seeds"]) for table in tables] == [(60, [0, 2])]


def test_differences_from_0_are_bold_and_single_seeds_have_no_interval():
    assert ablation.points({"mean": -0.02, "half_width": 0.015}) == "**-2.0 ± 1.5**"
    assert ablation.points({"mean": 0.02, "half_width": 0.03}) == "+2.0 ± 3.0"
    assert ablation.points({"mean": 0.02, "half_width": None}) == "+2.0"


def test_small_budgets_of_a_seed_come_before_large_ones_and_stage_1_is_shared(tmp_path):
    scale = ablation.Scale("base")
    tasks = ablation.list_tasks(tmp_path, scale, [3, 4], [240, 60], ["baseline", "sq-0.5", "all"])
    of_seed = ["stage1-none", "stage1-paper"]
    of_seed += [f"{budget}-{name}" for budget in (60, 240) for name in ("baseline", "sq-0.5", "all")]
    assert [task.name for task in tasks] == [f"seed-{seed}/{name}" for seed in (3, 4) for name in of_seed]


def test_run_of_other_settings_is_refused(tmp_path):
    run = ablation.Run(tmp_path, ablation.Scale("base"), 0, "paper", 60)
    run.note.parent.mkdir()
    run.note.write_text(json.dumps(run.facts))
    assert ablation.read_note(run) == run.facts
    other = replace(run, scale=ablation.Scale("base", stage1_steps=9))
    with pytest.raises(
        ValueError, match=r"60-paper\.json: this run had stage1_steps=150, but 9 is asked for\. Choose another --work"
    ):
        ablation.read_note(other)


@pytest.mark.long
def test_command_that_the_report_names_runs_where_only_the_packages_are_installed(tmp_path, monkeypatch):
    monkeypatch.delenv("PYTHONPATH", raising=False)
    command = [warm_python(), *shlex.split(ablation.COMMAND)[1:], "--plan", "--seeds", "7", "--settings", "baseline"]
    root = Path(ablation.__file__).parents[1]
    done = subprocess.run([*command, "--work", str(tmp_path)], cwd=root, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "seed-7/240-baseline: about" in done.stdout
    report = (ablation.RESULTS / "ablation.md").read_text()
    assert f"Measured with `{ablation.COMMAND}`" in report


def test_missing_base_models_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"clip/config\.json does not exist\. Run `make demo` first"):
        ablation.main(["--base", str(tmp_path), "--work", str(tmp_path)])


@pytest.mark.long
def test_quick_ablation_reports_and_does_again_only_what_is_missing(tmp_path, capsys):
    tiny.save_towers(tmp_path)
    work, report = tmp_path / "work", tmp_path / "report"
    command = ["--quick", "--base", str(tmp_path), "--work", str(work), "--output-dir", str(report), "--budgets", "2"]
    command += ["--seeds", "0", "--settings", "baseline", "all"]
    ablation.main(command)
    first = json.loads((report / "ablation.json").read_text())
    assert {run["setting"] for run in first["runs"]} == {"baseline", "all"}
    assert first["tables"][0]["rows"][1]["differences"].keys() == {"baseline"}
    assert "| prototypes (paper), self-questions 0.5 |" in (report / "ablation.md").read_text()
    assert (report / "ablation.png").stat().st_size > 0

    (work / "seed-0" / "2-all.json").unlink()
    capsys.readouterr()
    ablation.main(command)
    assert "1 of 4 to run" in capsys.readouterr().out
    again = json.loads((report / "ablation.json").read_text())
    accuracies = [{run["setting"]: run["accuracy"] for run in each["runs"]} for each in (first, again)]
    assert accuracies[0] == accuracies[1]
