"""What a language model loses by training: its loss on held-out text-only prompts, before and after a stage.

    python -m train_sft --config recipes/sq-llava-7b/stage2.yaml --text_probe held_out.jsonl

The rows have any layout of `docs/data.md`, without images. They are written in the model's own prompt layout, and only
answers count. `eval_text_probe_loss` is the mean loss of a token. It is logged before the first step, with each
evaluation, and after the last step. The value before the first step is in the log of each checkpoint, so a resumed run
does not measure it again.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from transformers import Trainer, TrainerCallback

from sq_llava.checkpoints.provenance import public_name
from sq_llava.data.rows import load_rows
from sq_llava.data.self_questions import IGNORE_INDEX, NOT_SPOKEN
from sq_llava.data.sources import DataSource
from sq_llava.training.collator import SelfQuestioningCollator


METRIC = "eval_text_probe_loss"


def read_text_probe(path: str) -> list[dict]:
    """
    Reads and checks all rows of a `text_probe`.

    Raises:
        ValueError: for a file or a row that cannot be read, and for a row with an image.
    """
    try:
        rows = list(load_rows([DataSource(path)]))
    except ValueError as error:
        raise ValueError(f"text_probe: {error}") from error
    for index, row in enumerate(rows):
        if row["images"]:
            raise ValueError(
                f"text_probe: {path}, row {index} (id {row['id']!r}) has the image {row['images'][0]!r:.80}. It "
                "measures text alone: remove this row."
            )
    return rows


@dataclass
class TextProbe:
    """
    Measures the loss of a model on text-only rows.

    Args:
        path (`str`): The file of the rows.
        batches (`list[dict]`): The rows as batches of the collator.
    """

    path: str
    batches: list[dict[str, torch.Tensor]]

    @classmethod
    def make(cls, path: str, rows: Iterable[dict], collator: SelfQuestioningCollator, batch_size: int) -> "TextProbe":
        """Tokenizes all rows, so that a row that the model cannot read is an error before training."""
        rows = sorted(rows, key=lambda row: row["length"])
        collator = replace(collator, pad_to_multiple_of=None)
        try:
            batches = [collator(rows[begin : begin + batch_size]) for begin in range(0, len(rows), batch_size)]
        except ValueError as error:
            raise ValueError(f"text_probe, {path}: {error}") from error
        return cls(path, batches)

    @property
    def num_rows(self) -> int:
        return sum(len(batch["row_ids"]) for batch in self.batches)

    def run(self, trainer: Trainer) -> dict[str, float]:
        """Measures the mean loss of an answer token. The batches are divided among the processes."""
        args = trainer.args
        trainer.model.eval()
        for begin in range(0, len(self.batches), args.world_size):
            index = begin + args.process_index
            # A sharded model needs all processes in each batch. Those without a batch of their own take one that does
            # not count.
            batch = self.batches[index] if index < len(self.batches) else without_labels(self.batches[0])
            trainer.prediction_step(trainer.model, batch, prediction_loss_only=True)
        return {METRIC: trainer.collect_metrics("eval")["loss_answers"]}


def without_labels(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    labels, kinds = batch["labels"], batch["turn_kinds"]
    return batch | {
        "labels": torch.full_like(labels, IGNORE_INDEX),
        "turn_kinds": torch.full_like(kinds, NOT_SPOKEN),
    }


class TextProbeCallback(TrainerCallback):
    """Measures before the first step and after the last one. It must come before the callbacks of trackers."""

    def __init__(self, probe: TextProbe, trainer: Trainer):
        self.probe, self.trainer = probe, trainer

    def on_train_begin(self, args, state, control, **kwargs):
        if state.global_step == 0 and not args.eval_on_start:
            self.trainer.log(self.probe.run(self.trainer))

    def on_train_end(self, args, state, control, **kwargs):
        was_stopped = self.trainer.watch.stopped and state.global_step < state.max_steps
        is_measured = any(METRIC in log and log["step"] == state.global_step for log in state.log_history)
        if not was_stopped and (args.load_best_model_at_end or not is_measured):
            self.trainer.log(self.probe.run(self.trainer))


def summarize(probe: TextProbe, log_history: list[dict]) -> dict[str, str | int | float]:
    """
    Returns:
        `dict`: Name and number of rows of the probe, `loss_after`, and `loss_before` if the log has it. It is missing
        if a run got its `text_probe` only when it was resumed.
    """
    logs = [log for log in log_history if METRIC in log]
    losses = {"loss_before": logs[0][METRIC]} if logs[0]["step"] == 0 else {}
    losses["loss_after"] = logs[-1][METRIC]
    losses = {name: round(loss, 4) for name, loss in losses.items()}
    return {"path": public_name(probe.path), "rows": probe.num_rows, **losses}
