"""Runs of `train_sft.py` with tiny models, in processes of their own, and what can be done to such a process."""

import json
import math
import multiprocessing
import os
import resource
import signal
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file
from transformers import TrainerState

import train_sft
from processing_sq_llava import SQLlavaProcessor
from sq_llava.checkpoints.completeness import step_of
from sq_llava.training.collator import SelfQuestioningCollator
from sq_llava.training.trainer import SQLlavaTrainer
from tests import tiny
from tests.processes import ended, fork


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


def make_parts(root: Path) -> Path:
    """A CLIP, a Llama, and 16 rows, every third of them text-only."""
    tiny.save_towers(root)
    return tiny.write_rows(root, lambda index: [("What is this?", f"A dog {index}.")] * 3)


def arguments(parts: Path, output_dir: Path, **overrides) -> list[str]:
    settings = SETTINGS | {
        "dataset_path": parts / "train.json",
        "output_dir": output_dir,
        "vision_model_name_or_path": parts / "clip",
        "text_model_name_or_path": parts / "llama",
    }
    return [text for name, value in (settings | overrides).items() for text in (f"--{name}", str(value))]


def start(args: list[str], log: Path, prepare=None, processes: int = 1, environment=None):
    return fork(train_sft.main, (args,), log, prepare, processes, environment)


def run(args: list[str], log: Path, prepare=None, processes: int = 1, environment=None) -> list[int]:
    """Exit codes of the processes; a negative one is the number of the signal that ended it."""
    return ended(start(args, log, prepare, processes, environment))


def history(output_dir: Path) -> list[dict]:
    return json.loads((output_dir / "trainer_state.json").read_text())["log_history"]


def losses(output_dir: Path) -> list[dict]:
    return [entry for entry in history(output_dir) if "loss" in entry]


def assert_equal_runs(left: Path, right: Path) -> None:
    assert losses(left) == losses(right)
    assert [entry["step"] for entry in losses(left)] == list(range(1, len(losses(left)) + 1))
    ours, theirs = (load_file(folder / "adapter_model.safetensors") for folder in (left, right))
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name


def steps_saved(output_dir: Path) -> list[int]:
    return sorted(step for folder in output_dir.iterdir() if (step := step_of(folder)) is not None)


def train(parts: Path, output_dir: Path, **overrides) -> SQLlavaTrainer:
    return train_sft.main(
        arguments(parts, output_dir, **{"max_steps": 3, "lr_scheduler_type": "constant"} | overrides)
    )


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
    SQLlavaProcessor.save_pretrained = die


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
    original, seen = SelfQuestioningCollator._sample, []

    def sample(self, row):
        if row["row_id"] == row_id:
            seen.append(row_id)
            if len(seen) == 2:
                raise ValueError(f"train.json, row {row_id}: the image is broken.")
        return original(self, row)

    SelfQuestioningCollator._sample = sample
