"""Runs that are killed, stopped, out of disk or fed with bad rows, in processes of their own, with tiny models."""

import json
import multiprocessing
import os
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
from sq_llava.recovery import step_of
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


def start(args: list[str], log: Path, prepare=None, processes: int = 1) -> list[multiprocessing.Process]:
    environments = [{}]
    if processes > 1:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        environments = [
            {
                "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": "2",
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
            }
            for rank in range(processes)
        ]  # fmt: skip
    children = [
        PROCESSES.Process(target=run_child, args=(args, str(log), environment, prepare))
        for environment in environments
    ]
    for child in children:
        child.start()
    return children


def run(args: list[str], log: Path, prepare=None, processes: int = 1) -> list[int]:
    """Exit codes of the processes; a negative one is the number of the signal that ended it."""
    children = start(args, log, prepare, processes)
    for child in children:
        child.join(120)
    return [child.exitcode for child in children]


def losses(output_dir: Path) -> list[dict]:
    history = json.loads((output_dir / "trainer_state.json").read_text())["log_history"]
    return [entry for entry in history if "loss" in entry]


def assert_equal_runs(left: Path, right: Path) -> None:
    assert losses(left) == losses(right)
    assert len(losses(left)) == SETTINGS["max_steps"]
    ours, theirs = (load_file(folder / "adapter_model.safetensors") for folder in (left, right))
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name


def steps_saved(output_dir: Path) -> list[int]:
    return sorted(step for folder in output_dir.iterdir() if (step := step_of(folder)) is not None)


# Where a process kills itself.


def kill_self(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)


def kill_in_step(occurrence: int) -> None:
    original, calls = SQLlavaTrainer.compute_loss, []

    def compute_loss(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == occurrence:
            kill_self()
        return original(self, *args, **kwargs)

    SQLlavaTrainer.compute_loss = compute_loss


def kill_in_adapter_file() -> None:
    def cut_off(self, output_dir):
        os.truncate(Path(output_dir) / "adapter_model.safetensors", 1000)
        kill_self()

    SQLlavaTrainer._save_optimizer_and_scheduler = cut_off


def kill_in_state_file() -> None:
    original = TrainerState.save_to_json

    def cut_off(self, path):
        original(self, path)
        os.truncate(path, 100)
        kill_self()

    TrainerState.save_to_json = cut_off


def kill_before_random_states() -> None:
    SQLlavaTrainer._save_rng_state = kill_self


def kill_in_rotation() -> None:
    def half_delete(output_dir, **kwargs):
        oldest = min((folder for folder in Path(output_dir).iterdir() if step_of(folder)), key=step_of)
        (oldest / "optimizer.pt").unlink()
        kill_self()

    transformers.trainer.rotate_checkpoints = half_delete


def kill_in_base() -> None:
    train_sft.SQLlavaProcessor.save_pretrained = kill_self


def kill_at_the_end() -> None:
    SQLlavaTrainer.save_state = kill_self


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
    assert run(resumed, log, (kill_in_step, 6)) == [-signal.SIGKILL]
    assert steps_saved(output_dir) == [2, 4]
    assert run(resumed, log, (kill_in_state_file,)) == [-signal.SIGKILL]
    assert run(resumed, log, (kill_at_the_end,)) == [-signal.SIGKILL]
    assert "checkpoint-6 is half-written (trainer_state.json is cut off) and passed over" in log.read_text()
    assert run(resumed, log) == [0], log.read_text()[-3000:]
    assert_equal_runs(whole, output_dir)
