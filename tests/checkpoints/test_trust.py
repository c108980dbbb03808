"""Entries in a folder that name code of others: what is found, and that nothing of it is run or carried on."""

import builtins
import json
import shutil
from pathlib import Path

import pytest
from jinja2.exceptions import SecurityError
from peft import LoraConfig
from transformers import AutoConfig

from processing_sq_llava import SQLlavaProcessor
from sq_llava.checkpoints.compose import compose, compose_config
from sq_llava.checkpoints.inspection import inspect
from sq_llava.checkpoints.trust import CUSTOM_GENERATE, changed_code, foreign_code
from sq_llava.resources import CODE_FILES, code_file
from tests import released, runs, tiny
from tests.checkpoints.conversions import convert_source
from tests.released import edit_json


ELSEWHERE = "org/name--module.Class"
TOKENIZER = {"auto_map": {"AutoTokenizer": [None, ELSEWHERE]}}


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A checkpoint without weights."""
    folder = tmp_path_factory.mktemp("saved") / "model"
    processor = tiny.tiny_processor()
    tiny.tiny_model_for(processor).config.save_pretrained(folder)
    processor.save_pretrained(folder)
    for name in CODE_FILES:
        shutil.copy(code_file(name), folder)
    return folder


@pytest.fixture
def copy(saved, tmp_path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "copy"))


@pytest.mark.parametrize(
    ("file", "fields", "entry"),
    [
        ("tokenizer_config.json", TOKENIZER, f"auto_map, AutoTokenizer is '{ELSEWHERE}'"),
        ("tokenizer_config.json", {"auto_map": [ELSEWHERE, None]}, f"auto_map is '{ELSEWHERE}'"),
        ("config.json", {"auto_map": {"AutoConfig": "folder/module.Class"}}, "AutoConfig is 'folder/module.Class'"),
        ("config.json", {"auto_map": {"AutoConfig": "../module.Class"}}, "AutoConfig is '../module.Class'"),
        ("config.json", {"auto_map": {"AutoModel": "other.SQLlavaAutoModel"}}, "is 'other.SQLlavaAutoModel'"),
        ("config.json", {"auto_map": {"AutoModel": f"org/x--{CODE_FILES[2][:-3]}.SQLlavaAutoModel"}}, "'org/x--model"),
        ("config.json", {"vision_config": {"auto_map": {"AutoModel": "a.B"}}}, "vision_config, auto_map, AutoModel"),
        ("config.json", {"custom_pipelines": {"x": {"impl": "a.B"}}}, "custom_pipelines, x, impl is 'a.B'"),
        ("config.json", {"attn_implementation": "org/kernel@main:f"}, "is 'org/kernel@main:f'"),
        ("config.json", {"text_config": {"_attn_implementation": {"": "org/kernel"}}}, "is 'org/kernel'"),
        ("processor_config.json", {"image_processor": {"auto_map": {"AutoImageProcessor": "a.B"}}}, "is 'a.B'"),
        ("preprocessor_config.json", {"auto_map": {"AutoProcessor": "a.B"}}, "is 'a.B'"),
        ("audio_tokenizer_config.json", {"audio_tokenizer_name_or_path": "org/x"}, "is 'org/x'"),
        ("generation_config.json", {"custom_generate": "org/x"}, "custom_generate is 'org/x'"),
        ("adapter_config.json", {"auto_mapping": {"parent_library": "evil"}}, "parent_library is 'evil'"),
        ("config.4.0.0.json", {"auto_map": {"AutoConfig": "a.B"}}, "is 'a.B'"),  # for older transformers
    ],
)
def test_entry_that_names_other_code_is_found_in_any_json_file(file, fields, entry, copy):
    path = copy / file
    path.write_text(json.dumps((json.loads(path.read_text()) if path.is_file() else {}) | fields))
    (found,) = foreign_code(copy)
    assert found.startswith(f"{file}: ") and entry in found


def test_names_that_are_written_with_escapes_are_read(copy):
    (copy / "tokenizer_config.json").write_text('{"\\u0061uto_map": {"AutoTokenizer": ["a.B", null]}}')
    assert foreign_code(copy) == ["tokenizer_config.json: auto_map, AutoTokenizer is 'a.B'"]


def test_function_that_replaces_generate_is_found(copy):
    (copy / CUSTOM_GENERATE).parent.mkdir()
    (copy / CUSTOM_GENERATE).touch()
    assert foreign_code(copy) == ["custom_generate/generate.py replaces `generate`"]


def test_own_entries_are_accepted_and_changed_files_are_named(copy):
    own = {"base_model_class": "SQLlavaForConditionalGeneration", "parent_library": "modeling_sq_llava"}
    LoraConfig(auto_mapping=own).save_pretrained(copy)
    edit_json(copy / "config.json", attn_implementation="flash_attention_2")
    assert foreign_code(copy) == [] == changed_code(copy)
    with (copy / "modeling_sq_llava.py").open("a") as file:
        file.write("\n")
    assert changed_code(copy) == ["modeling_sq_llava.py"]


def test_inspection_lists_the_entries_and_the_folder_is_not_sound(copy):
    assert inspect(copy).foreign_code == []
    edit_json(copy / "tokenizer_config.json", **TOKENIZER)
    inspection = inspect(copy)
    assert inspection.foreign_code == [f"tokenizer_config.json: auto_map, AutoTokenizer is '{ELSEWHERE}'"]
    inspection.faults.clear()
    assert not inspection.sound


def test_library_never_asks_on_the_terminal_whether_to_run_code(copy, monkeypatch):
    monkeypatch.setattr(builtins, "input", lambda prompt: pytest.fail(prompt))
    (copy / "config.json").unlink()  # so that transformers has no class of its own for the tokenizer
    edit_json(copy / "tokenizer_config.json", tokenizer_class="Unknown", auto_map={"AutoTokenizer": ["a.B", "a.B"]})
    with pytest.raises(ValueError, match="trust_remote_code"):
        SQLlavaProcessor.from_pretrained(copy)


@pytest.mark.parametrize("template", ["{{ [].__class__.__mro__ }}", "{{ ''.__class__.__subclasses__() }}"])
def test_chat_template_cannot_reach_python(template):
    processor = tiny.tiny_processor(chat_template=template)
    with pytest.raises(SecurityError, match="unsafe"):
        processor.apply_chat_template([{"role": "user", "content": "x"}])


def test_part_that_needs_its_own_code_is_refused(tmp_path):
    config = {"model_type": "unknown", "auto_map": {"AutoConfig": "a.B"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="needs code from its own repository, which this library does not run"):
        compose_config(str(tmp_path), str(tmp_path))


def test_entries_of_the_parts_are_not_in_a_composed_model(tmp_path):
    parts = runs.make_parts(tmp_path / "parts")
    for part in ("clip", "llama"):
        edit_json(parts / part / "config.json", auto_map={"AutoConfig": ELSEWHERE, "AutoModel": ELSEWHERE})
    edit_json(parts / "llama" / "tokenizer_config.json", **TOKENIZER)
    edit_json(parts / "clip" / "preprocessor_config.json", auto_map={"AutoImageProcessor": ELSEWHERE})
    assert AutoConfig.from_pretrained(parts / "llama", trust_remote_code=False).auto_map
    model, processor = compose(str(parts / "clip"), str(parts / "llama"))
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    assert foreign_code(tmp_path / "model") == []


def test_entries_of_a_source_are_not_in_its_conversion_and_are_reported(tmp_path):
    source = released.write_llava_hf(tmp_path / "source")
    edit_json(source / "config.json", auto_map={"AutoConfig": ELSEWHERE})
    edit_json(source / "tokenizer_config.json", **TOKENIZER)
    edit_json(source / "preprocessor_config.json", auto_map={"AutoImageProcessor": ELSEWHERE, "AutoX": ELSEWHERE})
    conversion = convert_source(source)
    assert foreign_code(conversion.out) == []
    notes = [note for note in conversion.notes if note.startswith("Left out, and never run")]
    assert len(notes) == 4 and all(ELSEWHERE in note for note in notes)
