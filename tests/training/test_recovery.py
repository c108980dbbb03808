"""Runs that are killed, stopped, out of disk or fed with bad rows go on as if nothing had been."""

import json
import random
import signal
import time
from pathlib import Path

import pytest

import train_sft
from sq_llava.training.recovery import EXIT_TRY_AGAIN
from tests.processes import ended
from tests.runs import (
    arguments,
    assert_equal_runs,
    break_row,
    die,
    in_step,
    kill_at_the_end,
    kill_before_random_states,
    kill_in_adapter_file,
    kill_in_base,
    kill_in_rotation,
    kill_in_state_file,
    limit_file_size,
    make_parts,
    note_rows,
    poison_row,
    run,
    signal_all,
    signal_self,
    start,
    steps_saved,
)


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> Path:
    return make_parts(tmp_path_factory.mktemp("parts"))


@pytest.fixture(scope="module")
def whole(parts, tmp_path_factory) -> Path:
    """The run that nobody interrupts."""
    folder = tmp_path_factory.mktemp("whole")
    assert run(arguments(parts, folder / "run"), folder / "log") == [0], (folder / "log").read_text()[-3000:]
    return folder / "run"


def test_run_killed_in_its_base_a_step_and_a_save_equals_the_uninterrupted_one(parts, whole, tmp_path):
    output_dir, log = tmp_path / "run", tmp_path / "log"
    resumed = arguments(parts, output_dir, resume=True)
    assert run(resumed, log, (kill_in_base,)) == [-signal.SIGKILL]
    assert "contains no complete checkpoint. Training starts from the beginning." in log.read_text()
    assert run(resumed, log, (in_step, 6, die)) == [-signal.SIGKILL]
    assert steps_saved(output_dir) == [2, 4]
    assert run(resumed, log, (kill_in_state_file,)) == [-signal.SIGKILL]
    assert run(resumed, log, (kill_at_the_end,)) == [-signal.SIGKILL]
    assert "checkpoint-6 is half-written (trainer_state.json is cut off) and is skipped" in log.read_text()
    assert run(resumed, log) == [0], log.read_text()[-3000:]
    assert_equal_runs(whole, output_dir)


def test_saves_that_were_killed_are_passed_over_and_set_aside(parts, whole, tmp_path):
    output_dir, log = tmp_path / "run", tmp_path / "log"
    resumed = arguments(parts, output_dir, resume=True, save_total_limit=1)
    assert run(resumed, log, (kill_in_rotation,)) == [-signal.SIGKILL]
    assert steps_saved(output_dir) == [2, 4]
    assert run(resumed, log, (kill_in_adapter_file,)) == [-signal.SIGKILL]
    assert "checkpoint-2 is half-written (optimizer.pt is missing)" in log.read_text()
    assert steps_saved(output_dir) == [4, 6]
    assert run(resumed, log, (kill_before_random_states,)) == [-signal.SIGKILL]
    assert "checkpoint-6 is half-written (trainer_state.json is missing; run.json is missing)" in log.read_text()
    assert run(resumed, log) == [0], log.read_text()[-3000:]
    assert steps_saved(output_dir) == [9]
    set_aside = sorted(folder.name for folder in output_dir.glob("half-written-*"))
    assert set_aside == [f"half-written-checkpoint-{name}" for name in ("2", "6", "6-2")]
    assert_equal_runs(whole, output_dir)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_ends_with_75_behind_the_step_and_nothing_is_lost(parts, whole, tmp_path, number):
    output_dir, log = tmp_path / "run", tmp_path / "log"
    resumed = arguments(parts, output_dir, resume=True)
    assert run(resumed, log, (in_step, 5, signal_self, 0, number)) == [EXIT_TRY_AGAIN]
    assert steps_saved(output_dir) == [4, 5]
    assert "Stopped at step 5. Resume with --resume." in log.read_text()
    assert not (output_dir / "adapter_model.safetensors").exists()
    assert run(resumed, log) == [0], log.read_text()[-3000:]
    assert_equal_runs(whole, output_dir)


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_recipe_of_the_readme_is_saved_on_ctrl_c(parts, tmp_path, stage):
    settings = {
        "config": Path(train_sft.__file__).parent / "recipes" / "easy-vqa" / f"{stage}.yaml",
        "dataset_path": parts / "train.json",
        "vision_model_name_or_path": parts / "clip",
        "text_model_name_or_path": parts / "llama",
        "output_dir": tmp_path / "run",
        "use_cpu": True,
    }
    args = [text for name, value in settings.items() for text in (f"--{name}", str(value))]
    assert run(args, tmp_path / "log", (in_step, 2, signal_self, 0, signal.SIGINT)) == [EXIT_TRY_AGAIN]
    assert steps_saved(tmp_path / "run") == [2]
    assert "Stopped at step 2. Resume with --resume." in (tmp_path / "log").read_text()


def test_second_interrupt_stops_at_once(parts, tmp_path):
    args = arguments(parts, tmp_path / "run")
    assert run(args, tmp_path / "log", (in_step, 5, signal_self, 0, signal.SIGINT, signal.SIGINT)) == [1]
    assert "KeyboardInterrupt" in (tmp_path / "log").read_text()
    assert steps_saved(tmp_path / "run") == [2, 4]


def test_signal_in_the_last_step_lets_the_run_end(parts, whole, tmp_path):
    args = arguments(parts, tmp_path / "run")
    assert run(args, tmp_path / "log", (in_step, 9, signal_self, 0, signal.SIGTERM)) == [0]
    assert_equal_runs(whole, tmp_path / "run")


def test_rows_grouped_by_length_come_once_an_epoch_and_in_the_same_order_after_a_kill(parts, tmp_path):
    settings = {"per_device_train_batch_size": 2, "train_sampling_strategy": "group_by_length"}
    whole, output_dir, log = tmp_path / "whole", tmp_path / "run", tmp_path / "log"
    assert run(arguments(parts, whole, **settings), log, (note_rows, tmp_path), processes=2) == [0, 0]
    steps = [list(map(json.loads, (tmp_path / f"rows{rank}").read_text().splitlines())) for rank in (0, 1)]
    epochs = [sorted(row for rank in steps for batch in rank[at : at + 4] for row in batch) for at in (0, 4)]
    assert epochs == [list(range(16))] * 2
    assert steps[0][:4] != steps[0][4:8]
    resumed = arguments(parts, output_dir, resume=True, **settings)
    assert -signal.SIGKILL in run(resumed, log, (in_step, 8, die), processes=2)
    assert run(resumed, log, processes=2) == [0, 0], log.read_text()[-3000:]
    assert_equal_runs(whole, output_dir)


def test_signal_to_data_loader_workers_too_loses_nothing(parts, tmp_path):
    settings = {
        "dataloader_num_workers": 2,
        "dataloader_persistent_workers": True,
        "dataloader_multiprocessing_context": "fork",
    }
    whole, output_dir, log = tmp_path / "whole", tmp_path / "run", tmp_path / "log"
    assert run(arguments(parts, whole, **settings), log) == [0], log.read_text()[-3000:]
    resumed = arguments(parts, output_dir, resume=True, **settings)
    assert run(resumed, log, (in_step, 6, signal_all)) == [EXIT_TRY_AGAIN], log.read_text()[-3000:]
    assert steps_saved(output_dir) == [4, 6]
    assert run(resumed, log) == [0], log.read_text()[-3000:]
    assert_equal_runs(whole, output_dir)


def test_signal_to_one_process_stops_both_behind_the_same_step(parts, tmp_path):
    settings = {"per_device_train_batch_size": 2, "max_steps": 6}
    output_dir, log = tmp_path / "run", tmp_path / "log"
    assert run(arguments(parts, tmp_path / "whole", **settings), log, processes=2) == [0, 0]
    resumed = arguments(parts, output_dir, resume=True, **settings)
    stop = (in_step, 3, signal_self, 1, signal.SIGTERM)
    assert run(resumed, log, stop, processes=2) == [EXIT_TRY_AGAIN, EXIT_TRY_AGAIN]
    assert steps_saved(output_dir) == [2, 3]
    assert run(resumed, log, processes=2) == [0, 0], log.read_text()[-3000:]
    assert_equal_runs(tmp_path / "whole", output_dir)


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "optimizer.pt"])
def test_full_disk_leaves_the_last_checkpoint_and_a_clear_error(parts, whole, tmp_path, file):
    output_dir, log = tmp_path / "run", tmp_path / "log"
    resumed = arguments(parts, output_dir, resume=True, save_total_limit=1)
    size = (whole / "checkpoint-9" / file).stat().st_size - 1
    assert run(resumed, log, (in_step, 4, limit_file_size, size)) == [1]
    assert f"CheckpointError: {output_dir}/checkpoint-4 could not be written (" in log.read_text()
    assert "It was removed; checkpoint-2 is unchanged. Free disk space, then resume with --resume." in log.read_text()
    assert [folder.name for folder in output_dir.glob("*checkpoint*")] == ["checkpoint-2"]
    assert run(resumed, log) == [0], log.read_text()[-3000:]
    assert_equal_runs(whole, output_dir)


def test_row_found_wrong_in_mid_run_loses_no_step(parts, whole, tmp_path):
    output_dir, log = tmp_path / "run", tmp_path / "log"
    resumed = arguments(parts, output_dir, resume=True, save_steps=100)
    assert run(resumed, log, (break_row, 5)) == [1]
    (done,) = steps_saved(output_dir)
    assert done > 2
    assert "ValueError: train.json, row 5: the image is broken." in log.read_text()
    assert f"{done} steps were trained. --resume resumes from checkpoint-{done}." in log.read_text()
    assert run(resumed, log) == [0], log.read_text()[-3000:]
    assert_equal_runs(whole, output_dir)


def wait_for_steps(number: int, children: list, log: Path) -> None:
    """Until the run has made so many more steps, or ended."""
    losses_then = log.read_text().count("'loss'") + number
    while log.read_text().count("'loss'") < losses_then and children[0].is_alive():
        time.sleep(0.001)


@pytest.mark.parametrize(("processes", "num_kills"), [(1, 4), (2, 2)])
def test_run_killed_at_random_moments_equals_the_uninterrupted_one(parts, tmp_path, processes, num_kills):
    settings = {"per_device_train_batch_size": 4 // processes, "max_steps": 6 * num_kills, "save_steps": 3}
    whole, output_dir, log = tmp_path / "whole", tmp_path / "run", tmp_path / "log"
    assert run(arguments(parts, whole, **settings), log, processes=processes) == [0] * processes
    resumed = arguments(parts, output_dir, resume=True, **settings)
    draw = random.Random(0)
    for _ in range(num_kills):
        children = start(resumed, log, processes=processes)
        wait_for_steps(1, children, log)
        begin, num_steps = time.monotonic(), draw.randint(1, 3)
        wait_for_steps(num_steps, children, log)
        # Somewhere in the next step, by how long one takes at present.
        time.sleep(draw.uniform(0, 1) * (time.monotonic() - begin) / num_steps)
        # One of two processes, or both: the other ends by itself, with an error or by our hand.
        for child in draw.sample(children, draw.randint(1, processes)):
            child.kill()
        codes = ended(children)
        assert -signal.SIGKILL in codes, "the run was over before it could be killed"
    assert run(resumed, log, processes=processes) == [0] * processes, log.read_text()[-3000:]
    assert_equal_runs(whole, output_dir)


@pytest.mark.parametrize(
    ("fault", "message"),
    [(poison_row, "was not applied: its loss is nan"), (break_row, "train.json, row 5: the image is broken")],
)
def test_fault_in_one_of_two_processes_ends_both_and_loses_no_checkpoint(parts, tmp_path, fault, message):
    settings = {"per_device_train_batch_size": 2, "save_steps": 1}
    whole, output_dir, log = tmp_path / "whole", tmp_path / "run", tmp_path / "log"
    assert run(arguments(parts, whole, **settings), log, processes=2) == [0, 0]
    resumed = arguments(parts, output_dir, resume=True, **settings)
    codes = run(resumed, log, (fault, 5), processes=2)
    assert 0 not in codes and -signal.SIGKILL not in codes
    assert message in log.read_text()
    newest = max(steps_saved(output_dir))
    assert f"--resume resumes from checkpoint-{newest}." in log.read_text()
    if fault is poison_row:
        assert all(f"Its batches on process {rank}, by row_id: rows" in log.read_text() for rank in (0, 1))
    assert run(resumed, log, processes=2) == [0, 0], log.read_text()[-3000:]
    assert_equal_runs(whole, output_dir)
