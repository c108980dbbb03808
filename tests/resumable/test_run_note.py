"""The note of a run, its command, and the lines from which it resumes."""

import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest

from sq_llava.output import command_line
from sq_llava.resumable import jsonl
from sq_llava.resumable.jsonl import LineWriter, read_complete_lines
from sq_llava.resumable.run_note import RunNote
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


def test_note_is_written_with_the_first_result_by_any_thread(tmp_path):
    note = RunNote(tmp_path / "out", {"model": "a"}, ["model"])
    assert not (tmp_path / "out").exists()
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: note.write(), range(50)))
    assert json.loads((tmp_path / "out" / "run.json").read_text()) == {"model": "a"}
    with pytest.raises(ValueError, match="a run with model 'a', but this run has 'b'"):
        RunNote(tmp_path / "out", {"model": "b"}, ["model"])


def test_note_without_a_newer_key_can_be_resumed(tmp_path):
    RunNote(tmp_path, {"model": "a"}, ["model"]).write()
    about = {"model": "a", "data": {"pope": 1}}
    assert RunNote(tmp_path, about, ["model", "data"]).about == about


def test_lines_are_in_the_file_at_once_and_flushed_once_a_second(tmp_path, monkeypatch):
    flushed, seconds = [], iter([0.0, 0.1, 0.9, 1.1, 1.2, 5.0])
    monkeypatch.setattr(os, "fsync", flushed.append)
    monkeypatch.setattr(jsonl, "time", SimpleNamespace(monotonic=lambda: next(seconds)))
    with LineWriter(tmp_path / "lines") as file:
        file.add([1, 2])
        file.add([3])
        assert read_complete_lines(tmp_path / "lines") == [b"1", b"2", b"3"] and not flushed
        file.add([4])
        assert len(flushed) == 1
    assert len(flushed) == 2


def test_line_that_a_kill_cut_off_is_removed_without_writing_the_others_again(tmp_path, monkeypatch):
    path = tmp_path / "lines"
    path.write_bytes(b"1\n2\n{")
    monkeypatch.setattr(type(path), "write_bytes", None)
    assert read_complete_lines(path, mends=False) == [b"1", b"2"] and path.stat().st_size == 5
    assert read_complete_lines(path) == [b"1", b"2"] and path.stat().st_size == 4
