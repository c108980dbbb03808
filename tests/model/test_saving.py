"""Saving and loading the model: weights bit for bit, ties, resized embeddings, devices, auto classes."""

import pytest
import torch
from safetensors import safe_open

from modeling_sq_llava import SQLlavaAutoModel, SQLlavaForConditionalGeneration, SQLlavaModel
from tests.tiny import TINY_LLAMA, TINY_VOCAB_SIZE, is_tied, logits_of, tiny_config, tiny_inputs, tiny_model


TIED_LLAMA = {**TINY_LLAMA, "tie_word_embeddings": True}
PARTS_ON_DISK = {
    "model.vision_tower": "disk",
    "model.prototype_extractor": "disk",
    "model.multi_modal_projector": "disk",
    "model.language_model": "cpu",
    "lm_head": "cpu",
}


@pytest.mark.parametrize("text_config", [TINY_LLAMA, TIED_LLAMA], ids=["untied", "tied"])
@pytest.mark.parametrize(
    ("dtype", "max_shard_size"),
    [(torch.float32, "50GB"), (torch.bfloat16, "50GB"), (torch.float32, "200KB")],
    ids=["float32", "bfloat16", "sharded"],
)
def test_saving_and_loading_keeps_weights_bit_for_bit_and_ties(text_config, dtype, max_shard_size, tmp_path):
    model = tiny_model(tiny_config(text_config=dict(text_config))).to(dtype)
    model.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (max_shard_size == "200KB")
    assert {path.name for path in tmp_path.glob("*.py")} == {"configuration_sq_llava.py", "modeling_sq_llava.py"}
    names = []
    for file in tmp_path.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            assert opened.metadata() == {"format": "pt"}
            names += opened.keys()
    # Inference engines read the files themselves, by these names. A tied weight is saved once.
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())
    again, report = SQLlavaForConditionalGeneration.from_pretrained(tmp_path, dtype=dtype, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    before, after = model.state_dict(), again.state_dict()
    assert before.keys() == after.keys()
    assert all(after[name].dtype == dtype and torch.equal(after[name], before[name]) for name in before)
    assert is_tied(again) == is_tied(model) == (text_config is TIED_LLAMA)


@pytest.mark.parametrize("text_config", [TINY_LLAMA, TIED_LLAMA], ids=["untied", "tied"])
def test_resized_embeddings_keep_the_old_logits_and_the_ties(text_config, tmp_path):
    model = tiny_model(tiny_config(text_config=dict(text_config)))
    inputs = tiny_inputs(model.config)
    before = logits_of(model, inputs)
    model.resize_token_embeddings(TINY_VOCAB_SIZE + 3, pad_to_multiple_of=64)
    assert model.config.text_config.vocab_size == TINY_VOCAB_SIZE + 64
    logits = logits_of(model, inputs)
    assert logits.shape[-1] == TINY_VOCAB_SIZE + 64
    torch.testing.assert_close(logits[..., :TINY_VOCAB_SIZE], before)
    assert model(**inputs, labels=inputs["input_ids"]).loss.isfinite()
    model.save_pretrained(tmp_path)
    again = SQLlavaForConditionalGeneration.from_pretrained(tmp_path)
    assert torch.equal(logits_of(again, inputs), logits)
    assert is_tied(again) == (text_config is TIED_LLAMA)


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["paper", "released"])
@pytest.mark.parametrize(
    ("device_map", "max_memory", "devices"),
    [
        ("auto", None, None),
        ({"": "cpu"}, None, None),
        ({"": "disk"}, None, {"disk"}),
        ("auto", {"cpu": 400_000}, {"cpu", "disk"}),
        (PARTS_ON_DISK, None, {"cpu", "disk"}),
    ],
    ids=["auto", "cpu", "disk", "little memory", "parts on disk"],
)
def test_a_model_loaded_over_devices_gives_the_same(variant, device_map, max_memory, devices, tmp_path):
    model = tiny_model(tiny_config(prototype_variant=variant))
    inputs = tiny_inputs(model.config)
    model.save_pretrained(tmp_path)
    spread = SQLlavaForConditionalGeneration.from_pretrained(
        tmp_path, device_map=device_map, max_memory=max_memory, offload_folder=tmp_path / "offload"
    )
    if devices:
        assert set(spread.hf_device_map.values()) == devices
    torch.testing.assert_close(logits_of(spread, inputs), logits_of(model, inputs))
    answers = [each.generate(**inputs, max_new_tokens=4, do_sample=False) for each in (spread, model)]
    assert torch.equal(*answers)


def test_automodel_is_the_generating_model_from_weights_and_the_base_from_a_config(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    assert type(SQLlavaAutoModel.from_pretrained(tmp_path)) is SQLlavaForConditionalGeneration
    assert type(SQLlavaAutoModel._from_config(tiny_config())) is SQLlavaModel
    base = SQLlavaModel.from_pretrained(tmp_path)
    inputs = tiny_inputs(base.config)
    with torch.no_grad():
        torch.testing.assert_close(base(**inputs)[0], tiny_model().model(**inputs).last_hidden_state)
