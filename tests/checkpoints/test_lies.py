"""Checkpoints whose files lie are refused in one line, within a moment, and without the memory that they ask for."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from sq_llava.checkpoints.load import load_checkpoint, load_model, load_processor
from sq_llava.cli.main import app
from sq_llava.training.adapter import LoraSize, add_adapter
from tests import tiny
from tests.limits import limited
from tests.released import edit_json


# JSON that is nested too deeply for `json.loads`.
DEEP = "[" * 100_000
# A field of config.json (one or two names), a wrong value, and what the error says.
CONFIGS = [
    ("num_prototypes", 10**9, "num_prototypes is 1000000000: give an int of at most 65536"),
    ("num_prototypes", -5, "num_prototypes is -5: give an int of at least 1"),
    ("num_prototypes", "5", "num_prototypes is '5': give an int of at least 1"),
    ("num_prototypes", 6, r"prototypes has the shape \[5, 32\], but config.json requires \[6, 32\]"),
    ("num_prototype_iterations", 10**9, "num_prototype_iterations is 1000000000: give an int of at most 100"),
    ("image_seq_length", 10**9, "image_seq_length is 1000000000, but the vision tower gives 9 tokens"),
    ("vision_feature_layer", 10**9, "the vision tower has 3 layers"),
    ("text_config, vocab_size", 10**12, "text_config.vocab_size is 1000000000000: give an int of at most"),
    ("text_config, vocab_size", 2**26, r"embed_tokens.weight has the shape \[512, 64\], but config.json requires"),
    ("text_config, vocab_size", 511.5, "text_config.vocab_size is 511.5: give an int"),
    ("text_config, num_hidden_layers", 10**8, "text_config.num_hidden_layers is 100000000: give an int"),
    ("text_config, num_hidden_layers", 1000, "it describes a model of more than"),
    ("text_config, num_hidden_layers", "2", "text_config.num_hidden_layers is '2': give an int"),
    ("text_config, num_hidden_layers", 1, r"layers.1.* is in a file, but has no place in the model"),
    ("text_config, hidden_size", 2**20, "has the shape"),
    ("text_config, hidden_size", -64, "text_config.hidden_size is -64: give an int of at least 1"),
    ("text_config, intermediate_size", 2**24, "has the shape"),
    ("text_config, num_attention_heads", 10**9, "text_config.num_attention_heads is 1000000000"),
    ("text_config, num_attention_heads", 3, "text_config .llama. has a wrong value"),
    ("text_config, head_dim", 10**12, "text_config.head_dim is 1000000000000: give an int of at most"),
    ("text_config, head_dim", 10**5, "has the shape"),
    ("text_config, max_position_embeddings", 10**12, "text_config.max_position_embeddings is 1000000000000"),
    ("text_config, hidden_act", "no_such", "no model can be made from config.json"),
    ("text_config, rms_norm_eps", "small", "text_config .llama. has a wrong value.*rms_norm_eps"),
    ("text_config, rope_parameters", {"rope_type": "no_such", "rope_theta": 1.0}, "no_such"),
    ("text_config, model_type", ["llama"], "text_config.model_type is"),
    ("vision_config, image_size", 10**6, "vision_config.image_size is 1000000: give an int of at most 16384"),
    ("vision_config, image_size", 16_380, "image_seq_length"),
    ("vision_config, image_size", "42", "vision_config.image_size is '42'"),
    ("vision_config, patch_size", 0, "vision_config.patch_size is 0: give an int of at least 1"),
    ("vision_config, patch_size", 43, "vision_config.patch_size is 43: give an int of at most 42"),
    ("vision_config, num_hidden_layers", 10**8, "vision_config.num_hidden_layers is 100000000"),
    ("vision_config, num_hidden_layers", 500, "it describes a model of more than"),
    ("vision_config, num_channels", 1000, "has the shape"),
    ("attn_implementation", "no_such", "no_such"),
    ("_attn_implementation", "no_such", "no_such"),
    ("transformers_weights", "../other.safetensors", "transformers_weights names other files"),
    ("text_config", 7, "a JSON file holds a value of a wrong type"),
    ("dtype", "float99", "float99"),
]
# Other files: name, change of its fields or its whole text, and what the error says.
FILES = [
    ("config.json", DEEP, "config.json is not valid JSON"),
    ("config.json", "1" * 5_000, "config.json is not valid JSON"),
    ("tokenizer.json", DEEP, "tokenizer.json is not valid JSON"),
    ("tokenizer.json", {"added_tokens": "none"}, "a JSON file holds a value of a wrong type"),
    ("tokenizer.json", {"model": 7}, "copy cannot be read"),
    ("tokenizer_config.json", {"added_tokens_decoder": 7}, "copy cannot be read"),
    ("processor_config.json", {"image_seq_length": 10**9}, "image_seq_length is 1000000000, but the model has 9"),
    (
        "processor_config.json",
        {"image_processor": {"crop_size": {"height": 42, "width": 42}, "size": {"shortest_edge": 200_000}}},
        "image_processor, size, shortest_edge is 200000, but the vision tower takes 42 pixels",
    ),
    (
        "processor_config.json",
        {"image_processor": {"crop_size": {"height": 10**6, "width": 42}, "size": {"shortest_edge": 42}}},
        "image_processor, crop_size, height is 1000000, but the vision tower takes 42 pixels",
    ),
    ("processor_config.json", {"vusr_marker": 7}, "copy cannot be read"),
    ("generation_config.json", {"num_beams": 10**6}, "num_beams is 1000000, but must be an int from 1 to 100"),
    ("generation_config.json", {"num_return_sequences": "2"}, "num_return_sequences is '2'"),
    ("model.safetensors.index.json", json.dumps({"weight_map": {"a": "../a.safetensors"}}), "not a file in the same"),
    ("model.safetensors.index.json", json.dumps({"weight_map": {"a": "/a.safetensors"}}), "not a file in the same"),
    ("model.safetensors.index.json", json.dumps({"weight_map": 7}), "weight_map is 7"),
    ("chat_template.jinja", "{% for a in range(9**5) %}{% for b in range(9**5) %}{% endfor %}{% endfor %}", "program"),
    ("chat_template.jinja", "{{ 'x' * 10**10 }}", "has a chat template of its own"),
]


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """A plain checkpoint and an adapter on it."""
    root = tmp_path_factory.mktemp("models")
    tiny.save_model(root / "plain")
    adapted = add_adapter(load_model(root / "plain"), LoraSize(2, 4, 0.0), LoraSize(4, 8, 0.0), train_vusr=True)
    adapted.save_pretrained(root / "adapter")
    tiny.tiny_processor().save_pretrained(root / "adapter")
    return root


@pytest.fixture
def copy(models, tmp_path) -> Path:
    return Path(shutil.copytree(models / "plain", tmp_path / "copy"))


def refused(folder: Path, seconds: float = 5.0) -> str:
    """The error of loading a model, within a limited time and memory. It must be one line."""
    with limited(seconds), pytest.raises(ValueError) as raised:
        load_checkpoint(str(folder))
    assert "\n" not in str(raised.value)
    return str(raised.value)


def ids(case) -> str | None:
    return str(case)[:40] if isinstance(case, (str, int, float)) else None


@pytest.mark.parametrize(("field", "value", "error"), CONFIGS, ids=ids)
def test_configuration_that_lies_is_refused_before_a_model_is_made(copy, field, value, error):
    *outer, name = field.split(", ")
    config = json.loads((copy / "config.json").read_text())
    (config[outer[0]] if outer else config)[name] = value
    (copy / "config.json").write_text(json.dumps(config))
    assert re.search(error, refused(copy))


@pytest.mark.parametrize(("name", "content", "error"), FILES, ids=ids)
def test_other_file_that_lies_is_refused(copy, name, content, error):
    if isinstance(content, dict):
        edit_json(copy / name, **content)
    else:
        (copy / name).write_text(content)
    assert error in refused(copy)


def test_own_chat_template_is_used_only_on_request(copy):
    (copy / "chat_template.jinja").write_text("{% for message in messages %}{{ message['content'] }}{% endfor %}")
    assert "--trust-chat-template" in refused(copy)
    trusted = load_processor(copy, trust_chat_template=True)
    assert trusted.apply_chat_template([{"role": "user", "content": "Hi"}]) == "Hi"


@pytest.mark.parametrize(
    ("field", "value", "error"),
    [
        ("base_model_name_or_path", None, "base_model_name_or_path is None, but must be the folder or the Hub id"),
        ("base_model_name_or_path", ["a"], r"base_model_name_or_path is \['a'\], but must be"),
        ("base_model_name_or_path", "/none", "base_model_name_or_path is /none, which does not exist"),
        ("base_model_name_or_path", "../none", "no such folder"),
        ("base_model_name_or_path", "ADAPTER", "holds no config.json"),
        ("r", 10**9, "has the shape"),
        ("r", -1, "no adapter can be made from adapter_config.json"),
        ("r", "2", "no adapter can be made from adapter_config.json"),
        ("peft_type", "PROMPT_TUNING", "peft_type is 'PROMPT_TUNING', but this library has LORA only"),
        ("target_modules", 7, "no adapter can be made"),
        ("alpha_pattern", 7, "holds a value of a wrong type|no adapter can be made"),
    ],
    ids=ids,
)
def test_adapter_that_lies_is_refused(models, tmp_path, field, value, error):
    adapter = Path(shutil.copytree(models / "adapter", tmp_path / "adapter"))
    edit_json(adapter / "adapter_config.json", **{field: str(adapter) if value == "ADAPTER" else value})
    assert re.search(error, refused(adapter))


def test_adapter_of_a_base_that_lies_is_refused(models, copy, tmp_path):
    adapter = Path(shutil.copytree(models / "adapter", tmp_path / "adapter"))
    edit_json(adapter / "adapter_config.json", base_model_name_or_path=str(copy))
    config = json.loads((copy / "config.json").read_text())
    config["text_config"]["num_hidden_layers"] = 900
    (copy / "config.json").write_text(json.dumps(config))
    assert "it describes a model of more than" in refused(adapter)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_pipe_in_place_of_a_file_is_not_opened(copy, name):
    (copy / name).unlink()
    os.mkfifo(copy / name)
    refused(copy)


def test_large_file_of_settings_is_not_read(copy):
    with (copy / "generation_config.json").open("wb") as file:
        file.truncate(2**40)
    assert "generation_config.json has 1,099,511,627,776 bytes, which is too large" in refused(copy)


COMMANDS = {
    "answer": ["answer", "a.png", "What?", "--model", "copy"],
    "ask": ["ask", "a.png", "--model", "copy"],
    "serve": ["serve", "copy"],
    "inspect": ["inspect", "copy"],
    "push": ["push", "copy", "org/name", "--dry-run"],
    "merge": ["merge", "adapter", "--out", "merged"],
}


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_refuses_a_configuration_that_lies_in_one_line(models, copy, command, monkeypatch):
    monkeypatch.chdir(copy.parent)
    shutil.copytree(models / "adapter", "adapter")
    edit_json(Path("adapter/adapter_config.json"), base_model_name_or_path=str(copy))
    tiny.picture().save("a.png")
    config = json.loads((copy / "config.json").read_text())
    config["text_config"]["num_hidden_layers"] = 10**8
    (copy / "config.json").write_text(json.dumps(config))
    with limited(60):
        result = CliRunner().invoke(app, COMMANDS[command])
    said = result.stdout if command == "inspect" else result.stderr
    assert result.exit_code == 1 and not Path("merged").exists()
    assert "text_config.num_hidden_layers is 100000000: give an int of at most 1000" in said
    assert command == "inspect" or len(result.stderr.strip().splitlines()) == 1
