"""The clean copy of all data of a recipe, and the preview of rows that training cannot use."""

import json
from pathlib import Path

import pytest
import yaml
from rich.console import Console
from rich.progress import Progress
from typer.testing import CliRunner

from sq_llava.cli.main import app
from sq_llava.data.sources import DataSource
from sq_llava.doctor.check import DataCheck, examine
from sq_llava.doctor.report import print_preview
from sq_llava.training.settings import parse_recipe
from tests import tiny
from tests.pictures import encoded


def write(file: Path, *answers: str, **fields) -> str:
    """Writes rows with these answers. An empty answer is an error."""
    rows = [{"messages": [{"role": "user", "content": "What?"}, {"role": "assistant", "content": a}]} for a in answers]
    file.write_text(json.dumps([row | fields for row in rows]))
    return str(file)


@pytest.fixture
def recipe(tmp_path) -> Path:
    """Two sources for training, of which the first has no good row, and three for evaluation."""
    tiny.save_towers(tmp_path)
    settings = {
        "stage": "instruct",
        "vision_model_name_or_path": str(tmp_path / "clip"),
        "text_model_name_or_path": str(tmp_path / "llama"),
        "output_dir": str(tmp_path / "run"),
        "eval_strategy": "epoch",
        "datasets": [
            {"path": write(tmp_path / "bad.json", "")},
            {"path": write(tmp_path / "train.json", "A dog.", ""), "weight": 2.0},
        ],
        "eval_datasets": [{"path": write(tmp_path / "eval.json", "A cat.", "")}],
        "generation_datasets": [{"path": write(tmp_path / "prompts.json", "")}],
        "text_probe": write(tmp_path / "probe.json", "A house.", ""),
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(settings))
    return tmp_path / "recipe.yaml"


def test_copies_are_named_under_the_setting_that_they_belong_to(recipe):
    folder, clean = recipe.parent, recipe.parent / "clean"
    result = CliRunner().invoke(app, ["doctor", "--config", str(recipe), "--fix", str(clean), "--json"])
    assert result.exit_code == 1, result.output
    train, held_out = (
        {"path": str(clean / name), "image_root": str(folder.resolve())} for name in ("1-train.jsonl", "2-eval.jsonl")
    )
    train["weight"] = 2.0
    printed = result.stderr.partition(f"Wrote {clean}. Replace the data settings of the recipe with:\n")[2]
    fixed = {"datasets": [train], "eval_datasets": [held_out], "text_probe": str(clean / "4-probe.jsonl")}
    assert yaml.safe_load(printed) == fixed
    assert f"# datasets: {folder}/bad.json has no row left" in printed
    assert f"# generation_datasets: {folder}/prompts.json has no row left" in printed

    sources = json.loads(result.stdout)["summary"]["sources"]
    settings = ["datasets", "datasets", "eval_datasets", "generation_datasets", "text_probe"]
    assert [source["setting"] for source in sources] == settings
    assert [source["fixed"] for source in sources[:4]] == [None, train, held_out, None]

    without = yaml.safe_load(recipe.read_text())
    del without["generation_datasets"]
    recipe.write_text(yaml.safe_dump(without | fixed))
    assert [source.path for source in parse_recipe(recipe, use_cpu=True)[0].datasets] == [train["path"]]


def test_preview_shows_the_error_of_a_row_that_cannot_be_used_and_then_the_other_rows(tmp_path, capsys):
    before, start, pixels = encoded(tiny.picture(), "PNG").partition(b"IDAT")
    (tmp_path / "broken.png").write_bytes(before + start + b"\xff\xff" + pixels[2:])
    files = [
        write(tmp_path / "long.json", "a red circle " * 200),
        write(tmp_path / "broken.json", "A cat.", image="broken.png"),
        write(tmp_path / "good.json", "A dog."),
    ]
    check = DataCheck(
        list(map(DataSource, files)),
        tiny.tiny_processor(system_message="Be kind."),
        max_length=200,
        measure_lengths=False,
    )
    report = examine(check, Progress(disable=True))
    assert not report.findings
    print_preview(check, report, 0, Console(width=500))
    shown = capsys.readouterr().out
    assert shown.count("Training would stop at this row") == 2
    assert "max_length" in shown and "broken.png: cannot be read as an image" in shown and "* A dog.</s>*" in shown
