"""Rows that share the pass over their image have the losses, logits and gradients of the rows alone."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.nn.attention.flex_attention import flex_attention
from transformers import AttentionInterface, AttentionMaskInterface, AutoConfig, AutoModel
from transformers.masking_utils import flash_attention_mask

from sq_llava.data.lengths import LengthBound, with_length_bounds
from sq_llava.data.rows import load_rows
from sq_llava.data.shared_images import ImageSharing
from sq_llava.data.sources import DataSource
from sq_llava.training.adapter import LoraSize, add_adapter
from sq_llava.training.collator import SelfQuestioningCollator
from sq_llava.training.packing import PackingCollator, PackSampler, pack_sampler, require_separation
from sq_llava.training.settings import parse_recipe
from sq_llava.training.shared_prefix import attention_mask, register_shared_prefix
from tests import runs, tiny


# The images of the rows: eight rows about image 0, some about others, with two images, and without.
IMAGES = [[0]] * 8 + [[1], [1, 2], [1], [1, 2], [1, 2], [2], [], []]
NUM_ROWS = len(IMAGES)


def raw_row(number: int) -> dict:
    turns = []
    for turn in range(1 + number % 3):
        question = "What is this, a dog ?" if turn == 0 and number % 2 else f"Is it {'green ' * (number % 4)}{turn}?"
        turns += [{"from": "human", "value": question}, {"from": "gpt", "value": f"A dog {number * turn}."}]
    turns[0]["value"] = "<image>\n" * len(IMAGES[number]) + turns[0]["value"]
    return {"image": [f"{image}.png" for image in IMAGES[number]], "conversations": turns}


def write_rows(folder: Path, raw: list[dict]) -> Dataset:
    for number in range(3):
        tiny.picture(number).save(folder / f"{number}.png")
    (folder / "rows.json").write_text(json.dumps(raw))
    return load_rows([DataSource(str(folder / "rows.json"))], image_seq_length=9)


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Dataset:
    return write_rows(tmp_path_factory.mktemp("rows"), [raw_row(number) for number in range(NUM_ROWS)])


@pytest.fixture(scope="module")
def processor():
    return tiny.tiny_processor(system_message="Be kind.")


@pytest.fixture(scope="module")
def model(processor):
    size = LoraSize(4, 8, 0.0)
    return runs.perturbed(add_adapter(tiny.tiny_model_for(processor), size, size, train_vusr=True)).train()


def logits_and_labels(model, batch: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits `(num_labels, vocab_size)` of the labelled tokens, row by row, and the labels."""
    batch = dict(batch)
    labels = batch.pop("labels")[:, 1:]
    for name in ("turn_kinds", "row_ids", "num_tokens"):
        batch.pop(name, None)
    if "branches" in batch:
        config = model.config.get_text_config()
        mask = attention_mask(batch.pop("branches"), batch["position_ids"], config, torch.float32)
        batch["attention_mask"] = mask
    logits = model(**batch, use_cache=False).logits[:, :-1]
    return logits[labels != -100], labels[labels != -100]


def gradients(model, logits: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    F.cross_entropy(logits, labels, reduction="sum").backward()
    return runs.gradients(model)


def assert_equal_to_rows_alone(model, collator, packs: list[list[dict]], flat: bool = False) -> dict:
    batch = PackingCollator(collator, flat, share_images=True)(packs)
    logits, labels = logits_and_labels(model, batch)
    found = gradients(model, logits, labels)
    alone = [logits_and_labels(model, collator([row])) for pack in packs for row in pack]
    alone_logits, alone_labels = (torch.cat(parts) for parts in zip(*alone))
    assert torch.equal(labels, alone_labels)
    torch.testing.assert_close(logits, alone_logits, rtol=1e-5, atol=1e-5)
    for name, expected in gradients(model, alone_logits, alone_labels).items():
        torch.testing.assert_close(found[name], expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max() + 1))
    return batch


ALL_ROWS = list(range(NUM_ROWS))
RECIPE = "recipes/sq-llava-7b/stage2.yaml"
CPU = {"train_sampling_strategy": "random", "use_cpu": True, "bf16": False, "tf32": False}
PACKS = [[0, 1, 2, 14, 9, 11], [15, 3, 8, 10]]


@pytest.mark.slow
@settings(max_examples=12, deadline=None)
@given(
    chosen=st.lists(st.sampled_from(ALL_ROWS), min_size=1, max_size=8),
    begin=st.integers(0, 8),
    epoch=st.integers(0, 9),
)
@example(chosen=ALL_ROWS[:8], begin=0, epoch=0)
@example(chosen=[9, 11, 12, 8, 10, 14, 13], begin=0, epoch=3)
@example(chosen=[0, 1, 0, 1], begin=2, epoch=1)
def test_losses_and_gradients_are_those_of_the_rows_alone(rows, processor, model, chosen, begin, epoch):
    collator = SelfQuestioningCollator(processor, max_length=2048)
    collator.epoch.fill_(epoch)
    samples = [rows[index] for index in chosen]
    packs = [pack for pack in (samples[:begin], samples[begin:]) if pack]
    assert_equal_to_rows_alone(model, collator, packs)


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["eager", "by_borders"])
def test_backends_agree(rows, processor, model, implementation):
    collator = SelfQuestioningCollator(processor, max_length=2048)
    packs = [[rows[index] for index in PACKS[0]], [rows[index] for index in PACKS[1]]]
    if implementation == "by_borders":
        AttentionInterface.register("by_borders", varlen_attention)
        AttentionMaskInterface.register("by_borders", flash_attention_mask)
        register_shared_prefix("by_borders")
    language_model = model.get_base_model().model.language_model
    language_model.set_attn_implementation(implementation)
    try:
        assert_equal_to_rows_alone(model, collator, packs, flat=implementation == "by_borders")
    finally:
        language_model.set_attn_implementation("sdpa")


@pytest.mark.slow
def test_flex_attention_has_the_logits_of_the_rows_alone(rows, processor, model, monkeypatch):
    """On a CPU, flex attention has no backward pass. It is not compiled here, to save time."""
    monkeypatch.setattr(
        "transformers.integrations.flex_attention.compile_friendly_flex_attention", flex_attention_only
    )
    collator = SelfQuestioningCollator(processor, max_length=2048)
    language_model = model.get_base_model().model.language_model
    packs = [[rows[index] for index in pack] for pack in PACKS]
    with torch.no_grad():
        expected, _ = logits_and_labels(model, PackingCollator(collator, share_images=True)(packs))
        language_model.set_attn_implementation("flex_attention")
        try:
            found, _ = logits_and_labels(model, PackingCollator(collator, share_images=True)(packs))
        finally:
            language_model.set_attn_implementation("sdpa")
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def flex_attention_only(query, key, value, training=False, **kwargs):
    return flex_attention(query, key, value, **kwargs)


def varlen_attention(module, query, key, value, attention_mask, scaling=None, cu_seq_lens_q=None, **kwargs):
    """Imitates FlashAttention: it sees only the borders, and its causal mask begins at the bottom right."""
    if cu_seq_lens_q is None:  # a row alone
        return F.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scaling, enable_gqa=True
        ).transpose(1, 2), None
    cu_seq_lens_k = kwargs["cu_seq_lens_k"]
    assert (kwargs["max_length_q"], kwargs["max_length_k"]) == tuple(
        int(borders.diff().max()) for borders in (cu_seq_lens_q, cu_seq_lens_k)
    )
    outputs = []
    for q, k, v in zip(
        query.split(cu_seq_lens_q.diff().tolist(), dim=2),
        key.split(cu_seq_lens_k.diff().tolist(), dim=2),
        value.split(cu_seq_lens_k.diff().tolist(), dim=2),
    ):
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(k.shape[2] - q.shape[2])
        outputs.append(F.scaled_dot_product_attention(q, k, v, mask, scale=scaling, enable_gqa=True))
    return torch.cat(outputs, dim=2).transpose(1, 2), None


def test_prefix_comes_once_with_its_images(rows, processor):
    collator = SelfQuestioningCollator(processor, max_length=2048)
    pack = [rows[index] for index in (0, 1, 2, 9, 11)]
    batch = PackingCollator(collator, share_images=True)([pack])
    alone = PackingCollator(collator)([pack])
    prefix_one, prefix_two = (
        int((alone_ids(collator, row) == processor.image_token_id).nonzero()[0][-1]) + 1 for row in (pack[0], pack[3])
    )
    assert int(alone["num_tokens"] - batch["num_tokens"]) == 2 * prefix_one + prefix_two
    assert batch["input_ids"].shape[1] == int(batch["num_tokens"])
    assert int((batch["input_ids"] == processor.image_token_id).sum()) == 9 * 3
    assert len(batch["pixel_values"]) == 3 and "image_indices" not in batch
    assert batch["row_ids"].tolist() == [0, 1, 2, 9, 11]
    assert int((batch["labels"] != -100).sum()) == int((alone["labels"] != -100).sum())


def alone_ids(collator, row: dict) -> np.ndarray:
    return collator([row])["input_ids"][0].numpy()


def test_rows_with_another_image_or_text_before_it_share_nothing(rows, processor):
    collator = SelfQuestioningCollator(processor, max_length=2048)
    other_system = {
        **rows[1],
        "messages": [{"role": "system", "content": [{"type": "text", "text": "Other."}]}, *rows[1]["messages"]],
    }
    for pack in ([rows[0], rows[8]], [rows[0], other_system], [rows[8], rows[9]], [rows[14], rows[15]]):
        batch = PackingCollator(collator, share_images=True)([pack])
        assert batch["num_tokens"] == PackingCollator(collator)([pack])["num_tokens"]


def test_rows_are_cut_as_when_alone(rows, processor, model):
    lengths = [len(alone_ids(SelfQuestioningCollator(processor), rows[row])) for row in range(8)]
    longest, shortest = int(np.argmax(lengths)), int(np.argmin(lengths))
    collator = SelfQuestioningCollator(processor, max_length=max(lengths) - 1)
    assert len(alone_ids(collator, rows[longest])) < max(lengths) - 1
    batch = assert_equal_to_rows_alone(model, collator, [[rows[longest], rows[shortest]]])
    assert int(batch["num_tokens"]) < len(alone_ids(collator, rows[longest])) + lengths[shortest]


def test_sliding_windows_are_those_of_the_rows_alone(rows, processor):
    """Gemma 2 has layers with and without a window. The window is shorter than a row."""
    torch.manual_seed(0)
    fields = {**tiny.TINY_LLAMA, "model_type": "gemma2", "sliding_window": 6, "head_dim": 16}
    language_model = AutoModel.from_config(AutoConfig.for_model(**fields), attn_implementation="eager").eval()
    embeddings = torch.randn(1, 4 + 5 + 7, language_model.config.hidden_size)
    numbers = torch.tensor([[[0, 0]] * 4 + [[0, 1]] * 5 + [[0, 2]] * 7])
    positions = torch.tensor([[*range(9), *range(4, 11)]])
    mask = attention_mask(numbers, positions, language_model.config, torch.float32)
    found = language_model(inputs_embeds=embeddings, position_ids=positions, attention_mask=mask).last_hidden_state
    alone = language_model(inputs_embeds=torch.cat([embeddings[:, :4], embeddings[:, 9:]], dim=1)).last_hidden_state
    torch.testing.assert_close(found[:, 9:], alone[:, 4:], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3"])
def test_language_model_that_keeps_branches_apart_is_accepted(family):
    torch.manual_seed(0)
    model = AutoModel.from_config(AutoConfig.for_model(**{**tiny.TINY_LLAMA, "model_type": family}))
    require_separation(model, share_images=True)


def test_language_model_that_mixes_branches_is_refused():
    torch.manual_seed(0)
    fields = {**tiny.TINY_LLAMA, "model_type": "lfm2", "layer_types": ["conv", "full_attention"]}
    with pytest.raises(ValueError, match=r"type 'lfm2' does not keep .* apart\. Remove share_images\."):
        require_separation(AutoModel.from_config(AutoConfig.for_model(**fields)), share_images=True)


# Packs


@settings(max_examples=60, deadline=None)
@given(data=st.data(), per_step=st.integers(1, 4), max_rows=st.integers(2, 5), seed=st.integers(0, 3))
def test_each_epoch_has_each_row_once_in_packs_that_fit(data, per_step, max_rows, seed):
    prefixes = data.draw(st.lists(st.sampled_from([0, 5, 20]), min_size=1, max_size=200))
    lengths = [data.draw(st.integers(prefix + 1, 100)) for prefix in prefixes]
    groups = [data.draw(st.integers(0, 20)) * 100 + prefix for prefix in prefixes]
    sharing = ImageSharing(np.array(groups), np.array(prefixes), max_rows)
    try:
        sampler = PackSampler(np.array(lengths), 100, 1, per_step, seed, torch.tensor(0), sharing)
    except ValueError as error:
        assert "the dataset is too small" in str(error)
        return
    for epoch in range(3):
        sampler.epoch.fill_(epoch)
        packs = [pack for batch in sampler for pack in batch]
        assert len(packs) == sampler.num_packs and len(packs) % per_step == 0
        assert sorted(row for pack in packs for row in pack) == list(range(len(lengths)))
        assert all(pack and sampler.size(pack) <= 100 for pack in packs)
        for items in sampler._pack(epoch, 0):
            assert all(len(item) <= max_rows for item in items)
            assert all(len({(groups[row], prefixes[row] > 0) for row in item}) == 1 for item in items)


def test_planned_size_is_at_least_that_of_the_batch(rows, processor):
    rows = with_length_bounds(rows, LengthBound(processor, 300), prefixes=True)
    _, args, _ = parse_recipe(RECIPE, **CPU, max_length=300, per_device_train_batch_size=1, packing=True)
    sampler = pack_sampler(rows, args, num_processes=1, max_rows_per_image=4)
    collator = SelfQuestioningCollator(processor, max_length=300)
    for epoch in range(3):
        sampler.epoch.fill_(epoch)
        collator.epoch.fill_(epoch)
        for [pack] in sampler:
            batch = PackingCollator(collator, share_images=True)([[rows[row] for row in pack]])
            assert int(batch["num_tokens"]) <= sampler.size(pack)
    alone = pack_sampler(rows, args, num_processes=1)
    assert sum(map(sampler.size, sampler.packs(0))) < 0.8 * sum(map(alone.size, alone.packs(0)))
    assert "share its pass" in sampler.describe() and "share its pass" not in alone.describe()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"share_images": True}, "share_images is true, but packing is not"),
        ({"share_images": True, "packing": True, "stage": "align"}, "share_images is true in stage align"),
        ({"max_rows_per_image": 1}, "max_rows_per_image is 1: it must be 2 or more"),
    ],
)
def test_settings_that_cannot_share_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        parse_recipe(RECIPE, **CPU | changes)
