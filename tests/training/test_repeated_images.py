"""An image that repeats in a batch is opened, processed and encoded once, and nothing else changes."""

import dataclasses
from pathlib import Path

import pytest
import torch
from PIL import Image

from sq_llava.data.images import open_image
from sq_llava.training.collator import SelfQuestioningCollator
from tests import tiny


def row(row_id: int, *images) -> dict:
    """A row with each image in a turn of its own."""
    messages = []
    for part in [{"type": "image"}] * len(images) or [{"type": "text", "text": "Hi."}]:
        messages.append({"role": "user", "content": [part, {"type": "text", "text": "What is this?"}]})
        messages.append({"role": "assistant", "content": [{"type": "text", "text": f"A dog {row_id}."}]})
    return {"row_id": row_id, "messages": messages, "images": list(images)}


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> list[str]:
    root = tmp_path_factory.mktemp("images")
    for index in range(3):
        tiny.picture(index).save(root / f"{index}.png")
    return [str(root / f"{index}.png") for index in range(3)]


@pytest.fixture(scope="module")
def collator() -> SelfQuestioningCollator:
    return SelfQuestioningCollator(tiny.tiny_processor(system_message=""), self_question_ratio=0.0)


def as_bytes(file: str) -> dict:
    return {"bytes": Path(file).read_bytes(), "path": None}


@pytest.mark.parametrize("read", [str, as_bytes, lambda file, cache={}: cache.setdefault(file, Image.open(file))])
def test_each_image_is_opened_and_processed_once(collator, files, monkeypatch, read):
    opened = []
    monkeypatch.setattr(
        "sq_llava.training.collator.open_image", lambda image: opened.append(image) or open_image(image)
    )
    a, b, c = files
    rows = [row(0, read(a)), row(1, read(b), read(a)), row(2), row(3, read(b)), row(4, read(c))]
    batch = collator(rows)
    assert len(opened) == len(batch["pixel_values"]) == 3
    assert batch["image_indices"].tolist() == [0, 1, 0, 1, 2]
    alone = torch.cat([collator([each])["pixel_values"] for each in rows if each["images"]])
    assert torch.equal(batch["pixel_values"][batch["image_indices"]], alone)


def test_two_files_with_equal_pixels_are_two_images(collator, files, tmp_path):
    (tmp_path / "copy.png").write_bytes(Path(files[0]).read_bytes())
    batch = collator([row(0, files[0]), row(1, str(tmp_path / "copy.png"))])
    assert len(batch["pixel_values"]) == 2 and "image_indices" not in batch


def test_collator_with_another_epoch_is_the_same_collator(collator, files):
    rows = [row(0, files[0]), row(1, files[0])]
    again = dataclasses.replace(collator, epoch=torch.tensor(0))
    assert torch.equal(collator(rows)["image_indices"], again(rows)["image_indices"])


def test_loss_and_gradients_are_the_same_as_without_deduplication(collator, files):
    a, b, _ = files
    batch = collator([row(0, a), row(1, b, a), row(2), row(3, a)])
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}
    model = tiny.tiny_model_for(collator.processor)
    encoded = []
    model.model.vision_tower.embeddings.register_forward_hook(lambda *call: encoded.append(len(call[2])))
    found = []
    for images in (
        {"pixel_values": batch["pixel_values"], "image_indices": batch["image_indices"]},
        {"pixel_values": batch["pixel_values"][batch["image_indices"]]},
    ):
        model.zero_grad()
        loss = model(**inputs, **images).loss
        loss.backward()
        found.append([loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}])
    assert encoded == [2, 4]
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)
