"""Runs that are killed, stopped, out of disk space or fed with bad rows resume as if nothing had happened."""

import os
import shutil
import signal
from pathlib import Path

import pytest

import train_sft
from sq_llava.early_checks import LOCK_FILE
from sq_llava.training.recovery import EXIT_TRY_AGAIN, HALF_WRITTEN_MODEL, place_model
from tests import runs
from tests.processes import locked_by_another_process
from tests.runs import Run, assert_equal_runs, die, in_step, signal_self


pytestmark = pytest.mark.slow

KILLED, STOPPED = [-signal.SIGKILL], [EXIT_TRY_AGAIN]


@pytest.fixture(scope="module")
def whole(parts, tmp_path_factory) -> Path:
    """A run without interruption."""
    return Run(parts, tmp_path_factory.mktemp("whole")).finish()


@pytest.fixture
def run(parts, tmp_path) -> Run:
    return Run(parts, tmp_path, resume=True)


def test_run_killed_in_setup_step_and_save_equals_the_uninterrupted_one(run, whole):
    assert run.exit_codes(runs.kill_in_base) == KILLED
    assert "contains no complete checkpoint. Training starts at step 0." in run.text
    assert run.exit_codes(in_step, 6, die) == KILLED
    assert run.steps_saved == [2, 4]
    assert run.exit_codes(runs.kill_in_state_file) == KILLED
    assert run.exit_codes(runs.kill_at_the_end) == KILLED
    assert "checkpoint-6 is half-written (trainer_state.json is cut off) and is skipped" in run.text
    assert (run.output_dir / LOCK_FILE).exists() and (run.output_dir / "adapter_config.json").exists()
    assert_equal_runs(whole, run.finish())
    assert not (run.output_dir / LOCK_FILE).exists() and not list(run.output_dir.glob("half-written-[bm]*"))


def test_second_run_into_the_same_output_dir_is_refused_before_a_model_is_loaded(run, monkeypatch):
    monkeypatch.setattr(train_sft, "load_base", None)
    with locked_by_another_process(run.output_dir), pytest.raises(ValueError, match="run: another run writes into"):
        train_sft.main(run.args)


def test_run_into_the_folder_that_it_starts_from_is_refused(parts, whole):
    with pytest.raises(ValueError, match=r"the folder of the model that training starts from. Its files would be"):
        runs.train(parts, whole, whole)


def test_checkpoint_is_on_the_disk_before_it_counts_and_before_older_ones_are_removed(parts, tmp_path, monkeypatch):
    """The order of: files that are flushed, `run.json` that lists them, and removed checkpoints."""
    flush, move, remove, events = os.fsync, os.replace, shutil.rmtree, []

    def flushed(file):
        flush(file)
        events.append(Path(os.readlink(f"/proc/self/fd/{file}")).name)

    def named(source, target):
        move(source, target)
        events.append(f"named {Path(target).name}")

    def removed(folder, **settings):
        remove(folder, **settings)
        events.append(f"removed {Path(folder).name}")

    monkeypatch.setattr(os, "fsync", flushed)
    monkeypatch.setattr(os, "replace", named)
    monkeypatch.setattr(shutil, "rmtree", removed)
    runs.train(parts, tmp_path / "run", max_steps=2, save_steps=1, save_total_limit=1)
    second = events[events.index("named run.json") + 1 : events.index("removed checkpoint-1")]
    before, after = second[: second.index("named run.json")], second[second.index("named run.json") :]
    assert {"adapter_model.safetensors", "optimizer.pt", "rng_state.pth"} <= set(before)
    assert "trainer_state.json" in after and "run" in after


def test_half_written_checkpoints_are_skipped_and_renamed(parts, whole, tmp_path):
    run = Run(parts, tmp_path, resume=True, save_total_limit=1)
    assert run.exit_codes(runs.kill_in_rotation) == KILLED
    assert run.steps_saved == [2, 4]
    assert run.exit_codes(runs.kill_in_adapter_file) == KILLED
    assert "checkpoint-2 is half-written (optimizer.pt is missing)" in run.text
    assert run.steps_saved == [4, 6]
    assert run.exit_codes(runs.kill_before_random_states) == KILLED
    assert "checkpoint-6 is half-written (trainer_state.json is missing; run.json is missing)" in run.text
    assert_equal_runs(whole, run.finish())
    assert run.steps_saved == [9]
    renamed = sorted(folder.name for folder in run.output_dir.glob("half-written-*"))
    assert renamed == [f"half-written-checkpoint-{name}" for name in ("2", "6", "6-2")]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_finishes_the_step_exits_with_75_and_loses_nothing(run, whole, number):
    assert run.exit_codes(in_step, 5, signal_self, 0, number) == STOPPED
    assert run.steps_saved == [4, 5]
    assert "Stopped at step 5. Resume with --resume." in run.text
    assert not (run.output_dir / "adapter_model.safetensors").exists()
    assert_equal_runs(whole, run.finish())


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_run_of_the_readmes_recipe_is_saved_on_ctrl_c(parts, tmp_path, stage):
    run = Run(parts, tmp_path)
    run.args = runs.command_line({
        "config": Path(train_sft.__file__).parent / "recipes" / "easy-vqa" / f"{stage}.yaml",
        "dataset_path": parts / "train.json",
        "vision_model_name_or_path": parts / "clip",
        "text_model_name_or_path": parts / "llama",
        "output_dir": run.output_dir,
        "use_cpu": True,
    })  # fmt: skip
    assert run.exit_codes(in_step, 2, signal_self, 0, signal.SIGINT) == STOPPED
    assert run.steps_saved == [2]
    assert "Stopped at step 2. Resume with --resume." in run.text


@pytest.mark.parametrize(
    "saving",
    [
        pytest.param({"save_strategy": "best"}, marks=pytest.mark.long),
        {"save_strategy": "steps", "save_steps": 1, "load_best_model_at_end": True, "save_total_limit": 1},
    ],
    ids=["only the best are saved", "the best is loaded at the end"],
)
def test_stop_keeps_its_checkpoint_beside_the_best_one(parts, tmp_path, saving):
    # This metric does not change, so the first step stays the best.
    saving = saving | {"metric_for_best_model": "self_question_share"}
    run = Run(parts, tmp_path, num_eval_rows=3, eval_strategy="steps", eval_steps=1, **saving)
    assert run.exit_codes(in_step, 3, signal_self, 0, signal.SIGTERM) == STOPPED
    assert {1, 3} <= set(run.steps_saved)
    assert "Stopped at step 3. Resume with --resume." in run.text


def test_final_model_replaces_weights_and_configuration_of_another_kind(tmp_path):
    final, part = tmp_path / "run", tmp_path / "run" / HALF_WRITTEN_MODEL
    part.mkdir(parents=True)
    for name in ("adapter_config.json", "adapter_model.safetensors", "model.safetensors", "README.md"):
        (final / name).write_text("old")
    new = {"config.json", "model-00001-of-00001.safetensors", "model.safetensors.index.json"}
    for name in new:
        (part / name).write_text("new")
    place_model(part, final)
    assert {file.name for file in final.iterdir()} == new | {"README.md"}


def test_second_interrupt_stops_at_once(run):
    assert run.exit_codes(in_step, 5, signal_self, 0, signal.SIGINT, signal.SIGINT) == [1]
    assert "KeyboardInterrupt" in run.text
    assert run.steps_saved == [2, 4]


def test_signal_in_the_last_step_lets_the_run_end(run, whole):
    assert_equal_runs(whole, run.finish(in_step, 9, signal_self, 0, signal.SIGTERM))


@pytest.mark.long
def test_rows_grouped_by_length_come_once_an_epoch_and_in_the_same_order_after_a_kill(parts, tmp_path):
    settings = {"processes": 2, "per_device_train_batch_size": 2, "train_sampling_strategy": "group_by_length"}
    whole = Run(parts, tmp_path / "whole", **settings).finish(runs.write_row_ids, tmp_path)
    steps = runs.row_ids(tmp_path)
    epochs = [sorted(row for rank in steps for batch in rank[at : at + 4] for row in batch) for at in (0, 4)]
    assert epochs == [list(range(16))] * 2
    assert steps[0][:4] != steps[0][4:8]
    run = Run(parts, tmp_path / "killed", resume=True, **settings)
    assert -signal.SIGKILL in run.exit_codes(in_step, 8, die)
    assert_equal_runs(whole, run.finish())


@pytest.mark.long
def test_signal_to_dataloader_workers_too_loses_nothing(parts, tmp_path):
    settings = {"dataloader_num_workers": 2, "dataloader_persistent_workers": True}
    settings["dataloader_multiprocessing_context"] = "fork"
    whole = Run(parts, tmp_path / "whole", **settings).finish()
    run = Run(parts, tmp_path / "stopped", resume=True, **settings)
    assert run.exit_codes(in_step, 6, runs.signal_all) == STOPPED, run.text[-3000:]
    assert run.steps_saved == [4, 6]
    assert_equal_runs(whole, run.finish())


@pytest.mark.long
def test_signal_to_one_process_stops_both_after_the_same_step(parts, tmp_path):
    settings = {"processes": 2, "per_device_train_batch_size": 2, "max_steps": 6}
    whole = Run(parts, tmp_path / "whole", **settings).finish()
    run = Run(parts, tmp_path / "stopped", resume=True, **settings)
    assert run.exit_codes(in_step, 3, signal_self, 1, signal.SIGTERM) == STOPPED * 2
    assert run.steps_saved == [2, 3]
    assert_equal_runs(whole, run.finish())


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "optimizer.pt"])
def test_full_disk_leaves_the_last_checkpoint_and_a_clear_error(parts, whole, tmp_path, file):
    run = Run(parts, tmp_path, resume=True, save_total_limit=1)
    size = (whole / "checkpoint-9" / file).stat().st_size - 1
    assert run.exit_codes(in_step, 4, runs.limit_file_size, size) == [1]
    assert f"CheckpointError: {run.output_dir}/checkpoint-4 could not be written (" in run.text
    assert "It was removed; checkpoint-2 is unchanged. Free disk space, then resume with --resume." in run.text
    assert [folder.name for folder in run.output_dir.glob("*checkpoint*")] == ["checkpoint-2"]
    assert_equal_runs(whole, run.finish())


def test_row_found_invalid_during_training_loses_no_step(parts, whole, tmp_path):
    run = Run(parts, tmp_path, resume=True, save_steps=100)
    assert run.exit_codes(runs.break_row, 5) == [1]
    (done,) = run.steps_saved
    assert done > 2
    assert "ValueError: train.json, row 5: the image is broken." in run.text
    assert f"{done} steps were trained. --resume resumes from checkpoint-{done}." in run.text
    assert_equal_runs(whole, run.finish())


@pytest.mark.long
@pytest.mark.parametrize(("processes", "num_kills"), [(1, 4), (2, 2)])
def test_run_killed_at_random_moments_equals_the_uninterrupted_one(parts, tmp_path, processes, num_kills):
    # Three steps per epoch, of which the last has half a batch.
    settings = runs.write_in_order(parts, tmp_path / "ordered.json") | {"max_steps": 6 * num_kills}
    settings |= {"per_device_train_batch_size": 4 // processes}
    whole = Run(parts, tmp_path / "whole", processes, **settings).finish()
    run = Run(parts, tmp_path / "killed", processes, resume=True, **settings)
    runs.kill_at_random_moments(run, num_kills)
    assert_equal_runs(whole, run.finish())


@pytest.mark.long
@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (runs.poison_row, "was not applied: its loss is nan"),
        (runs.break_row, "train.json, row 5: the image is broken"),
    ],
)
def test_fault_in_one_of_two_processes_ends_both_and_loses_no_checkpoint(parts, tmp_path, fault, message):
    settings = {"processes": 2, "per_device_train_batch_size": 2, "save_steps": 1}
    whole = Run(parts, tmp_path / "whole", **settings).finish()
    run = Run(parts, tmp_path / "faulty", resume=True, **settings)
    codes = run.exit_codes(fault, 5)
    assert 0 not in codes and -signal.SIGKILL not in codes
    assert message in run.text
    assert f"--resume resumes from checkpoint-{max(run.steps_saved)}." in run.text
    if fault is runs.poison_row:
        assert all(f"Its batches on process {rank}, by row_id: rows" in run.text for rank in (0, 1))
    assert_equal_runs(whole, run.finish())
