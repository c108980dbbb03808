"""Crash safety: complete checkpoints, a stop on signals, and a check of each step before it is applied.

    python -m train_sft --config recipes/sq-llava-7b/stage1.yaml --resume

A run that is killed at any moment and resumed with `--resume` has the losses and weights of one that was never killed.
The newest complete checkpoint holds weights, optimizer and schedule; self-questions, the order of rows and dropout are
functions of the seed and of epoch, row, turn, step and process. What it does not do: write to disk through power
failures (no fsync).
"""

import hashlib
import json
import math
import os
import signal
from pathlib import Path

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType
from transformers import TrainerCallback

from sq_llava.checkpoints.completeness import RUN_FILE, STATE_FILE, checkpoint_faults, json_fault, step_of


# sysexits.h: "temporary failure, try again later". A scheduler may requeue on it.
EXIT_TRY_AGAIN = os.EX_TEMPFAIL
SET_ASIDE = "half-written-"


class CheckpointError(OSError):
    """A checkpoint could not be written."""


def find_checkpoint(output_dir: str, resume: bool, given: str | None) -> str | None:
    """
    The complete checkpoint that a run resumes from; `None` for a run from the beginning.

    Half-written checkpoints of `output_dir` are renamed, so that they neither count in `save_total_limit` nor mix with
    what is written later. Nothing is deleted.

    Args:
        output_dir (`str`): Folder of the run.
        resume (`bool`): Whether to resume from the newest complete checkpoint of `output_dir`.
        given (`str`, *optional*): Another checkpoint to resume from.

    Raises:
        ValueError: if `output_dir` holds checkpoints and neither is given; if the given checkpoint is not complete, or
            older than others in `output_dir`; if checkpoints were complete once, and none is now.
    """
    root = Path(output_dir)
    folders = sorted((folder for folder in root.glob("checkpoint-*") if step_of(folder) is not None), key=step_of)
    if folders and not resume and given is None:
        raise ValueError(
            f"output_dir {output_dir} already holds {folders[-1].name}: resume it with --resume, or give another "
            "output_dir."
        )
    if given is not None and (faults := checkpoint_faults(Path(given))):
        raise ValueError(f"resume_from_checkpoint is {given}, which is not complete: {'; '.join(faults)}.")
    half_written = {folder: faults for folder in folders if (faults := checkpoint_faults(folder))}
    complete = [folder for folder in folders if folder not in half_written]
    if given is not None:
        newer = [folder.name for folder in complete if step_of(folder) > (step_of(Path(given)) or 0)]
        if newer:
            raise ValueError(
                f"resume_from_checkpoint is {given}, but output_dir {output_dir} holds newer ones: "
                f"{', '.join(newer)}. Move them away, or give another output_dir."
            )
    elif not complete:
        _refuse_damaged(half_written)
    for folder, faults in half_written.items():
        _set_aside(folder, faults)
    if given is not None:
        return given
    if not complete:
        if resume:
            PartialState().print(f"--resume: {output_dir} holds no complete checkpoint; training starts over.")
        return None
    PartialState().print(f"--resume: training resumes from {complete[-1]}.")
    return str(complete[-1])


def _refuse_damaged(half_written: dict[Path, list[str]]) -> None:
    """Refuses to start from the beginning where a damaged checkpoint was complete once: it may still be repaired."""
    for folder, faults in half_written.items():
        if not json_fault(folder / STATE_FILE):
            raise ValueError(
                f"{folder} was complete once, but cannot be resumed: {'; '.join(faults)}. Bring the files back, "
                "or give another output_dir to start from the beginning."
            )


def _set_aside(folder: Path, faults: list[str]) -> None:
    target = folder.with_name(SET_ASIDE + folder.name)
    number = 1
    while target.exists():
        number += 1
        target = folder.with_name(f"{SET_ASIDE}{folder.name}-{number}")
    folder.rename(target)
    print(
        f"{folder} is half-written ({'; '.join(faults)}) and skipped. It was renamed to {target.name}, is not "
        "used, and may be deleted."
    )


def warn_of_changes(checkpoint: str, run: dict[str, int]) -> None:
    """Prints each difference from the run that wrote the checkpoint that makes the losses differ."""
    before = json.loads((Path(checkpoint) / RUN_FILE).read_text())
    for name, now in run.items():
        if before.get(name, now) != now:
            print(
                f"{checkpoint}: {name} was {before[name]} and is {now} now: from here on, the losses are not those of "
                "the uninterrupted run."
            )


class StepWatch(TrainerCallback):
    """
    Looks at each optimizer step before it is applied, all processes together, with one all-reduce: is it sound, and
    has any process been told to stop?

    A step is refused with a `ValueError`, and no weight changes, if its loss or gradient is not finite, if no token of
    it has a weight, or if its loss is above `max_loss`.

    On SIGTERM or SIGINT, in any process, the step is finished and a checkpoint is saved; `stopped` is set then. A
    second SIGINT stops at once. The Trainer's own `enable_jit_checkpoint` is not used: each process decides alone,
    three seconds later, may save between backward pass and step under the number of the step before, and ends with 0.

    Args:
        accelerator ([`~accelerate.Accelerator`]): Of the trainer.
        max_loss (`float`): In nats per token of weight 1.
    """

    def __init__(self, accelerator: Accelerator, max_loss: float):
        self.accelerator = accelerator
        self.max_loss = max_loss
        self.stopped = False
        self.applying = False
        # The step of the newest checkpoint, begun or complete; None while nothing is trained.
        self.saved_step: int | None = None
        # Noted down by the trainer: row ids with (weighted loss, weight) of each micro-batch, the gradient's norm.
        self.micro_batches: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.gradient_norm: torch.Tensor | float | None = None
        self._signal: int | None = None
        self._handlers: dict = {}

    def on_train_begin(self, args, state, control, **kwargs):
        self.saved_step = state.global_step
        self._process = os.getpid()
        self._handlers = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}

    def restore_handlers(self) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}

    def _note(self, number, frame):
        # Workers of the data loader inherit this handler, and are still needed.
        if os.getpid() != self._process:
            return
        self._signal = number
        signal.signal(signal.SIGINT, signal.default_int_handler)
        # Not print: a handler may run inside another print.
        os.write(2, f"\n{signal.Signals(number).name}: the step is finished and saved before the end.\n".encode())

    def on_step_begin(self, args, state, control, **kwargs):
        # The data loader draws from the generator that dropout draws from, and with persistent workers not as often
        # after a resume. So dropout has its own seed in each step.
        key = f"{args.seed}:{state.global_step}:{args.process_index}".encode()
        torch.manual_seed(int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big"))

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        step = state.global_step + 1
        if self.accelerator.distributed_type != DistributedType.DEEPSPEED:
            self.check(step, self.gradient_norm)
        # DeepSpeed does not always know the norm. With float16, it leaves such steps out by itself.
        elif self.accelerator.mixed_precision != "fp16" and not math.isfinite(self.gradient_norm or 0.0):
            raise ValueError(
                f"The norm of the gradient of step {step} is {self.gradient_norm}, and DeepSpeed has applied it: the "
                "weights of this run are lost. Resume from its last checkpoint, with mended rows or settings."
            )

    def check(self, step: int, gradient_norm: torch.Tensor | float | None = None) -> None:
        """
        Args:
            gradient_norm: `None` under DeepSpeed, which is asked before the backward pass: that applies the step.

        Raises:
            ValueError: if the step is refused.
        """
        device = self.accelerator.device
        own = torch.stack([sums for _, sums in self.micro_batches]).sum(0)
        told = torch.tensor([float(self._signal is not None)], device=device)
        norm = torch.as_tensor(0.0 if gradient_norm is None else gradient_norm, device=device).float().reshape(1)
        totals = torch.cat([own, norm, told])
        loss, weight, norm, told = self.accelerator.reduce(totals, reduction="sum").tolist()
        loss = loss / weight if weight else math.nan
        if weight == 0:
            self._refuse(step, "no token of it has a weight in the loss.")
        if not math.isfinite(loss):
            self._refuse(step, f"its loss is {loss}.")
        if loss > self.max_loss:
            self._refuse(
                step,
                f"its loss is {loss:.4g}, above max_loss {self.max_loss:.4g} (by default 2 ln(vocabulary size), twice "
                "that of a uniform guess): training diverges.",
            )
        # With float16, the gradient scaler leaves such steps out by itself.
        if not math.isfinite(norm) and self.accelerator.scaler is None:
            self._refuse(step, f"the norm of its gradient is {norm}.")
        self.micro_batches.clear()
        self.stopped = told > 0
        self.applying = True

    def _refuse(self, step: int, reason: str) -> None:
        rows = "; ".join(
            f"rows {', '.join(map(str, row_ids.tolist()))} (loss {float(loss / weight):.4g})"
            for row_ids, (loss, weight) in self.micro_batches
        )
        raise ValueError(
            f"Step {step} is not applied: {reason} Its batches on process {self.accelerator.process_index}, by "
            f"row_id: {rows}. Mend these rows or the settings."
        )

    def on_step_end(self, args, state, control, **kwargs):
        self.applying = False
        if self.stopped:
            control.should_training_stop = True
            control.should_save = args.save_strategy != "no"
        # Losses since the last line of the log would be lost with the process.
        control.should_log |= control.should_save
