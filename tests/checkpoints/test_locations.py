"""How a Hub id is told from the path of a folder."""

import pytest

from sq_llava.locations import is_hub_id, require_folder_or_id


@pytest.fixture(autouse=True)
def runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "runs" / "model").mkdir(parents=True)
    return tmp_path / "runs"


def test_hub_id_is_no_folder():
    assert is_hub_id("org/llava-v1.5-7b")
    assert require_folder_or_id("org/llava-v1.5-7b") is None


@pytest.mark.parametrize("name", ["runs/model", "./runs/model", "~/runs/model"])
def test_folder_is_found_from_here_and_from_home(name, runs):
    assert require_folder_or_id(name).resolve() == runs / "model"


@pytest.mark.parametrize("name", ["runs/none", "./none", "~/none", "none", "org/name/more", ".org/name", "/none"])
def test_path_of_a_missing_folder_is_no_hub_id(name):
    with pytest.raises(ValueError, match=r" \(--base\): no such folder"):
        require_folder_or_id(name, "--base")
