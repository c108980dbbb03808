"""Packed training has the losses of padded batches, also after a kill and with a second process."""

import json
import signal

import pytest
import torch
from rich.console import Console
from rich.progress import Progress
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import flash_attention_mask

from sq_llava.doctor.check import data_check, examine
from sq_llava.doctor.report import print_report
from sq_llava.training.packing import PackingCollator
from sq_llava.training.settings import parse_settings
from sq_llava.training.trainer import SQLlavaTrainer
from tests import runs
from tests.runs import NO_DROPOUT, Run, arguments, assert_close, assert_equal_runs, train


pytestmark = pytest.mark.slow


# Two or three of the 16 rows per pack, eight packs per epoch.
PACKED = {"packing": True, "max_length": 130, "per_device_train_batch_size": 1}


@pytest.fixture(scope="module")
def trainer(parts, tmp_path_factory) -> SQLlavaTrainer:
    settings = {"question_loss_weight": 0.3, "per_device_train_batch_size": 2, "max_steps": 4, "save_strategy": "no"}
    return train(parts, tmp_path_factory.mktemp("run"), **PACKED | NO_DROPOUT | settings)


def loss_and_gradients(trainer: SQLlavaTrainer, batch: dict) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    trainer.model.train().zero_grad()
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    return loss.detach(), runs.gradients(trainer.model)


def assert_same_step(trainer: SQLlavaTrainer, packs: list, flat: bool = False, implementation: str = "sdpa") -> None:
    padded = trainer.data_collator([row for pack in packs for row in pack])
    sampler, trainer.packs = trainer.packs, None
    expected_loss, expected = loss_and_gradients(trainer, padded)
    trainer.packs = sampler
    trainer.model.get_base_model().set_attn_implementation(implementation)
    try:
        loss, found = loss_and_gradients(trainer, PackingCollator(trainer.data_collator, flat)(packs))
    finally:
        trainer.model.get_base_model().set_attn_implementation("sdpa")
    torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=1e-6)
    assert_close(found, expected, rtol=1e-5)


def packs_of(trainer: SQLlavaTrainer, batch: int) -> list[list[dict]]:
    return [[trainer.train_dataset[row] for row in pack] for pack in list(trainer.packs)[batch]]


@pytest.mark.parametrize("batch", [0, 3])
def test_packed_step_has_the_loss_and_gradients_of_the_padded_one(trainer, batch):
    assert_same_step(trainer, packs_of(trainer, batch))


def varlen_attention(module, query, key, value, attention_mask, scaling=None, cu_seq_lens_q=None, **kwargs):
    """Imitates FlashAttention, which separates conversations only by the borders that it gets."""
    assert attention_mask is None
    key, value = (heads.repeat_interleave(query.shape[1] // heads.shape[1], dim=1) for heads in (key, value))
    causal = getattr(module, "is_causal", False)
    if not causal:  # the vision tower
        assert cu_seq_lens_q is None
        return F.scaled_dot_product_attention(query, key, value, scale=scaling).transpose(1, 2), None
    assert query.shape[0] == 1 and kwargs["max_length_q"] == kwargs["max_length_k"] == int(cu_seq_lens_q.diff().max())
    assert torch.equal(cu_seq_lens_q, kwargs["cu_seq_lens_k"]) and cu_seq_lens_q[-1] == query.shape[2]
    pieces = zip(*(heads.split(cu_seq_lens_q.diff().tolist(), dim=2) for heads in (query, key, value)))
    outputs = [F.scaled_dot_product_attention(*piece, is_causal=True, scale=scaling) for piece in pieces]
    return torch.cat(outputs, dim=2).transpose(1, 2), None


def test_attention_by_borders_alone_gives_the_padded_step(trainer):
    """The inputs are those of FlashAttention-2, which needs a GPU: one flat row, no mask, borders for the LLM only."""
    AttentionInterface.register("by_borders", varlen_attention)
    AttentionMaskInterface.register("by_borders", flash_attention_mask)
    assert_same_step(trainer, packs_of(trainer, 1), flat=True, implementation="by_borders")


def test_run_with_flash_attention_has_flat_batches(trainer, monkeypatch):
    assert "cu_seq_lens_q" not in next(iter(trainer.get_train_dataloader()))
    monkeypatch.setattr(trainer.model.config.get_text_config(), "_attn_implementation_internal", "flash_attention_2")
    batch = next(iter(trainer.get_train_dataloader()))
    assert batch["input_ids"].shape[0] == 1 and len(batch["cu_seq_lens_q"]) == len(batch["row_ids"]) + 1


def test_share_of_filled_positions_is_logged_and_epochs_have_whole_steps(trainer):
    fills = [entry["packing_fill"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(fills) == 4 == len(trainer.packs)
    tokens = sum(int(trainer.data_collator([row])["attention_mask"].sum()) for row in trainer.train_dataset)
    assert sum(fills) / 4 == pytest.approx(tokens / (8 * 130), rel=1e-6)


def test_micro_batch_without_an_image_gives_every_trained_weight_a_gradient(trainer):
    text_only = [row for row in trainer.train_dataset if not row["images"]][:2]
    _, gradients = loss_and_gradients(trainer, PackingCollator(trainer.data_collator)([text_only]))
    assert all(gradient is not None for gradient in gradients.values())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"packing_strategy": "wrapped"},
            "packing_strategy is 'wrapped', which is not supported. Packing never cuts rows",
        ),
        ({"packing_strategy": "bfd_split"}, "packing_strategy is 'bfd_split'"),
        ({"train_sampling_strategy": "group_by_length"}, "train_sampling_strategy is 'group_by_length'"),
        ({"padding_free": True}, "padding_free is True, which is not supported. It does not work with images"),
        ({"eval_packing": True}, "eval_packing is True, which is not supported. Evaluation batches are never packed"),
        ({"auto_find_batch_size": True}, "auto_find_batch_size is True.*--dry_run real"),
        ({"dataloader_drop_last": True}, "packing is true and dataloader_drop_last is 'True'"),
        ({"global_batch_size": 32}, "16 rows make 8 packs of max_length 130, .* needs 32 packs"),
    ],
)
def test_settings_that_packing_does_not_support_are_refused(parts, tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        train(parts, tmp_path, **PACKED | settings)


@pytest.mark.long
def test_killed_run_and_two_processes_equal_the_uninterrupted_one(parts, tmp_path):
    """The rows show two images, and share the passes over them."""
    rows = json.loads((parts / "train.json").read_text())
    shared = [row | ({"image": f"{1 + index % 2}.png"} if "image" in row else {}) for index, row in enumerate(rows)]
    (tmp_path / "rows.json").write_text(json.dumps(shared))
    settings = PACKED | {"dataset_path": tmp_path / "rows.json", "image_root": parts, "share_images": True}
    settings |= {"gradient_accumulation_steps": 2, "max_steps": 8, "save_steps": 3}
    whole = Run(parts, tmp_path / "whole", **settings).finish()
    run = Run(parts, tmp_path / "killed", resume=True, **settings)
    assert run.exit_codes(runs.in_step, 8, runs.die) == [-signal.SIGKILL]  # in the middle of the second epoch
    assert_equal_runs(whole, run.finish())

    settings |= runs.PLAIN_DESCENT
    one = Run(parts, tmp_path / "one", **settings).finish()
    settings |= {"gradient_accumulation_steps": 1, "processes": 2}
    two = Run(parts, tmp_path / "two", **settings).finish(runs.write_row_ids, tmp_path)
    runs.assert_similar_runs(one, two)
    steps = runs.row_ids(tmp_path)
    for epoch in (0, 4):
        seen = [row for rank in steps for batch in rank[epoch : epoch + 4] for row in batch]
        assert sorted(seen) == list(range(16))
    run = Run(parts, tmp_path / "two_killed", resume=True, **settings)
    assert -signal.SIGKILL in run.exit_codes(runs.in_step, 8, runs.die)
    assert_equal_runs(two, run.finish())


def test_plan_and_trial_step_count_packs(parts, tmp_path, capsys):
    train(parts, tmp_path / "meta", **PACKED | {"dry_run": "meta", "global_batch_size": 2, "num_gpus": 2})
    plan = " ".join(capsys.readouterr().out.split())
    assert "1 rows of 130 tokens" in plan and " packs, 2 per step (2 processes x 1 packs x 1 accumulation" in plan
    assert "The number of packs is approximate" in plan
    trainer = train(parts, tmp_path / "real", **PACKED | {"dry_run": "real", "global_batch_size": 2})
    output = " ".join(capsys.readouterr().out.split())
    assert "Packing: 16 rows in 8 packs of at most 130 tokens, 2.00 rows per pack, about 2 rows per step" in output
    assert "Steps: 8 packs, 2 per step (1 processes x 1 packs x 2 accumulation steps), 4 steps per epoch." in output
    assert "Measured in one step on the fullest packs" in output
    fullest = max(sum(trainer.packs.lengths[row] for row in pack) for pack in trainer.packs.packs(1))
    assert trainer.state.global_step == 1 and f"1 rows of {fullest} tokens" in output


def doctor_report(args: list[str]) -> tuple[dict, str]:
    """The doctor's summary, and what it prints."""
    console = Console(record=True, width=200)
    with Progress(disable=True) as progress:
        report = examine(data_check(*parse_settings(args)), progress)
    print_report(report, console)
    return report.summary, console.export_text()


def test_doctor_says_how_full_the_packs_are(parts, tmp_path):
    summary, text = doctor_report(arguments(parts, tmp_path, **PACKED))
    tokens = summary["tokens"]
    assert tokens["packing"] == {"packs": 8, "fill": round(tokens["total"] / (8 * 130), 3)}
    expected = f"Packing: about 2.0 of these rows per pack of 130 tokens, fill {tokens['packing']['fill']:.2f}"
    assert expected in text


def test_doctor_finishes_if_no_row_fits_into_a_pack(parts, tmp_path):
    summary, text = doctor_report(arguments(parts, tmp_path, **PACKED | {"max_length": 5}))
    assert summary["codes"]["too_long"] == 16 and summary["tokens"]["packing"] is None
    assert "Packing" not in text
