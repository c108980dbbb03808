"""`sq-llava inspect` on complete, released, trained and damaged folders."""

import json
import os
import shutil
from pathlib import Path

import pytest
from huggingface_hub import constants
from typer.testing import CliRunner

from sq_llava.checkpoints.inspection import inspect
from sq_llava.cli.main import app
from sq_llava.resources import CODE_FILES
from tests import released
from tests.released import edit_json, edit_weights
from tests.runs import make_parts, train
from tests.tiny import tiny_model_for, tiny_processor


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("plain") / "model"
    processor = tiny_processor()
    model = tiny_model_for(processor)
    model.save_pretrained(folder, max_shard_size="200KB")
    processor.save_pretrained(folder)
    return folder


@pytest.fixture
def copy(plain, tmp_path) -> Path:
    return Path(shutil.copytree(plain, tmp_path / "copy"))


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("run")
    train(make_parts(root / "parts"), root / "run", max_steps=2, save_steps=1)
    return root / "run"


@pytest.fixture
def shard(copy) -> Path:
    """The first weight file of a copy."""
    return min(copy.glob("model-*.safetensors"))


def test_plain_checkpoint_is_recognised_complete_and_counted(plain):
    inspection = inspect(plain)
    assert inspection.sound and inspection.missing == []
    model = tiny_model_for(tiny_processor())
    parts = {name: counts["parameters"] for name, counts in inspection.parts.items()}
    assert parts == {
        "vision": model.model.vision_tower.num_parameters(),
        "extractor": sum(weight.numel() for weight in model.model.prototype_extractor.parameters()),
        "projector": sum(weight.numel() for weight in model.model.multi_modal_projector.parameters()),
        "text": model.model.language_model.num_parameters() + model.lm_head.weight.numel(),
    }
    assert {counts["dtypes"][0] for counts in inspection.parts.values()} == {"F32"}
    assert inspection.prototypes["prototype_variant"] == "paper"
    assert inspection.prototypes["num_prototypes"] == 5
    assert inspection.markers["vusr_marker"] == "[vusr]"
    assert inspection.token_ids["vusr_token_id"] == inspection.token_ids["[vusr]"] == model.config.vusr_token_id
    assert inspection.code.keys() == set(CODE_FILES)
    assert all(code["as_in_this_library"] for code in inspection.code.values())
    assert len(list(plain.glob("model-*.safetensors"))) > 2


def test_changed_code_is_reported(copy):
    with (copy / "modeling_sq_llava.py").open("a") as file:
        file.write("# changed\n")
    code = inspect(copy).code
    assert not code["modeling_sq_llava.py"]["as_in_this_library"]
    assert code["processing_sq_llava.py"]["as_in_this_library"]


@pytest.mark.parametrize(
    ("name", "value", "fault"),
    [
        ("config.json", [], "config.json holds '[]', not a JSON object"),
        ("model.safetensors.index.json", {}, "index.json: weight_map is None"),
        ("model.safetensors.index.json", {"weight_map": {"a": "../a.safetensors"}}, "not a file in the same folder"),
    ],
)
def test_json_of_another_form_is_a_fault(copy, name, value, fault):
    (copy / name).write_text(json.dumps(value))
    assert [fault in line for line in inspect(copy).faults] == [True]


def test_missing_field_of_the_extractor_is_reported_and_is_no_fault(copy):
    config = json.loads((copy / "config.json").read_text())
    del config["num_prototypes"]
    (copy / "config.json").write_text(json.dumps(config))
    assert "num_prototypes in config.json: the default is used" in inspect(copy).missing


@pytest.mark.parametrize(
    "name", ["processor_config.json", "tokenizer.json", "generation_config.json", "modeling_sq_llava.py"]
)
def test_missing_file_is_reported_and_is_no_fault(copy, name):
    (copy / name).unlink()
    inspection = inspect(copy)
    assert inspection.sound
    assert any(name in line for line in inspection.missing)


def test_truncated_weights_are_a_fault(copy, shard):
    os.truncate(shard, shard.stat().st_size - 1)
    assert f"{shard.name} is damaged or cut off" in inspect(copy).faults[0]


def test_missing_file_of_an_index_is_a_fault(copy, shard):
    shard.unlink()
    faults = " ".join(inspect(copy).faults)
    assert f"model.safetensors.index.json lists 1 files that are missing: {shard.name}" in faults


def test_missing_weight_in_a_file_is_a_fault(copy, shard):
    edit_weights(shard, lambda weights: weights.pop(min(weights)))
    assert any("1 weights are not in the listed files" in fault for fault in inspect(copy).faults)


def test_weight_of_another_shape_than_in_the_configuration_is_a_fault(copy):
    edit_json(copy / "config.json", num_prototypes=6)
    assert inspect(copy).faults == [
        "model.prototype_extractor.prototypes has the shape [5, 32], but config.json requires [6, 32]"
    ]


def test_marker_with_another_id_than_in_the_tokenizer_is_a_fault(copy):
    edit_json(copy / "config.json", image_token_id=7)
    inspection = inspect(copy)
    own = inspection.token_ids["<image>"]
    assert inspection.faults == [f"<image> has the id {own} in tokenizer.json, but 7 in config.json"]


def test_configuration_that_is_cut_off_is_a_fault(copy):
    os.truncate(copy / "config.json", 100)
    assert inspect(copy).faults[0] == "config.json is not valid JSON: it is cut off or damaged"


def test_folder_without_weights_is_a_fault(copy):
    for file in copy.glob("model*"):
        if file.suffix != ".py":
            file.unlink()
    assert any("no readable weight file" in fault for fault in inspect(copy).faults)


def test_lora_release_has_its_ranks_and_alphas_by_tower(parts, tmp_path):
    inspection = inspect(released.write_sq_llava_lora(tmp_path / "lora", base=parts / "base"))
    assert inspection.sound
    assert {"tower": "text", "ranks": [8], "alphas": [16], "file": "adapter_model.bin"} in inspection.loras
    assert {"tower": "vision", "ranks": [4], "alphas": [12], "file": "Vit-lora/adapter_model.bin"} in inspection.loras
    assert inspection.prototypes == {"prototype_variant": "released", "num_prototypes": 5}
    assert inspection.bases["base"] == str(parts / "base")
    assert inspection.missing == [
        f"the vision tower: {released.RELEASED_TOWER} is neither a folder nor in the local cache of the Hub"
    ]


@pytest.mark.parametrize("kind", released.WRITERS)
def test_each_released_layout_is_recognised_and_each_weight_has_a_part(tmp_path, kind):
    inspection = inspect(released.WRITERS[kind](tmp_path / "folder"))
    assert inspection.sound
    assert inspection.kind == kind
    assert "other" not in inspection.parts


def test_folder_of_another_kind_is_unknown(parts):
    inspection = inspect(parts / "clip")
    assert inspection.kind is None
    assert "is not a known kind of checkpoint" in inspection.faults[0]


@pytest.mark.slow
def test_output_of_a_stage_shows_its_lora_its_base_and_its_checkpoints(run_folder):
    inspection = inspect(run_folder)
    assert inspection.sound
    assert {lora["tower"] for lora in inspection.loras} == {"vision", "text"}
    assert inspection.bases["base"] == str(run_folder / "base")
    assert {"<image>", "[vusr]", "<pad>"} <= inspection.token_ids.keys()
    assert set(inspection.checkpoints.values()) == {"complete"}


def test_incomplete_checkpoint_of_a_run_is_reported(run_folder, tmp_path):
    copy = Path(shutil.copytree(run_folder, tmp_path / "run"))
    (copy / "checkpoint-2" / "optimizer.pt").unlink()
    checkpoints = inspect(copy).checkpoints
    assert checkpoints == {"checkpoint-1": "complete", "checkpoint-2": "optimizer.pt is missing"}


def test_folder_of_the_cache_is_found_by_its_hub_id(plain, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    commit = tmp_path / "models--org--name" / "snapshots" / ("0" * 40)
    shutil.copytree(plain, commit)
    (tmp_path / "models--org--name" / "refs").mkdir()
    (tmp_path / "models--org--name" / "refs" / "main").write_text("0" * 40)
    assert inspect("org/name").sound
    with pytest.raises(ValueError, match="org/other is neither a folder nor an id in the local cache"):
        inspect("org/other")


def test_command_prints_json_and_its_exit_code_says_whether_the_folder_is_sound(plain, copy):
    result = CliRunner().invoke(app, ["inspect", str(plain), "--json"])
    assert result.exit_code == 0
    assert json.loads(result.stdout)["sound"]
    (copy / "config.json").unlink()
    result = CliRunner().invoke(app, ["inspect", str(copy)])
    assert result.exit_code == 1
    assert "broken" in result.stdout
