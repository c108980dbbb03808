"""Complete and incomplete checkpoints, and the choice of the one that a run resumes from."""

import json
import os
import shutil
from pathlib import Path

import pytest

from sq_llava.checkpoints.completeness import checkpoint_faults
from sq_llava.training.recovery import find_checkpoint, warn_of_changes
from tests.runs import make_parts, steps_saved, train


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> Path:
    return make_parts(tmp_path_factory.mktemp("parts"))


@pytest.fixture(scope="module")
def whole(parts, tmp_path_factory) -> Path:
    output_dir = tmp_path_factory.mktemp("whole") / "run"
    train(parts, output_dir, max_steps=9)
    return output_dir


@pytest.fixture
def run_folder(whole, tmp_path) -> Path:
    """A copy of a complete run, with checkpoints 8 and 9."""
    return Path(shutil.copytree(whole, tmp_path / "copy"))


LAST_FILES = ("trainer_state.json", "run.json")


@pytest.mark.parametrize(
    "file", ["adapter_model.safetensors", "optimizer.pt", "rng_state.pth", "tokenizer.json", *LAST_FILES]
)
def test_missing_or_truncated_file_of_a_checkpoint_is_found(run_folder, file):
    checkpoint = run_folder / "checkpoint-9"
    assert checkpoint_faults(checkpoint) == []
    size = (checkpoint / file).stat().st_size
    for left in (size - 2, 0):
        os.truncate(checkpoint / file, left)
        fault = "is cut off" if file in LAST_FILES else f"has {left} bytes of {size}"
        assert checkpoint_faults(checkpoint) == [f"{file} {fault}"]
    (checkpoint / file).unlink()
    assert checkpoint_faults(checkpoint) == [f"{file} is missing"]
    assert find_checkpoint(str(run_folder), resume=True, given=None) == str(run_folder / "checkpoint-8")


def test_output_dir_with_checkpoints_is_refused_before_any_work(parts, run_folder):
    before = sorted(run_folder.rglob("*"))
    with pytest.raises(
        ValueError, match=r"already contains checkpoint-9\. Resume that run with --resume, or choose another"
    ):
        train(parts, run_folder, dataset_path="none.json")
    assert sorted(run_folder.rglob("*")) == before


def test_requested_checkpoint_must_be_complete_and_the_newest(run_folder):
    with pytest.raises(ValueError, match=r"contains newer checkpoints: checkpoint-9\. Move them away"):
        find_checkpoint(str(run_folder), resume=False, given=str(run_folder / "checkpoint-8"))
    (run_folder / "checkpoint-9" / "scheduler.pt").unlink()
    with pytest.raises(ValueError, match=r"checkpoint-9, which is incomplete: scheduler.pt is missing\."):
        find_checkpoint(str(run_folder), resume=False, given=str(run_folder / "checkpoint-9"))


def test_checkpoints_that_were_complete_once_are_not_silently_deleted(run_folder):
    for step in (8, 9):
        (run_folder / f"checkpoint-{step}" / "optimizer.pt").unlink()
    with pytest.raises(
        ValueError, match=r"was complete once, but is damaged and cannot be resumed: optimizer.pt is missing"
    ):
        find_checkpoint(str(run_folder), resume=True, given=None)
    assert steps_saved(run_folder) == [8, 9]


@pytest.mark.slow
def test_incomplete_checkpoint_with_a_higher_number_does_not_replace_a_complete_one(parts, run_folder):
    half_written = Path(shutil.copytree(run_folder / "checkpoint-9", run_folder / "checkpoint-100"))
    (half_written / "trainer_state.json").unlink()
    train(parts, run_folder, resume=True, save_total_limit=1, max_steps=11)
    assert steps_saved(run_folder) == [11]
    assert checkpoint_faults(run_folder / "checkpoint-11") == []


def test_base_is_read_back_and_another_one_is_refused(parts, run_folder):
    with pytest.raises(ValueError, match=r"num_prototypes is 6, but the base in .*base has 5"):
        train(parts, run_folder, resume=True, num_prototypes=6)
    with pytest.raises(ValueError, match=r"prompt_layout is 'minigpt4', but the base in .*base has another layout"):
        train(parts, run_folder, resume=True, prompt_layout="minigpt4")
    shutil.rmtree(run_folder / "base")
    with pytest.raises(ValueError, match=r"need their base in .*base, which does not exist\. Restore that folder"):
        train(parts, run_folder, resume=True)


def test_changes_that_change_the_losses_are_reported(run_folder, capsys):
    run = json.loads((run_folder / "checkpoint-9" / "run.json").read_text())
    warn_of_changes(str(run_folder / "checkpoint-9"), run)
    assert capsys.readouterr().out == ""
    warn_of_changes(str(run_folder / "checkpoint-9"), run | {"num_rows": 15})
    assert "num_rows is 15, but was 16 in" in capsys.readouterr().out
