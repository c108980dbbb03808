"""The example with SmolLM2: its descriptions of photographs, and three steps of both of its stages."""

import json
from importlib.util import find_spec

import pytest

from examples.smollm2 import run
from examples.smollm2.data import read_descriptions, text_prompts
from sq_llava.training.text_probe import METRIC
from tests.runs import history


def test_each_description_has_a_caption_and_questions_that_are_asked_once():
    for entry in read_descriptions():
        texts = [entry["caption"], *(text for pair in entry["questions"] for text in pair)]
        assert all(text[0].isupper() and text[-1] in ".?" for text in texts), entry
        questions = [question for question, _ in entry["questions"]]
        assert len(set(questions)) == len(questions) and all(question.endswith("?") for question in questions)
    unseen = {entry["file"] for entry in read_descriptions() if entry.get("unseen")}
    assert unseen and not unseen & {entry["file"] for entry in read_descriptions() if not entry.get("unseen")}
    assert len(set(text_prompts())) == len(text_prompts())


def test_missing_packages_are_named_with_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run, "NEEDED", {"not_installed": "not-installed"})
    with pytest.raises(SystemExit):
        run.main(["--output-dir", str(tmp_path)])
    assert "not-installed not installed: run `pip install -r examples/smollm2" in capsys.readouterr().err


@pytest.mark.walk
def test_three_steps_of_both_stages_end_in_a_report(tmp_path):
    missing = [package for module, package in run.NEEDED.items() if find_spec(module) is None]
    if missing:
        pytest.skip(f"the packages of examples/smollm2/requirements.txt are not installed: {', '.join(missing)}")
    run.main(["--quick", "--output-dir", str(tmp_path)])
    steps = json.loads((tmp_path / "steps.json").read_text())
    assert steps["stage 1"]["steps"] == steps["stage 2"]["steps"] == 3
    # The prompts' answers are SmolLM2's own, in its own layout: it must find them likely before it is trained.
    before, *_, after = [entry[METRIC] for entry in history(tmp_path / "stage2") if METRIC in entry]
    assert before < 0.5 and before != after
    report = (tmp_path / "report.md").read_text()
    assert f"| before stage 2 | {before:.3f} |" in report and "`gravel.png`" in report
