"""Steps with a bad loss or gradient are refused before they are applied."""

import math
from pathlib import Path

import pytest
import torch

from sq_llava.training.collator import SelfQuestioningCollator
from sq_llava.training.trainer import SQLlavaTrainer
from tests.runs import assert_close, steps_saved, train, trained_weights


pytestmark = pytest.mark.slow


@pytest.fixture
def poison(monkeypatch):
    """`poison(rows, name, value)` overwrites an input of every batch that contains one of the rows."""

    def fill(rows: list[int], name: str, value: float) -> None:
        original = SelfQuestioningCollator.__call__

        def call(self, batch_rows):
            batch = original(self, batch_rows)
            if set(rows) & set(batch["row_ids"].tolist()):
                batch[name] = torch.full_like(batch[name], value)
            return batch

        monkeypatch.setattr(SelfQuestioningCollator, "__call__", call)

    return fill


# Each step has two batches of two rows. The third step is poisoned.
ACCUMULATED = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}


@pytest.fixture(scope="module")
def two_steps(parts, tmp_path_factory) -> tuple[Path, list[list[int]]]:
    """A run of two steps, and the row ids of all batches of its epoch."""
    output_dir = tmp_path_factory.mktemp("two") / "run"
    trainer = train(parts, output_dir, **ACCUMULATED, max_steps=2)
    return output_dir, [batch["row_ids"].tolist() for batch in trainer.get_train_dataloader()]


def assert_third_step_was_not_applied(two_steps: Path, output_dir: Path) -> None:
    assert steps_saved(output_dir) == [2]
    assert_close(trained_weights(two_steps / "checkpoint-2"), trained_weights(output_dir / "checkpoint-2"), atol=0)


def test_step_whose_loss_is_nan_is_not_applied_and_its_rows_are_named(parts, two_steps, tmp_path, poison):
    sound, batches = two_steps
    poison([next(row for row in batches[5] if row % 3)], "pixel_values", math.nan)
    named = rf"rows {batches[4][0]}, {batches[4][1]} \(loss \d.*; rows {batches[5][0]}, {batches[5][1]} \(loss nan\)"
    with pytest.raises(ValueError, match=rf"Step 3 was not applied: its loss is nan\. .*{named}") as raised:
        train(parts, tmp_path / "run", **ACCUMULATED, save_steps=100)
    assert raised.value.__notes__ == ["2 steps were trained. --resume resumes from checkpoint-2."]
    assert_third_step_was_not_applied(sound, tmp_path / "run")


def test_step_without_a_label_is_not_applied_but_one_such_batch_is(parts, two_steps, tmp_path, poison):
    sound, batches = two_steps
    poison(batches[4], "turn_kinds", 0)
    trainer = train(parts, tmp_path / "one", **ACCUMULATED)
    assert trainer.state.global_step == 3
    poison(batches[5], "turn_kinds", 0)
    with pytest.raises(ValueError, match=r"Step 3 was not applied: none of its tokens has a weight in the loss\."):
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
    with pytest.raises(ValueError, match=r"Step 3 was not applied: its gradient norm is inf\."):
        train(parts, tmp_path / "run", **ACCUMULATED)
    assert_third_step_was_not_applied(two_steps[0], tmp_path / "run")


def test_diverging_loss_stops_the_run(parts, two_steps, tmp_path):
    with pytest.raises(ValueError, match=r"Step 1 was not applied: its loss is \d.*, above max_loss 0\.5 .*diverges"):
        train(parts, tmp_path / "run", max_loss=0.5)
    assert steps_saved(tmp_path / "run") == []
    trainer = train(parts, tmp_path / "sound", max_steps=1)
    assert trainer.watch.max_loss == 2 * math.log(trainer.model.config.text_config.vocab_size)
