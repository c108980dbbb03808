"""Crash safety: finds complete checkpoints, stops on signals, and checks each step before it is applied.

    python -m train_sft --config recipes/sq-llava-7b/stage1.yaml --resume

A run may be killed at any moment. Resumed with `--resume`, it has the same losses and weights as a run that was never
killed. The newest complete checkpoint holds weights, optimizer and schedule. Self-questions, the order of rows and
dropout depend only on the seed and on epoch, row, turn, step and process.

A power failure cannot damage a complete checkpoint: its files are flushed to the disk (fsync) before `run.json` lists
them, and older checkpoints are removed only after that. The final model gets its place in `output_dir` when all of its
files are complete.
"""

import hashlib
import json
import math
import os
import pickle
import shutil
import signal
from pathlib import Path
from statistics import fmean

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType
from transformers import TrainerCallback
from transformers.trainer_pt_utils import safe_globals

from sq_llava.checkpoints.completeness import RUN_FILE, STATE_FILE, checkpoint_faults, json_fault, step_of
from sq_llava.checkpoints.config_checks import one_line
from sq_llava.checkpoints.weight_files import load_plain
from sq_llava.output import HALF_WRITTEN, sync, sync_path


# sysexits.h: "temporary failure, try again later". A scheduler may restart the job on this exit code.
EXIT_TRY_AGAIN = os.EX_TEMPFAIL
# Folder in `output_dir` of the final model until it is complete.
HALF_WRITTEN_MODEL = f"{HALF_WRITTEN}model"
# Without its configuration, a folder is neither a model nor an adapter.
CONFIGURATIONS = ("adapter_config.json", "config.json")
# Number of steps whose mean loss is the beginning of a run, with which `StepWatch` compares later steps.
FIRST_STEPS = 10


class CheckpointError(OSError):
    """A checkpoint could not be written."""


def find_checkpoint(output_dir: str, resume: bool, given: str | None) -> str | None:
    """
    Finds the complete checkpoint to resume from.

    Half-written checkpoints in `output_dir` are renamed, so that they neither count in `save_total_limit` nor mix with
    later files. Nothing is deleted.

    Args:
        output_dir (`str`): Folder of the run.
        resume (`bool`): Whether to resume from the newest complete checkpoint of `output_dir`.
        given (`str`, *optional*): Another checkpoint to resume from.

    Returns:
        `str` or `None`: Path of the checkpoint; `None` to train from the beginning.

    Raises:
        ValueError: if `output_dir` holds checkpoints but neither `resume` nor `given` is set; if the given checkpoint
            is incomplete, or older than others in `output_dir`; if no checkpoint is complete and one is damaged.
    """
    folders = [folder for folder in Path(output_dir).glob("checkpoint-*") if step_of(folder) is not None]
    folders.sort(key=step_of)
    if folders and not resume and given is None:
        raise ValueError(
            f"output_dir {output_dir} already contains {folders[-1].name}. Resume that run with --resume, or choose "
            "another output_dir."
        )
    if given is not None and (faults := checkpoint_faults(Path(given))):
        raise ValueError(
            f"resume_from_checkpoint is {given}, which is incomplete: {'; '.join(faults)}. Choose another checkpoint."
        )
    half_written = {folder: faults for folder in folders if (faults := checkpoint_faults(folder))}
    complete = [folder for folder in folders if folder not in half_written]
    if given is not None:
        newer = [folder.name for folder in complete if step_of(folder) > (step_of(Path(given)) or 0)]
        if newer:
            raise ValueError(
                f"resume_from_checkpoint is {given}, but output_dir {output_dir} contains newer checkpoints: "
                f"{', '.join(newer)}. Move them away, or choose another output_dir."
            )
    elif not complete:
        _refuse_damaged(half_written)
    for folder, faults in half_written.items():
        _set_aside(folder, faults)
    if given is not None:
        return given
    if not complete:
        if resume:
            PartialState().print(f"--resume: {output_dir} contains no complete checkpoint. Training starts at step 0.")
        return None
    PartialState().print(f"--resume: training resumes from {complete[-1]}.")
    return str(complete[-1])


def require_plain_states(checkpoint: str) -> None:
    """
    Checks that the states of optimizer, schedule and random generators, and the index of a sharded checkpoint of FSDP,
    hold only data. Tensors are not read.

    DeepSpeed loads its own files as pickles that may run code: resume only your own runs with it.

    Raises:
        ValueError: if a file is damaged, or holds code that would be run.
    """
    for file in sorted([*Path(checkpoint).glob("*.pt"), *Path(checkpoint).glob("*.pth")]):
        with safe_globals():
            load_plain(file)
    for file in sorted(Path(checkpoint).glob("*/.metadata")):
        try:
            with file.open("rb") as stream:
                _IndexOfShards(stream).load()
        except Exception as error:  # pickle documents no common class for errors of damaged files
            raise ValueError(
                f"{file} was not loaded: it is damaged, or holds code that would be run ({one_line(error)}). "
                "Resume from another checkpoint."
            ) from error


class _IndexOfShards(pickle.Unpickler):
    """Reads an index of torch.distributed.checkpoint, which torch itself would load with any code in it."""

    def find_class(self, module: str, name: str):
        is_data = (module, name) in (("torch", "Size"), ("torch.serialization", "_get_layout"))
        is_own = module.startswith("torch.distributed.checkpoint.") or module == "pathlib"
        if not is_data and "." not in name and (is_own or module == "torch"):
            found = super().find_class(module, name)
            is_data = isinstance(found, torch.dtype) or (isinstance(found, type) and is_own)
        if not is_data:
            raise pickle.UnpicklingError(f"{module}.{name}")
        return super().find_class(module, name)


def _refuse_damaged(half_written: dict[Path, list[str]]) -> None:
    """Refuses to start from the beginning if a checkpoint was damaged after it was complete: it may be repairable."""
    for folder, faults in half_written.items():
        if not json_fault(folder / STATE_FILE):
            raise ValueError(
                f"{folder} was complete once, but is damaged and cannot be resumed: {'; '.join(faults)}. Restore its "
                "files, or choose another output_dir to start from the beginning."
            )


def _set_aside(folder: Path, faults: list[str]) -> None:
    target = folder.with_name(HALF_WRITTEN + folder.name)
    number = 1
    while target.exists():
        number += 1
        target = folder.with_name(f"{HALF_WRITTEN}{folder.name}-{number}")
    folder.rename(target)
    print(
        f"{folder} is half-written ({'; '.join(faults)}) and is skipped. It was renamed to {target.name} and may be "
        "deleted."
    )


def place_model(part: Path, final: Path) -> None:
    """
    Moves the files of a complete model to their place. A kill meanwhile leaves no model, but never a mix of two: the
    configuration is removed first and comes last.
    """
    sync(part)
    files = sorted(part.iterdir(), key=lambda file: file.name in CONFIGURATIONS)
    # Of either kind: an adapter is found before a model, and a single file of weights before several.
    for name in (*CONFIGURATIONS, "adapter_model.safetensors", "model*.safetensors*"):
        for old in final.glob(name):
            old.unlink()
    for file in files:
        if file.is_dir():
            shutil.rmtree(final / file.name, ignore_errors=True)
        file.replace(final / file.name)
    part.rmdir()
    sync_path(final)


def warn_of_changes(checkpoint: str, run: dict[str, int]) -> None:
    """Prints each setting that changes the losses and differs from the run that wrote the checkpoint."""
    before = json.loads((Path(checkpoint) / RUN_FILE).read_text())
    for name, now in run.items():
        if before.get(name, now) != now:
            print(
                f"Warning: {name} is {now}, but was {before[name]} in {checkpoint}. The losses will differ from those "
                "of an uninterrupted run."
            )


class StepWatch(TrainerCallback):
    """
    Checks each optimizer step before it is applied, in all processes together, with one all-reduce.

    A step is refused with a `ValueError`, before any weight changes, if its loss or gradient is not finite, if none of
    its tokens has a weight in the loss, or if its loss is above [`StepWatch.highest_loss`]. DeepSpeed applies a step
    inside the backward pass. With it, the loss is checked before that pass, and the gradient after it: the error says
    whether DeepSpeed has applied the step.

    On SIGTERM or SIGINT in any process, all processes finish the step and save a checkpoint; `stopped` is then true. A
    SIGINT after that stops at once. The Trainer's own `enable_jit_checkpoint` is not used: each process would decide
    alone, three seconds later. The checkpoint may be saved between backward pass and step, with the number of the
    previous step, and the run exits with 0.

    Args:
        accelerator ([`~accelerate.Accelerator`]): The trainer's accelerator.
        vocab_size (`int`): Size of the vocabulary.
        max_loss (`float`, *optional*): Maximum loss of a step, in nats per token of weight 1. Default: twice the loss
            that the run began with.
    """

    def __init__(self, accelerator: Accelerator, vocab_size: int, max_loss: float | None = None):
        self.accelerator = accelerator
        self.uniform_loss = math.log(vocab_size)
        self.max_loss = max_loss
        # Losses of the first steps of the run; checkpoints keep them.
        self.first_losses: list[float] = []
        self.stopped = False
        self.applying = False
        # Step of the newest checkpoint, begun or complete; None before training.
        self.saved_step: int | None = None
        # Set by the trainer: row ids with (weighted loss, weight) of each micro-batch, and the gradient norm.
        self.micro_batches: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.gradient_norm: torch.Tensor | float | None = None
        self._signal: int | None = None
        self._handlers: dict = {}

    def on_train_begin(self, args, state, control, **kwargs):
        self.saved_step = state.global_step
        self._process = os.getpid()
        self._handlers = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}

    @property
    def highest_loss(self) -> float:
        """
        The highest loss that a step may have: `max_loss` if it was given. Otherwise twice the mean loss of the first
        `FIRST_STEPS` steps, or twice the loss of a uniform guess if that is higher. The first step may have any loss:
        texts that the language model has never seen can be worse than a guess.
        """
        if self.max_loss is not None:
            return self.max_loss
        return 2 * max(self.uniform_loss, fmean(self.first_losses)) if self.first_losses else math.inf

    def restore_handlers(self) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}

    def _note(self, number, frame):
        # Dataloader workers inherit this handler, but must keep working until the step is finished.
        if os.getpid() != self._process:
            return
        self._signal = number
        signal.signal(signal.SIGINT, signal.default_int_handler)
        # Not print: a signal handler may interrupt another print.
        os.write(2, f"\n{signal.Signals(number).name}: finishing and saving this step, then stopping.\n".encode())

    def on_step_begin(self, args, state, control, **kwargs):
        # The dataloader and dropout share one random generator. With persistent workers, the dataloader draws from it
        # a different number of times after a resume, so each step sets its own seed for dropout.
        key = f"{args.seed}:{state.global_step}:{args.process_index}".encode()
        torch.manual_seed(int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big"))
        self.micro_batches.clear()

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        step, norm = state.global_step + 1, self.gradient_norm
        if self.accelerator.distributed_type != DistributedType.DEEPSPEED:
            self.check(step, norm)
        # DeepSpeed does not always know the norm. With float16, it skips such steps itself.
        elif norm is not None and not math.isfinite(norm) and self.accelerator.mixed_precision != "fp16":
            self._refuse_after_backward(step, norm)

    def _refuse_after_backward(self, step: int, gradient_norm: float) -> None:
        """Refuses a step whose gradient is not finite. DeepSpeed has already skipped or applied it."""
        if self.accelerator.optimizer_step_was_skipped:
            self.applying = False
            self._refuse(step, f"its gradient norm is {gradient_norm}.")
        raise ValueError(
            f"The gradient norm of step {step} is {gradient_norm}, and DeepSpeed has applied this step: the weights "
            "of this run are lost. Fix the rows or the settings, and resume from the last checkpoint with --resume."
        )

    def check(self, step: int, gradient_norm: torch.Tensor | float | None = None) -> None:
        """
        Args:
            step (`int`): Number of the step, from 1.
            gradient_norm: `None` under DeepSpeed, which computes it in the backward pass. DeepSpeed also applies the
                step there, so this is called before.

        Raises:
            ValueError: if the step is refused.
        """
        device = self.accelerator.device
        own = torch.stack([sums for _, sums in self.micro_batches]).sum(0)
        stop_requested = torch.tensor([float(self._signal is not None)], device=device)
        norm = torch.as_tensor(0.0 if gradient_norm is None else gradient_norm, device=device).float().reshape(1)
        totals = torch.cat([own, norm, stop_requested])
        loss, weight, norm, stop_requested = self.accelerator.reduce(totals, reduction="sum").tolist()
        loss = loss / weight if weight else math.nan
        if weight == 0:
            self._refuse(step, "none of its tokens has a weight in the loss.")
        if not math.isfinite(loss):
            self._refuse(step, f"its loss is {loss}.")
        if loss > self.highest_loss:
            self._refuse(step, f"its loss is {loss:.4g}, above {self._limit()}. Training diverges.")
        # With float16, the gradient scaler skips such steps itself.
        if not math.isfinite(norm) and self.accelerator.scaler is None:
            self._refuse(step, f"its gradient norm is {norm}.")
        if len(self.first_losses) < FIRST_STEPS:
            self.first_losses.append(loss)
        self.stopped = stop_requested > 0
        self.applying = True

    def _limit(self) -> str:
        if self.max_loss is not None:
            return f"max_loss {self.max_loss:.4g}"
        return (
            f"{self.highest_loss:.4g}: twice the mean loss of the first steps ({fmean(self.first_losses):.4g}), or of "
            f"a uniform guess ({self.uniform_loss:.4g}) if that is higher. max_loss sets another limit"
        )

    def _refuse(self, step: int, reason: str) -> None:
        rows = "; ".join(
            f"rows {', '.join(map(str, row_ids.tolist()))} (loss {float(loss / weight):.4g})"
            for row_ids, (loss, weight) in self.micro_batches
        )
        raise ValueError(
            f"Step {step} was not applied: {reason} Its batches on process {self.accelerator.process_index}, by "
            f"row_id: {rows}. Fix these rows, or change the settings (such as a lower learning_rate)."
        )

    def on_step_end(self, args, state, control, **kwargs):
        self.applying = False
        if self.stopped:
            control.should_training_stop = True
            control.should_save = args.save_strategy != "no"
            # With save_strategy best, an evaluation would cancel this save. And the end of training would delete this
            # checkpoint if another one is the best.
            control.should_evaluate = False
            if args.metric_for_best_model is not None:
                args.save_total_limit = None
        # Otherwise the losses since the last log line would be lost when the process exits.
        control.should_log |= control.should_save
