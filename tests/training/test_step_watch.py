"""Steps with a bad loss or gradient are refused before they are applied."""

import math
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from sq_llava.training.collator import SelfQuestioningCollator
from sq_llava.training.recovery import FIRST_STEPS, StepWatch
from sq_llava.training.trainer import SQLlavaTrainer
from tests.runs import assert_close, steps_saved, train, trained_weights


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


@pytest.mark.slow
def test_step_whose_loss_is_nan_is_not_applied_and_its_rows_are_named(parts, two_steps, tmp_path, poison):
    sound, batches = two_steps
    poison([next(row for row in batches[5] if row % 3)], "pixel_values", math.nan)
    named = rf"rows {batches[4][0]}, {batches[4][1]} \(loss \d.*; rows {batches[5][0]}, {batches[5][1]} \(loss nan\)"
    with pytest.raises(ValueError, match=rf"Step 3 was not applied: its loss is nan\. .*{named}") as raised:
        train(parts, tmp_path / "run", **ACCUMULATED, save_steps=100)
    assert raised.value.__notes__ == ["2 steps were trained. --resume resumes from checkpoint-2."]
    assert_third_step_was_not_applied(sound, tmp_path / "run")


@pytest.mark.slow
def test_step_without_a_label_is_not_applied_but_one_such_batch_is(parts, two_steps, tmp_path, poison):
    sound, batches = two_steps
    poison(batches[4], "turn_kinds", 0)
    trainer = train(parts, tmp_path / "one", **ACCUMULATED)
    assert trainer.state.global_step == 3
    poison(batches[5], "turn_kinds", 0)
    with pytest.raises(ValueError, match=r"Step 3 was not applied: none of its tokens has a weight in the loss\."):
        train(parts, tmp_path / "run", **ACCUMULATED)
    assert_third_step_was_not_applied(sound, tmp_path / "run")


@pytest.mark.slow
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


@pytest.mark.slow
def test_loss_above_max_loss_stops_the_run(parts, tmp_path):
    with pytest.raises(ValueError, match=r"Step 1 was not applied: its loss is \d.*, above max_loss 0\.5\."):
        train(parts, tmp_path / "run", max_loss=0.5)
    assert steps_saved(tmp_path / "run") == []


VOCAB_SIZE = 64  # the loss of a uniform guess is 4.16


def check_losses(watch: StepWatch, *losses: float) -> None:
    for step, loss in enumerate(losses, 1):
        watch.micro_batches = [(torch.tensor([step]), torch.tensor([2 * loss, 2.0]))]
        watch.check(step, gradient_norm=1.0)


def test_honest_run_may_begin_above_the_loss_of_a_guess():
    watch = StepWatch(Accelerator(cpu=True), VOCAB_SIZE)
    check_losses(watch, 12.74, 13.5, 11.0, 24.0)
    assert watch.highest_loss == pytest.approx(2 * (12.74 + 13.5 + 11 + 24) / 4)


def test_run_diverges_at_twice_the_loss_of_its_beginning_but_never_below_that_of_a_guess():
    with pytest.raises(ValueError, match=r"Step 2 .* loss is 25\.6, above 25\.48: twice the mean loss of the first"):
        check_losses(StepWatch(Accelerator(cpu=True), VOCAB_SIZE), 12.74, 25.6)
    with pytest.raises(ValueError, match=r"Step 3 .* loss is 8\.4, above 8\.318: .*guess \(4\.159\).*diverges"):
        check_losses(StepWatch(Accelerator(cpu=True), VOCAB_SIZE), 0.5, 4.0, 8.4)


def test_beginning_is_the_first_ten_steps():
    watch = StepWatch(Accelerator(cpu=True), VOCAB_SIZE)
    check_losses(watch, *[10.0] * FIRST_STEPS, *[1.0] * 90)
    assert watch.highest_loss == 20


def test_max_loss_is_a_fixed_limit():
    watch = StepWatch(Accelerator(cpu=True), VOCAB_SIZE, max_loss=3.0)
    with pytest.raises(ValueError, match=r"Step 1 .* loss is 3\.1, above max_loss 3\. "):
        check_losses(watch, 3.1)
