"""The GPU benchmark: its code with tiny sizes on a CPU, and its count of operations."""

import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import gpu
from benchmarks.random_models import loss_of, with_adapter


@pytest.fixture(scope="module")
def setting() -> gpu.Setting:
    return gpu.make_setting(tiny=True, peak_tflops=1)


@pytest.mark.long
def test_every_part_runs_and_is_reported(setting):
    report = gpu.measure(setting)
    for name, result in report["parts"].items():
        assert result is not None, name
        if name.startswith("stage"):
            assert result["label_tokens_per_second"] > 0
    table = gpu.to_markdown(report)
    assert "| stage 2, stock, checkpointing |" in table and "| 16 |" in table and "| without extractor |" in table
    utilisation = report["parts"]["stage 2, ours"]["utilisation"]
    assert utilisation == pytest.approx(report["parts"]["stage 2, ours"]["tflops"])  # of a peak of 1 TFLOPS


@pytest.mark.parametrize("rows_per_image", [1, 2])
def test_count_of_operations_is_near_those_that_are_run(setting, rows_per_image):
    model = with_adapter(setting.model().float(), **gpu.lora_of("stage2"))
    model.config.text_config._attn_implementation = "eager"  # all of whose products are counted
    rows = gpu.make_rows(setting, model.config.image_seq_length, captions=False, rows_per_image=rows_per_image)
    batch = {name: tensor.float() if tensor.is_floating_point() else tensor
             for name, tensor in gpu.packed(rows, setting, rows_per_image).items()}  # fmt: skip
    with FlopCounterMode(display=False) as counter:
        loss_of(model, batch).backward()
    # The counter counts the head three times, attention between all tokens of a pack, and padding.
    assert gpu.model_flops(model, rows) == pytest.approx(counter.get_total_flops(), rel=0.25)


@pytest.mark.parametrize("rows_per_image", [1, 2])
def test_packed_rows_hold_the_tokens_of_the_rows(setting, rows_per_image):
    rows = gpu.make_rows(setting, 16, captions=False, rows_per_image=rows_per_image)
    batch = gpu.packed(rows, setting, rows_per_image)
    assert (batch["labels"] != -100).sum() == sum((row["labels"] != -100).sum() for row in rows)
    images = [row["image"] for row in rows if row["image"] is not None]
    assert len(batch["pixel_values"]) == len(set(images)) == -(-len(images) // rows_per_image)
    num_placeholders = (batch["input_ids"] == setting.processor.image_token_id).sum()
    assert num_placeholders == 16 * len(set(images))
    if rows_per_image == 1:
        num_tokens = (batch["position_ids"] > 0).sum() + len(rows)
        assert num_tokens == sum(len(row["input_ids"]) for row in rows)


def test_rows_that_share_images_have_the_loss_of_the_rows(setting):
    model = with_adapter(setting.model().float(), **gpu.lora_of("stage2")).eval()
    rows = gpu.make_rows(setting, model.config.image_seq_length, captions=False, rows_per_image=2)
    alone, shared = gpu.packed(rows, setting), gpu.packed(rows, setting, rows_per_image=2)
    alone["pixel_values"] = shared["pixel_values"] = torch.ones_like(shared["pixel_values"]).float()
    assert "attention_mask" in shared and shared["input_ids"].numel() < alone["input_ids"].numel()
    torch.testing.assert_close(loss_of(model, shared), loss_of(model, alone), rtol=1e-5, atol=0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_ends_with_a_message(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    with pytest.raises(SystemExit, match="No NVIDIA GPU was found"):
        gpu.main()
