"""The table of settings is complete, errors come from it, and docs/settings.md is generated from it."""

import copy
from dataclasses import fields
from pathlib import Path

import pytest
from trl import ModelConfig, SFTConfig

import train_sft
from sq_llava.training import setting_table
from sq_llava.training.setting_table import NOT_IN_ALL_VERSIONS, SETTINGS, TABLE, refuse_settings
from sq_llava.training.settings import SQLlavaArguments
from tests.runs import command_line


ROOT = Path(train_sft.__file__).parent
CLASSES = {"SQ-LLaVA": (SQLlavaArguments,), "TRL's ModelConfig": (ModelConfig,)}
REFUSED = [name for name, setting in SETTINGS.items() if setting.verdict == "refused"]


@pytest.fixture(scope="module")
def configs(tmp_path_factory) -> list:
    return [SFTConfig(str(tmp_path_factory.mktemp("run")), use_cpu=True, bf16=False), ModelConfig()]


def with_value(configs: list, name: str, value) -> list:
    changed = [copy.copy(config) for config in configs]
    (holder,) = (config for config in changed if name in {field.name for field in fields(config)})
    setattr(holder, name, value)
    return changed


@pytest.mark.parametrize("config", [SQLlavaArguments, ModelConfig, SFTConfig], ids=lambda config: config.__name__)
def test_every_field_of_the_installed_versions_is_in_the_table(config):
    titles = [title for title in TABLE if CLASSES.get(title, (SFTConfig,)) == (config,)]
    named = {name for title in titles for name in TABLE[title]}
    there = {field.name for field in fields(config) if field.init}
    assert there - named == set(), "add these to sq_llava/training/setting_table.py"
    assert named - there <= NOT_IN_ALL_VERSIONS, "these do not exist in any version"


def test_no_setting_is_in_the_table_twice():
    assert len(SETTINGS) == sum(map(len, TABLE.values()))


def test_tests_that_the_table_names_exist():
    for name, setting in SETTINGS.items():
        if setting.verdict == "supported" and setting.note:
            file, _, test = setting.note.partition("::")
            assert f"def {test}(" in (ROOT / "tests" / file).read_text(), f"{name}: {setting.note}"
        elif setting.verdict != "supported":
            assert setting.note, name


@pytest.mark.parametrize("name", REFUSED)
def test_refused_setting_is_named_with_its_value_and_what_to_do(configs, name):
    with pytest.raises(ValueError, match=rf"^{name} is .*, which is not supported\. [A-Z].+\.$") as error:
        refuse_settings(*with_value(configs, name, "something else"))
    assert "\n" not in str(error.value)
    assert ("something else" in str(error.value)) == (name != "hub_token")  # a token is a secret


def test_defaults_and_accepted_values_are_not_refused(configs):
    refuse_settings(*configs)
    values = [(name, value) for name in REFUSED for value in SETTINGS[name].values]
    assert ("completion_only_loss", True) in values
    for name, value in values:
        refuse_settings(*with_value(configs, name, value))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor is 0.1, which is not supported. It needs all"),
        ({"completion_only_loss": False}, "completion_only_loss is False"),
        ({"hub_strategy": "checkpoint"}, "hub_strategy is 'checkpoint'.*sq-llava push"),
        ({"push_to_hub": True}, "push_to_hub is True.*sq-llava push OUTPUT_DIR ORG/NAME"),
        ({"lora_modules_to_save": "lm_head"}, "lora_modules_to_save is .'lm_head'.*full_finetuning"),
    ],
)
def test_run_with_a_refused_setting_ends_before_any_model_is_loaded(given, message):
    settings = {"stage": "align", "dataset_path": "none.json", "model_name_or_path": "none", "use_cpu": True}
    settings |= {"output_dir": "none", "bf16": False, **given}
    with pytest.raises(ValueError, match=message):
        train_sft.main(command_line(settings))
    assert not Path("none").exists()


def test_document_is_what_the_table_says():
    written = (ROOT / "docs" / "settings.md").read_text()
    assert written == setting_table.render(), "run python -m sq_llava.training.setting_table > docs/settings.md"
