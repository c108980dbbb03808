"""`sq-llava recipes` lists recipes and copies them."""

import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from sq_llava.cli.main import app
from sq_llava.cli.recipes import copy_recipes, list_recipes, summary
from sq_llava.resources import find_resource


FOLDERS = sorted({name.rpartition("/")[0] for name in list_recipes()} - {"accelerate"})


def run(*arguments):
    return CliRunner().invoke(app, ["recipes", *map(str, arguments)])


def test_every_recipe_is_listed_with_the_first_sentence_of_its_comment():
    result = run()
    assert result.exit_code == 0, result.output
    lines = dict(line.split(maxsplit=1) for line in result.stdout.splitlines())
    files = [path for path in find_resource("recipes").rglob("*") if path.is_file()]
    assert lines.keys() == list_recipes().keys() and len(lines) == len(files)
    assert lines["sq-llava-7b/stage1"] == "SQ-LLaVA-7B, stage 1: alignment on LLaVA-Pretrain, 558K captions."
    assert lines["accelerate/multi_node"] == "Two machines with eight GPUs each, with Slurm and torchrun."
    assert all(line.endswith(".") for line in lines.values())


def test_summary_is_a_whole_sentence_over_several_lines(tmp_path):
    (tmp_path / "recipe.yaml").write_text("# LLaVA-1.5 on\n# two lines. More.\nstage: align\n# no header\n")
    assert summary(tmp_path / "recipe.yaml") == "LLaVA-1.5 on two lines."


@pytest.mark.parametrize("name", ["sq-llava-7b/stage1", "recipes/sq-llava-7b/stage1.yaml"])
def test_one_recipe_is_copied_with_the_launch_settings(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run("copy", name).exit_code == 0
    launch = {f"accelerate/{file.name}" for file in (find_resource("recipes") / "accelerate").iterdir()}
    copied = {path.relative_to("recipes").as_posix() for path in Path("recipes").rglob("*") if path.is_file()}
    assert copied == {"sq-llava-7b/stage1.yaml", *launch}
    for path in copied:
        assert (Path("recipes") / path).read_bytes() == (find_resource("recipes") / path).read_bytes()


@pytest.mark.parametrize("folder", ["recipes", "my/own"])
@pytest.mark.parametrize("name", FOLDERS)
def test_commands_in_the_comments_of_a_copy_name_existing_files(name, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    written, kept = copy_recipes(name, Path(folder))
    assert written and not kept
    for file in (path for path in written if "accelerate" not in path.parts):
        commands = "\n".join(line for line in file.read_text().splitlines() if line.startswith("#  "))
        paths = re.findall(r"--config(?:_file)? (\S+)", commands)
        assert all(Path(path).is_file() for path in paths), paths
        assert folder == "recipes" or "recipes/" not in file.read_text()


def test_no_file_is_overwritten(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run("copy", "llava-7b/stage1")
    Path("recipes/accelerate/ddp.yaml").write_text("num_processes: 4")
    # Edited launch settings and identical recipes are kept.
    result = run("copy", "llava-7b")
    assert result.exit_code == 0
    assert "Kept recipes/accelerate/ddp.yaml" in result.stderr and "Kept recipes/llava-7b/stage1.yaml" in result.stderr
    assert Path("recipes/accelerate/ddp.yaml").read_text() == "num_processes: 4"
    Path("recipes/llava-7b/stage1.yaml").write_text("stage: align")
    Path("recipes/llava-7b/stage2.yaml").unlink()
    result = run("copy", "llava-7b")
    assert result.exit_code == 1 and "recipes/llava-7b/stage1.yaml exists already and is different" in result.stderr
    assert Path("recipes/llava-7b/stage1.yaml").read_text() == "stage: align"
    assert not Path("recipes/llava-7b/stage2.yaml").exists()


@pytest.mark.parametrize("name", ["", ".", "..", "../recipes", "sq-llava", "sq-llava-7b/stage"])
def test_unknown_recipe_is_refused(name, tmp_path):
    result = run("copy", name, tmp_path / "copies")
    assert result.exit_code == 1 and "no such recipe" in result.stderr
    assert not list(tmp_path.iterdir())
