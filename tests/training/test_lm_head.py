"""The trainer's loss: the language model's head sees only labelled positions, and nothing else changes."""

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from torch.nn import functional as F
from trl import SFTConfig
from trl.kernels import ChunkedLogProbFunction

from sq_llava.data.rows import load_rows
from sq_llava.data.self_questions import ANSWER, QUESTION
from sq_llava.data.sources import DataSource
from sq_llava.training.adapter import LoraSize, add_adapter
from sq_llava.training.collator import SelfQuestioningCollator
from sq_llava.training.trainer import SQLlavaTrainer
from tests import tiny
from tests.runs import assert_close, gradients, perturbed


QUESTION_WEIGHT = 0.3
GEMMA2 = {**tiny.TINY_LLAMA, "model_type": "gemma2", "head_dim": 16, "final_logit_softcapping": 2.0}
PHI = {**tiny.TINY_LLAMA, "model_type": "phi"}  # has a head with bias
TEXT_CONFIGS = {"llama": tiny.TINY_LLAMA, "gemma2": GEMMA2, "phi": PHI}
SIZE = LoraSize(4, 8, 0.0)


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Dataset:
    """Conversations with an image, and one without."""
    root = tmp_path_factory.mktemp("rows")
    tiny.picture().save(root / "a.png")
    turns = [("human", "<image>\nWhat?"), ("gpt", "A dog."), ("human", "Where is it?"), ("gpt", "In the green grass.")]
    row = {"image": "a.png", "conversations": [{"from": role, "value": text} for role, text in turns]}
    text_only = {"conversations": [{"from": role, "value": text.removeprefix("<image>\n")} for role, text in turns]}
    (root / "rows.json").write_text(json.dumps([row, row, text_only, row]))
    return load_rows([DataSource(str(root / "rows.json"))], image_seq_length=9)


def make_trainer(rows: Dataset, folder: Path, text_config: dict = tiny.TINY_LLAMA, tied=False, **settings):
    """A trainer of stage 2, and a batch with answers and self-questions."""
    processor = tiny.tiny_processor(system_message="Be kind.")
    model = tiny.tiny_model_for(processor, text_config=dict(text_config), tie_word_embeddings=tied)
    model = perturbed(add_adapter(model, SIZE, SIZE, train_vusr=True))
    collator = SelfQuestioningCollator(processor, self_question_ratio=1.0)
    args = SFTConfig(
        output_dir=str(folder), use_cpu=True, report_to="none", remove_unused_columns=False, disable_tqdm=True,
        **{"bf16": False, "gradient_checkpointing": False, **settings},
    )  # fmt: skip
    trainer = SQLlavaTrainer(
        model=model, args=args, train_dataset=rows, data_collator=collator, processing_class=processor,
        question_loss_weight=QUESTION_WEIGHT, part_learning_rates={},
    )  # fmt: skip
    return trainer, collator([rows[index] for index in range(len(rows))])


def loss_and_gradients(trainer: SQLlavaTrainer, batch: dict) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    trainer.model.train().zero_grad()
    with trainer.compute_loss_context_manager():
        loss = trainer.compute_loss(trainer.model_wrapped, dict(batch))
    trainer.accelerator.backward(loss)
    return loss.detach(), gradients(trainer.model)


def reference(trainer: SQLlavaTrainer, batch: dict, dtype: torch.dtype = torch.float32) -> dict:
    """Loss, gradients and metrics by their definitions, from all logits."""
    model, batch = trainer.model.train(), dict(batch)
    model.zero_grad()
    kinds = batch.pop("turn_kinds")[:, 1:]
    labels = batch.pop("labels")[:, 1:]
    batch.pop("row_ids")
    with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
        logits = model(**batch, use_cache=False).logits[:, :-1].float()
    losses = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none")  # 0 at positions without a label
    answers, questions = kinds == ANSWER, kinds == QUESTION
    weights = answers + QUESTION_WEIGHT * questions
    loss = (weights * losses).sum() / weights.sum()
    loss.backward()
    correct = (logits.argmax(-1) == labels) & (labels != -100)
    return {
        "loss": loss.detach(),
        "gradients": gradients(model),
        "loss_answers": losses[answers].mean().item(),
        "loss_questions": losses[questions].mean().item(),
        "mean_token_accuracy": (correct.sum() / (labels != -100).sum()).item(),
    }


@pytest.mark.parametrize(("kind", "tied"), [("llama", False), ("llama", True), ("gemma2", True), ("phi", False)])
def test_loss_gradients_and_metrics_are_those_of_all_logits(kind, tied, rows, tmp_path):
    trainer, batch = make_trainer(rows, tmp_path, TEXT_CONFIGS[kind], tied)
    loss, found = loss_and_gradients(trainer, batch)
    expected = reference(trainer, batch)
    torch.testing.assert_close(loss, expected["loss"], rtol=1e-6, atol=1e-6)
    assert_close(found, expected["gradients"], rtol=1e-5, atol=1e-6)
    logs = {"loss": 0.0}
    trainer.log(logs)
    for name in ("loss_answers", "loss_questions", "mean_token_accuracy"):
        assert logs[name] == pytest.approx(expected[name], rel=1e-6, abs=1e-6), name


def test_head_gets_only_labelled_positions(rows, tmp_path, monkeypatch):
    trainer, batch = make_trainer(rows, tmp_path)
    scored = []
    forward = ChunkedLogProbFunction.forward

    def count(context, hidden, *inputs):
        scored.append(hidden.shape)
        return forward(context, hidden, *inputs)

    monkeypatch.setattr(ChunkedLogProbFunction, "forward", staticmethod(count))
    loss_and_gradients(trainer, batch)
    num_labels = int((batch["labels"] != -100).sum())
    assert scored == [(num_labels, 64)] and num_labels < batch["labels"].numel() / 2


@pytest.mark.parametrize("settings", [{"bf16": True}, {"gradient_checkpointing": True}], ids=["bf16", "checkpointing"])
def test_autocast_and_gradient_checkpointing_do_not_change_the_loss(settings, rows, tmp_path):
    trainer, batch = make_trainer(rows, tmp_path, **settings)
    if "gradient_checkpointing" in settings:
        trainer.model.gradient_checkpointing_enable({"use_reentrant": False})
    loss, found = loss_and_gradients(trainer, batch)
    trainer.model.gradient_checkpointing_disable()
    dtype, tolerance = (torch.bfloat16, 0.02) if "bf16" in settings else (torch.float32, 1e-5)
    expected = reference(trainer, batch, dtype)
    torch.testing.assert_close(loss, expected["loss"], rtol=tolerance, atol=0)
    assert_close(found, expected["gradients"], rtol=10 * tolerance, atol=tolerance)


def test_batch_without_a_label_gives_every_trained_weight_a_gradient_of_zero(rows, tmp_path):
    trainer, batch = make_trainer(rows, tmp_path)
    batch["labels"] = torch.full_like(batch["labels"], -100)
    batch["turn_kinds"] = torch.zeros_like(batch["turn_kinds"])
    loss, found = loss_and_gradients(trainer, batch)
    assert loss == 0
    assert all(gradient.abs().max() == 0 for gradient in found.values())


def test_evaluation_gives_the_mean_over_its_batches(rows, tmp_path):
    trainer, batch = make_trainer(rows, tmp_path, per_device_eval_batch_size=4)
    expected = reference(trainer, batch)
    metrics = trainer.evaluate(rows)
    assert metrics["eval_loss"] == pytest.approx(expected["loss"].item(), rel=1e-6)
    for name in ("loss_answers", "loss_questions", "mean_token_accuracy"):
        assert metrics[f"eval_{name}"] == pytest.approx(expected[name], rel=1e-6), name


@pytest.mark.slow
def test_gradient_checkpointing_computes_the_layers_of_both_towers_again(rows, tmp_path):
    calls = []
    for checkpointing in (False, True):
        trainer, _ = make_trainer(
            rows, tmp_path, gradient_checkpointing=checkpointing, max_steps=1, per_device_train_batch_size=4,
            save_strategy="no",
        )  # fmt: skip
        base = trainer.model.get_base_model().model
        for layer in (base.vision_tower.encoder.layers[0], base.language_model.layers[0]):
            # A pre-hook: the recomputation stops as soon as it has all that the backward pass needs.
            layer.mlp.register_forward_pre_hook(
                lambda module, *_, c=checkpointing: calls.append((type(module).__name__, c))
            )
        trainer.train()
    assert Counter(calls) == {
        ("CLIPMLP", False): 1, ("LlamaMLP", False): 1, ("CLIPMLP", True): 2, ("LlamaMLP", True): 2,
    }  # fmt: skip
