"""The shared parts of the benchmarks, and the page with their results. No benchmark is run here."""

import json
import sys
from pathlib import Path

import pytest

from benchmarks import common, readme, three_systems
from sq_llava.evaluation import easy_vqa


FOLDER = Path(readme.__file__).parent
SHARED = {"common", "readme", "random_models", "load", "scene_measures", "scene_models", "scene_report", "scene_world"}
BY_HAND = {
    "gpu", "launchers", "shared_images", "sharing_accuracy", "serving", "asking_first", "ablation", "scenes",
    "self_training", "three_systems",
}  # fmt: skip


def parse(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["benchmark", *map(str, arguments)])
    return common.parse_arguments("What it does.", rows=(7, "Number of rows."))


def test_functions_run_in_turn_after_a_warm_up_of_each():
    calls = []
    times = common.interleave({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=2)
    assert calls == ["a", "b"] * 3 and [len(seconds) for seconds in times.values()] == [2, 2]


def test_ratio_is_taken_within_each_round():
    found = common.ratio({"peer": [2.0, 60.0, 8.0], "project": [1.0, 20.0, 2.0]}, "peer", "project")
    assert found == {"median": 3.0, "low": 2.0, "high": 4.0}
    assert common.with_spread(found) == "3 (2 to 4)"


def test_quick_run_prints_and_writes_nothing(monkeypatch, tmp_path, capsys):
    arguments = parse(monkeypatch, "--quick", "--output-dir", tmp_path)
    common.save("speed", {"figure": 1}, lambda report: "# Speed\n\n| a |", arguments)
    assert "| a |" in capsys.readouterr().out and not list(tmp_path.iterdir())


def test_result_names_its_command_and_machine(monkeypatch, tmp_path):
    arguments = parse(monkeypatch, "--rows", 9, "--output-dir", tmp_path)
    assert arguments.rows == 9
    common.save("speed", {"figure": 1}, lambda report: f"# Speed\n\n| {report['figure']} |", arguments)
    report = json.loads((tmp_path / "speed.json").read_text())
    assert report["figure"] == 1 and report["machine"]["torch"] == common.machine()["torch"]
    assert report["command"] == f"python -m benchmarks.speed --rows 9 --output-dir {tmp_path}"
    title, line, table = (tmp_path / "speed.md").read_text().strip().split("\n\n")
    assert (title, table) == ("# Speed", "| 1 |") and f"`{report['command']}`" in line and "cores of" in line


def test_page_has_each_benchmark_and_make_runs_no_other():
    assert set(readme.ORDER) | SHARED == {file.stem for file in FOLDER.glob("*.py")}
    makefile = (FOLDER.parent / "Makefile").read_text()
    run = makefile.partition("BENCHMARKS := ")[2].partition("\n\n")[0].replace("\\", "").split()
    assert set(run) == set(readme.ORDER) - BY_HAND


def test_table_of_three_systems_has_a_row_of_means_for_each():
    def run(accuracy):
        kinds = dict.fromkeys(easy_vqa.KINDS, 0.5)
        return {
            "trained_parameters": [1000, 2000], "image_tokens": 32, "accuracy": {"all": accuracy, **kinds},
            "blank_image_accuracy": 0.25,
        }  # fmt: skip

    lowest = {name: 0.5 + number / 10 for number, name in enumerate(three_systems.SYSTEMS)}
    runs = {name: [run(accuracy), run(accuracy + 0.2)] for name, accuracy in lowest.items()}
    report = {"stage1_steps": 3, "steps": 4, "seeds": [0, 1], "num_questions": 5, "blind_guess": 0.6, "runs": runs}
    lines = three_systems.to_markdown(report).splitlines()
    rows = [line for line in lines if line.startswith("| **")]
    assert [row.split("**")[1] for row in rows] == ["LLaVA", "MiniGPT-4", "SQ-LLaVA"]
    for row, accuracy in zip(rows, ("**60.0%** | 50.0 to 70.0", "**70.0%**", "**80.0%** | 70.0 to 90.0")):
        assert accuracy in row and row.endswith("| 25.0% |")
    assert sum(line.endswith("| 1,000; 2,000 | 32 |") for line in lines) == 3


@pytest.mark.parametrize("name", readme.ORDER)
def test_section_holds_the_result_or_says_that_there_is_none(name, monkeypatch, tmp_path):
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    assert f"Not measured yet. The command is `python -m benchmarks.{name}`" in readme.section(name)
    (tmp_path / f"{name}.md").write_text("# Title\n\n## Part\n\n![plot](plot.png) [other](https://x.org/b.png)\n")
    section = readme.section(name)
    assert section.startswith(f"## Title (`{name}`)\n\n### Part\n")
    assert section.endswith("![plot](results/plot.png) [other](https://x.org/b.png)")


@pytest.mark.slow
@pytest.mark.parametrize("file", sorted(common.RESULTS.glob("*.json")), ids=lambda file: file.stem)
def test_committed_tables_are_made_from_the_measured_numbers(file):
    assert readme.markdown_of(file.stem) == file.with_suffix(".md").read_text()
