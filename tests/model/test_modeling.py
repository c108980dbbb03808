"""The model: its parts, the models that it must agree with, its errors, training."""

import copy

import pytest
import torch
from torch.nn import functional as F
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    CLIPVisionModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    SiglipVisionModel,
    set_seed,
)

from modeling_sq_llava import SQLlavaForConditionalGeneration, SQLlavaModel
from tests.tiny import (
    TINY_CLIP,
    TINY_LLAMA,
    TINY_SIGLIP,
    TINY_VOCAB_SIZE,
    is_tied,
    left_padded,
    logits_of,
    tiny_config,
    tiny_inputs,
    tiny_minigpt4_config,
    tiny_model,
)


@pytest.fixture
def inputs(tiny_model):
    """A prompt with one image."""
    return tiny_inputs(tiny_model.config)


@pytest.fixture
def text(tiny_model):
    """A prompt without an image."""
    return tiny_inputs(tiny_model.config, num_images=0)


def gradients(model, inputs):
    model.zero_grad()
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    return {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}


def test_the_parts_have_their_names_and_work_one_after_another(tiny_model, inputs):
    base = tiny_model.model
    assert type(base) is SQLlavaModel
    with torch.no_grad():
        features = base.get_vision_features(inputs["pixel_values"])
        projector = base.multi_modal_projector
        hidden = F.gelu(projector.linear_1(base.prototype_extractor(features)))
        image_tokens = projector.linear_2(hidden)
        embeddings = base.language_model.get_input_embeddings()(inputs["input_ids"])
        embeddings[0, 4:13] = image_tokens[0]
        expected = tiny_model.lm_head(base.language_model(inputs_embeds=embeddings).last_hidden_state)
        outputs = tiny_model(**inputs)
    assert features.shape == (1, 9, 32)
    torch.testing.assert_close(outputs.image_hidden_states, image_tokens)
    torch.testing.assert_close(outputs.logits, expected)


def test_the_image_and_its_prototypes_reach_the_logits(tiny_model, inputs):
    other = {**inputs, "pixel_values": torch.zeros_like(inputs["pixel_values"])}
    assert (logits_of(tiny_model, inputs) - logits_of(tiny_model, other)).abs().max() > 0.1
    before = logits_of(tiny_model, inputs)
    tiny_model.model.prototype_extractor.prototypes.data.mul_(-1.0)
    assert (logits_of(tiny_model, inputs) - before).abs().max() > 1e-3


@pytest.mark.parametrize("layer", [-1, -2, -4, 0, 1, 3])
@pytest.mark.parametrize(
    ("vision_config", "tower_class", "strategy"),
    [
        (TINY_CLIP, CLIPVisionModel, "default"),
        (TINY_CLIP, CLIPVisionModel, "full"),
        (TINY_SIGLIP, SiglipVisionModel, "full"),
        # As in SigLIP 2 so400m, whose images of 384 pixels have 27 patches of 14 and a rest.
        ({**TINY_SIGLIP, "image_size": 48}, SiglipVisionModel, "full"),
        ({**TINY_SIGLIP, "vision_use_head": False}, SiglipVisionModel, "full"),
    ],
    ids=["clip", "clip with CLS", "siglip", "siglip with a rest", "siglip without head"],
)
def test_vision_features_are_the_hidden_states_of_transformers_tower(vision_config, tower_class, strategy, layer):
    config = tiny_config(
        vision_config=dict(vision_config), vision_feature_layer=layer, vision_feature_select_strategy=strategy
    )
    model = tiny_model(config).model
    tower = tower_class(config.vision_config).eval()
    tower.load_state_dict(model.vision_tower.state_dict())
    pixel_values = tiny_inputs(config, num_images=2)["pixel_values"]
    with torch.no_grad():
        expected = tower(pixel_values, output_hidden_states=True).hidden_states[layer]
        features = model.get_vision_features(pixel_values)
    torch.testing.assert_close(features, expected[:, 1:] if strategy == "default" else expected)
    assert features.shape[1] == config.image_seq_length


@pytest.mark.parametrize("vision_config", [TINY_CLIP, TINY_SIGLIP], ids=["clip", "siglip"])
def test_vision_layers_above_the_feature_layer_are_never_run(vision_config):
    model = tiny_model(tiny_config(vision_config=dict(vision_config)))
    tower = model.model.vision_tower
    above = [tower.encoder.layers[2], tower.post_layernorm]
    if vision_config is TINY_SIGLIP:
        above.append(tower.head)
    for module in above:
        for parameter in module.parameters():
            parameter.data.fill_(torch.nan)
    assert logits_of(model, tiny_inputs(model.config)).isfinite().all()
    tower.encoder.layers[1].mlp.fc1.weight.data.fill_(torch.nan)
    assert logits_of(model, tiny_inputs(model.config)).isnan().any()


def test_without_prototypes_it_is_llava_1_5():
    model = tiny_model(tiny_config(prototype_variant="none"))
    config = model.config
    llava_config = LlavaConfig(
        vision_config=copy.deepcopy(config.vision_config),
        text_config=copy.deepcopy(config.text_config),
        image_token_index=config.image_token_id,
        tie_word_embeddings=False,
    )
    llava = LlavaForConditionalGeneration(llava_config).eval()
    for name in ("vision_tower", "multi_modal_projector", "language_model"):
        getattr(llava.model, name).load_state_dict(getattr(model.model, name).state_dict())
    llava.lm_head.load_state_dict(model.lm_head.state_dict())
    batch = left_padded([tiny_inputs(config, num_images=2), tiny_inputs(config, num_images=1, seed=1)])
    torch.testing.assert_close(logits_of(model, batch), logits_of(llava, batch))


def test_with_a_linear_projector_it_is_llava():
    model = tiny_model(tiny_config(prototype_variant="none", projector_type="linear")).model
    weights = dict(model.multi_modal_projector.named_parameters())
    assert {name: tuple(weight.shape) for name, weight in weights.items()} == {
        "linear_1.weight": (64, 32),
        "linear_1.bias": (64,),
    }
    assert not list(model.prototype_extractor.parameters())
    pixel_values = tiny_inputs(model.config)["pixel_values"]
    with torch.no_grad():
        outputs = model.get_image_features(pixel_values)
        expected = F.linear(outputs.last_hidden_state, weights["linear_1.weight"], weights["linear_1.bias"])
    torch.testing.assert_close(outputs.pooler_output, expected)


@pytest.mark.parametrize("variant", ["paper", "released", "none"])
@pytest.mark.parametrize("vision_config", [TINY_CLIP, TINY_SIGLIP], ids=["clip", "siglip"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_models_run_in_their_dtype(variant, vision_config, dtype):
    config = tiny_config(vision_config=dict(vision_config), prototype_variant=variant)
    model = tiny_model(config)
    inputs = tiny_inputs(config)
    expected = logits_of(model, inputs)
    logits = logits_of(model.to(dtype), inputs)
    assert logits.dtype == dtype
    assert F.cosine_similarity(logits.float(), expected, dim=-1).min() > 0.97


def test_a_float32_connector_works_inside_a_bfloat16_model():
    model = tiny_model().to(torch.bfloat16)
    model.model.prototype_extractor.float()
    model.model.multi_modal_projector.float()
    inputs = tiny_inputs(model.config)
    outputs = model(**inputs, labels=inputs["input_ids"])
    outputs.loss.backward()
    assert outputs.logits.dtype == torch.bfloat16
    assert model.model.multi_modal_projector.linear_1.weight.grad.any()


# One tiny configuration of each family that SQ-LLaVA is meant for.
TEXT_FAMILIES = {
    "llama": {},
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    "gemma": {"head_dim": 16},
    "gemma2": {"head_dim": 16},
    "gemma3_text": {"head_dim": 16},
    "mistral": {"sliding_window": 8},
    "phi": {},
    "phi3": {"pad_token_id": 0},
    "smollm3": {"pad_token_id": 0},
    "olmo2": {},
    "gpt_neox": {},
    "gpt2": {},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": TINY_LLAMA["hidden_size"]},
}


@pytest.mark.parametrize("family", TEXT_FAMILIES)
def test_each_text_family_gives_its_own_logits_and_takes_images(family):
    text_config = CONFIG_MAPPING[family](**{**TINY_LLAMA, "model_type": family, **TEXT_FAMILIES[family]})
    set_seed(0)
    language_model = AutoModelForCausalLM.from_config(text_config).eval()
    model = tiny_model(tiny_config(text_config=text_config))
    model.model.language_model.load_state_dict(language_model.base_model.state_dict())
    model.lm_head.load_state_dict(language_model.get_output_embeddings().state_dict())
    text = tiny_inputs(model.config, num_images=0, num_words=20)
    torch.testing.assert_close(logits_of(model, text), logits_of(language_model, text))
    assert is_tied(model) == text_config.tie_word_embeddings
    inputs = tiny_inputs(model.config)
    other = {**inputs, "pixel_values": -inputs["pixel_values"]}
    assert (logits_of(model, inputs) - logits_of(model, other)).abs().max() > 1e-3


def test_families_that_scale_their_logits_are_refused():
    for family, scale in (("cohere", "logit_scale"), ("granite", "logits_scaling")):
        text_config = CONFIG_MAPPING[family](**{**TINY_LLAMA, "model_type": family, scale: 0.25})
        with pytest.raises(ValueError, match=f"text_config.{scale} is 0.25"):
            tiny_config(text_config=text_config)


@pytest.mark.parametrize(
    ("images_in_text", "num_images", "error"),
    [
        (1, 2, "the text has 9 image tokens, the images have 18 features"),
        (2, 1, "the text has 18 image tokens, the images have 9 features"),
        (0, 1, "the text has 0 image tokens, the images have 9 features"),
        (1, 0, r"the text has 9 image tokens, but no pixel_values were given \(0 features\)"),
    ],
)
def test_numbers_of_image_tokens_and_features_that_differ_are_both_named(
    images_in_text, num_images, error, tiny_model
):
    prompt, pictures = (tiny_inputs(tiny_model.config, num_images=number) for number in (images_in_text, num_images))
    prompt["pixel_values"] = pictures.get("pixel_values")
    for call in (tiny_model, tiny_model.generate):
        with pytest.raises(ValueError, match=error):
            call(**prompt)


def test_exactly_one_kind_of_text_and_one_of_images_is_taken(tiny_model, inputs, monkeypatch):
    embeddings = tiny_model.get_input_embeddings()(inputs["input_ids"])
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        tiny_model(**inputs, inputs_embeds=embeddings)
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        tiny_model(pixel_values=inputs["pixel_values"])
    encoded = {"image": tiny_model.get_image_features(inputs["pixel_values"])}
    with pytest.raises(ValueError, match="pixel_values or mm_encoder_outputs, not both"):
        tiny_model(**inputs, mm_encoder_outputs=encoded)
    monkeypatch.setattr(tiny_model.config, "image_token_id", tiny_model.config.text_config.vocab_size)
    with pytest.raises(ValueError, match=r"outside of the vocabulary, .* Give input_ids"):
        tiny_model(inputs_embeds=embeddings, pixel_values=inputs["pixel_values"])


def test_images_may_be_given_encoded_and_text_as_embeddings(tiny_model):
    inputs = tiny_inputs(tiny_model.config, num_images=2)
    expected = logits_of(tiny_model, inputs)
    input_ids, pixel_values = inputs["input_ids"], inputs["pixel_values"]
    with torch.no_grad():
        encoded = tiny_model.get_image_features(pixel_values)
        as_list = copy.copy(encoded)
        as_list["pooler_output"] = list(encoded.pooler_output)
        embeddings = tiny_model.get_input_embeddings()(input_ids)
    for same in (
        {"input_ids": input_ids, "mm_encoder_outputs": {"image": encoded}},
        {"input_ids": input_ids, "mm_encoder_outputs": {"image": as_list}},
        {"inputs_embeds": embeddings, "pixel_values": pixel_values},
    ):
        assert torch.equal(logits_of(tiny_model, same), expected)


def test_the_image_token_may_lie_outside_the_vocabulary():
    model = tiny_model(tiny_config(image_token_id=TINY_VOCAB_SIZE + 7))
    inside = tiny_model(tiny_config())
    inside.load_state_dict(model.state_dict())
    assert torch.equal(logits_of(model, tiny_inputs(model.config)), logits_of(inside, tiny_inputs(inside.config)))


@pytest.mark.parametrize("config", [tiny_config(), tiny_minigpt4_config()], ids=["SQ-LLaVA", "MiniGPT-4"])
def test_left_padded_mixed_batch_has_the_logits_of_each_prompt_alone(config):
    model = tiny_model(config)
    prompts = [
        tiny_inputs(config, num_images=number, num_words=8 + 3 * row, seed=row)
        for row, number in enumerate([2, 0, 1, 3])
    ]
    logits = logits_of(model, left_padded(prompts))
    for row, prompt in enumerate(prompts):
        alone = logits_of(model, prompt)[0]
        torch.testing.assert_close(logits[row, -len(alone) :], alone, atol=1e-4, rtol=1e-4)


def test_loss_is_the_next_token_cross_entropy_of_the_labelled_tokens(tiny_model, inputs):
    labels = inputs["input_ids"].clone()
    labels[:, :15] = -100
    outputs = tiny_model(**inputs, labels=labels)
    expected = F.cross_entropy(outputs.logits[0, 14:-1], labels[0, 15:])
    torch.testing.assert_close(outputs.loss, expected)


def test_logits_to_keep_gives_the_last_or_the_chosen_positions(tiny_model, inputs):
    every = logits_of(tiny_model, inputs)
    torch.testing.assert_close(logits_of(tiny_model, inputs, logits_to_keep=3), every[:, -3:])
    chosen = torch.tensor([0, 14, 20])
    torch.testing.assert_close(logits_of(tiny_model, inputs, logits_to_keep=chosen), every[:, chosen])


def calls_of(module):
    """Returns a list that grows by one item at each call of the module."""
    calls = []
    module.register_forward_pre_hook(lambda *args: calls.append(1))
    return calls


def test_a_text_only_batch_costs_no_vision_pass_at_inference(tiny_model, inputs, text):
    calls = [
        calls_of(module) for module in (tiny_model.model.vision_tower.embeddings, tiny_model.model.prototype_extractor)
    ]
    logits_of(tiny_model, text)
    tiny_model(**text)  # with gradients, in evaluation mode
    tiny_model.train()
    logits_of(tiny_model, text)
    tiny_model.eval().generate(**text, max_new_tokens=3)
    assert calls == [[], []]
    tiny_model.generate(**inputs, max_new_tokens=3)
    assert calls == [[1], [1]]


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "gradient checkpointing"])
def test_a_text_only_batch_in_training_gives_the_vision_side_zero_gradients(checkpointing, tiny_model, inputs, text):
    tiny_model.train()
    if checkpointing:
        tiny_model.gradient_checkpointing_enable()
    with_image, text_only = gradients(tiny_model, inputs), gradients(tiny_model, text)
    assert text_only.keys() == with_image.keys()
    vision_side = [name for name in text_only if not name.startswith(("model.language_model.", "lm_head."))]
    assert {name.split(".")[1] for name in vision_side} == {
        "vision_tower",
        "prototype_extractor",
        "multi_modal_projector",
    }
    assert not any(text_only[name].any() for name in vision_side)
    assert all(with_image[name].any() for name in vision_side if not name.endswith("k_proj.bias"))
    assert all(text_only[name].any() for name in set(text_only) - set(vision_side))
    # Only the layers above the feature layer are not run.
    unused = {name for name, _ in tiny_model.named_parameters()} - with_image.keys()
    not_run = ("model.vision_tower.encoder.layers.2.", "model.vision_tower.post_layernorm.")
    assert unused and all(name.startswith(not_run) for name in unused)


def test_a_text_only_batch_in_training_has_the_loss_it_has_in_evaluation(tiny_model, text):
    expected = tiny_model(**text, labels=text["input_ids"]).loss
    assert torch.equal(tiny_model.train()(**text, labels=text["input_ids"]).loss, expected)


@pytest.mark.parametrize("variant", ["paper", "released"])
def test_gradient_checkpointing_gives_the_same_gradients(variant):
    model = tiny_model(tiny_config(prototype_variant=variant)).train()
    inputs = tiny_inputs(model.config, num_images=2)
    layers = (model.model.vision_tower.encoder.layers[0].mlp, model.model.language_model.layers[0].mlp)
    calls = [calls_of(layer) for layer in layers]
    plain = gradients(model, inputs)
    model.gradient_checkpointing_enable()
    checkpointed = gradients(model, inputs)
    assert calls == [[1] * 3, [1] * 3]  # once, then twice: the backward pass runs it again
    torch.testing.assert_close(checkpointed, plain)


@pytest.mark.parametrize(
    ("implementation", "vision", "text"),
    [
        ("eager", "eager", "eager"),
        ("flex_attention", "flex_attention", "flex_attention"),
        ({"vision_config": "eager", "text_config": "sdpa"}, "eager", "sdpa"),
        ({"vision_config": "sdpa", "text_config": "flex_attention"}, "sdpa", "flex_attention"),
    ],
    ids=["eager", "flex", "eager vision", "flex text"],
)
def test_attention_implementations_agree_and_are_set_for_each_part(implementation, vision, text, tmp_path):
    model = tiny_model()
    batch = left_padded([tiny_inputs(model.config, num_images=2), tiny_inputs(model.config, num_images=1, seed=1)])
    expected = logits_of(model, batch)
    assert model.model.vision_tower.config._attn_implementation == "sdpa"
    model.save_pretrained(tmp_path)
    model = SQLlavaForConditionalGeneration.from_pretrained(tmp_path, attn_implementation=implementation)
    assert model.model.vision_tower.config._attn_implementation == vision
    assert model.model.language_model.config._attn_implementation == text
    with torch.compiler.set_stance("force_eager"):  # compiling flex attention takes half a minute
        logits = logits_of(model, batch)
    seen = batch["attention_mask"].bool()
    torch.testing.assert_close(logits[seen], expected[seen], atol=1e-4, rtol=1e-4)


def test_flash_attention_2_is_supported_where_it_is_installed():
    for module in (SQLlavaModel(tiny_config()), tiny_model().model.vision_tower, tiny_model().model.language_model):
        assert module._supports_flash_attn


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize("variant", ["paper", "released"])
def test_the_forward_pass_compiles_to_one_graph(variant):
    model = tiny_model(tiny_config(prototype_variant=variant))
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for num_images in (1, 0) if variant == "paper" else (1,):
        inputs = tiny_inputs(model.config, num_images=num_images)
        torch.testing.assert_close(logits_of(compiled, inputs), logits_of(model, inputs))
    torch.compiler.reset()
