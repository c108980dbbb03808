"""The fields that the model returns and their names, in each supported version of transformers."""

import pytest
import torch
from transformers import AutoModelForCausalLM, CLIPVisionModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from modeling_sq_llava import CACHE_NAME
from tests import tiny


SIZES = {**tiny.TINY_LLAMA, "num_key_value_heads": 4, "output_router_logits": True, "router_aux_loss_coef": 0.5}
MIXTURES_OF_EXPERTS = {
    "mixtral": {**SIZES, "model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {
        **SIZES,
        "model_type": "qwen3_moe",
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "decoder_sparse_step": 1,
        "head_dim": 16,
    },
}


def test_outputs_have_the_fields_of_the_language_models_own(tiny_model):
    inputs = tiny.tiny_inputs(tiny_model.config)
    tiny_model.set_attn_implementation("eager")
    with torch.no_grad():
        outputs = tiny_model(**inputs, labels=inputs["input_ids"], output_hidden_states=True, output_attentions=True)
        as_tuple = tiny_model(**inputs, return_dict=False)
    assert CausalLMOutputWithPast.__dataclass_fields__.keys() <= type(outputs).__dataclass_fields__.keys()
    assert {"loss", "logits", CACHE_NAME, "hidden_states", "attentions", "image_outputs"} == outputs.keys()
    assert outputs[0] is outputs.loss and outputs[1] is outputs.logits
    assert outputs.image_hidden_states is outputs.image_outputs.pooler_output
    assert [tuple(state.shape) for state in outputs.hidden_states] == [(1, 21, 64)] * 3
    assert [tuple(attention.shape) for attention in outputs.attentions] == [(1, 4, 21, 21)] * 2
    assert torch.equal(as_tuple[0], outputs.logits)


def test_cache_may_be_given_by_either_name_but_not_by_both(tiny_model):
    inputs = tiny.tiny_inputs(tiny_model.config)
    next_token = torch.tensor([[5]])
    with torch.no_grad():
        logits = []
        for name in ("cache", "past_key_values"):
            cache = tiny_model(**inputs, use_cache=True)[CACHE_NAME]
            logits.append(tiny_model(input_ids=next_token, **{name: cache}).logits)
    assert torch.equal(*logits)
    with pytest.raises(ValueError, match="two names for the same thing"):
        tiny_model(input_ids=next_token, cache=cache, past_key_values=cache)


@pytest.mark.parametrize("family", MIXTURES_OF_EXPERTS)
def test_router_loss_equals_that_of_the_familys_own_model(family):
    model = tiny.tiny_model(tiny.tiny_config(text_config=dict(MIXTURES_OF_EXPERTS[family])))
    own = AutoModelForCausalLM.from_config(model.config.text_config).eval()
    own.model.load_state_dict(model.model.language_model.state_dict())
    own.lm_head.load_state_dict(model.lm_head.state_dict())
    input_ids = torch.randint(3, 400, (2, 7), generator=torch.Generator().manual_seed(0))
    attention_mask = torch.ones_like(input_ids)
    attention_mask[0, :3] = 0
    with torch.no_grad():
        for batch in ({"input_ids": input_ids}, {"input_ids": input_ids, "attention_mask": attention_mask}):
            ours, expected = (which(**batch, labels=input_ids) for which in (model, own))
            assert torch.equal(ours.logits, expected.logits)
            torch.testing.assert_close(ours.aux_loss, expected.aux_loss)
            torch.testing.assert_close(ours.loss, expected.loss)
            assert len(ours.router_logits) == len(expected.router_logits)
        assert ours.aux_loss > 1
        # A decoding step routes one token, but its mask also covers the tokens in the cache.
        assert model(**tiny.tiny_inputs(model.config), output_router_logits=False).aux_loss is None
    generated = model.generate(input_ids=input_ids, attention_mask=attention_mask, max_new_tokens=3, do_sample=False)
    assert generated.shape[1] > input_ids.shape[1]


def test_generation_from_embeddings_gives_the_tokens_of_the_ids(tiny_model):
    inputs = tiny.tiny_inputs(tiny_model.config, num_images=2)
    settings = {"do_sample": False, "min_new_tokens": 5, "max_new_tokens": 5}
    expected = tiny_model.generate(**inputs, **settings)[:, -5:]
    embeddings = tiny_model.get_input_embeddings()(inputs["input_ids"])
    batch = {"inputs_embeds": embeddings, "attention_mask": torch.ones_like(inputs["input_ids"])}
    # The placeholders are found by their embedding, as in transformers' LLaVA.
    assert torch.equal(tiny_model.generate(**batch, pixel_values=inputs["pixel_values"], **settings), expected)
    image_tokens = tiny_model.get_image_features(inputs["pixel_values"]).pooler_output
    placeholders = inputs["input_ids"] == tiny_model.config.image_token_id
    batch["inputs_embeds"] = embeddings.masked_scatter(placeholders.unsqueeze(-1), image_tokens)
    assert torch.equal(tiny_model.generate(**batch, **settings), expected)


@torch.no_grad()
def test_image_features_come_with_the_towers_hidden_states(tiny_model):
    pixel_values = tiny.tiny_inputs(tiny_model.config, num_images=2)["pixel_values"]
    tower = CLIPVisionModel(tiny_model.config.vision_config).eval()
    tower.load_state_dict(tiny_model.model.vision_tower.state_dict())
    expected = tower(pixel_values, output_hidden_states=True).hidden_states
    features = tiny_model.get_image_features(pixel_values, output_hidden_states=True)
    assert len(features.hidden_states) == tiny_model.config.num_vision_layers_used + 1 == len(expected) - 1
    for ours, towers in zip(features.hidden_states, expected, strict=False):
        torch.testing.assert_close(ours, towers)
    assert torch.equal(features.hidden_states[-1][:, 1:], features.last_hidden_state)
    assert tiny_model.get_image_features(pixel_values).hidden_states is None
    with pytest.raises(ValueError, match="output_attentions is True"):
        tiny_model.get_image_features(pixel_values, output_attentions=True)
