"""Training on self-made data: the list of runs, and the table of their results. Nothing is trained here."""

import json
from argparse import Namespace
from pathlib import Path

import pytest

from benchmarks import self_training


def tasks_of(work: Path, seeds: list[int]) -> list[self_training.Task]:
    numbers = {"budget": 60, "weak_steps": 40, "num_questions": 10, "test_stride": 10}
    return self_training.list_tasks(Namespace(work=work, base=Path("runs/demo"), seeds=seeds, **numbers))


def finished(task: self_training.Task, accuracy: float) -> dict:
    made = {"num_kept": 1500, "left_out": {"confidence: low log-probability": 7}}
    truth = {"premise_is_true": 0.9, "own_answer_is_right": None, "yes_of_yes_no": 0.5}
    sets = dict.fromkeys(self_training.FILTERS, made | truth)
    return task.facts | {"accuracy": accuracy, "test_questions": 968, "sets": sets}


def test_data_is_generated_before_it_is_trained_on(tmp_path):
    tasks = tasks_of(tmp_path, [3])
    training = next(task for task in tasks if (task.generator, task.data) == ("weak", "filtered"))
    assert not training.is_ready() and training.generation in tasks
    training.generation.note.parent.mkdir()
    training.generation.note.write_text(json.dumps(training.generation.facts))
    assert training.is_ready()
    assert len({task.name for task in tasks}) == len(tasks)


def test_table_has_means_and_differences_within_a_seed(tmp_path):
    tasks = tasks_of(tmp_path, [0, 1])
    accuracies = {"real questions": (0.80, 0.90), "unfiltered": (0.70, 0.82), "filtered": (0.75, 0.87)}
    notes = {task.name: finished(task, accuracies.get(task.data, (0.5, 0.5))[task.seed]) for task in tasks}
    lines = self_training.to_markdown({"command": "c", "torch": "2", "runs": notes}).splitlines()
    assert "| real questions | 1,961 | 100% | 100% | 49% |" in lines
    assert "| real questions | 85.0% (80.0 to 90.0) |  |  |" in lines
    # Minus real: -5 and -3, a standard error of 1 times 12.706. Minus unfiltered: +5 in both seeds, no spread.
    assert "| filtered, by the weak model | 81.0% (75.0 to 87.0) | -4.0 ± 12.7 | **+5.0 ± 0.0** |" in lines
    assert "| filtered, by the weak model | 1,500 | 90.0% |  | 50.0% (50 to 50) |" in lines


def test_missing_model_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"model/config\.json does not exist\. Run `make demo` first, or set --base"):
        self_training.main(["--base", str(tmp_path), "--work", str(tmp_path / "work")])
