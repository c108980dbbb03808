"""Converted checkpoints are complete, and equal to sources that transformers and PEFT run."""

import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
import sentencepiece
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers.utils import logging

from benchmarks import convert as benchmark
from sq_llava.checkpoints import convert
from sq_llava.checkpoints.load import load_checkpoint
from sq_llava.checkpoints.verify import TOLERANCES, verify
from sq_llava.checkpoints.weights import weight_name
from sq_llava.resources import CODE_FILES
from tests import ROOT, released, tiny
from tests.checkpoints.conversions import (
    LORA,
    MERGED,
    PROJECTOR,
    SOURCES,
    convert_source,
    load_weights,
    plan,
    run_convert,
)
from tests.released import edit_json
from tests.warm_python import warm_python


EMBEDDINGS, HEAD = "model.language_model.embed_tokens.weight", "lm_head.weight"


@pytest.fixture(scope="module", autouse=True)
def quiet():
    logging.disable_progress_bar()
    yield
    logging.enable_progress_bar()


@pytest.mark.slow
@pytest.mark.parametrize("name", SOURCES)
def test_result_has_the_logits_of_the_source(parts, tmp_path, name):
    write, *needed = SOURCES[name]
    base, vision = (parts / part if part else None for part in needed)
    conversion = convert_source(write(tmp_path / "source"), base, vision)
    assert conversion.processor.image_token_id >= 450
    verification = verify(conversion.layout, conversion.out)
    assert verification.faults == [] and verification.tolerance == TOLERANCES[torch.float32]
    asks = [1] if conversion.processor.vusr_token_id is None else []
    assert [row.num_images for row in verification.comparisons] == [1, 2, 0, *asks]
    for row in verification.comparisons:
        assert row.relative_difference < 5e-5 and row.same_argmax == 1.0 and row.largest_logit > 1


@pytest.mark.slow
def test_auto_classes_load_the_result_in_a_fresh_process_elsewhere(lora, tmp_path):
    model, _ = load_checkpoint(str(convert_source(lora).out))
    prompt = tiny.tiny_inputs(model.config)
    torch.save(prompt, tmp_path / "prompt.pt")
    code = (
        "import torch, warnings\n"
        "from transformers import AutoModel, AutoProcessor\n"
        "model = AutoModel.from_pretrained('result', trust_remote_code=True)\n"
        "processor = AutoProcessor.from_pretrained('result', trust_remote_code=True)\n"
        "prompt = torch.load('prompt.pt')\n"
        "assert processor.image_token_id == 450\n"
        "with warnings.catch_warnings():\n"
        "    warnings.simplefilter('error')\n"
        "    new = model.generate(**prompt, max_new_tokens=2)\n"
        "assert new.shape[1] > prompt['input_ids'].shape[1]\n"
        "torch.save(model(**prompt).logits.detach(), 'logits.pt')\n"
    )
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "PYTHONPATH": ""}
    done = subprocess.run(
        [warm_python(), "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    # transformers logs this if settings of sampling remain with greedy decoding.
    assert "generation flags" not in done.stderr
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), model(**prompt).logits)


def test_result_is_a_complete_repository_of_the_hub(lora, parts, tmp_path):
    result = convert_source(lora).out
    assert {file.name for file in result.iterdir()} >= {
        *CODE_FILES, "README.md", "chat_template.jinja", "config.json", "generation_config.json", "model.safetensors",
        "processor_config.json", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    assert {file.name for file in tmp_path.iterdir()} == {"source", "result"}
    for file in result.glob("*.py"):
        assert file.read_bytes() == (ROOT / file.name).read_bytes()
    for file in result.glob("*.json"):
        assert str(tmp_path) not in file.read_text() and str(parts) not in file.read_text()
    with safe_open(result / "model.safetensors", "pt") as weights:
        assert weights.metadata() == {"format": "pt"}
    card = (result / "README.md").read_text()
    assert "converted from `source`" in card and "the LoRA of the authors' SQ-LLaVA" in " ".join(card.split())


def test_configuration_says_what_the_source_said(parts, tmp_path):
    changes = {"num_latents": 4, "mm_vision_select_layer": -3, "rope_theta": 5e5, "image_aspect_ratio": "square"}
    conversion = plan(MERGED(tmp_path / "source", vision=parts / "clip", **changes))
    config = conversion.model.config
    assert (config.prototype_variant, config.num_prototypes) == ("released", 4)
    assert config.projector_hidden_act == "quick_gelu"
    assert (config.vision_feature_layer, config.vision_feature_select_strategy) == (-3, "default")
    assert config.text_config.rope_parameters["rope_theta"] == 5e5
    assert config.text_config.to_dict().keys() <= {*tiny.tiny_config().text_config.to_dict(), "_name_or_path"}
    assert conversion.processor.image_aspect_ratio == "crop"


@pytest.mark.parametrize("tokenizer", ["slow", "fast", "fast_only"])
def test_ids_are_those_of_sentencepiece_and_text_after_an_image_is_tokenized_separately(parts, tmp_path, tokenizer):
    base = released.write_language_model(tmp_path / "base", tokenizer=tokenizer)
    processor = plan(PROJECTOR(tmp_path / "source", base=base, vision=parts / "clip")).processor
    encode = sentencepiece.SentencePieceProcessor(str(parts / "base" / "tokenizer.model")).encode

    def ids_of(text: str) -> list[int]:
        return processor.tokenizer(text, add_special_tokens=False).input_ids

    # SentencePiece adds a space before a leading space, but prompts do not begin with one.
    for text in ("What animal is this?\nA dog, 12 cats.", "Ähnliches 猫 🐈\t  two  spaces", "USER: Hi ASSISTANT:"):
        assert ids_of(text) == encode(text)
    content = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "What animal is this?"}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    before, *after_images = [f"{processor.system_message} USER: ", "\n", "\nWhat animal is this? ASSISTANT:"]
    expected = [processor.tokenizer.bos_token_id, *encode(before)]
    for text in after_images:
        expected += [processor.image_token_id, *encode(text)]
    assert ids_of(prompt) == expected


def test_new_rows_are_the_mean_of_the_others(parts, tmp_path):
    conversion = convert_source(PROJECTOR(tmp_path / "source", base=parts / "base", vision=parts / "clip"))
    weights, base = load_weights(conversion.out), released.text_weights()
    for name, old in ((EMBEDDINGS, base["model.embed_tokens.weight"]), (HEAD, base["lm_head.weight"])):
        assert weights[name].shape == (512, 64)
        torch.testing.assert_close(weights[name][:450], old, atol=0, rtol=0)
        torch.testing.assert_close(weights[name][450:], old.mean(0).expand(62, -1))
    assert (conversion.processor.image_token_id, conversion.processor.vusr_token_id) == (450, 451)
    assert "from 450 to 512 rows for <image>, [vusr] and padding" in " ".join(convert.describe(conversion))


def test_tied_embeddings_stay_tied(parts, tmp_path):
    source = released.write_llava_lora(tmp_path / "source", base=parts / "tied", vision=parts / "clip")
    result = convert_source(source).out
    assert HEAD not in load_weights(result)
    model, _ = load_checkpoint(str(result))
    assert model.lm_head.weight is model.model.language_model.embed_tokens.weight


def test_llava_of_transformers_keeps_its_ids_and_weights(llava_hf):
    conversion = convert_source(llava_hf)
    tokenizer = conversion.processor.tokenizer
    config = json.loads((llava_hf / "config.json").read_text())
    assert (conversion.processor.image_token_id, tokenizer.pad_token_id, len(tokenizer)) == (
        config["image_token_index"], config["pad_token_id"], 452,
    )  # fmt: skip
    old, new = load_weights(llava_hf), load_weights(conversion.out)
    assert new.keys() == {weight_name(name) for name in old}
    assert all(torch.equal(new[weight_name(name)], tensor) for name, tensor in old.items())


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["paper", "released"])
def test_start_of_training_has_a_new_extractor_and_everything_else_of_llava(llava_hf, variant):
    conversion = convert_source(llava_hf, prototypes=variant)
    new = load_weights(conversion.out)
    old = {weight_name(name): tensor for name, tensor in load_weights(llava_hf).items()}
    assert all(torch.equal(new[name], tensor) for name, tensor in old.items())
    added = new.keys() - old.keys()
    assert added and all(name.startswith("model.prototype_extractor.") for name in added)
    assert f"The prototype extractor ({variant}) is new and untrained" in " ".join(convert.describe(conversion))
    assert "extractor is new" in (conversion.out / "README.md").read_text()
    model, processor = load_checkpoint(str(conversion.out))
    assert model.config.projector_hidden_act == "gelu"
    assert processor.vusr_token_id == model.config.vusr_token_id == 452
    assert processor.system_message == convert.VICUNA_SYSTEM_MESSAGE
    assert model(**tiny.tiny_inputs(model.config)).logits.isfinite().all()


def test_prompt_of_a_release_is_that_of_the_authors(lora):
    processor = plan(lora).processor
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What animal is this?"}]},
        {"role": "assistant", "content": "A dog."},
        {"role": "vusr", "content": "What is it doing?"},
    ]
    assert processor.apply_chat_template(messages) == (
        "<s> A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
        "detailed, and polite answers to the user's questions.Also, the artificial intelligence assistant is a "
        "curious virtual user. The virtual user asks complex questions that are relevant to the content in the "
        "image, for example, asking about background knowledge of the objects in the image, asking to discuss about "
        "events happening in the image, etc. Again, do not ask about uncertain details. USER: <image> \nWhat animal "
        "is this? ASSISTANT: A dog.</s>VUSER: What is it doing?</s>"
    )
    assert processor.vusr_token_id is None and "[vusr]" not in processor.tokenizer.get_vocab()


def test_prompt_of_llava_is_that_of_vicuna(llava):
    processor = plan(llava).processor
    assert processor.apply_chat_template([{"role": "user", "content": "Hi"}], add_generation_prompt=True) == (
        "<s> A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
        "detailed, and polite answers to the user's questions. USER: Hi ASSISTANT:"
    )
    assert processor.image_aspect_ratio == "pad"


def test_generation_is_greedy_and_stops_at_the_source_s_tokens_and_the_delimiter(llava):
    edit_json(llava / "generation_config.json", eos_token_id=7)
    settings = json.loads((convert_source(llava).out / "generation_config.json").read_text())
    assert settings["do_sample"] is False and settings["eos_token_id"] == [2, 7]
    assert (settings["bos_token_id"], settings["pad_token_id"]) == (1, 0)
    assert not {"temperature", "top_p", "max_length"} & settings.keys()


def test_lora_is_added_in_float32_and_rounded_once(parts, tmp_path):
    base = released.write_language_model(tmp_path / "base", dtype=torch.float16)
    conversion = convert_source(released.write_llava_lora(tmp_path / "source", base=base, vision=parts / "clip"))
    assert conversion.model.dtype == torch.float16
    lora = torch.load(tmp_path / "source" / "adapter_model.bin")
    name = "model.layers.0.mlp.up_proj"
    down, up = (lora[f"base_model.model.{name}.lora_{letter}.weight"] for letter in "AB")
    weight = released.text_weights()[f"{name}.weight"].half()
    expected = (weight.double() + 2.0 * up.double() @ down.double()).half()
    result = load_weights(conversion.out)[weight_name(f"{name}.weight")]
    # In float32, values in the middle between two float16 can be rounded to either side.
    assert (result != expected).float().mean() < 0.001
    rounded_first = weight + (2.0 * up @ down).half()
    assert (rounded_first != expected).float().mean() > 0.05


def test_patterns_of_a_module_replace_the_general_rank_and_alpha(parts, tmp_path):
    source = released.write_llava_lora(tmp_path / "source", base=parts / "base", vision=parts / "clip")
    module = "model.layers.1.self_attn.q_proj"
    weights = torch.load(source / "adapter_model.bin")
    for letter in "AB":
        name = f"base_model.model.{module}.lora_{letter}.weight"
        weights[name] = weights[name][:4] if letter == "A" else weights[name][:, :4].contiguous()
    torch.save(weights, source / "adapter_model.bin")
    patterns = {"rank_pattern": {r"layers\.1\..*q_proj": 4}, "alpha_pattern": {module: 20, "up_proj": 8}}
    edit_json(source / "adapter_config.json", **patterns)
    result = load_weights(convert_source(source).out)
    for name, scale in ((module, 5.0), ("model.layers.0.mlp.up_proj", 1.0), ("model.layers.0.mlp.down_proj", 2.0)):
        down, up = (weights[f"base_model.model.{name}.lora_{letter}.weight"] for letter in "AB")
        expected = released.text_weights()[f"{name}.weight"] + scale * up @ down
        torch.testing.assert_close(result[weight_name(f"{name}.weight")], expected)


def test_untrained_vision_lora_is_reported(parts, tmp_path):
    source = LORA(tmp_path / "source", base=parts / "base", vision=parts / "clip", zero_vision_b=True)
    lines = list(convert.describe(plan(source)))
    assert "ViT-LoRA: merged into 18 matrices, rank 4, scaled by 3." in lines
    assert any("All B matrices of the ViT-LoRA are zero" in line for line in lines)


def test_vision_lora_of_stage_1_is_merged_too(parts, tmp_path):
    projector = PROJECTOR(tmp_path / "projector")
    release = LORA(tmp_path / "release", vision_lora="folder")
    shutil.copytree(release / "Vit-lora", projector / "Vit-lora")
    stage1, stage2 = (
        load_weights(convert_source(source, parts / "base", parts / "clip", name).out)
        for source, name in ((projector / "mm_projector.bin", "stage1"), (release, "stage2"))
    )
    tower = [name for name in stage1 if name.startswith("model.vision_tower.")]
    assert all(torch.equal(stage1[name], stage2[name]) for name in tower)
    name = "encoder.layers.0.mlp.fc1.weight"
    assert not torch.equal(stage1[f"model.vision_tower.{name}"], released.vision_weights()[name])


def test_unused_weights_are_counted(parts, tmp_path):
    source = LORA(tmp_path / "source", base=parts / "llava-base", vision=parts / "clip")
    lines = [line.split() for line in convert.describe(plan(source))]
    lines = [line for line in lines if line[:2] == ["Not", "used"]]
    counts = {" ".join(line[3:]).partition(":")[0]: int(line[2].strip("():")) for line in lines}
    assert counts == {
        f"connector of {parts / 'llava-base'}; the source has its own.": 4,
        "ln_1": 2, "inv_freq": 2, "position_ids": 2, "text_model": 20, "projection": 2, "logit_scale": 1,
    }  # fmt: skip


@pytest.mark.slow
def test_small_files_hold_the_same_weights_as_a_large_one(lora):
    convert_source(lora, name="one")
    result = convert_source(lora, name="many", max_shard_size="100KB").out
    index = json.loads((result / "model.safetensors.index.json").read_text())
    files = sorted(result.glob("*.safetensors"))
    assert len(files) > 5 and {file.name for file in files} == set(index["weight_map"].values())
    one, many = load_weights(result.parent / "one"), load_weights(result)
    assert one.keys() == many.keys() == index["weight_map"].keys()
    assert all(torch.equal(many[name], tensor) for name, tensor in one.items())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in many.values())
    assert all(file.stat().st_size < 150_000 or len(load_file(file)) == 1 for file in files)
    loaded, _ = load_checkpoint(str(result))
    assert all(torch.equal(tensor, one[name]) for name, tensor in loaded.state_dict().items())


def test_empty_folder_is_filled(llava_hf, tmp_path):
    (tmp_path / "result").mkdir()
    assert load_weights(convert_source(llava_hf).out)


def test_padding_in_place_of_the_source_s_crop_is_reported(llava_hf):
    line = "Images are padded to a square, as in LLaVA-1.5's training. The source's processor crops them."
    assert line in list(convert.describe(plan(llava_hf)))
    edit_json(llava_hf / "preprocessor_config.json", do_pad=True)
    assert line not in list(convert.describe(plan(llava_hf)))


def test_projector_without_configuration_gets_the_released_settings_and_this_is_reported(parts, tmp_path):
    source = PROJECTOR(tmp_path / "source", config=False)
    conversion = convert_source(source, parts / "base", parts / "clip")
    config = conversion.model.config
    assert (config.num_prototypes, config.vision_feature_layer) == (256, -2)
    text = " ".join(convert.describe(conversion))
    assert "no config.json next to the projector" in text and "256 is used" in text
    assert verify(conversion.layout, conversion.out).faults == []


def test_all_files_are_on_the_disk_before_the_folder_has_its_name(llava, tmp_path, monkeypatch):
    synced, fsync = set(), os.fsync

    def record(descriptor: int) -> None:
        is_parent = os.path.samestat(os.fstat(descriptor), os.stat(tmp_path))  # flushed when the name is given
        assert is_parent or not (tmp_path / "result").exists()
        synced.add(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    monkeypatch.setattr("os.fsync", record)
    result = convert_source(llava, max_shard_size="100KB").out
    assert {path.stat().st_ino for path in result.iterdir()} <= synced


@pytest.mark.parametrize("step", ["write_file", "custom_object_save", "write_card"])
def test_interrupted_conversion_leaves_no_folder_and_can_be_repeated(llava, tmp_path, monkeypatch, step):
    def end(*arguments, **settings):
        raise KeyboardInterrupt

    with monkeypatch.context() as context:
        context.setattr(convert, step, end)
        with pytest.raises(KeyboardInterrupt):
            convert_source(llava)
    assert not (tmp_path / "result").exists()
    convert_source(llava)
    assert {file.name for file in tmp_path.iterdir()} == {"source", "result"}


@pytest.mark.long
@pytest.mark.slow
def test_killed_conversion_leaves_no_folder_and_can_be_repeated(llava, tmp_path):
    code = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from sq_llava.checkpoints import convert\n"
        "from tests.checkpoints.conversions import convert_source\n"
        "write_file, done = convert.write_file, []\n"
        "def kill_at_the_third(*arguments):\n"
        "    write_file(*arguments)\n"
        "    done.append(arguments)\n"
        "    len(done) < 3 or os.kill(os.getpid(), signal.SIGKILL)\n"
        "convert.write_file = kill_at_the_third\n"
        "convert_source(Path(sys.argv[1]), max_shard_size='100KB')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(llava)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not (tmp_path / "result").exists()
    assert len(list((tmp_path / "half-written-result" / "result").glob("*.safetensors"))) == 3
    convert_source(llava)
    assert {file.name for file in tmp_path.iterdir()} == {"source", "result"}


@pytest.mark.long
@pytest.mark.slow
def test_memory_is_that_of_the_largest_files_not_of_the_checkpoint():
    report = benchmark.run(benchmark.SMALL, num_shards=4, with_peer=False)
    assert report["convert"]["peak_bytes"] <= report["bound_bytes"] < report["base_bytes"]


def test_command_reports_what_it_found_and_did(parts, tmp_path):
    source, out = LORA(tmp_path / "source"), tmp_path / "result"
    result = run_convert(
        source, "--base", parts / "base", "--vision", parts / "clip", "--out", out, "--dtype", "bfloat16"
    )
    assert result.exit_code == 0, result.output
    assert "is the LoRA of the authors' SQ-LLaVA: adapter_config.json, and" in result.stderr
    assert "LLM-LoRA: merged into 14 matrices, rank 8, scaled by 2." in result.stderr
    assert "of bfloat16; prototypes: released; question marker: VUSER:" in result.stderr
    assert all(tensor.dtype == torch.bfloat16 for tensor in load_weights(out).values())


def test_help_has_an_example_for_each_layout():
    examples = run_convert("--help").stdout.partition("Examples:")[2]
    for example in ("sqllava-lora-7b", "llava-v1.5-7b", "llava-v1.5-7b-lora", "stage1/mm_projector.bin"):
        assert f"sq-llava convert {example} --" in examples
    assert examples.count("sq-llava convert llava-hf/llava-1.5-7b-hf") == 2
