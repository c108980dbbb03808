"""Runs `train_sft.py` with tiny models, in this process or in others, and breaks such a process in many ways."""

import json
import math
import multiprocessing
import os
import random
import resource
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, PreTrainedModel, TrainerState

import train_sft
from processing_sq_llava import SQLlavaProcessor
from sq_llava.checkpoints.completeness import step_of
from sq_llava.checkpoints.load import merge_adapter
from sq_llava.training import trainer
from sq_llava.training.collator import SelfQuestioningCollator
from sq_llava.training.memory import Batch, estimate_memory
from sq_llava.training.planning import model_from_configs
from sq_llava.training.settings import parse_settings
from sq_llava.training.trainer import SQLlavaTrainer
from tests import tiny
from tests.processes import ended, fork


# Four optimizer steps per epoch. Both towers have dropout, so that the random states matter.
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
NO_DROPOUT = {"vision_lora_dropout": 0.0, "lora_dropout": 0.0}
# With plain gradient descent, a wrong gradient shows in the weights. Adam would divide its scale away.
PLAIN_DESCENT = NO_DROPOUT | {"optim": "sgd", "learning_rate": 0.1}


def make_parts(root: Path) -> Path:
    """Writes a CLIP, a Llama, and 16 rows. Every third row is text-only."""
    tiny.save_towers(root)
    return tiny.write_rows(root, lambda index: [("What is this?", f"A dog {index}.")] * 3)


def write_in_order(parts: Path, file: Path, first: str = "images") -> dict:
    """
    Writes ten rows, in turn two about one image and two without, so that one of two processes never sees an image.

    With four rows per step, half a batch is left over in an epoch.

    Args:
        first: "images" or "text", the kind of the first two rows.
    """
    rows = json.loads((parts / "train.json").read_text())
    with_image, text_only = ([row for row in rows if ("image" in row) == kind] for kind in (True, False))
    for one, other in zip(with_image[::2], with_image[1::2]):
        other["image"] = one["image"]
    pairs = [(with_image[at : at + 2], text_only[at : at + 2]) for at in (0, 2, 4)]
    ordered = [row for pair in pairs for half in pair[:: 1 if first == "images" else -1] for row in half][:10]
    file.write_text(json.dumps(ordered))
    return {"dataset_path": file, "image_root": parts, "train_sampling_strategy": "sequential"}


def command_line(settings: dict) -> list[str]:
    """Settings as options. A tuple is several words."""
    words = []
    for name, value in settings.items():
        words += [f"--{name}", *map(str, value if isinstance(value, tuple) else (value,))]
    return words


def arguments(parts: Path, output_dir: Path, previous: Path | None = None, **overrides) -> list[str]:
    """A command line that starts from `previous`, the folder of a stage, or else from a new model."""
    settings = SETTINGS | {"dataset_path": parts / "train.json", "output_dir": output_dir}
    if previous is None:
        settings |= {"vision_model_name_or_path": parts / "clip", "text_model_name_or_path": parts / "llama"}
    else:
        settings["model_name_or_path"] = previous
    return command_line(settings | overrides)


def train(parts: Path, output_dir: Path, previous: Path | None = None, **overrides) -> SQLlavaTrainer:
    """Trains in this process."""
    settings = {"max_steps": 3, "lr_scheduler_type": "constant"} | overrides
    return train_sft.main(arguments(parts, output_dir, previous, **settings))


class Run:
    """
    Trains in processes of its own, into `folder/run`. What they print is added to `folder/log`.

    Args:
        environment: What a launcher adds to the environment of the processes.
    """

    def __init__(
        self, parts: Path, folder: Path, processes: int = 1, environment: dict[str, str] | None = None, **settings
    ):
        self.environment = environment
        folder.mkdir(exist_ok=True)
        self.output_dir, self.log, self.processes = folder / "run", folder / "log", processes
        self.log.touch()
        self.args = arguments(parts, self.output_dir, **settings)

    def start(self, *prepare) -> list[multiprocessing.Process]:
        """`prepare` is a function and its arguments, called in each process before it trains."""
        return fork(train_sft.main, (self.args,), self.log, prepare or None, self.processes, self.environment)

    def exit_codes(self, *prepare) -> list[int]:
        """Minus the number of the signal for a process that was killed."""
        return ended(self.start(*prepare))

    def finish(self, *prepare) -> Path:
        assert self.exit_codes(*prepare) == [0] * self.processes, self.text[-3000:]
        return self.output_dir

    @property
    def text(self) -> str:
        return self.log.read_text()

    @property
    def steps_saved(self) -> list[int]:
        return steps_saved(self.output_dir)


def history(output_dir: Path) -> list[dict]:
    return json.loads((output_dir / "trainer_state.json").read_text())["log_history"]


def losses(output_dir: Path) -> list[dict]:
    return [entry for entry in history(output_dir) if "loss" in entry]


def trained_weights(folder: Path) -> dict[str, torch.Tensor]:
    """The weights that a run leaves, of an adapter or of a whole model."""
    adapter = folder / "adapter_model.safetensors"
    return load_file(adapter if adapter.is_file() else folder / "model.safetensors")


def assert_close(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor], rtol=0.0, atol=1e-5) -> None:
    """Compares two dicts of tensors, and names the one that differs."""
    assert left.keys() == right.keys()
    for name in left:
        torch.testing.assert_close(left[name], right[name], rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


def assert_similar_runs(left: Path, right: Path, atol=1e-6) -> None:
    """The same run on another number of processes: sums in another order differ in their last bits."""
    for ours, theirs in zip(losses(left), losses(right), strict=True):
        ours["epoch"] = theirs["epoch"]  # counted in batches, of which there can be more
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-5)
    assert_close(trained_weights(left), trained_weights(right), atol=atol)


def assert_memory_is_planned(run: Run, held: dict[str, int], sharding: str, pieces: int = 2) -> None:
    """
    Compares what the processes of a run held with what `--dry_run meta` estimates, to 1%.

    Args:
        held: As `tests.launches.held_bytes` returns it.
        sharding, pieces: A column of the plan, and the number of processes that it divides a model among.
    """
    arguments, training_args, model_config = parse_settings(run.args)
    model = model_from_configs(arguments, model_config)
    terms = estimate_memory(model, Batch(1, 8, 1), training_args, pieces, sharding)
    planned = {term.name: term.num_bytes for term in terms}
    if sharding == "DDP":
        planned["gradients"] /= 2  # the other half is in its buckets
    for name in ("weights", "gradients", "optimizer"):
        assert held[name] == pytest.approx(planned[name], rel=0.01), name


def assert_killed_run_equals(run: Run, whole: Path, plain: Path, merged: Path) -> PreTrainedModel:
    """
    Kills a run of several processes in its fourth step, and resumes it. Returns the model that it leaves.

    Args:
        run (`Run`): Not started yet, with `resume`.
        whole (`Path`): Output of the same run, never killed.
        plain (`Path`): Output of one process. The run must leave the same files.
        merged (`Path`): Where the model is merged to, if the run trains an adapter. It must load by its own code.
    """
    assert -signal.SIGKILL in run.exit_codes(in_step, 4, die)
    assert run.steps_saved == [2]
    run.finish()
    assert "training resumes from" in run.text
    assert_similar_runs(whole, run.output_dir, atol=1e-7)
    files = [{file.name for file in folder.iterdir() if file.is_file()} for folder in (plain, run.output_dir)]
    assert files[0] == files[1]
    folder = run.output_dir
    if (folder / "adapter_config.json").is_file():
        merge_adapter(str(folder), str(merged))
        folder = merged
    model = AutoModel.from_pretrained(folder, trust_remote_code=True)
    assert type(model).__name__ == "SQLlavaForConditionalGeneration"
    return model


def assert_equal_runs(left: Path, right: Path) -> None:
    assert losses(left) == losses(right)
    assert [entry["step"] for entry in losses(left)] == list(range(1, len(losses(left)) + 1))
    assert_close(trained_weights(left), trained_weights(right), atol=0)


def steps_saved(output_dir: Path) -> list[int]:
    return sorted(step for folder in output_dir.iterdir() if (step := step_of(folder)) is not None)


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.requires_grad}


def perturbed(model: torch.nn.Module) -> torch.nn.Module:
    """Adds noise to the trained weights: LoRA's B matrices start at zero."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.02 * torch.randn(parameter.shape, generator=generator)
    return model


@torch.no_grad()
def logits(model, processor: SQLlavaProcessor) -> torch.Tensor:
    """The logits of a question about an image."""
    content = [{"type": "image", "image": tiny.picture()}, {"type": "text", "text": "What is it?"}]
    messages = [{"role": "user", "content": content}]
    inputs = processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt")
    return model.eval()(**inputs).logits


def wait_for_steps(number: int, children: list, run: Run) -> None:
    """Waits until the run has made this many more steps, or has ended."""
    losses_then = run.text.count("'loss'") + number
    while run.text.count("'loss'") < losses_then and children[0].is_alive():
        time.sleep(0.001)


def kill_at_random_moments(run: Run, num_kills: int, seed: int = 0) -> None:
    """Starts or resumes a run this often, and kills one of its processes or several in a step."""
    draw = random.Random(seed)
    for _ in range(num_kills):
        children = run.start()
        wait_for_steps(1, children, run)
        begin, num_steps = time.monotonic(), draw.randint(1, 3)
        wait_for_steps(num_steps, children, run)
        # At a random moment of the next step, judged by how long the last steps took.
        time.sleep(draw.uniform(0, 1) * (time.monotonic() - begin) / num_steps)
        killed = draw.sample(range(run.processes), draw.randint(1, run.processes))
        for rank in killed:
            children[rank].kill()
        codes = ended(children)
        assert codes[killed[0]] == -signal.SIGKILL, "the run ended before it could be killed"
        # `ended` kills a process that is alive after a minute.
        assert codes.count(-signal.SIGKILL) == len(killed), "a process waited for a killed one"


# Functions that are called in a process before it trains.


def die(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)


def in_step(step: int, action, *args) -> None:
    """Calls `action` in the forward pass of an optimizer step that has one batch. Steps count from 1."""
    original = SQLlavaTrainer.compute_loss

    def compute_loss(self, *inputs, **kwargs):
        if self.state.global_step + 1 == step:
            action(*args)
        return original(self, *inputs, **kwargs)

    SQLlavaTrainer.compute_loss = compute_loss


def write_row_ids(folder: Path) -> None:
    """Writes the row ids of each batch of this process to a file."""
    original = SQLlavaTrainer.compute_loss

    def compute_loss(self, model, inputs, **kwargs):
        with (folder / f"rows{os.environ['RANK']}").open("a") as stream:
            stream.write(json.dumps(inputs["row_ids"].tolist()) + "\n")
        return original(self, model, inputs, **kwargs)

    SQLlavaTrainer.compute_loss = compute_loss


def row_ids(folder: Path) -> list[list[list[int]]]:
    """The row ids of each batch of each of two processes, as `write_row_ids` wrote them."""
    return [list(map(json.loads, (folder / f"rows{rank}").read_text().splitlines())) for rank in (0, 1)]


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

    trainer.rotate_checkpoints = half_delete


def kill_in_base() -> None:
    SQLlavaProcessor.save_pretrained = die


def kill_at_the_end() -> None:
    SQLlavaTrainer.save_state = die


def signal_self(rank: int, *numbers: int) -> None:
    if int(os.environ.get("RANK", 0)) == rank:
        for number in numbers:
            os.kill(os.getpid(), number)


def signal_all() -> None:
    """Sends SIGTERM to the dataloader workers too, as a scheduler does."""
    workers = [process.pid for process in multiprocessing.active_children()]
    assert len(workers) == 2
    for process in (*workers, os.getpid()):
        os.kill(process, signal.SIGTERM)


def limit_file_size(size: int) -> None:
    """Imitates a full disk: writing more than `size` bytes to a file fails."""
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
    """Makes a row invalid when it is loaded for the second time."""
    original, seen = SelfQuestioningCollator._sample, []

    def sample(self, row):
        if row["row_id"] == row_id:
            seen.append(row_id)
            if len(seen) == 2:
                raise ValueError(f"train.json, row {row_id}: the image is broken.")
        return original(self, row)

    SelfQuestioningCollator._sample = sample
