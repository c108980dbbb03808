"""Resumable work: what is done is kept, what failed may be repaired, and results for other data are refused."""

from dataclasses import dataclass

import pytest

from sq_llava.resumable.resume import read_lines, run_resumable


@dataclass(frozen=True)
class Item:
    id: str
    content: str


def shout(batch):
    if any(item.content == "broken" for item in batch):
        raise ValueError("cannot be read")
    return [{"said": item.content.upper()} for item in batch]


def run(folder, **contents):
    """Works on items with these contents, which are also their hashes."""
    items = [Item(id, content) for id, content in contents.items()]
    return run_resumable(items, shout, folder, "said", "Shouting", hashes=contents)


def test_item_that_failed_can_be_repaired_but_a_result_for_other_data_is_refused(tmp_path):
    lines = run(tmp_path, a="one", b="broken")
    assert [line["error"] for line in lines.values()] == [None, "ValueError: cannot be read"]
    lines = run(tmp_path, a="one", b="two")
    assert {id: line["said"] for id, line in lines.items()} == {"a": "ONE", "b": "TWO"}
    with pytest.raises(ValueError, match=r"said-0\.jsonl: the line for 'b' is about other data"):
        run(tmp_path, a="one", b="three")


def test_line_of_an_item_that_is_gone_is_refused_unless_it_failed(tmp_path):
    run(tmp_path, a="one", b="broken")
    assert list(run(tmp_path, a="one")) == ["a"]
    assert list(read_lines(tmp_path, "said", ["a", "c"], with_failed=True)) == ["a"]
    with pytest.raises(ValueError, match=r"line for 'a', which is not in the input: .* --limit differs from before"):
        run(tmp_path, c="one")
