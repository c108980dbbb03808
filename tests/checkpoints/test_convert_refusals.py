"""Sources that cannot be converted: the error names the place and the reason, and nothing is written."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from transformers import Siglip2Config

from sq_llava.checkpoints import convert
from sq_llava.checkpoints.layouts import recognise
from sq_llava.checkpoints.weights import unused_kind, weight_name
from tests import tiny
from tests.checkpoints.conversions import LORA, MERGED, PROJECTOR, convert_source, plan, run_convert
from tests.released import edit_json, edit_weights


def edit_shard(source: Path, name: str, change) -> None:
    index = json.loads((source / "pytorch_model.bin.index.json").read_text())
    edit_weights(source / index["weight_map"][name], change)


def cut_off(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


ADAPTER, TRAINABLES, SHARD = "adapter_model.bin", "non_lora_trainables.bin", "pytorch_model-00002-of-00002.bin"
NORM, MODEL = "model.norm.weight", "base_model.model.model."
UP = f"{MODEL}layers.0.mlp.up_proj.lora_B.weight"
# For each fault: how to make it in a source, and a part of the error.
LORA_FAULTS = {
    "no projector": (lambda s: (s / TRAINABLES).unlink(), "non_lora_trainables.bin, which holds the .* is missing"),
    "no LoRA": (lambda s: (s / ADAPTER).unlink(), "adapter_model.bin, which holds the LoRA, is missing"),
    "rank": (
        lambda s: edit_json(s / "adapter_config.json", r=16),
        r"has rank 8, but .*source/adapter_config.json says 16, so its alpha is unknown. Put the",
    ),
    "rank of ViT-LoRA": (
        lambda s: shutil.rmtree(s / "Vit-lora"),
        r"vision_tower.* has rank 4, but .*says 8.*\(for a ViT-LoRA: into Vit-lora\)",
    ),
    "half of a pair": (
        lambda s: edit_weights(s / ADAPTER, lambda w: w.pop(UP)),
        "lora_B of .*up_proj is missing. Download",
    ),
    "DoRA": (lambda s: edit_json(s / "adapter_config.json", use_dora=True), "use_dora is true"),
    "shape of LoRA": (
        lambda s: edit_weights(s / ADAPTER, lambda w: w.update({UP: torch.ones(3, 8)})),
        r"LoRA of \(3, 8\) x \(8, 64\) does not fit model.layers.0.mlp.up_proj.weight of \(96, 64\)",
    ),
    "incomplete projector": (
        lambda s: edit_weights(s / TRAINABLES, lambda w: w.pop(f"{MODEL}mm_projector.f.bias")),
        r"1 weights without a tensor: model.prototype_extractor.f.bias\.$",
    ),
    "unknown tensor": (
        lambda s: edit_weights(s / TRAINABLES, lambda w: w.update({f"{MODEL}extra": torch.ones(1)})),
        r"1 tensors without a place in the model: base_model.model.model.extra in .*non_lora_trainables.bin\.$",
    ),
    "another tower": (
        lambda s: edit_weights(
            s / TRAINABLES, lambda w: w.update({f"{MODEL}mm_projector.c.weight": torch.ones(16, 16)})
        ),
        r"1 wrong shapes: .*mm_projector.c.weight in .*: \(16, 16\), not \(32, 32\)",
    ),
    "projector type": (
        lambda s: edit_json(s / "config.json", mm_projector_type="mlp3x"),
        "mm_projector_type is 'mlp3x', which",
    ),
    "image start": (
        lambda s: edit_json(s / "config.json", mm_use_im_start_end=True),
        "mm_use_im_start_end is true",
    ),
    "aspect ratio": (
        lambda s: edit_json(s / "config.json", image_aspect_ratio="anyres"),
        "image_aspect_ratio is 'anyres'",
    ),
    "cut off": (lambda s: cut_off(s / ADAPTER), r"adapter_model.bin was not loaded: it is damaged"),
}
WHOLE_FAULTS = {
    "missing file": (lambda s: (s / SHARD).unlink(), r"pytorch_model-00002-of-00002.bin: no such file"),
    "cut off": (lambda s: cut_off(s / SHARD), r"pytorch_model-00002-of-00002.bin was not loaded: it is damaged"),
    "missing tensor": (
        lambda s: edit_shard(s, NORM, lambda w: w.pop(NORM)),
        r"1 weights without a tensor: model.language_model.norm.weight",
    ),
    "both ways": (
        lambda s: edit_shard(s, NORM, lambda w: w.update({"model.norm.scale": w.pop(NORM)})),
        r"1 tensors without a place .*: model.norm.scale in .*bin. 1 weights without a tensor: model.*norm.weight",
    ),
    "twice": (
        lambda s: edit_shard(s, NORM, lambda w: w.update({"language_model.model.norm.weight": w[NORM]})),
        r"language_model.model.norm.weight and model.norm.weight .* both belong to model.language_model.norm.weight",
    ),
    "no tokenizer": (lambda s: (s / "tokenizer.model").unlink(), "holds neither tokenizer.model nor tokenizer.json"),
    "no weights": (lambda s: [f.unlink() for f in s.glob("pytorch_model*")], "but has no weight files"),
    "ViT-LoRA beside": (lambda s: (s / "Vit-lora").mkdir(), "not known whether this LoRA is merged"),
    "model type": (lambda s: edit_json(s / "config.json", model_type="llava_mpt2"), "model_type is 'llava_mpt2', but"),
}


@pytest.mark.parametrize("fault", LORA_FAULTS)
def test_fault_of_a_lora_is_named_and_nothing_written(lora, fault):
    assert_refused(lora, *LORA_FAULTS[fault])


@pytest.mark.parametrize("fault", WHOLE_FAULTS)
def test_fault_of_a_complete_checkpoint_is_named_and_nothing_written(llava, fault):
    assert_refused(llava, *WHOLE_FAULTS[fault])


def test_truncated_safetensors_are_named(llava_hf):
    name = "model-00002-of-00003.safetensors"
    assert_refused(llava_hf, lambda s: cut_off(s / name), f"{name} is damaged or cut off")


def assert_refused(source: Path, break_it, message: str) -> None:
    break_it(source)
    with pytest.raises(ValueError, match=message):
        convert.plan(recognise(source), source.parent / "new" / "result")
    assert not (source.parent / "new").exists()


@pytest.mark.parametrize(
    "name", ["model.mm_projector.sim_gamma", "model.layers.0.self_attn.rotary", "transformer.h.0.attn.weight"]
)
def test_unknown_names_have_no_weight(name):
    targets = tiny.tiny_model(tiny.tiny_config(prototype_variant="released")).state_dict()
    assert unused_kind(name) is None
    try:
        assert weight_name(name) not in targets
    except ValueError as error:
        assert "is not the name of a weight" in str(error)


def test_vision_lora_that_differs_in_its_two_places_is_refused(parts, tmp_path):
    message = r"ViT-LoRA in .*/adapter_model.bin differs from the one in .*Vit-lora/adapter_model.bin.* Move the"
    source = LORA(tmp_path / "source", base=parts / "base", vision=parts / "clip", differing=True)
    with pytest.raises(ValueError, match=message):
        plan(source)
    source = LORA(tmp_path / "fewer", base=parts / "base", vision=parts / "clip")

    def drop_last_layer(weights):
        for name in [name for name in weights if ".layers.2." in name]:
            del weights[name]

    edit_weights(source / "Vit-lora" / ADAPTER, drop_last_layer)
    with pytest.raises(ValueError, match=message):
        plan(source)


def test_missing_parts_are_asked_for_by_their_options(parts, tmp_path):
    source = LORA(tmp_path / "source", base="org/base", vision="org/tower")
    with pytest.raises(ValueError, match=r"needs the language model org/base, which is not on .* as --base"):
        plan(source)
    with pytest.raises(ValueError, match=r"needs the vision tower org/tower, which is not on .* as --vision"):
        plan(source, parts / "base")
    lone = PROJECTOR(tmp_path / "lone", config=False)
    with pytest.raises(ValueError, match=r"needs a language model that it does not name\. .* as --base"):
        plan(lone, vision=parts / "clip")


def test_vision_tower_of_variable_resolution_is_refused_before_any_weight_is_read(parts, tmp_path, monkeypatch):
    source = LORA(tmp_path / "source", base=parts / "base", vision=parts / "clip")
    Siglip2Config().save_pretrained(tmp_path / "siglip2-base-patch16-naflex")
    monkeypatch.setattr(convert, "read_sources", None)
    with pytest.raises(ValueError, match=r"\(SigLIP 2 NaFlex\).* Take a SigLIP 2 of fixed resolution"):
        plan(source, vision=tmp_path / "siglip2-base-patch16-naflex")


def test_parts_that_a_source_has_itself_are_refused(llava_hf, parts, tmp_path):
    with pytest.raises(ValueError, match=r"has its own vision tower\. Remove --vision"):
        plan(llava_hf, vision=parts / "clip")
    with pytest.raises(ValueError, match=r"has its own language model\. Remove --base"):
        plan(llava_hf, base=parts / "base")
    merged = MERGED(tmp_path / "merged", vision=parts / "clip")
    with pytest.raises(ValueError, match=r"has a trained prototype extractor\. Remove --prototypes"):
        plan(merged, prototypes="paper")


LLAVA_HF_TEMPLATE = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}{% for part in message['content'] | "
    "selectattr('type', 'equalto', 'text') %}{% generation %}{{ part['text'] }}{% endgeneration %}{% endfor %}"
    "{% endfor %}"
)
CHATML_TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>{% endfor %}"
VICUNA_TEMPLATE = "{% for m in messages %}{{ 'USER: ' + m['content'] }}{% endfor %}"


def write_template(file: Path, template: str) -> None:
    if file.suffix == ".jinja":
        file.write_text(template)
        return
    if not file.is_file():
        file.write_text("{}")
    is_named = file.name == "tokenizer_config.json"
    edit_json(file, chat_template=[{"name": "default", "template": template}] if is_named else template)


@pytest.mark.parametrize(
    "file", ["chat_template.jinja", "chat_template.json", "processor_config.json", "tokenizer_config.json"]
)
def test_source_with_other_prompts_than_vicuna_s_is_refused(llava_hf, file):
    write_template(llava_hf / file, CHATML_TEMPLATE)
    with pytest.raises(ValueError, match=rf"source/{file}: chat_template is .* have no USER:.* remove the template"):
        plan(llava_hf)
    for template in (LLAVA_HF_TEMPLATE, VICUNA_TEMPLATE):
        write_template(llava_hf / file, template)
        lines = list(convert.describe(plan(llava_hf)))
        assert f"Prompts are Vicuna's with its system message. They replace those of {llava_hf / file}." in lines


def test_own_checkpoint_and_filled_folder_are_refused(llava_hf):
    result = convert_source(llava_hf).out
    with pytest.raises(ValueError, match="a checkpoint of this library: there is nothing to convert"):
        plan(result, name="again")
    with pytest.raises(ValueError, match="result is not empty"):
        plan(llava_hf)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none", "--out", "new"], "none (the source): no such folder"),
        (["source", "--out", "new", "--dtype", "int8"], "--dtype is 'int8'"),
        (["source", "--out", "new", "--prototypes", "none"], "--prototypes is 'none': choose one of paper, released"),
        (["source", "--out", "new", "--max-shard-size", "5"], "Unit"),
        (["source", "--out", "source"], "source is not empty"),
    ],
)
def test_wrong_input_ends_with_one_line_and_writes_nothing(llava_hf, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    result = run_convert(*arguments)
    assert result.exit_code == 1
    assert message in result.stderr and "Traceback" not in result.output
    assert {file.name for file in tmp_path.iterdir()} == {"source"}
