"""The effects of training settings: LoRA, the loss, the batches, and the end of generation."""

import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoTokenizer, GenerationConfig
from transformers.integrations.neftune import activate_neftune, deactivate_neftune

import train_sft
from sq_llava.checkpoints.compose import stop_token_ids
from sq_llava.checkpoints.load import load_checkpoint, merge_adapter
from sq_llava.training.adapter import LoraOptions, LoraSize, add_adapter, load_adapter_weights
from sq_llava.training.settings import LORA_INITIALISATIONS, parse_recipe, parse_settings
from sq_llava.training.stage_model import load_base, quantization_config
from sq_llava.training.trainer import SQLlavaTrainer
from tests import runs, tiny


SIZE = LoraSize(4, 8, 0.0)
NAMED = ("q_proj", "v_proj")
DORA = {"use_dora": True, "use_rslora": True}
# One step, without dropout.
SHORT = runs.NO_DROPOUT | {"max_steps": 1, "save_strategy": "no", "doctor": "off"}


def arguments(parts: Path, output_dir: Path, previous: Path | None = None, **overrides) -> list[str]:
    return runs.arguments(parts, output_dir, previous, **SHORT | overrides)


def train(*args, **overrides) -> SQLlavaTrainer:
    return train_sft.main(arguments(*args, **overrides))


# LoRA


@pytest.fixture(scope="module")
def dora_stages(parts, tmp_path_factory) -> tuple[Path, SQLlavaTrainer]:
    """Both stages with DoRA and rsLoRA; in the second, on two kinds of layers of the language model."""
    root = tmp_path_factory.mktemp("dora")
    train(parts, root / "stage1", stage="align", **DORA, init_lora_weights="gaussian")
    stage2 = train(parts, root / "stage2", root / "stage1", **DORA, lora_target_modules=NAMED)
    return root / "stage1", stage2


@pytest.mark.long
def test_dora_and_rslora_on_named_layers_are_trained_saved_merged_and_resumed_from(dora_stages, tmp_path):
    stage1, trainer = dora_stages
    stage2 = trainer.args.output_dir
    weights = load_file(f"{stage2}/adapter_model.safetensors")
    in_text = {name.split(".")[-3] for name in weights if ".language_model." in name and ".lora_A." in name}
    assert in_text == set(NAMED)
    for tower in ("vision_tower", "language_model"):
        layers = [name for name in weights if f".{tower}." in name and "lora_magnitude_vector" in name]
        assert layers
        assert all(weights[name.replace("lora_magnitude_vector", "lora_B.weight")].any() for name in layers)
    loaded, processor = load_checkpoint(stage2)
    lora = next(m for name, m in loaded.named_modules() if ".language_model." in name and hasattr(m, "lora_A"))
    assert lora.scaling["default"] == runs.SETTINGS["lora_alpha"] / math.sqrt(runs.SETTINGS["lora_r"])
    expected = runs.logits(trainer.model, processor)
    torch.testing.assert_close(runs.logits(loaded, processor), expected, rtol=0, atol=1e-5)
    merge_adapter(stage2, str(tmp_path / "merged"))
    merged, _ = load_checkpoint(str(tmp_path / "merged"))
    torch.testing.assert_close(runs.logits(merged, processor), expected, rtol=1e-4, atol=1e-4)
    # Another stage starts with the same logits.
    for folder, text_size in ((str(stage1), SIZE), (stage2, SIZE)):
        before, processor = load_checkpoint(folder)
        options = LoraOptions(NAMED, use_rslora=True, use_dora=True)
        base = load_checkpoint(str(stage1 / "base"))[0]
        continued = add_adapter(base, SIZE, text_size, train_vusr=True, options=options)
        load_adapter_weights(continued, folder)
        torch.testing.assert_close(
            runs.logits(continued, processor), runs.logits(before, processor), rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize("name", LORA_INITIALISATIONS)
def test_new_lora_of_each_initialisation_changes_no_logit(name):
    processor = tiny.tiny_processor()
    model = tiny.tiny_model_for(processor)
    expected = runs.logits(model, processor)
    size = LoraSize(64, 128, 0.0)
    adapted = add_adapter(model, size, size, True, options=LoraOptions(init_lora_weights=LORA_INITIALISATIONS[name]))
    torch.testing.assert_close(runs.logits(adapted, processor), expected, rtol=1e-4, atol=1e-4)
    a, b = (
        next(p for key, p in adapted.named_parameters() if ".language_model." in key and f".lora_{half}." in key)
        for half in "AB"
    )
    assert b.any() == (name == "orthogonal")
    if name != "orthogonal":  # PEFT's normal distribution has the standard deviation 1 / rank
        assert (a.std() - 1 / 64 < 1e-3) == (name == "gaussian")


NO_LORA = LoraSize(0, 8, 0.0)


@pytest.mark.parametrize(
    ("saved", "vision", "text", "options", "message"),
    [
        (NO_LORA, LoraSize(4, 16, 0.0), SIZE, {}, "vision_lora_alpha is 16, but the stage that wrote .* used 8"),
        (SIZE, SIZE, LoraSize(4, 32, 0.0), {}, "lora_alpha is 32, but the stage"),
        (NO_LORA, SIZE, SIZE, {"use_rslora": True}, "use_rslora is True, .* used False.*Set use_rslora to false"),
        (NO_LORA, SIZE, SIZE, {"use_dora": True}, "use_dora is True, but the stage"),
    ],
)
def test_lora_of_another_scale_is_refused(tmp_path, saved, vision, text, options, message):
    add_adapter(tiny.tiny_model(), SIZE, saved, train_vusr=True).save_pretrained(tmp_path)
    model = add_adapter(tiny.tiny_model(), vision, text, train_vusr=True, options=LoraOptions(**options))
    with pytest.raises(ValueError, match=f"^{message}"):
        load_adapter_weights(model, str(tmp_path))


@pytest.mark.parametrize("name", ["lm_head", "multi_modal_projector", "fc1", "q_pro"])
def test_lora_outside_of_the_language_models_layers_is_refused(name):
    with pytest.raises(ValueError, match=f"contains {name}, but .* down_proj, gate_proj, .* v_proj"):
        add_adapter(tiny.tiny_model(), SIZE, SIZE, True, options=LoraOptions(("q_proj", name)))


def test_each_tower_has_its_own_dropout():
    model = add_adapter(tiny.tiny_model(), LoraSize(4, 8, 0.25), LoraSize(4, 8, 0.125), True)
    dropouts = {
        (name.split(".")[3], module.p)
        for name, module in model.named_modules()
        if ".lora_dropout." in name and isinstance(module, nn.Dropout)
    }
    assert dropouts == {("vision_tower", 0.25), ("language_model", 0.125)}


# Settings that do not work together


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"stage": "align", "lora_target_modules": "q_proj"}, "lora_target_modules is 'q_proj', but this run"),
        ({"lora_r": 0, "vision_lora_r": 0, "use_dora": True}, "use_dora is True, but this run trains no LoRA"),
        ({"use_dora": True, "load_in_8bit": True}, "use_dora is True and load_in_8bit is set"),
        ({"bnb_4bit_quant_type": "fp4"}, "bnb_4bit_quant_type is 'fp4', but load_in_4bit is not set"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa': choose one of default, gaussian, orthogonal"),
        ({"init_lora_weights": "orthogonal", "lora_r": 5}, "is 'orthogonal', but lora_r is 5. It needs even"),
        ({"full_finetuning": True, "lora_r": 0, "vision_lora_r": 0, "use_peft": True}, "together with use_peft True"),
        ({"do_eval": True}, "To evaluate, set eval_strategy"),
        ({"num_eval_rows": 3}, r"num_eval_rows is 3.*To evaluate, set eval_strategy"),
        ({"self_question_ratio": 1.5}, "self_question_ratio is 1.5: it must be a number from 0 to 1"),
        ({"accelerator_config": '{"split_batches": true}'}, "accelerator_config has split_batches true"),
        ({"accelerator_config": '{"dispatch_batches": true}'}, "accelerator_config has dispatch_batches true"),
        ({"accelerator_config": '{"even_batches": false}'}, "or even_batches false"),
        ({"activation_offloading": True}, "activation_offloading is True, but the model is on the CPU"),
        ({"train_sampling_strategy": "batch_rebalance"}, "'batch_rebalance', which is not supported. Choose random"),
        ({"packing": True, "pad_to_multiple_of": 64}, "packing is true and pad_to_multiple_of is '64'"),
    ],
)
def test_settings_that_do_not_work_together_are_refused(parts, tmp_path, overrides, message):
    with pytest.raises(ValueError, match=message):
        parse_settings(arguments(parts, tmp_path, **overrides))


def test_vusr_is_trained_whatever_its_language_model_calls_the_embeddings():
    text_config = {**tiny.TINY_LLAMA, "model_type": "gpt_neox"}
    model = tiny.tiny_model(tiny.tiny_config(text_config=text_config))
    adapted = add_adapter(model, LoraSize(0, 1, 0.0), LoraSize(2, 4, 0.0), train_vusr=True)
    trained = [name for name, parameter in adapted.named_parameters() if parameter.requires_grad]
    assert any("embed_in" in name and "trainable_tokens" in name for name in trained)


def test_lora_on_a_language_model_without_linear_layers_is_refused():
    model = tiny.tiny_model(tiny.tiny_config(text_config={**tiny.TINY_LLAMA, "model_type": "gpt2"}))
    with pytest.raises(ValueError, match=r"of type 'gpt2' has no layer of the class torch\.nn\.Linear"):
        add_adapter(model, LoraSize(0, 1, 0.0), LoraSize(2, 4, 0.0), train_vusr=True)


def test_overrides_of_a_recipe_may_be_lists_but_not_none(parts, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("stage: instruct\nuse_cpu: true\nlora_r: 4\ndataset_path: x\noutput_dir: y\n")
    _, _, model_config = parse_recipe(recipe, lora_target_modules=["q_proj", "v_proj"])
    assert model_config.lora_target_modules == ["q_proj", "v_proj"]
    with pytest.raises(ValueError, match=r"max_length is None\. To keep the recipe's value, leave it out"):
        parse_recipe(recipe, max_length=None)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("{path: x, weigth: 2}", "datasets, x: unknown key 'weigth'. Valid keys are path, image_root, .*weight"),
        ("{weight: 2}", "datasets contains .'weight': 2.: each entry needs a path"),
    ],
)
def test_unknown_key_of_a_dataset_in_a_recipe_is_refused(tmp_path, entry, message):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"stage: align\ndatasets: [{entry}]\noutput_dir: y\n")
    with pytest.raises(ValueError, match=message):
        parse_settings(["--config", str(recipe), "--use_cpu", "true"])


def test_empty_list_of_a_recipe_is_no_list(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("stage: align\ndataset_path: x\neval_datasets:\noutput_dir: y\n")
    arguments, _, _ = parse_settings(["--config", str(recipe), "--use_cpu", "true"])
    assert arguments.eval_datasets == []


def test_settings_of_four_bits_reach_bitsandbytes(parts, tmp_path):
    four_bits = {"load_in_4bit": True, "dtype": "bfloat16", "bnb_4bit_quant_type": "fp4"}
    four_bits |= {"use_bnb_nested_quant": True, "bnb_4bit_quant_storage": "bfloat16"}
    config = quantization_config(parse_settings(arguments(parts, tmp_path, **four_bits))[2])
    assert (config.bnb_4bit_quant_type, config.bnb_4bit_use_double_quant) == ("fp4", True)
    assert config.bnb_4bit_quant_storage == config.bnb_4bit_compute_dtype == torch.bfloat16


def test_model_from_parts_has_the_requested_architecture(parts, tmp_path):
    asked = {"prototype_variant": "released", "num_prototypes": 3, "num_prototype_iterations": 1}
    asked |= {"projector_type": "linear"}
    model, _, _ = load_base(*parse_settings(arguments(parts, tmp_path, **asked)), None)
    assert {name: getattr(model.config, name) for name in asked} == asked
    assert model.model.prototype_extractor.num_iterations == 1


# The loss and the batches


@pytest.fixture(scope="module")
def trainer(parts, tmp_path_factory) -> SQLlavaTrainer:
    """Three steps, each of which makes the model worse."""
    return train(
        parts,
        tmp_path_factory.mktemp("run"),
        max_steps=3,
        optim="sgd",
        learning_rate=10.0,
        max_grad_norm=0,
        lr_scheduler_type="constant",
        max_loss=1e9,
        pad_to_multiple_of=64,
        include_num_input_tokens_seen=True,
        num_eval_rows=4,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        save_total_limit=3,
        load_best_model_at_end=True,
        metric_for_best_model="loss_answers",
    )


@pytest.mark.slow
def test_trainer_counts_tokens_and_keeps_the_best_model(trainer):
    assert trainer.state.num_input_tokens_seen == 3 * 4 * 64
    output_dir = Path(trainer.args.output_dir)
    evaluations = [entry for entry in runs.history(output_dir) if "eval_loss_answers" in entry]
    best = min(evaluations, key=lambda entry: entry["eval_loss_answers"])["step"]
    checkpoint = output_dir / f"checkpoint-{best}"
    assert best != 3 and trainer.state.best_model_checkpoint.endswith(checkpoint.name)
    runs.assert_close(runs.trained_weights(output_dir), runs.trained_weights(checkpoint), atol=0)


def batch_of(trainer: SQLlavaTrainer, multiple: int | None) -> dict:
    collator, rows = trainer.data_collator, trainer.train_dataset
    given, collator.pad_to_multiple_of = collator.pad_to_multiple_of, multiple
    batch = collator([rows[index] for index in range(4)])
    collator.pad_to_multiple_of = given
    return batch


def loss_of(trainer: SQLlavaTrainer, multiple: int | None = None) -> float:
    with torch.no_grad():
        return trainer.compute_loss(trainer.model, batch_of(trainer, multiple)).item()


def test_padding_to_a_multiple_does_not_change_the_loss(trainer):
    assert trainer.data_collator.pad_to_multiple_of == 64
    trainer.model.eval()
    assert batch_of(trainer, None)["input_ids"].shape[1] % 64 != 0
    for name in ("input_ids", "attention_mask", "labels", "turn_kinds"):
        assert batch_of(trainer, 64)[name].shape[1] % 64 == 0
    assert loss_of(trainer, 64) == pytest.approx(loss_of(trainer), rel=1e-5)


def test_dynamic_fine_tuning_weighs_each_token_by_its_probability(trainer, monkeypatch):
    trainer.model.eval()
    monkeypatch.setattr(trainer.args, "loss_type", "dft")
    batch = batch_of(trainer, None)
    labels = batch.pop("labels")[:, 1:]
    for name in ("turn_kinds", "row_ids"):
        del batch[name]
    with torch.no_grad():
        log_probs = trainer.model(**batch).logits.float().log_softmax(-1)[:, :-1]
    log_probs = log_probs.gather(2, labels.clamp_min(0).unsqueeze(2)).squeeze(2)[labels != -100]
    assert loss_of(trainer) == pytest.approx((-log_probs * log_probs.exp()).mean().item(), rel=1e-3)


def test_noise_on_embeddings_is_added_only_in_training(trainer):
    model = trainer.model
    plain = [loss_of(trainer) for _ in (model.train(), model.eval())]
    handle = activate_neftune(model, 50.0, trainer.accelerator)  # as the Trainer does
    noisy = {mode: loss_of(trainer) for mode in (True, False) if model.train(mode)}
    deactivate_neftune(model, handle, trainer.accelerator)
    assert noisy[True] != pytest.approx(plain[0], rel=1e-2)
    assert noisy[False] == pytest.approx(plain[1], rel=1e-5)


# The end of generation


@pytest.mark.parametrize(
    ("own", "expected"), [(None, 2), (2, 2), ([2], 2), (7, [2, 7]), ([7, 9], [2, 7, 9]), ([9, 2], [2, 9])]
)
def test_delimiter_and_the_models_own_ends_stop_generation(own, expected):
    processor = tiny.tiny_processor()
    assert processor.tokenizer.eos_token_id == 2
    assert stop_token_ids(own, processor) == expected


@pytest.mark.slow
def test_eos_token_ends_answers_in_training_and_in_the_merged_model(parts, tmp_path):
    for name in ("clip", "llama"):
        shutil.copytree(parts / name, tmp_path / name)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "llama")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    tokenizer.save_pretrained(tmp_path / "llama")
    places = {"vision_model_name_or_path": tmp_path / "clip", "text_model_name_or_path": tmp_path / "llama"}
    trainer = train(parts, tmp_path / "run", **places, eos_token="<|im_end|>", doctor="sample")
    end = trainer.processing_class.tokenizer.convert_tokens_to_ids("<|im_end|>")
    labels = trainer.data_collator([trainer.train_dataset[0]])["labels"]
    assert (labels == end).any() and not (labels == 2).any()
    merge_adapter(str(tmp_path / "run"), str(tmp_path / "merged"))
    shutil.copytree(tmp_path / "merged", tmp_path / "old")
    GenerationConfig(eos_token_id=2).save_pretrained(tmp_path / "old")  # without the delimiter
    for folder in ("run", "merged", "old"):
        model, processor = load_checkpoint(str(tmp_path / folder))
        assert processor.tokenizer.eos_token == "<|im_end|>"
        answer = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
        assert processor.apply_chat_template(answer).endswith(" Hello<|im_end|>")
        assert model.generation_config.eos_token_id == [end, 2], folder


def test_eos_token_that_the_tokenizer_lacks_is_refused(parts, tmp_path):
    with pytest.raises(ValueError, match=r"eos_token\) is '<\|im_end\|>', .* give one of <unk>, <s>, </s>"):
        train(parts, tmp_path, eos_token="<|im_end|>")
    assert not (tmp_path / "base").exists()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_activations_are_offloaded_on_a_gpu(parts, tmp_path):
    plain, offloaded = (
        train(parts, tmp_path / str(offload), use_cpu=False, activation_offloading=offload)
        for offload in (False, True)
    )
    assert offloaded.state.log_history[0]["loss"] == pytest.approx(plain.state.log_history[0]["loss"], rel=1e-4)
