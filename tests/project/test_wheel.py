"""The contents of a wheel, and the errors when a file or an optional package is missing."""

import shutil
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from typer.testing import CliRunner

import train_sft
from sq_llava import resources
from sq_llava.checkpoints import load as checkpoint
from sq_llava.checkpoints import push as publishing
from sq_llava.cli.main import app
from sq_llava.evaluation import easy_vqa
from sq_llava.evaluation.reading import Data
from sq_llava.resources import CODE_FILES, code_file, find_resource
from tests import ROOT, tiny
from tests.wheel_checks import build_wheel


NOT_SOURCES = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist", "runs")


def files_below(folder: Path) -> set[str]:
    return {
        path.relative_to(folder.parent).as_posix()
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> zipfile.ZipFile:
    """A wheel that is built from a copy of the tree, which has a leftover file of an earlier build."""
    folder = tmp_path_factory.mktemp("wheel")
    shutil.copytree(ROOT, folder / "tree", ignore=NOT_SOURCES)
    leftover = folder / "tree" / "build" / "lib" / "sq_llava" / "recipes" / "outdated.yaml"
    leftover.parent.mkdir(parents=True)
    leftover.touch()
    (folder / "dist").mkdir()
    return zipfile.ZipFile(build_wheel(folder / "dist", folder / "tree"))


@pytest.mark.slow
def test_wheel_holds_every_file_of_the_library_and_nothing_else(wheel):
    names = {name for name in wheel.namelist() if ".dist-info/" not in name}
    shipped = {"train_sft.py", *CODE_FILES} | files_below(ROOT / "sq_llava")
    at_the_top = {"model_card.md"} | files_below(ROOT / "recipes") | files_below(ROOT / "space")
    assert names == shipped | {f"sq_llava/{name}" for name in at_the_top}
    for name in shipped:
        assert wheel.read(name) == (ROOT / name).read_bytes(), name
    for name in at_the_top:
        assert wheel.read(f"sq_llava/{name}") == (ROOT / name).read_bytes(), name


def test_wheel_has_the_command(wheel):
    entry_points = next(name for name in wheel.namelist() if name.endswith("entry_points.txt"))
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]["sq-llava"]
    assert f"sq-llava = {declared}" in wheel.read(entry_points).decode()


def test_nothing_is_looked_for_beside_the_packages():
    """A path that leads out of the package is right only in the source tree."""
    for file in [*(ROOT / "sq_llava").rglob("*.py"), ROOT / "train_sft.py"]:
        text = file.read_text()
        assert "__file__).parent.parent" not in text and "__file__).parents" not in text, file


def test_files_are_found_wherever_the_command_is_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_resource("model_card.md").read_bytes() == (ROOT / "model_card.md").read_bytes()
    assert [code_file(name).parent for name in CODE_FILES] == [ROOT] * len(CODE_FILES)
    with pytest.raises(FileNotFoundError, match=r"no_card\.md is missing\. Install sq-llava again"):
        find_resource("no_card.md")


def test_without_the_template_a_merge_ends_before_a_model_is_loaded(tmp_path, monkeypatch):
    """The card is written last, so hours of work would be lost."""
    for name in ("sq_llava.checkpoints.card", "sq_llava.checkpoints.load"):
        monkeypatch.delitem(sys.modules, name)

    def find(name):
        raise FileNotFoundError(f"{name} is missing")

    monkeypatch.setattr(resources, "find_resource", find)
    (tmp_path / "adapter").mkdir()
    result = CliRunner().invoke(app, ["merge", str(tmp_path / "adapter"), "--out", str(tmp_path / "model")])
    assert result.exit_code == 1 and "model_card.md is missing" in result.stderr
    assert list(tmp_path.iterdir()) == [tmp_path / "adapter"]


def hide(monkeypatch, package: str) -> None:
    """Makes the package look as if it were not installed, and the modules that use it as if not yet imported."""
    monkeypatch.setitem(sys.modules, package, None)
    for name in [name for name in sys.modules if name.startswith(("sq_llava.serving.", "sq_llava.page."))]:
        parent, _, child = name.rpartition(".")
        if child != "command":
            monkeypatch.setattr(
                sys.modules[parent], child, sys.modules[name]
            )  # so that it is restored together with the module
            monkeypatch.delitem(sys.modules, name)


def test_missing_package_of_the_page_is_named_with_its_extra(tmp_path, monkeypatch):
    hide(monkeypatch, "gradio")
    (tmp_path / "config.json").write_text("{}")
    result = CliRunner().invoke(app, ["demo", str(tmp_path)])
    assert result.exit_code == 1
    assert result.stderr == "Error: gradio is not installed: pip install 'sq-llava[page]'.\n"


@pytest.mark.parametrize(
    ("package", "extra", "settings"),
    [
        ("tensorboard", "tracking", ["--report_to", "tensorboard"]),
        ("bitsandbytes", "quantization", ["--load_in_8bit"]),
    ],
)
def test_training_asks_for_optional_packages_before_it_reads_anything(package, extra, settings, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    recipe = ["--stage", "align", "--dataset_path", "none.json", "--output_dir", str(tmp_path), "--use_cpu", "true"]
    with pytest.raises(ValueError, match=rf"{package} is not installed: pip install 'sq-llava\[{extra}\]'"):
        train_sft.main([*recipe, *settings])


def test_images_of_easy_vqa_are_named_with_their_extra(tmp_path, monkeypatch):
    monkeypatch.setattr(easy_vqa, "find_spec", lambda _: None)
    (tmp_path / "test.json").write_text("[]")
    with pytest.raises(ValueError, match=r"found no folder images .* pip install 'sq-llava\[demo\]'"):
        easy_vqa.read(Data(tmp_path))


@pytest.fixture
def model(tmp_path) -> Path:
    """A plain checkpoint."""
    processor = tiny.tiny_processor()
    tiny.tiny_model_for(processor).save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_card_that_cannot_be_written_ends_a_push_before_anything_is_loaded_or_sent(model, monkeypatch):
    (model / "processor_config.json").unlink()
    monkeypatch.setattr(publishing, "check_loading", lambda *_: pytest.fail("loaded"))
    result = CliRunner().invoke(app, ["push", str(model), "org/name", "--dry-run"])
    assert result.exit_code == 1 and "processor_config.json is missing" in result.stderr


def test_provenance_that_cannot_be_read_ends_a_merge_and_a_stage_before_a_model_is_loaded(model, monkeypatch):
    """The provenance is written after hours of work."""
    (model / "provenance.yaml").write_text("no fields")
    (model / "adapter_config.json").write_text("{}")
    monkeypatch.setattr(checkpoint, "load_checkpoint", lambda *_: pytest.fail("loaded"))
    with pytest.raises(ValueError, match=r"provenance.yaml holds 'no fields'"):
        checkpoint.merge_adapter(str(model), str(model / "merged"))
    (model / "adapter_config.json").unlink()  # a stage can also start from a plain checkpoint
    monkeypatch.setattr(train_sft, "load_base", lambda *_: pytest.fail("loaded"))
    recipe = ["--stage", "instruct", "--dataset_path", "none.json", "--output_dir", str(model / "stage2")]
    with pytest.raises(ValueError, match=r"provenance.yaml holds 'no fields'"):
        train_sft.main([*recipe, "--model_name_or_path", str(model), "--use_cpu", "true"])
