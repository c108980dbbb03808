"""Runs that are killed, stopped, out of disk or fed with bad rows, in processes of their own, with tiny models."""

import json
import math
import multiprocessing
import os
import random
import resource
import shutil
import signal
import socket
import time
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import CLIPConfig, CLIPModel, LlamaConfig, LlamaForCausalLM, TrainerState, set_seed

import train_sft
from sq_llava.recovery import EXIT_TRY_AGAIN, checkpoint_faults, find_checkpoint, step_of, warn_of_changes
from sq_llava.self_questioning import SelfQuestioningCollator
from sq_llava.trainer import SQLlavaTrainer
from tests import tiny


# Four optimizer steps an epoch; dropout in both towers, so that the random states matter.
SETTINGS = {
    "stage": "instruct",
    "num_prototypes": 5,
    "learning_rate": 3e-3,
    "lr_scheduler_type": "cosine",
    "vision_lora_r": 4,
    "vision_lora_alpha": 8,
    "vision_lora_dropout": 0.2,
    "lora_r": 4,
    "lora_alpha": 8,
    "lora_dropout": 0.1,
    "system_message": "Be kind.",
    "per_device_train_batch_size": 4,
    "max_steps": 9,
    "gradient_checkpointing": False,
    "bf16": False,
    "use_cpu": True,
    "logging_steps": 1,
    "save_steps": 2,
    "save_total_limit": 2,
    "report_to": "none",
    "disable_tqdm": True,
}
# Children are forked from a server that has imported everything but has run nothing: two seconds less, or eight.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["tests.test_recovery"])


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> Path:
    """A CLIP, a Llama, and 16 rows, every third of them text-only."""
    root = tmp_path_factory.mktemp("parts")
    set_seed(0)
    tokenizer = tiny.llama_tokenizer()
    clip = CLIPConfig(text_config={"num_hidden_layers": 1, "hidden_size": 32}, vision_config=tiny.TINY_VISION)
    CLIPModel(clip).save_pretrained(root / "clip")
    tiny.tiny_image_processor().save_pretrained(root / "clip")
    LlamaForCausalLM(LlamaConfig(**{**tiny.TINY_LLAMA, "vocab_size": len(tokenizer)})).save_pretrained(root / "llama")
    tokenizer.save_pretrained(root / "llama")
    rows = []
    for index in range(16):
        turns = []
        for _ in range(3):
            turns += [{"from": "human", "value": "What is this?"}, {"from": "gpt", "value": f"A dog {index}."}]
        rows.append({"id": f"r{index}", "conversations": turns})
        if index % 3:
            tiny.picture(index).save(root / f"{index}.png")
            rows[-1]["image"] = f"{index}.png"
            turns[0]["value"] = "<image>\n" + turns[0]["value"]
    (root / "train.json").write_text(json.dumps(rows))
    return root


def arguments(parts: Path, output_dir: Path, **overrides) -> list[str]:
    settings = SETTINGS | {
        "dataset_path": parts / "train.json",
        "output_dir": output_dir,
        "vision_model_name_or_path": parts / "clip",
        "text_model_name_or_path": parts / "llama",
    }
    return [text for name, value in (settings | overrides).items() for text in (f"--{name}", str(value))]


def run_child(args: list[str], log: str, environment: dict[str, str], prepare) -> None:
    """Body of a child process: `prepare` is a function, or one with its arguments, that is called first."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ.update(environment)
    torch.set_num_threads(1)
    if prepare is not None:
        function, *rest = prepare
        function(*rest)
    train_sft.main(args)


def environments_of(processes: int) -> list[dict[str, str]]:
    """What torchrun gives each of several processes; nothing for one."""
    if processes == 1:
        return [{}]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    shared |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    return [{"RANK": str(rank), "LOCAL_RANK": str(rank), **shared} for rank in range(processes)]


def start(args: list[str], log: Path, prepare=None, processes: int = 1) -> list[multiprocessing.Process]:
    children = [
        PROCESSES.Process(target=run_child, args=(args, str(log), environment, prepare))
        for environment in environments_of(processes)
    ]
    for child in children:
        child.start()
    return children


def run(args: list[str], log: Path, prepare=None, processes: int = 1) -> list[int]:
    """Exit codes of the processes; a negative one is the number of the signal that ended it."""
    return ended(start(args, log, prepare, processes))


def ended(children: list[multiprocessing.Process]) -> list[int]:
    for child in children:
        child.join(60)
        if child.is_alive():
            child.kill()
            child.join()
    return [child.exitcode for child in children]


def losses(output_dir: Path) -> list[dict]:
    history = json.loads((output_dir / "trainer_state.json").read_text())["log_history"]
    return [entry for entry in history if "loss" in entry]


def assert_equal_runs(left: Path, right: Path) -> None:
    assert losses(left) == losses(right)
    assert [entry["step"] for entry in losses(left)] == list(range(1, len(losses(left)) + 1))
    ours, theirs = (load_file(folder / "adapter_model.safetensors") for folder in (left, right))
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name


def steps_saved(output_dir: Path) -> list[int]:
    return sorted(step for folder in output_dir.iterdir() if (step := step_of(folder)) is not None)


# What is done to a process before it trains.


def die(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)


def in_step(step: int, action, *args) -> None:
    """Calls `action` in the forward pass of an optimizer step (with one batch a step), counted from the beginning."""
    original = SQLlavaTrainer.compute_loss

    def compute_loss(self, *inputs, **kwargs):
        if self.state.global_step + 1 == step:
            action(*args)
        return original(self, *inputs, **kwargs)

    SQLlavaTrainer.compute_loss = compute_loss


def note_rows(folder: Path) -> None:
    """Writes the rows of each step of this process into a file."""
    original = SQLlavaTrainer.compute_loss

    def compute_loss(self, model, inputs, **kwargs):
        with (folder / f"rows{os.environ['RANK']}").open("a") as stream:
            stream.write(json.dumps(inputs["row_ids"].tolist()) + "\n")
        return original(self, model, inputs, **kwargs)

    SQLlavaTrainer.compute_loss = compute_loss


def kill_in_adapter_file() -> None:
    def cut_off(self, output_dir):
        os.truncate(Path(output_dir) / "adapter_model.safetensors", 1000)
        die()

    SQLlavaTrainer._save_optimizer_and_scheduler = cut_off


def kill_in_state_file() -> None:
    original = TrainerState.save_to_json

    def cut_off(self, path):
        original(self, path)
        os.truncate(path, 100)
        die()

    TrainerState.save_to_json = cut_off


def kill_before_random_states() -> None:
    SQLlavaTrainer._save_rng_state = die


def kill_in_rotation() -> None:
    def half_delete(output_dir, **kwargs):
        oldest, *others = steps_saved(Path(output_dir))
        if others:
            (Path(output_dir) / f"checkpoint-{oldest}" / "optimizer.pt").unlink()
            die()

    transformers.trainer.rotate_checkpoints = half_delete


def kill_in_base() -> None:
    train_sft.SQLlavaProcessor.save_pretrained = die


def kill_at_the_end() -> None:
    SQLlavaTrainer.save_state = die


def signal_self(rank: int, *numbers: int) -> None:
    if int(os.environ.get("RANK", 0)) == rank:
        for number in numbers:
            os.kill(os.getpid(), number)


def signal_all() -> None:
    """As a scheduler does: to the workers of the data loader, too."""
    workers = [process.pid for process in multiprocessing.active_children()]
    assert len(workers) == 2
    for process in (*workers, os.getpid()):
        os.kill(process, signal.SIGTERM)


def limit_file_size(size: int) -> None:
    """A disk that is full behind `size` bytes of each file: what is written beyond fails, as on a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def poison_row(row_id: int) -> None:
    original = SelfQuestioningCollator.__call__

    def call(self, rows):
        batch = original(self, rows)
        if row_id in batch["row_ids"]:
            batch["pixel_values"].fill_(math.nan)
        return batch

    SelfQuestioningCollator.__call__ = call


def break_row(row_id: int) -> None:
    """A row that turns out to be wrong when it is fetched for the second time."""
    original, seen = SelfQuestioningCollator._conversation, []

    def conversation(self, row):
        if row["row_id"] == row_id:
            seen.append(row_id)
            if len(seen) == 2:
                raise ValueError(f"train.json, row {row_id}: the image is broken.")
        return original(self, row)

    SelfQuestioningCollator._conversation = conversation


@pytest.fixture(scope="module")
def whole(parts, tmp_path_factory) -> Path:
    """The run that nobody interrupts."""
    folder = tmp_path_factory.mktemp("whole")
    begin = time.monotonic()
    assert run(arguments(parts, folder / "run"), folder / "log") == [0], (folder / "log").read_text()[-3000:]
    (folder / "run" / "seconds").write_text(str(time.monotonic() - begin))
    return folder / "run"


def test_run_killed_in_its_base_a_step_and_a_save_equals_the_uninterrupted_one(parts, whole, tmp_path):
    output_dir, log = tmp_path / "run", tmp_path / "log"
    resumed = arguments(parts, output_dir, resume=True)
    assert run(resumed, log, (kill_in_base,)) == [-signal.SIGKILL]
    assert "holds no complete checkpoint; training starts anew" in log.read_text()
    assert run(resumed, log, (in_step, 6, die)) == [-signal.SIGKILL]
    assert steps_saved(output_dir) == [2, 4]
    assert run(resumed, log, (kill_in_state_file,)) == [-signal.SIGKILL]
    assert run(resumed, log, (kill_at_the_end,)) == [-signal.SIGKILL]
    assert "checkpoint-6 is half-written (trainer_state.json is cut off) and passed over" in log.read_text()
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
    assert "Stopped at step 5. Go on with --resume." in log.read_text()
    assert not (output_dir / "adapter_model.safetensors").exists()
    assert run(resumed, log) == [0], log.read_text()[-3000:]
    assert_equal_runs(whole, output_dir)


def test_second_interrupt_stops_at_once(parts, tmp_path):
    args = arguments(parts, tmp_path / "run")
    assert run(args, tmp_path / "log", (in_step, 5, signal_self, 0, signal.SIGINT, signal.SIGINT)) == [1]
    assert "KeyboardInterrupt" in (tmp_path / "log").read_text()
    assert steps_saved(tmp_path / "run") == [2, 4]


def test_signal_in_the_last_step_lets_the_run_end(parts, whole, tmp_path):
    args = arguments(parts, tmp_path / "run")
    assert run(args, tmp_path / "log", (in_step, 9, signal_self, 0, signal.SIGTERM)) == [0]
    assert_equal_runs(whole, tmp_path / "run")


@pytest.mark.slow
def test_rows_grouped_by_length_come_once_an_epoch_and_in_the_same_order_after_a_kill(parts, tmp_path):
    settings = {
        "per_device_train_batch_size": 2, "train_sampling_strategy": "group_by_length",
    }  # fmt: skip
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


@pytest.mark.slow
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


@pytest.mark.slow
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
    assert f"CheckpointError: {output_dir}/checkpoint-4 could not be written, with " in log.read_text()
    assert "It was removed; checkpoint-2 is as it was. Free disk space, then go on with --resume." in log.read_text()
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
    assert f"{done} steps were done. --resume goes on from checkpoint-{done}." in log.read_text()
    assert run(resumed, log) == [0], log.read_text()[-3000:]
    assert_equal_runs(whole, output_dir)


# In this process: what is looked at before each step.


def train(parts: Path, output_dir: Path, **overrides) -> SQLlavaTrainer:
    return train_sft.main(
        arguments(parts, output_dir, **{"max_steps": 3, "lr_scheduler_type": "constant"} | overrides)
    )


@pytest.fixture
def poison(monkeypatch):
    """`poison(rows, name, value)` fills an input of every batch that holds one of the rows."""

    def fill(rows: list[int], name: str, value: float) -> None:
        original = SelfQuestioningCollator.__call__

        def call(self, batch_rows):
            batch = original(self, batch_rows)
            if set(rows) & set(batch["row_ids"].tolist()):
                batch[name] = torch.full_like(batch[name], value)
            return batch

        monkeypatch.setattr(SelfQuestioningCollator, "__call__", call)

    return fill


def weights_of(checkpoint: Path) -> dict[str, torch.Tensor]:
    return load_file(checkpoint / "adapter_model.safetensors")


# Each step has two batches of two rows; the third step is poisoned.
ACCUMULATED = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}


@pytest.fixture(scope="module")
def two_steps(parts, tmp_path_factory) -> tuple[Path, list[list[int]]]:
    """A run of two steps, and the rows of all batches of its epoch."""
    output_dir = tmp_path_factory.mktemp("two") / "run"
    trainer = train(parts, output_dir, **ACCUMULATED, max_steps=2)
    return output_dir, [batch["row_ids"].tolist() for batch in trainer.get_train_dataloader()]


def assert_third_step_was_not_applied(two_steps: Path, output_dir: Path) -> None:
    assert steps_saved(output_dir) == [2]
    before, behind = weights_of(two_steps / "checkpoint-2"), weights_of(output_dir / "checkpoint-2")
    assert all(torch.equal(before[name], behind[name]) for name in before)


def test_step_whose_loss_is_nan_is_not_applied_and_its_rows_are_named(parts, two_steps, tmp_path, poison):
    sound, batches = two_steps
    poison([next(row for row in batches[5] if row % 3)], "pixel_values", math.nan)
    named = rf"rows {batches[4][0]}, {batches[4][1]} \(loss \d.*; rows {batches[5][0]}, {batches[5][1]} \(loss nan\)"
    with pytest.raises(ValueError, match=rf"Step 3 is not applied: its loss is nan\. .*{named}") as raised:
        train(parts, tmp_path / "run", **ACCUMULATED, save_steps=100)
    assert raised.value.__notes__ == ["2 steps were done. --resume goes on from checkpoint-2."]
    assert_third_step_was_not_applied(sound, tmp_path / "run")


def test_step_without_a_label_is_not_applied_but_one_such_batch_is(parts, two_steps, tmp_path, poison):
    sound, batches = two_steps
    poison(batches[4], "turn_kinds", 0)
    trainer = train(parts, tmp_path / "one", **ACCUMULATED)
    assert trainer.state.global_step == 3
    poison(batches[5], "turn_kinds", 0)
    with pytest.raises(ValueError, match=r"Step 3 is not applied: no token of it has a weight in the loss\."):
        train(parts, tmp_path / "run", **ACCUMULATED)
    assert_third_step_was_not_applied(sound, tmp_path / "run")


def test_step_whose_gradient_is_not_finite_is_not_applied(parts, two_steps, tmp_path, monkeypatch):
    original = SQLlavaTrainer.training_step

    def training_step(self, model, *args, **kwargs):
        loss = original(self, model, *args, **kwargs)
        if self.state.global_step == 2:
            next(p for p in model.parameters() if p.grad is not None).grad.view(-1)[0] = math.inf
        return loss

    monkeypatch.setattr(SQLlavaTrainer, "training_step", training_step)
    with pytest.raises(ValueError, match=r"Step 3 is not applied: the norm of its gradient is inf\."):
        train(parts, tmp_path / "run", **ACCUMULATED)
    assert_third_step_was_not_applied(two_steps[0], tmp_path / "run")


def test_diverging_loss_stops_the_run(parts, two_steps, tmp_path):
    with pytest.raises(ValueError, match=r"Step 1 is not applied: its loss is \d.*, above max_loss 0\.5 .*diverges"):
        train(parts, tmp_path / "run", max_loss=0.5)
    assert steps_saved(tmp_path / "run") == []
    trainer = train(parts, tmp_path / "sound", max_steps=1)
    assert trainer.watch.max_loss == 2 * math.log(trainer.model.config.text_config.vocab_size)


# Which checkpoint is gone on from.


@pytest.fixture
def run_folder(whole, tmp_path) -> Path:
    """A copy of the run that nobody interrupted: checkpoints 8 and 9."""
    return Path(shutil.copytree(whole, tmp_path / "copy"))


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "optimizer.pt", "rng_state.pth", "tokenizer.json"])
def test_each_file_of_a_checkpoint_is_missed_and_known_when_cut_off(run_folder, file):
    checkpoint = run_folder / "checkpoint-9"
    assert checkpoint_faults(checkpoint) == []
    size = (checkpoint / file).stat().st_size
    os.truncate(checkpoint / file, size - 1)
    assert checkpoint_faults(checkpoint) == [f"{file} has {size - 1} bytes of {size}"]
    (checkpoint / file).unlink()
    assert checkpoint_faults(checkpoint) == [f"{file} is missing"]
    assert find_checkpoint(str(run_folder), resume=True, given=None) == str(run_folder / "checkpoint-8")


@pytest.mark.parametrize("file", ["trainer_state.json", "run.json"])
def test_each_last_file_of_a_checkpoint_is_missed_and_known_when_cut_off(run_folder, file):
    checkpoint = run_folder / "checkpoint-9"
    for size in ((checkpoint / file).stat().st_size - 2, 0):
        os.truncate(checkpoint / file, size)
        assert checkpoint_faults(checkpoint) == [f"{file} is cut off"]
    (checkpoint / file).unlink()
    assert checkpoint_faults(checkpoint) == [f"{file} is missing"]
    assert find_checkpoint(str(run_folder), resume=True, given=None) == str(run_folder / "checkpoint-8")


def test_output_dir_with_checkpoints_is_refused_before_any_work(parts, run_folder):
    before = sorted(run_folder.rglob("*"))
    with pytest.raises(ValueError, match=r"already holds checkpoint-9: go on from it with --resume, or give another"):
        train(parts, run_folder, dataset_path="none.json")
    assert sorted(run_folder.rglob("*")) == before


def test_given_checkpoint_must_be_complete_and_the_newest(run_folder):
    with pytest.raises(ValueError, match=r"holds newer ones: checkpoint-9\. Move them away"):
        find_checkpoint(str(run_folder), resume=False, given=str(run_folder / "checkpoint-8"))
    (run_folder / "checkpoint-9" / "scheduler.pt").unlink()
    with pytest.raises(ValueError, match=r"checkpoint-9, which is not complete: scheduler.pt is missing\."):
        find_checkpoint(str(run_folder), resume=False, given=str(run_folder / "checkpoint-9"))


def test_checkpoints_that_were_complete_once_are_not_silently_thrown_away(run_folder):
    for step in (8, 9):
        (run_folder / f"checkpoint-{step}" / "optimizer.pt").unlink()
    with pytest.raises(ValueError, match=r"was complete once, but cannot be gone on from: optimizer.pt is missing"):
        find_checkpoint(str(run_folder), resume=True, given=None)
    assert steps_saved(run_folder) == [8, 9]


def test_half_written_checkpoint_with_a_higher_number_never_costs_the_complete_one(parts, run_folder):
    half_written = Path(shutil.copytree(run_folder / "checkpoint-9", run_folder / "checkpoint-100"))
    (half_written / "trainer_state.json").unlink()
    train(parts, run_folder, resume=True, save_total_limit=1, max_steps=11)
    assert steps_saved(run_folder) == [11]
    assert checkpoint_faults(run_folder / "checkpoint-11") == []


def test_base_is_read_back_and_another_one_is_refused(parts, run_folder):
    with pytest.raises(ValueError, match=r"num_prototypes is 6, but .*checkpoint-9 was trained with 5"):
        train(parts, run_folder, resume=True, num_prototypes=6)
    shutil.rmtree(run_folder / "base")
    with pytest.raises(ValueError, match=r"the base that it stands on is not in .*base\. Bring that folder back"):
        train(parts, run_folder, resume=True)


def test_changes_that_change_the_losses_are_said(run_folder, capsys):
    run = json.loads((run_folder / "checkpoint-9" / "run.json").read_text())
    warn_of_changes(str(run_folder / "checkpoint-9"), run)
    assert capsys.readouterr().out == ""
    warn_of_changes(str(run_folder / "checkpoint-9"), run | {"num_rows": 15})
    assert "num_rows was 16 and is 15 now" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_run_killed_at_ten_random_moments_equals_the_uninterrupted_one(parts, tmp_path, processes):
    settings = {"per_device_train_batch_size": 4 // processes, "max_steps": 40, "save_steps": 3}
    whole, output_dir, log = tmp_path / "whole", tmp_path / "run", tmp_path / "log"
    assert run(arguments(parts, whole, **settings), log, processes=processes) == [0] * processes
    resumed = arguments(parts, output_dir, resume=True, **settings)
    draw = random.Random(0)
    for _ in range(10):
        already = log.read_text().count("'loss'")
        children = start(resumed, log, processes=processes)
        while log.read_text().count("'loss'") == already:
            time.sleep(0.001)
        time.sleep(draw.uniform(0, 0.25))
        # One of two processes, or both: the other ends by itself, with an error or by our hand.
        for child in draw.sample(children, draw.randint(1, processes)):
            child.kill()
        codes = ended(children)
        assert -signal.SIGKILL in codes, "the run was over before it could be killed"
        print(steps_saved(output_dir), [folder.name for folder in output_dir.glob("half-*")])
    assert run(resumed, log, processes=processes) == [0] * processes, log.read_text()[-3000:]
    assert_equal_runs(whole, output_dir)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "message"),
    [(poison_row, "is not applied: its loss is nan"), (break_row, "train.json, row 5: the image is broken")],
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
    assert f"--resume goes on from checkpoint-{newest}." in log.read_text()
    if fault is poison_row:
        assert all(f"Its batches on process {rank}, by row_id: rows" in log.read_text() for rank in (0, 1))
    assert run(resumed, log, processes=2) == [0, 0], log.read_text()[-3000:]
    assert_equal_runs(whole, output_dir)
