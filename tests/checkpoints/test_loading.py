"""Models of a wrong kind and incomplete models are refused before they are loaded: folders, Hub ids and adapters."""

import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from transformers import BertConfig
from typer.testing import CliRunner

import train_sft
from sq_llava.checkpoints.load import load_checkpoint, load_model, merge_adapter, require_model
from sq_llava.cli.main import app
from sq_llava.evaluation.other_models import load_any
from sq_llava.evaluation.results import hash_of_model
from sq_llava.inference.assistant import Assistant
from sq_llava.training.adapter import LoraSize, add_adapter
from tests import released, runs, tiny
from tests.local_hub import LocalHub
from tests.released import edit_json, edit_weights


LOST = "model.multi_modal_projector.linear_1.weight"


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """A plain checkpoint and an adapter on it; both with a weight removed; models of other kinds; a picture."""
    root = tmp_path_factory.mktemp("models")
    tiny.save_model(root / "plain")
    adapted = add_adapter(load_model(root / "plain"), LoraSize(2, 4, 0.0), LoraSize(4, 8, 0.0), train_vusr=True)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.constant_(parameter, 0.1)
    adapted.save_pretrained(root / "adapter")
    tiny.tiny_processor().save_pretrained(root / "adapter")

    shutil.copytree(root / "plain", root / "broken")
    edit_weights(root / "broken" / "model.safetensors", lambda weights: weights.pop(LOST))
    shutil.copytree(root / "adapter", root / "broken-adapter")
    edit_weights(root / "broken-adapter" / "adapter_model.safetensors", lambda weights: weights.pop(min(weights)))
    shutil.copytree(root / "plain", root / "foreign")
    (root / "foreign" / "folder").mkdir()
    (root / "foreign" / "folder" / "module.py").write_text(f"open({str(root / 'code_ran')!r}, 'w').close()\n")
    edit_json(root / "foreign" / "tokenizer_config.json", auto_map={"AutoTokenizer": ["folder/module.Class", None]})
    shutil.copytree(root / "adapter", root / "adapter-on-foreign")
    edit_json(root / "adapter-on-foreign" / "adapter_config.json", base_model_name_or_path=str(root / "foreign"))
    released.write_llava_hf(root / "llava-hf")
    BertConfig(hidden_size=8, num_attention_heads=2).save_pretrained(root / "bert")
    (root / "pictures").mkdir()
    tiny.picture().save(root / "pictures" / "a.png")
    return root


COMMANDS = {
    "ask": ["ask", "pictures", "--model", "MODEL"],
    "answer": ["answer", "pictures", "What?", "--model", "MODEL"],
    "chat": ["chat", "pictures/a.png", "--model", "MODEL"],
    "serve": ["serve", "MODEL"],
    "demo": ["demo", "MODEL"],
    "prototypes": ["prototypes", "pictures/a.png", "--model", "MODEL", "--out", "seen.png"],
    "push": ["push", "MODEL", "org/name", "--dry-run"],
    "generate-data self": ["generate-data", "self", "pictures", "--model", "MODEL", "--out", "OUT", "--device", "cpu"],
    "evaluate-questions": ["evaluate-questions", "--model", "MODEL", "--images", "pictures", "--out", "OUT"],
}


def run(models: Path, command: list[str], model: str, out: Path):
    return CliRunner().invoke(app, [{"MODEL": model, "OUT": str(out)}.get(word, word) for word in command])


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_checkpoint_without_a_weight_is_refused_by_each_command_with_its_name(models, command, tmp_path, monkeypatch):
    monkeypatch.chdir(models)
    result = run(models, COMMANDS[command], "broken", tmp_path)
    assert result.exit_code == 1
    assert f"broken cannot be loaded: {LOST} is missing: config.json requires it" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1 and result.stdout == ""


@pytest.mark.parametrize("command", [name for name in COMMANDS if name != "evaluate-questions"])
@pytest.mark.parametrize(
    ("model", "what"), [("llava-hf", "is a LLaVA in the format of transformers"), ("bert", "model_type 'bert'")]
)
def test_model_of_another_kind_is_refused_by_each_command(models, command, model, what, tmp_path, monkeypatch):
    monkeypatch.chdir(models)
    result = run(models, COMMANDS[command], model, tmp_path)
    assert result.exit_code == 1
    assert what in result.stderr and len(result.stderr.strip().splitlines()) == 1 and result.stdout == ""


@pytest.mark.slow
@pytest.mark.parametrize("model", ["foreign", "adapter-on-foreign"])
@pytest.mark.parametrize("command", COMMANDS)
def test_model_that_names_other_code_is_refused_by_each_command_and_runs_nothing(
    models, command, model, tmp_path, monkeypatch
):
    monkeypatch.chdir(models)
    result = run(models, COMMANDS[command], model, tmp_path)
    assert result.exit_code == 1
    assert "tokenizer_config.json: auto_map, AutoTokenizer is 'folder/module.Class'" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1 and result.stdout == ""
    assert not (models / "code_ran").exists()


@pytest.mark.parametrize("model", ["foreign", "adapter-on-foreign"])
def test_model_that_names_other_code_is_neither_evaluated_nor_merged(models, model, tmp_path):
    with pytest.raises(ValueError, match=r"foreign names code that is not this library's"):
        load_any(str(models / model), trust_remote_code=True)
    if model == "adapter-on-foreign":
        with pytest.raises(ValueError, match=r"foreign names code that is not this library's"):
            merge_adapter(str(models / model), str(tmp_path / "merged"))
    assert not (models / "code_ran").exists() and not (tmp_path / "merged").exists()


@pytest.mark.parametrize("model", ["broken", "llava-hf", "bert", "broken-adapter", "foreign", "adapter-on-foreign"])
def test_training_refuses_a_start_that_cannot_be_loaded(models, model, tmp_path):
    parts = runs.make_parts(tmp_path)
    settings = runs.SETTINGS | {"dataset_path": parts / "train.json", "output_dir": tmp_path / "run"}
    settings["model_name_or_path"] = models / model
    arguments = [text for name, value in settings.items() for text in (f"--{name}", str(value))]
    with pytest.raises(ValueError, match=rf"{model.split('-')[-1]}( cannot be loaded| is| names code)"):
        train_sft.main(arguments)


def test_base_in_a_folder_has_an_absolute_name_that_an_adapter_finds_from_anywhere(models, monkeypatch):
    monkeypatch.chdir(models)
    assert load_model("plain").name_or_path == str(models / "plain")


def test_adapter_without_a_weight_cannot_be_merged(models, tmp_path):
    with pytest.raises(ValueError, match=r"broken-adapter cannot be loaded: .*missing: adapter_config\.json requires"):
        merge_adapter(str(models / "broken-adapter"), str(tmp_path / "merged"))
    assert not (tmp_path / "merged").exists()


def test_weights_of_another_shape_or_without_a_place_are_named(models, tmp_path):
    copy = Path(shutil.copytree(models / "plain", tmp_path / "copy"))
    edit_weights(
        copy / "model.safetensors", lambda weights: weights.update({"more": torch.ones(1), LOST: torch.ones(2, 3)})
    )
    with pytest.raises(ValueError, match=rf"{LOST} has the shape \[2, 3\].*more is in a file, but has no place"):
        require_model(copy)
    (copy / "processor_config.json").unlink()
    with pytest.raises(ValueError, match=r"processor_config\.json is missing"):
        require_model(copy)


def test_adapter_on_a_base_of_another_kind_is_refused(models, tmp_path):
    copy = Path(shutil.copytree(models / "adapter", tmp_path / "adapter"))
    edit_json(copy / "adapter_config.json", base_model_name_or_path=str(models / "llava-hf"))
    with pytest.raises(ValueError, match=r"its base .*llava-hf has the model_type 'llava', not 'sq_llava'"):
        load_checkpoint(str(copy))


@pytest.fixture
def hub(models, tmp_path, monkeypatch):
    """org/adapter on an older commit of org/plain; org/bert; and an empty cache."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    adapter = Path(shutil.copytree(models / "adapter", tmp_path / "adapter"))
    with LocalHub() as hub:
        edit_json(
            adapter / "adapter_config.json",
            base_model_name_or_path="org/plain",
            revision=hub.add("org/plain", models / "plain"),
            auto_mapping={"base_model_class": "AutoModel", "parent_library": "transformers"},  # as published
        )
        hub.repositories["org/plain"].commit("main", {}, "emptied")
        hub.add("org/adapter", adapter)
        hub.add("org/bert", models / "bert")
        yield hub


@pytest.mark.slow
def test_adapter_loads_by_its_hub_id_on_the_commit_of_its_base_and_then_offline(models, hub):
    expected = answer_of(*load_checkpoint(str(models / "adapter")))
    commits = {name: list(repository.commits) for name, repository in hub.repositories.items()}
    revision, base = commits["org/adapter"][-1], commits["org/plain"][1]
    with hub.online():
        model, processor = load_checkpoint("org/adapter")
        assert answer_of(model, processor) == expected
        assert model.get_base_model().name_or_path == "org/plain"
    answered = len(hub.log)
    assert answer_of(*load_checkpoint("org/adapter", revision=revision)) == expected
    assert hash_of_model("org/adapter") == f"{revision} on {base}"
    assert len(hub.log) == answered


def test_hub_id_of_another_model_is_refused_before_its_weights_are_fetched(hub):
    with hub.online():
        with pytest.raises(ValueError, match=r"org/bert is not an SQ-LLaVA.*model_type 'bert'"):
            load_checkpoint("org/bert")
        with pytest.raises(ValueError, match="org/none: not in the cache, and could not be downloaded from the Hub"):
            load_checkpoint("org/none")
    fetched = [path.rpartition("/")[2] for method, path in hub.log if method == "GET" and "/resolve/" in path]
    assert fetched == ["config.json"]


def answer_of(model, processor) -> str:
    return Assistant(model.eval(), processor).answer(tiny.picture(), "Hi", 6)
