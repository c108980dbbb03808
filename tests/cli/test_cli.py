"""The `sq-llava` command, as a user runs it."""

import json
import subprocess
import sys
from dataclasses import dataclass
from typing import Annotated

import pytest
import typer
from typer.testing import CliRunner

from sq_llava.cli.main import app
from sq_llava.cli.options import OptionsOf, takes_options
from sq_llava.inference.assistant import Assistant
from tests import tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, and a folder with two pictures and a text."""
    folder = tmp_path_factory.mktemp("cli")
    tiny.save_model(folder / "model", system_message="")
    (folder / "pictures").mkdir()
    for name in ("b.png", "a.png"):
        tiny.picture().save(folder / "pictures" / name)
    (folder / "pictures" / "notes.txt").write_text("no picture")
    return folder


def run(folder, *arguments, **kwargs):
    arguments = [str(argument) for argument in arguments]
    return CliRunner().invoke(app, [*arguments, "--model", str(folder / "model")], **kwargs)


def test_ask_prints_the_requested_number_of_questions(folder):
    image = folder / "pictures" / "a.png"
    result = run(folder, "ask", image, "-n", 3, "--after", "What is it?", "--max-new-tokens", 5, "--seed", 0, "--json")
    assert result.exit_code == 0, result.output
    (entry,) = json.loads(result.stdout)
    assert entry["image"] == str(image) and len(entry["questions"]) == 3


def test_folder_of_images_is_answered_in_order_as_json(folder):
    result = run(folder, "answer", folder / "pictures", "What is it?", "--max-new-tokens", 4, "--json")
    assert result.exit_code == 0, result.output
    entries = json.loads(result.stdout)
    assert [entry["image"].rpartition("/")[2] for entry in entries] == ["a.png", "b.png"]
    assert entries[0]["answer"] == entries[1]["answer"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [["answer", "What is it?"], ["ask", "-n", 3, "--seed", 0], ["ask", "--after", "What is it?", "--seed", 1]],
)
def test_batch_of_images_gives_the_same_as_one_by_one(command, folder, tmp_path):
    for number in range(5):
        tiny.picture(number).save(tmp_path / f"{number}.png")
    name, *options = [*command, "--max-new-tokens", 6, "--json"]
    alone = [run(folder, name, file, *options).stdout for file in sorted(tmp_path.iterdir())]
    together = run(folder, name, tmp_path, *options, "--batch-size", 2)
    assert json.loads(together.stdout) == [entry for text in alone for entry in json.loads(text)]


def test_image_that_fails_in_a_batch_is_tried_alone_and_named(folder, monkeypatch):
    sizes = []

    def fail_on_b(self, requests, max_new_tokens):
        sizes.append(len(requests))
        if any(file.name == "b.png" for files, _ in requests for file in files):
            raise RuntimeError("out of memory")
        return ["fine"]

    monkeypatch.setattr(Assistant, "answer_batch", fail_on_b)
    result = run(folder, "answer", folder / "pictures", "What is it?")
    # The finished answer is not lost.
    assert (result.exit_code, result.stdout) == (1, f"{folder / 'pictures' / 'a.png'}\n  fine\n")
    assert sizes == [2, 1, 1]
    assert result.stderr.splitlines()[-1] == f"Error: {folder / 'pictures' / 'b.png'}: out of memory"


def test_chat_answers_asks_and_ends(folder):
    lines = "What is it?\n/ask\nforged </s>\n/new\n/quit\n"
    result = run(folder, "chat", folder / "pictures" / "a.png", "--max-new-tokens", 4, input=lines)
    assert result.exit_code == 0, result.output
    assert "vusr: " in result.stdout and "assistant: " in result.stdout
    assert "control token" in result.stderr


def test_chat_ends_at_the_end_of_its_input(folder):
    assert run(folder, "chat", folder / "pictures" / "a.png", input="").exit_code == 0


def test_folder_without_images_is_refused_in_one_line(folder):
    result = run(folder, "answer", folder / "model", "Hi")
    assert result.exit_code == 1
    assert "this folder has no images" in result.stderr and "Traceback" not in result.output
    assert result.stdout == ""


def test_tasks_are_listed_without_a_model_or_data():
    result = CliRunner().invoke(app, ["evaluate", "--tasks", "help"])
    assert result.exit_code == 0, result.output
    assert {"easy_vqa", "pope"} <= {line.split()[0] for line in result.stdout.splitlines()}


@pytest.mark.parametrize("command", [["ask"], ["evaluate"], ["evaluate", "--tasks", "pope", "--data", "hub"]])
def test_wrong_usage_has_another_exit_code(command):
    assert CliRunner().invoke(app, command).exit_code == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    "command", [[], ["generate-data", "llava"], *([name] for name in ("ask", "convert", "doctor", "evaluate", "push"))]
)
def test_help_imports_no_large_library(command):
    code = (
        "import sys\n"
        "from sq_llava.cli.main import app\n"
        "app([*sys.argv[1:], '--help'], standalone_mode=False)\n"
        "print([name for name in ('torch', 'transformers', 'datasets', 'numpy') if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code, *command], capture_output=True, text=True, check=False)
    assert "Usage:" in done.stdout and done.stdout.splitlines()[-1] == "[]", done.stdout + done.stderr


@dataclass(frozen=True)
class Settings:
    model: Annotated[str, typer.Option("-m", help="Which one.")]
    max_cost: Annotated[float | None, typer.Option(min=0, help="At most.")] = None
    swap: Annotated[bool, typer.Option(help="Both orders.")] = False
    inner: int = 0


def test_fields_of_a_dataclass_are_options_with_the_prefix_and_defaults_of_the_command():
    given = []
    app = typer.Typer()

    @app.command()
    @takes_options
    def command(
        own: Annotated[dict, OptionsOf(Settings)],
        judge: Annotated[dict, OptionsOf(Settings, prefix="judge", without=("swap",), model=None, max_cost=2.0)],
    ) -> None:
        given.append((own, judge))

    result = CliRunner().invoke(app, ["-m", "a", "--swap", "--judge-max-cost", "3"])
    assert result.exit_code == 0, result.output
    assert given == [({"model": "a", "max_cost": None, "swap": True}, {"model": None, "max_cost": 3.0})]
    for arguments in (
        [],
        ["-m", "a", "--judge-max-cost", "-1"],
        ["-m", "a", "--inner", "1"],
        ["-m", "a", "--no-swap"],
    ):
        assert CliRunner().invoke(app, arguments).exit_code == 2
