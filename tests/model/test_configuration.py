"""The configuration: defaults, checked fields, saving."""

import json

import pytest
from transformers import CLIPConfig, CLIPVisionConfig, LlamaConfig, Qwen3Config, SiglipVisionConfig

from configuration_sq_llava import SQLlavaConfig
from tests.tiny import TINY_CLIP, TINY_LLAMA, TINY_SIGLIP, tiny_config


def test_defaults_are_sq_llava_7b():
    config = SQLlavaConfig()
    vision, text = config.vision_config, config.text_config
    assert (vision.model_type, vision.hidden_size, vision.num_hidden_layers) == ("clip_vision_model", 1024, 24)
    assert (vision.image_size, vision.patch_size, vision.num_attention_heads) == (336, 14, 16)
    assert (text.model_type, text.hidden_size, text.num_hidden_layers) == ("llama", 4096, 32)
    assert (text.intermediate_size, text.num_attention_heads, text.max_position_embeddings) == (11008, 32, 4096)
    assert (config.prototype_variant, config.num_prototypes, config.num_prototype_iterations) == ("paper", 256, 2)
    assert (config.projector_type, config.projector_hidden_act) == ("mlp2x", "gelu")
    assert (config.vision_feature_layer, config.vision_feature_select_strategy) == (-2, "default")
    assert config.image_seq_length == 576
    assert config.num_vision_layers_used == 23
    assert config.image_token_id < text.vocab_size
    assert config.vusr_token_id < text.vocab_size
    assert not config.tie_word_embeddings


def test_released_variant_has_the_activation_of_the_release():
    assert SQLlavaConfig(prototype_variant="released").projector_hidden_act == "quick_gelu"
    assert SQLlavaConfig(prototype_variant="released", projector_hidden_act="gelu").projector_hidden_act == "gelu"


def test_sub_configs_may_be_dicts_or_objects():
    from_dicts = tiny_config()
    from_objects = tiny_config(
        vision_config=CLIPVisionConfig.from_dict(TINY_CLIP), text_config=LlamaConfig.from_dict(TINY_LLAMA)
    )
    assert from_objects.to_dict() == from_dicts.to_dict()


def test_a_sub_config_without_model_type_is_clip_or_llama():
    config = SQLlavaConfig(vision_config={"image_size": 224}, text_config={"vocab_size": 64})
    assert type(config.vision_config) is CLIPVisionConfig
    assert type(config.text_config) is LlamaConfig


def test_the_text_config_is_kept_as_the_same_object():
    text_config = Qwen3Config(hidden_size=64)
    config = tiny_config(text_config=text_config)
    assert config.text_config is text_config
    assert config.get_text_config() is text_config


def test_siglip_has_no_cls_token_to_drop():
    config = tiny_config(vision_config=dict(TINY_SIGLIP))
    assert type(config.vision_config) is SiglipVisionConfig
    assert (config.vision_feature_select_strategy, config.image_seq_length) == ("full", 9)
    with pytest.raises(ValueError, match="drops the CLS token, but a SigLIP vision tower has none: use 'full'"):
        tiny_config(vision_config=dict(TINY_SIGLIP), vision_feature_select_strategy="default")


def test_number_of_image_tokens_follows_from_the_vision_config():
    assert tiny_config().image_seq_length == 9
    assert tiny_config(vision_feature_select_strategy="full").image_seq_length == 10
    assert tiny_config(image_seq_length=9).image_seq_length == 9
    with pytest.raises(ValueError, match="image_seq_length is 576, but the vision tower gives 9 tokens"):
        tiny_config(image_seq_length=576)


def test_tied_embeddings_follow_the_text_config_unless_given():
    tied = {**TINY_LLAMA, "tie_word_embeddings": True}
    assert not tiny_config().tie_word_embeddings
    assert tiny_config(text_config=tied).tie_word_embeddings
    assert not tiny_config(text_config=tied, tie_word_embeddings=False).tie_word_embeddings


@pytest.mark.parametrize(
    ("field", "value", "error"),
    [
        ("prototype_variant", "perceiver", "choose one of 'paper', 'released', 'none'"),
        ("projector_type", "mlp3x", "choose one of 'mlp2x', 'linear'"),
        ("vision_feature_select_strategy", "patch", "choose one of 'default', 'full'"),
        ("num_prototypes", 0, "give an int of at least 1"),
        ("num_prototypes", True, "give an int of at least 1"),
        ("num_prototypes", 2.5, "give an int of at least 1"),
        ("num_prototype_iterations", "2", "give an int of at least 1"),
        ("vision_feature_layer", 4, "the vision tower has 3 layers, so give an int from -4 to 3"),
        ("vision_feature_layer", -5, "the vision tower has 3 layers, so give an int from -4 to 3"),
        ("vision_feature_layer", [-2, -1], "the vision tower has 3 layers, so give an int from -4 to 3"),
        ("image_token_id", -1, "give an int of at least 0"),
        ("image_token_id", None, "give an int of at least 0"),
        ("vusr_token_id", -7, "give an int of at least 0"),
        ("vision_config", {"model_type": "resnet"}, "SQ-LLaVA takes clip_vision_model or siglip_vision_model or blip"),
        ("vision_config", {"model_type": "siglip2_vision_model"}, "of fixed resolution, such as google/siglip2-base-"),
        ("vision_config", CLIPConfig(), "Pass the vision part of a CLIP, SigLIP or BLIP-2 configuration"),
        ("text_config", {"model_type": "no_such_model"}, "which this version of transformers does not know"),
        ("projector_hidden_act", "guess", "the name of an activation of transformers"),
        ("tie_word_embeddings", "yes", "give True, False or None"),
        ("initializer_range", "0.02", "give a float above 0"),
        ("initializer_range", -0.02, "give a float above 0"),
        ("image_seq_length", 9.0, "remove it"),
    ],
)
def test_the_error_about_a_wrong_field_names_it_and_says_what_to_give(field, value, error):
    with pytest.raises(ValueError, match=error) as raised:
        tiny_config(**{field: value})
    assert field in str(raised.value)


@pytest.mark.parametrize("field", ["vision_config", "text_config"])
def test_a_sub_config_of_the_wrong_type_is_named(field):
    with pytest.raises(TypeError, match=f"{field} is 'llama': give a dict or a configuration object, or remove it"):
        tiny_config(**{field: "llama"})


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"prototype_variant": "released", "num_prototypes": 7, "num_prototype_iterations": 3, "vusr_token_id": None},
        {"prototype_variant": "none", "projector_type": "linear", "vision_config": TINY_SIGLIP},
        {"vision_feature_layer": -1, "vision_feature_select_strategy": "full", "tie_word_embeddings": True},
    ],
)
def test_saving_and_loading_keeps_every_field_and_the_code_file(fields, tmp_path):
    config = tiny_config(**fields)
    config.save_pretrained(tmp_path)
    again = SQLlavaConfig.from_pretrained(tmp_path)
    assert {**again.to_dict(), "_name_or_path": ""} == {**config.to_dict(), "_name_or_path": ""}
    assert (tmp_path / "configuration_sq_llava.py").is_file()
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["model_type"] == "sq_llava"
    assert saved["auto_map"] == {
        "AutoConfig": "configuration_sq_llava.SQLlavaConfig",
        "AutoModel": "modeling_sq_llava.SQLlavaAutoModel",
        "AutoModelForImageTextToText": "modeling_sq_llava.SQLlavaForConditionalGeneration",
        "AutoModelForMultimodalLM": "modeling_sq_llava.SQLlavaForConditionalGeneration",
    }


def test_a_saved_config_never_names_another_repository(tmp_path):
    config = tiny_config()
    config.auto_map = {"AutoConfig": "someone/else--configuration_sq_llava.SQLlavaConfig"}
    config.save_pretrained(tmp_path)
    assert SQLlavaConfig.from_pretrained(tmp_path).auto_map["AutoConfig"] == "configuration_sq_llava.SQLlavaConfig"


@pytest.mark.parametrize(
    ("name", "meant"), [("num_prototype", "did you mean 'num_prototypes'"), ("typo", "fields are")]
)
def test_an_unknown_field_is_refused(name, meant):
    with pytest.raises(ValueError, match=f"SQLlavaConfig has no field '{name}': .*{meant}"):
        tiny_config(**{name: 3})


def test_a_saved_config_may_have_unknown_fields_but_no_misspelt_ones(tmp_path):
    tiny_config().save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    saved = json.loads(file.read_text())
    file.write_text(json.dumps({**saved, "field_of_tomorrow": 1, "use_cache": False}))
    assert SQLlavaConfig.from_pretrained(tmp_path).field_of_tomorrow == 1
    file.write_text(json.dumps({**saved, "projector_tpye": "linear"}))
    with pytest.raises(ValueError, match="has no field 'projector_tpye': did you mean 'projector_type'"):
        SQLlavaConfig.from_pretrained(tmp_path)
