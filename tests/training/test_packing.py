"""Packed rows: no conversation affects another. Packs: they contain every row once, and are never too long."""

import json
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel

from sq_llava.data.lengths import LengthBound, with_length_bounds
from sq_llava.data.rows import load_rows
from sq_llava.data.sources import DataSource
from sq_llava.training.adapter import LoraSize, add_adapter
from sq_llava.training.collator import SelfQuestioningCollator
from sq_llava.training.packing import PackingCollator, PackSampler, require_separation
from tests import runs, tiny


SIZE = LoraSize(4, 8, 0.0)
WORDS = ["What", "is", "this", "?", "a", "green", "dog", "éß", "\n", "  ", "1", "2"]


def conversation(num_turns: int, num_images: int, number: int) -> dict:
    turns = []
    for turn in range(num_turns):
        words = [WORDS[(number * 5 + turn * 3 + k) % 7] for k in range(3 + (number + turn) % 5)]
        turns += [{"from": "human", "value": " ".join(words)}, {"from": "gpt", "value": f"A dog {number * turn}."}]
    turns[0]["value"] = "<image>\n" * num_images + turns[0]["value"]
    return {"image": [f"{number % 4}.png"] * num_images, "conversations": turns}


def write_rows(root: Path, raw: list[dict], name: str = "rows.json") -> Dataset:
    for number in range(4):
        tiny.picture(number).save(root / f"{number}.png")
    (root / name).write_text(json.dumps(raw))
    return load_rows([DataSource(str(root / name))], image_seq_length=9)


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Dataset:
    """Rows with none to three images, and one to four exchanges."""
    images = [0, 1, 3, 1, 0, 2, 1, 1]
    raw = [conversation(1 + number % 4, count, number) for number, count in enumerate(images)]
    return write_rows(tmp_path_factory.mktemp("rows"), raw)


@pytest.fixture(scope="module")
def processor():
    return tiny.tiny_processor(system_message="Be kind.")


def trained_model(processor, implementation="sdpa"):
    model = tiny.tiny_model_for(processor)
    model.set_attn_implementation(implementation)
    return runs.perturbed(add_adapter(model, SIZE, SIZE, train_vusr=True)).train()


def token_losses(model, batch: dict) -> torch.Tensor:
    """Losses of all labelled tokens, sample by sample."""
    inputs = {name: values for name, values in batch.items() if name not in ("labels", "turn_kinds", "row_ids")}
    logits = model(**inputs, use_cache=False).logits
    labels = batch["labels"][:, 1:]
    return F.cross_entropy(logits[:, :-1].transpose(1, 2), labels, reduction="none")[labels != -100]


def gradients(model, losses: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    losses.sum().backward()
    return runs.gradients(model)


CHOICES = [[0], [2], [0, 4], [1, 2], [0, 1, 2], [4, 3, 0, 5], [2, 1, 3, 5, 6, 7], [0, 1, 2, 3, 4, 5, 6, 7]]


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("chosen", CHOICES, ids=str)
@pytest.mark.parametrize("num_packs", [1, 2])
def test_losses_and_gradients_are_those_of_each_conversation_alone(rows, processor, chosen, implementation, num_packs):
    collator = SelfQuestioningCollator(processor, max_length=2048)
    model = trained_model(processor, implementation)
    samples = [rows[index] for index in chosen]
    packs = [samples] if num_packs == 1 else [samples[: len(samples) // 2], samples[len(samples) // 2 :]]
    packed = PackingCollator(collator)([pack for pack in packs if pack])
    losses = token_losses(model, packed)
    found = gradients(model, losses)
    alone = torch.cat([token_losses(model, collator([sample])) for sample in samples])
    torch.testing.assert_close(losses, alone, rtol=1e-5, atol=1e-5)
    for name, expected in gradients(model, alone).items():
        torch.testing.assert_close(found[name], expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max() + 1))


def test_packed_row_has_the_labels_draws_images_and_rows_of_its_conversations(rows, processor):
    collator = SelfQuestioningCollator(processor, self_question_ratio=0.5, max_length=2048)
    collator.epoch.fill_(3)
    packed = PackingCollator(collator)([[rows[index] for index in (5, 2, 0)], [rows[index] for index in (3, 7)]])
    assert packed["row_ids"].tolist() == [5, 2, 0, 3, 7]
    assert "attention_mask" not in packed
    # The second token of each conversation has position 1. Padding has position 0.
    begins = [(pack, at - 1) for pack, at in (packed["position_ids"] == 1).nonzero().tolist()]
    images = iter(all_images(packed))
    for index, (pack, begin) in zip((5, 2, 0, 3, 7), begins):
        alone = collator([rows[index]])
        length = alone["input_ids"].shape[1]
        piece = {name: packed[name][pack, begin : begin + length] for name in packed if packed[name].ndim == 2}
        assert piece["position_ids"].tolist() == list(range(length))
        for name in ("input_ids", "turn_kinds"):
            assert torch.equal(piece[name], alone[name][0])
        assert piece["labels"][0] == -100 and torch.equal(piece["labels"][1:], alone["labels"][0, 1:])
        assert all(torch.equal(next(images), image) for image in all_images(alone))
    assert next(images, None) is None
    assert (packed["turn_kinds"] == 2).any()
    shorter = int((packed["position_ids"].diff(dim=1) != 0).sum(dim=1).argmin())
    assert packed["labels"][shorter, -1] == -100 and packed["position_ids"][shorter, -1] == 0


def all_images(batch: dict) -> list[torch.Tensor]:
    """The pixels of each image in the text, in order."""
    if "pixel_values" not in batch:
        return []
    indices = batch.get("image_indices", torch.arange(len(batch["pixel_values"])))
    return list(batch["pixel_values"][indices])


def test_first_token_of_a_caption_is_not_predicted_from_another_row(tmp_path):
    """The tokenizer adds no token before the text, so the first token of a text-only caption has a label."""
    captions = [{"from": "human", "value": "Say."}, {"from": "gpt", "value": "A dog."}]
    rows = write_rows(tmp_path, [{"conversations": captions}] * 2)
    processor = tiny.tiny_processor(tiny.byte_level_tokenizer())
    collator = SelfQuestioningCollator(processor, plain=True, max_length=100)
    alone = collator([rows[0]])
    assert alone["labels"][0, 0] != -100
    packed = PackingCollator(collator)([[rows[0], rows[1]]])
    length = alone["labels"].shape[1]
    assert packed["labels"].shape == (1, 2 * length)
    assert packed["labels"][0, [0, length]].tolist() == [-100, -100]
    assert packed["turn_kinds"][0, [0, length]].tolist() == [0, 0]
    assert int((packed["labels"] != -100).sum()) == 2 * (length - 1)


def test_flash_attention_gets_the_start_of_each_conversation(rows, processor):
    """Like transformers' own flattening collator: int32 borders, Python numbers, one row without padding."""
    collator = SelfQuestioningCollator(processor, max_length=2048)
    packs = [[rows[0], rows[1]], [rows[2]]]
    batch = PackingCollator(collator, flat=True)(packs)
    lengths = [collator([row])["input_ids"].shape[1] for pack in packs for row in pack]
    assert batch["input_ids"].shape == batch["position_ids"].shape == (1, sum(lengths))
    for name in ("cu_seq_lens_q", "cu_seq_lens_k"):
        assert batch[name].dtype == torch.int32
        assert batch[name].tolist() == [0, lengths[0], sum(lengths[:2]), sum(lengths)]
    assert (batch["max_length_q"], batch["max_length_k"]) == (max(lengths), max(lengths))
    assert (batch["position_ids"][0] == 0).nonzero().flatten().tolist() == batch["cu_seq_lens_q"].tolist()[:-1]


# Lengths


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(
    turns=st.lists(st.lists(st.sampled_from(WORDS), min_size=1, max_size=6).map("".join), min_size=1, max_size=4),
    tokenizer=st.sampled_from(list(tiny.TOKENIZERS)),
    marker=st.sampled_from(["[vusr]", "VUSER:"]),
    num_images=st.integers(0, 2),
)
def test_bound_is_the_longest_of_all_draws(turns, tokenizer, marker, num_images):
    processor = processor_of(tokenizer, marker)
    content = [{"type": "image"}] * num_images
    messages = []
    for text in turns:
        messages.append({"role": "user", "content": [*content, {"type": "text", "text": text}]})
        messages.append({"role": "assistant", "content": [{"type": "text", "text": text[::-1]}]})
        content = []
    user_turns = range(2, len(messages), 2) if num_images else ()
    lengths = []
    for draw in product([False, True], repeat=len(user_turns)):
        drawn = [dict(message) for message in messages]
        for index, asked in zip(user_turns, draw):
            drawn[index]["self_question"] = asked
        lengths.append(length_of(processor, drawn))
    assert LengthBound(processor, 10_000).of_rows([messages], [0]) == [max(lengths)]


PROCESSORS = {}


def processor_of(tokenizer: str, marker: str):
    if (tokenizer, marker) not in PROCESSORS:
        PROCESSORS[tokenizer, marker] = tiny.tiny_processor(tiny.TOKENIZERS[tokenizer](), vusr_marker=marker)
    return PROCESSORS[tokenizer, marker]


def length_of(processor, messages: list[dict]) -> int:
    """Tokens of a row in the collator's batch, with image tokens."""
    images = [tiny.picture() for message in messages for part in message["content"] if part["type"] == "image"]
    text = processor.apply_chat_template(messages)
    return processor(images=images or None, text=[text], return_tensors="pt")["input_ids"].shape[1]


@pytest.mark.slow
@settings(max_examples=12, deadline=None)
@given(max_length=st.integers(60, 200), ratio=st.sampled_from([0.0, 0.5, 1.0]), epoch=st.integers(0, 50))
def test_row_that_is_cut_is_never_longer_than_its_bound(rows, processor, max_length, ratio, epoch):
    bound = LengthBound(processor, max_length, self_question_ratio=ratio)
    collator = SelfQuestioningCollator(processor, self_question_ratio=ratio, max_length=max_length)
    collator.epoch.fill_(epoch)
    for row in (rows[index] for index in range(len(rows))):
        (length,) = bound.of_rows([row["messages"]], [row["row_id"]])
        assert int(collator([row])["attention_mask"].sum()) <= length <= max_length


def test_lengths_of_captions_are_exact_and_cut_as_in_the_collator(rows, processor):
    for max_length in (300, 45):
        collator = SelfQuestioningCollator(processor, plain=True, max_length=max_length)
        with_lengths = with_length_bounds(rows, LengthBound(processor, max_length, plain=True))
        for row in (with_lengths[index] for index in range(len(rows))):
            assert int(collator([row])["attention_mask"].sum()) == row["length"]


def test_row_whose_first_exchange_is_too_long_is_named_before_training(rows, processor):
    with pytest.raises(
        ValueError, match=r"Row 2: its first question and answer have 5\d tokens, more than max_length 50"
    ):
        with_length_bounds(rows, LengthBound(processor, 50))


def test_row_that_the_chat_template_refuses_is_named_before_training(tmp_path, processor):
    raw = [conversation(2, 1, number) for number in range(3)]
    raw[1]["conversations"][3]["value"] = "A [vusr] dog."
    with pytest.raises(ValueError, match=r"Row 1: .*\[vusr\]"):
        with_length_bounds(write_rows(tmp_path, raw), LengthBound(processor, 300))


def test_lengths_are_computed_once_until_something_changes(tmp_path, processor, monkeypatch):
    raw = [conversation(2, 1, number) for number in range(6)]
    rows = write_rows(tmp_path, raw)
    counted = []
    of_rows = LengthBound.of_rows
    monkeypatch.setattr(LengthBound, "of_rows", lambda *args: counted.append(1) or of_rows(*args))
    first = with_length_bounds(rows, LengthBound(processor, 300))
    again = with_length_bounds(rows, LengthBound(processor, 300))
    assert len(counted) == 1 and again["length"][:] == first["length"][:]
    chosen = with_length_bounds(rows.select([4, 1]), LengthBound(processor, 300))
    assert chosen["length"][:] == [first["length"][4], first["length"][1]] and chosen[0]["row_id"] == 4
    with_length_bounds(rows, LengthBound(processor, 301))
    before = first["length"][5]
    changed = write_rows(tmp_path, [*raw[:5], conversation(4, 1, 5)])
    assert with_length_bounds(changed, LengthBound(processor, 300))["length"][5] > before
    assert len(counted) == 4


FOREIGN = {
    "lfm2": {**tiny.TINY_LLAMA, "model_type": "lfm2", "layer_types": ["conv", "full_attention"]},
    "opt": {"model_type": "opt", "vocab_size": 512, "hidden_size": 64, "word_embed_proj_dim": 64, "ffn_dim": 96,
            "num_hidden_layers": 2, "num_attention_heads": 4, "init_std": 0.2},
}  # fmt: skip


def language_model(fields: dict):
    torch.manual_seed(0)
    return AutoModel.from_config(AutoConfig.for_model(**fields))


@pytest.mark.parametrize("attention", ["sdpa", "flash_attention_2"])
@pytest.mark.parametrize("family", FOREIGN)
def test_language_model_that_mixes_conversations_is_refused(family, attention):
    model = language_model(FOREIGN[family])
    model.config._attn_implementation = attention
    with pytest.raises(ValueError, match=f"type '{family}' does not keep the conversations of a packed row apart"):
        require_separation(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_neox"])
def test_language_model_that_keeps_conversations_apart_is_accepted(family, dtype):
    model = language_model({**tiny.TINY_LLAMA, "model_type": family}).to(dtype).train()
    model.config._attn_implementation = "flash_attention_2"
    require_separation(model)
    assert model.training and model.config._attn_implementation == "flash_attention_2"


# Packs


def sampler_of(lengths, max_length=2048, per_batch=1, per_step=8, seed=0, epoch=0) -> PackSampler:
    return PackSampler(np.array(lengths), max_length, per_batch, per_step, seed, torch.tensor(epoch))


def packs_of(sampler: PackSampler) -> list[list[int]]:
    return [pack for batch in sampler for pack in batch]


def simulated_lengths(num_rows: int, seed: int = 0) -> np.ndarray:
    """Lengths like those of a mix with 6% text-only rows: 845 tokens on average."""
    generator = np.random.default_rng(seed)
    text = 24 + generator.gamma(1.6, 175.0, num_rows).astype(int)
    return np.minimum(text + 576 * (generator.random(num_rows) >= 0.06), 2048)


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 100), min_size=1, max_size=300),
    per_batch=st.integers(1, 3),
    multiple=st.integers(1, 3),
    seed=st.integers(0, 3),
)
def test_each_epoch_has_each_row_once_in_whole_steps_of_packs_that_fit(lengths, per_batch, multiple, seed):
    try:
        sampler = sampler_of(lengths, 100, per_batch, per_batch * multiple, seed)
    except ValueError as error:
        assert "the dataset is too small" in str(error)
        return
    for epoch in range(4):
        sampler.epoch.fill_(epoch)
        batches = list(sampler)
        assert len(batches) == len(sampler) and {len(batch) for batch in batches} == {per_batch}
        packs = [pack for batch in batches for pack in batch]
        assert len(packs) == sampler.num_packs and len(packs) % (per_batch * multiple) == 0
        assert sorted(row for pack in packs for row in pack) == list(range(len(lengths)))
        assert all(0 < sum(lengths[row] for row in pack) <= 100 for pack in packs)


def test_packs_are_a_function_of_seed_and_epoch_for_any_number_of_processes():
    lengths = simulated_lengths(3_000)
    # Batches of two packs for two processes, or batches of one pack for one process: the steps are the same.
    one, two = (packs_of(sampler_of(lengths, per_batch=size, epoch=1)) for size in (1, 2))
    assert one == two == packs_of(sampler_of(lengths, epoch=1))
    for other in (sampler_of(lengths, epoch=2), sampler_of(lengths, epoch=1, seed=1)):
        several = {frozenset(pack) for pack in one if len(pack) > 1}
        assert len(several & set(map(frozenset, packs_of(other)))) < len(several) / 20


def test_packs_of_rows_as_long_as_real_ones_are_nine_tenths_full():
    lengths = simulated_lengths(20_000)
    sampler = sampler_of(lengths, per_step=128)
    fill = lengths.sum() / (len(packs_of(sampler)) * 2048)
    assert fill > 0.89
    assert f"fill {fill:.3f}" in sampler.describe()
    random = np.random.default_rng(0).permutation(lengths)[: len(lengths) // 8 * 8].reshape(-1, 8)
    assert fill > random.sum() / (random.max(axis=1).sum() * 8) + 0.2
