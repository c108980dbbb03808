"""Rows in both layouts, shards of the input, and files that several processes write."""

import json
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sq_llava.generation.rows import Card, Shard, make_row, to_llava, write_output
from tests import ROOT
from tests.processes import lines_of


def test_row_of_several_images_in_both_layouts():
    row = make_row("1", ["a.png", "b.png"], [("Which?", "The left."), ("Why?", "So.")], kind="k")
    assert [part["type"] for part in row["messages"][0]["content"]] == ["image", "image", "text"]
    llava = to_llava(row)
    assert llava["image"] == ["a.png", "b.png"] and llava["kind"] == "k"
    assert [turn["value"] for turn in llava["conversations"][:2]] == ["<image>\n<image>\nWhich?", "The left."]
    last = to_llava(make_row("1", ["a.png"], [("Which?", "The left."), ("Why?", "So.")], image_last=True))
    assert [turn["value"] for turn in last["conversations"][::2]] == ["Which?\n<image>", "Why?"]


@given(items=st.lists(st.integers(), max_size=20), count=st.integers(1, 6))
@settings(max_examples=50, deadline=None)
def test_each_item_is_in_one_shard(items, count):
    shards = [Shard.parse(f"{n + 1}/{count}").take(items) for n in range(count)]
    assert sorted(item for shard in shards for item in shard) == sorted(items)


@pytest.mark.parametrize("text", ["0/4", "5/4", "1", "a/b", "-1/2"])
def test_wrong_shards_are_refused(text):
    with pytest.raises(ValueError, match="expected i/n"):
        Shard.parse(text)


def test_folder_that_two_processes_write_at_once_holds_complete_files(tmp_path):
    script = (
        "import pathlib, sys; from sq_llava.generation.rows import *\n"
        "row = make_row('2', ['2.png'], [('Why?', 'So.')])\n"
        "write_output(pathlib.Path(sys.argv[1]), Shard(), [row], [], {}, Card('t', 's', {}))"
    )

    def rows():
        yield make_row("1", ["1.png"], [("Why?", "So.")])
        subprocess.run([sys.executable, "-c", script, str(tmp_path)], cwd=ROOT, check=True)

    write_output(tmp_path, Shard(), rows(), [], {}, Card("t", "s", {}))
    assert [row["id"] for row in lines_of(tmp_path / "data.jsonl")] == ["1"]
    assert [row["id"] for row in json.loads((tmp_path / "llava.json").read_text())] == ["1"]
    assert not list(tmp_path.glob("*.new"))
