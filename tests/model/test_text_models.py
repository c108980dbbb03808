"""Special kinds of language models: mixtures of experts, multimodal models, and tokenizers with added tokens."""

from pathlib import Path

import pytest
import torch
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3nConfig,
    Llama4TextConfig,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2_5_VLConfig,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    Siglip2Config,
    set_seed,
)

from sq_llava.checkpoints.compose import compose, compose_config, compose_processor
from sq_llava.checkpoints.inspection import inspect
from sq_llava.checkpoints.load import load_checkpoint, merge_adapter
from sq_llava.training.trainer import require_router_loss
from tests import runs, tiny


EXPERTS = {"num_experts_per_tok": 2, "head_dim": 16}


def write_language_model(folder: Path, kind: str) -> Path:
    tokenizer = tiny.llama_tokenizer()
    fields = {name: value for name, value in tiny.TINY_LLAMA.items() if name != "model_type"}
    fields["vocab_size"] = len(tokenizer)
    set_seed(0)
    if kind == "qwen3_moe":
        model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**fields, **EXPERTS, num_experts=4, moe_intermediate_size=32))
    elif kind == "mixtral":
        model = MixtralForCausalLM(MixtralConfig(**fields, **EXPERTS, num_local_experts=4))
    else:
        text = {**fields, "head_dim": 16, "model_type": "gemma3_text"}
        image_tokens = {"image_token_index": 5, "boi_token_index": 6, "eoi_token_index": 7, "mm_tokens_per_image": 9}
        config = Gemma3Config(text_config=text, vision_config=tiny.TINY_SIGLIP, **image_tokens)
        model = Gemma3ForConditionalGeneration(config)
    model.eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> Path:
    root = runs.make_parts(tmp_path_factory.mktemp("parts"))
    for kind in ("qwen3_moe", "mixtral", "gemma3"):
        write_language_model(root / kind, kind)
    return root


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["qwen3_moe", "mixtral", "gemma3"])
def test_language_model_is_composed_saved_and_loaded_again(parts, tmp_path, kind):
    model, processor = compose(str(parts / "clip"), str(parts / kind), num_prototypes=5)
    classes = {
        "qwen3_moe": Qwen3MoeForCausalLM,
        "mixtral": MixtralForCausalLM,
        "gemma3": Gemma3ForConditionalGeneration,
    }
    own = classes[kind].from_pretrained(parts / kind).eval()
    input_ids = torch.arange(8, 24).unsqueeze(0)
    expected = own(input_ids=input_ids).logits
    assert torch.allclose(model(input_ids=input_ids).logits[..., : expected.shape[-1]], expected, atol=1e-5)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    assert inspect(tmp_path).sound
    reloaded, _ = load_checkpoint(str(tmp_path))
    assert torch.equal(reloaded(input_ids=input_ids).logits, model(input_ids=input_ids).logits)
    planned = compose_config(str(parts / "clip"), str(parts / kind), num_prototypes=5).text_config
    assert planned.model_type == reloaded.config.text_config.model_type


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (Qwen2_5_VLConfig(), "is a qwen2_5_vl, which transformers cannot load as a causal language model"),
        (Gemma3nConfig(), "is a gemma3n, whose layers read token ids"),
    ],
    ids=["no causal language model", "token ids in each layer"],
)
def test_multimodal_model_without_a_usable_text_part_is_refused_with_its_type(parts, tmp_path, config, message):
    config.save_pretrained(tmp_path)
    for make in (compose_config, compose):
        with pytest.raises(ValueError, match=message):
            make(str(parts / "clip"), str(tmp_path))


def test_processor_has_a_placeholder_for_the_cls_token_if_the_model_keeps_it(parts):
    model, processor = compose(str(parts / "clip"), str(parts / "llama"), vision_feature_select_strategy="full")
    assert processor.image_seq_length == model.config.image_seq_length == 10


def test_vision_model_of_variable_resolution_is_refused_before_anything_is_loaded(parts, tmp_path, monkeypatch):
    Siglip2Config().save_pretrained(tmp_path)
    monkeypatch.setattr("sq_llava.checkpoints.compose._tokenizer_of", None)
    for make in (compose_config, compose_processor, compose):
        with pytest.raises(ValueError, match="such as google/siglip2-base-patch16-384"):
            make(str(tmp_path), str(parts / "gemma3"))


def first_step(parts: Path, output_dir: Path, coefficient: float, **overrides) -> dict:
    settings = {"router_aux_loss_coef": coefficient, "max_steps": 1, **overrides}
    runs.train(parts, output_dir, **settings)
    [entry] = runs.losses(output_dir)
    return entry


@pytest.mark.slow
def test_router_loss_is_added_once_a_step_and_experts_stay_frozen(parts, tmp_path, capsys):
    settings = {"text_model_name_or_path": parts / "qwen3_moe", "gradient_accumulation_steps": 2}
    settings |= {"vision_lora_dropout": 0, "lora_dropout": 0}
    without = first_step(parts, tmp_path / "without", 0.0, **settings)
    with_it = first_step(parts, tmp_path / "with", 0.5, **settings)
    assert "aux_loss" not in without and with_it["aux_loss"] > 1
    assert with_it["loss"] == pytest.approx(without["loss"] + 0.5 * with_it["aux_loss"], abs=1e-4)
    assert with_it["loss_answers"] == pytest.approx(without["loss_answers"], abs=1e-4)
    assert with_it["grad_norm"] != without["grad_norm"]
    # Two layers of four experts, of 3 x 32 x 64 weights each.
    assert f"{2 * 4 * 3 * 32 * 64:,} expert weights of the language model stay frozen" in capsys.readouterr().out
    merge_adapter(str(tmp_path / "with"), str(tmp_path / "merged"))
    merged, _ = load_checkpoint(str(tmp_path / "merged"))
    assert merged.config.text_config.output_router_logits is False


@pytest.mark.slow
def test_stage_one_uses_the_router_loss_coefficient_of_the_language_models_configuration(parts, tmp_path):
    entry = first_step(parts, tmp_path / "run", None, stage="align", text_model_name_or_path=parts / "mixtral")
    mean = entry["loss_answers"]
    assert entry["loss"] == pytest.approx(mean + 0.001 * entry["aux_loss"], abs=1e-5)


def test_error_about_a_family_without_a_router_loss_says_how_to_turn_it_off():
    with pytest.raises(ValueError, match=r"\(llama4_text\) has no num_experts.*Set router_aux_loss_coef to 0"):
        require_router_loss(Llama4TextConfig())


@pytest.mark.parametrize("kind", ["llama", "byte_level"])
def test_added_tokens_and_templates_are_saved_and_loaded_again(tmp_path, kind):
    processor = tiny.tiny_processor(tiny.TOKENIZERS[kind]())
    control_tokens = processor.control_tokens
    model = tiny.tiny_model_for(processor)
    processor.tokenizer.add_tokens(["<box>", "</box>"], special_tokens=True)
    model.resize_token_embeddings(len(processor.tokenizer))
    processor.chat_template = {"default": processor.chat_template, "short": "{{ messages[0]['content'] }}"}
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)

    assert inspect(tmp_path).sound
    reloaded, again = load_checkpoint(str(tmp_path))
    ids = processor.tokenizer.convert_tokens_to_ids(["<box>", "</box>"])
    assert again.tokenizer.convert_tokens_to_ids(["<box>", "</box>"]) == ids
    assert reloaded.config.text_config.vocab_size == len(again.tokenizer) == max(ids) + 1
    assert torch.equal(reloaded.lm_head.weight[ids], model.lm_head.weight[ids])
    assert again.control_tokens == control_tokens
    assert again.chat_template == processor.chat_template

    messages = [{"role": "user", "content": "Where? <box>1</box>"}]
    assert again.apply_chat_template(messages, chat_template="short") == "Where? <box>1</box>"
    prompt = again.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt")
    assert ids[0] in prompt["input_ids"] and ids[0] not in reloaded.generation_config.suppress_tokens
    assert again.tokenizer.decode([ids[0]]) == "<box>"
