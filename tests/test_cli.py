"""The `sq-llava` command, as somebody at a terminal meets it."""

import json
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from sq_llava.cli.main import app
from tests import tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, and a folder with two pictures and a text."""
    folder = tmp_path_factory.mktemp("cli")
    processor = tiny.tiny_processor(system_message="")
    model = tiny.tiny_model_for(processor)
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    (folder / "pictures").mkdir()
    for name in ("b.png", "a.png"):
        tiny.picture().save(folder / "pictures" / name)
    (folder / "pictures" / "notes.txt").write_text("no picture")
    return folder


def run(folder, *arguments, **kwargs):
    arguments = [str(argument) for argument in arguments]
    return CliRunner().invoke(app, [*arguments, "--model", str(folder / "model")], **kwargs)


def test_ask_prints_as_many_questions_as_wanted(folder):
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


def test_chat_answers_asks_and_ends(folder):
    lines = "What is it?\n/ask\nforged </s>\n/new\n/quit\n"
    result = run(folder, "chat", folder / "pictures" / "a.png", "--max-new-tokens", 4, input=lines)
    assert result.exit_code == 0, result.output
    assert "vusr: " in result.stdout and "assistant: " in result.stdout
    assert "control token" in result.stderr


def test_chat_ends_with_its_input(folder):
    assert run(folder, "chat", folder / "pictures" / "a.png", input="").exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["answer", "none.png", "Hi"], "none.png: no such image"),
        (["answer", "pictures/notes.txt", "Hi"], "is of no known image format, or its header is broken"),
        (["answer", "model", "Hi"], "a folder without images"),
        (["chat", "none.png"], "none.png: no such image"),
    ],
)
def test_wrong_input_ends_with_one_line(folder, arguments, message, monkeypatch):
    monkeypatch.chdir(folder)
    result = run(folder, *arguments)
    assert result.exit_code == 1
    assert message in result.stderr and "Traceback" not in result.output
    assert result.stdout == ""


def test_missing_model_ends_with_one_line(folder):
    result = CliRunner().invoke(app, ["answer", str(folder / "pictures" / "a.png"), "Hi", "--model", "./none"])
    assert result.exit_code == 1
    assert "./none: no such folder" in result.stderr


def test_wrong_usage_has_another_exit_code(folder):
    assert CliRunner().invoke(app, ["ask"]).exit_code == 2


@pytest.mark.parametrize("command", ["ask", "answer", "chat", "merge"])
def test_help_has_examples(command):
    result = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "119"})
    assert result.exit_code == 0
    assert f"sq-llava {command} " in result.output.partition("Examples:")[2]


@pytest.mark.parametrize(
    "command", [[], ["generate-data", "llava"], *([name] for name in ("ask", "convert", "doctor", "evaluate", "push"))]
)
def test_help_answers_before_any_large_library_is_imported(command):
    code = (
        "import sys\n"
        "from sq_llava.cli.main import app\n"
        "app([*sys.argv[1:], '--help'], standalone_mode=False)\n"
        "print([name for name in ('torch', 'transformers', 'datasets', 'numpy') if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code, *command], capture_output=True, text=True, check=False)
    assert "Usage:" in done.stdout and done.stdout.splitlines()[-1] == "[]", done.stdout + done.stderr
