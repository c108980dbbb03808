"""How the kind of a folder is recognised."""

import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from huggingface_hub.errors import HTTPError

from sq_llava.checkpoints.inspection import inspect
from sq_llava.checkpoints.layouts import recognise
from sq_llava.checkpoints.weight_files import find_weight_files, read_pickle
from sq_llava.training.adapter import LoraSize, add_adapter
from tests import released, tiny


def names(files: tuple[Path, ...]) -> list[str]:
    return [f"{file.parent.name}/{file.name}" if file.parent.name == "Vit-lora" else file.name for file in files]


def test_lora_is_recognised_with_everything_that_belongs_to_it(lora, parts):
    layout = recognise(lora)
    assert layout.kind == "sq_llava_lora"
    assert layout.evidence == 'adapter_config.json, and mm_projector_type "cluster" in config.json'
    assert (layout.base, layout.vision) == (parts / "base", parts / "clip")
    assert names(layout.weight_files) == ["adapter_model.bin", "non_lora_trainables.bin", "Vit-lora/adapter_model.bin"]
    assert names(layout.base_files) == [f"pytorch_model-0000{number}-of-00002.bin" for number in (1, 2)]
    assert (layout.adapter_config["r"], layout.vision_adapter_config["r"]) == (8, 4)


@pytest.mark.parametrize(
    ("write", "kind", "projector_type"),
    [
        (released.write_sq_llava_merged, "sq_llava", "cluster"),
        (released.write_llava, "llava", "mlp2x_gelu"),
        (released.write_llava_lora, "llava_lora", "mlp2x_gelu"),
        (released.write_projector, "projector", "cluster"),
        (released.write_llava_hf, "llava_hf", None),
    ],
)
def test_released_layout_is_recognised(tmp_path, write, kind, projector_type):
    layout = recognise(write(tmp_path / "source"))
    assert (layout.kind, layout.projector_type) == (kind, projector_type)
    assert all(file.is_file() for file in layout.weight_files) and layout.weight_files
    assert (layout.base, layout.vision) == (None, None)


def test_llava_before_1_5_is_recognised_by_its_fields(tmp_path):
    source = released.write_llava(tmp_path / "source", projector="linear")
    config = json.loads((source / "config.json").read_text())
    del config["mm_projector_type"]
    (source / "config.json").write_text(json.dumps(config))
    layout = recognise(source)
    assert (layout.kind, layout.projector_type) == ("llava", "linear")
    assert "before 1.5" in layout.evidence


@pytest.mark.parametrize("projector", ["cluster", "mlp2x_gelu", "linear"])
def test_file_of_a_projector_is_recognised_without_its_configuration(tmp_path, projector):
    source = released.write_projector(tmp_path / "source", projector, config=False)
    layout = recognise(source / "mm_projector.bin")
    assert (layout.kind, layout.projector_type, layout.config) == ("projector", projector, {})
    assert layout.path == source


def test_own_folders_are_recognised(tmp_path):
    model = tiny.tiny_model()
    model.save_pretrained(tmp_path / "model")
    adapted = add_adapter(model, LoraSize(2, 4, 0.0), LoraSize(0, 0, 0.0), train_vusr=False)
    adapted.save_pretrained(tmp_path / "run" / "checkpoint-3")
    layouts = [recognise(tmp_path / name) for name in ("model", "run", "run/checkpoint-3")]
    assert [layout.kind for layout in layouts] == ["checkpoint", "training", "adapter"]
    assert [names(layout.weight_files) for layout in layouts] == [
        ["model.safetensors"],
        [],
        ["adapter_model.safetensors"],
    ]


def test_hub_id_is_found_in_the_cache_alone(parts, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    source = released.write_sq_llava_lora(tmp_path / "source", base="org/base", vision="org/none")
    assert recognise(source).base is None
    revision = "0" * 40
    repository = tmp_path / "cache" / "models--org--base"
    shutil.copytree(parts / "base", repository / "snapshots" / revision)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(revision)
    layout = recognise(source)
    assert layout.base == repository / "snapshots" / revision
    assert (layout.base_name, layout.vision_name, layout.vision) == ("org/base", "org/none", None)
    with pytest.raises(ValueError, match=r"org/none \(--vision\): neither a folder nor in the local cache"):
        recognise(source, vision="org/none")


def test_given_id_is_downloaded_with_a_message_and_an_error_takes_one_line(tmp_path, capsys, monkeypatch):
    def fail(*arguments, **settings):
        raise HTTPError("connection reset")

    monkeypatch.setattr("sq_llava.checkpoints.layouts.HfApi.list_repo_files", fail)
    source = released.write_llava(tmp_path / "source")
    message = r"org/none \(--vision\) is not in the cache and could not be downloaded: connection reset"
    with pytest.raises(ValueError, match=message):
        recognise(source, vision="org/none", download=True)
    assert "Downloading org/none from the Hub" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("base", "its config.json has the model_type 'llama' and no fields mm_"),
        ("clip", "its config.json has the model_type 'clip'"),
        (".", "it holds neither config.json nor adapter_config.json nor mm_projector.bin"),
        ("none", r"none \(the source\): no such folder"),
        ("base/config.json", "give a folder, a Hub id, or the .bin file of a projector"),
        ("clip/pytorch_model.bin", "holds no projector"),
    ],
)
def test_other_models_and_folders_are_refused_with_the_reason(parts, source, message):
    with pytest.raises(ValueError, match=message):
        recognise(parts / source)


def test_adapter_of_another_model_is_refused(parts, tmp_path):
    source = released.write_sq_llava_lora(tmp_path / "source")
    with pytest.raises(ValueError, match=r"Vit-lora is not a known kind .* no config.json with fields mm_"):
        recognise(source / "Vit-lora")


def test_safetensors_are_preferred_to_pickles(tmp_path):
    (tmp_path / "pytorch_model.bin").touch()
    assert names(find_weight_files(tmp_path)) == ["pytorch_model.bin"]
    (tmp_path / "model.safetensors").touch()
    assert names(find_weight_files(tmp_path)) == ["model.safetensors"]


@pytest.mark.parametrize("name", ["../secret.safetensors", "/secret.safetensors", "..", "", 3])
def test_index_that_names_a_file_elsewhere_is_refused(tmp_path, name):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"model.norm.weight": name}}))
    with pytest.raises(ValueError, match=r"index.json: weight_map holds .* which is not a file in the same folder"):
        find_weight_files(tmp_path)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("config.json", '{"model_type": ', "config.json is not valid JSON"),
        ("config.json", "[]", r"config.json holds '\[\]', not a JSON object"),
        ("model.safetensors.index.json", "{}", "index.json: weight_map is None, but must map each tensor"),
    ],
)
def test_broken_json_is_named(tmp_path, name, text, message):
    shutil.copy(released.write_llava(tmp_path / "source") / "config.json", tmp_path)
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        recognise(tmp_path)


class _Bomb:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("form", ["zip", "legacy", "pickle"])
def test_pickle_that_would_run_code_is_refused_and_does_not_run(tmp_path, form):
    file, trace = tmp_path / "mm_projector.bin", tmp_path / "trace"
    state = {"model.mm_projector.weight": torch.ones(2, 2), "bomb": _Bomb(trace)}
    if form == "pickle":
        file.write_bytes(pickle.dumps(state))
    else:
        torch.save(state, file, _use_new_zipfile_serialization=form == "zip")
    with pytest.raises(ValueError, match=r"mm_projector.bin was not loaded: .* code that would be run"):
        recognise(tmp_path)
    assert any("mm_projector.bin was not loaded" in fault for fault in inspect(tmp_path).faults)
    assert not trace.exists()
    torch.load(file, weights_only=False) if form != "pickle" else pickle.loads(file.read_bytes())
    assert trace.exists()  # the bomb works


def test_pickles_of_old_torch_are_read(tmp_path):
    tensors = {"a": torch.arange(6.0).view(2, 3)}
    torch.save(tensors, tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    torch.testing.assert_close(read_pickle(tmp_path / "old.bin"), tensors)


def test_pickle_that_holds_no_named_tensors_is_refused(tmp_path):
    torch.save({"epoch": 3, "state": {}}, tmp_path / "state.bin")
    with pytest.raises(ValueError, match="does not hold named tensors"):
        read_pickle(tmp_path / "state.bin")
