"""The command that a run notes can be typed again as it is."""

import sys

import pytest

from sq_llava.output import command_line
from tests import ROOT


@pytest.mark.parametrize(
    ("program", "typed"),
    [
        ("/usr/bin/sq-llava", "sq-llava"),
        (str(ROOT / "sq_llava/__main__.py"), "sq-llava"),
        (str(ROOT / "demo/run.py"), "python -m demo.run"),
        (str(ROOT / "train_sft.py"), f"python {ROOT / 'train_sft.py'}"),
    ],
)
def test_command_is_what_was_typed(program, typed, monkeypatch):
    monkeypatch.setattr(sys, "argv", [program, "--limit", "3", "a file"])
    assert command_line() == f"{typed} --limit 3 'a file'"
