"""What commands print: help at any width, plain text where colours are unwanted, and no warnings of libraries."""

import gc
import io
import logging
import sys
import warnings
from collections.abc import Iterator

import pytest
import typer
from rich.console import Console
from typer.testing import CliRunner

from sq_llava.cli import evaluate
from sq_llava.cli.main import app
from sq_llava.console import loading, quiet_warnings


def commands_below(group, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for name, command in group.commands.items():
        yield (*path, name)
        if hasattr(command, "commands"):
            yield from commands_below(command, (*path, name))


@pytest.mark.parametrize("command", [(), *commands_below(typer.main.get_command(app))], ids=" ".join)
def test_help_fits_80_columns_in_plain_text_and_ends_in_examples(command):
    result = CliRunner().invoke(app, [*command, "--help"], env={"COLUMNS": "80", "TERMINAL_WIDTH": None})
    assert result.exit_code == 0
    lines = result.output.splitlines()
    assert "\x1b" not in result.output
    assert max(map(len, lines)) <= 80
    assert not [line for line in lines if "…" in line], "a name or a default is cut off"
    examples = " ".join(result.output.partition("Examples:")[2].split())
    assert " ".join(("sq-llava", *command)) in examples


def test_no_color_prints_a_help_without_colours_on_a_terminal():
    environment = {"NO_COLOR": "1", "FORCE_COLOR": "1", "COLUMNS": "80"}
    output = CliRunner().invoke(app, ["push", "--help"], env=environment, color=True).output
    assert "\x1b[3" not in output and "\x1b[9" not in output  # bold may stay


FIGURES = {
    "num_images": 20, "num_failed": 0, "num_questions": 80, "distinct_questions": 0.5, "distinct_1": 0.25,
    "distinct_2": 0.5, "self_bleu_of_an_image": None, "mean_words": 5.5, "types": {"what": 0.75, "yes/no": 0.25},
    "answer_changes_without_the_image": 1.0,
    "clip": {"texts_cut": 0.0, "questions": 0.25, "questions_with_another_image": 0.125},
    "easy_vqa": {
        "premise_is_true": 0.9, "num_premises": 80, "presumed_is_true": None, "num_presuming": 0,
        "own_answer_is_right": 1.0, "num_own_answers": 72,
    },
}  # fmt: skip


@pytest.mark.slow
def test_questions_are_shown_in_a_table_of_80_columns(monkeypatch):
    console = Console(width=80, record=True, file=io.StringIO())
    monkeypatch.setattr(evaluate, "console", console)
    evaluate.show_questions(FIGURES)
    text = console.export_text()
    rows = {name.strip(): value for name, _, value in (line.rstrip().rpartition(" ") for line in text.splitlines())}
    assert rows["questions"] == "80" and rows["words per question"] == "5.500"
    assert rows["questions of type yes/no"] == "25.0%"
    assert rows["CLIP similarity of questions and another image"] == "0.125"
    assert "\x1b" not in text and max(map(len, text.splitlines())) <= 80


@pytest.fixture
def as_at_start(monkeypatch):
    """A process that was started without PYTHONWARNINGS; afterwards everything is as before."""
    monkeypatch.setattr(sys, "warnoptions", [])
    monkeypatch.setattr(logging, "lastResort", logging.StreamHandler(io.StringIO()))
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "")
    with warnings.catch_warnings(record=True) as seen:
        warnings.resetwarnings()
        yield seen


def warn(module: str) -> None:
    for category in (UserWarning, FutureWarning):
        warnings.warn_explicit("old", category, "file.py", 1, module=module, registry={})


def test_warnings_of_other_packages_are_hidden_and_our_own_are_shown(as_at_start):
    quiet_warnings()
    warn("torch.nn")
    assert not as_at_start
    warn("sq_llava.cli.checkpoints")
    assert len(as_at_start) == 2
    library = logging.getLogger("a_library_without_handlers")
    library.propagate = False
    library.warning("cast")
    library.error("broken")
    assert logging.lastResort.stream.getvalue() == "broken\n"


def test_pythonwarnings_shows_all_warnings(as_at_start, monkeypatch):
    monkeypatch.setattr(sys, "warnoptions", ["default"])
    quiet_warnings()
    warn("torch.nn")
    assert len(as_at_start) == 2 and logging.lastResort.level == logging.NOTSET


def test_garbage_is_collected_again_after_libraries_are_loaded():
    with pytest.raises(ValueError, match="damaged"), loading():
        assert not gc.isenabled()
        raise ValueError("damaged")
    assert gc.isenabled()
