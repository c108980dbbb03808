"""LLaVA's stage 2 trains all weights of language model and projector, without an adapter."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sq_llava.checkpoints.load import load_checkpoint, merge_adapter
from sq_llava.checkpoints.provenance import read_provenance
from sq_llava.locations import is_adapter
from sq_llava.resources import CODE_FILES
from sq_llava.training.adapter import count_parameters
from tests import tiny
from tests.runs import assert_close, train


pytestmark = pytest.mark.slow


PROJECTOR = {"prototype_variant": "none", "projector_type": "linear", "doctor": "off", "learning_rate": 1e-3}
FULL = PROJECTOR | {"full_finetuning": True, "lora_r": 0, "vision_lora_r": 0, "self_question_ratio": 0.0}
FULL |= {"save_strategy": "no"}


@pytest.fixture(scope="module")
def stage1(parts, tmp_path_factory) -> Path:
    """An adapter with ViT-LoRA, to be merged before the language model is trained."""
    output_dir = tmp_path_factory.mktemp("stage1") / "run"
    train(parts, output_dir, stage="align", max_steps=2, save_strategy="no", **PROJECTOR)
    return output_dir


def test_all_of_language_model_and_projector_is_trained_and_nothing_of_the_tower(parts, stage1, tmp_path):
    begun = load_checkpoint(str(stage1))[0].merge_and_unload().state_dict()
    trainer = train(parts, tmp_path / "run", stage1, max_steps=2, **FULL)
    counts = count_parameters(trainer.model)
    assert counts["vision"][0] == counts["connector"][1] == counts["text"][1] == 0
    unused = trainer.processing_class.vusr_token_id
    for name, now in trainer.model.state_dict().items():
        if "vision_tower" in name:
            assert torch.equal(now, begun[name]), f"{name} is frozen, but changed"
        else:
            assert not torch.equal(now, begun[name]), f"{name} was not trained"
    embeddings = "model.language_model.embed_tokens.weight"
    assert torch.equal(trainer.model.state_dict()[embeddings][unused], begun[embeddings][unused])


def test_output_is_a_plain_checkpoint_that_another_stage_can_start_from(parts, stage1, tmp_path):
    trainer = train(parts, tmp_path / "one", stage1, max_steps=2, **FULL)
    assert not is_adapter(tmp_path / "one")
    model, _ = load_checkpoint(str(tmp_path / "one"))
    inputs = tiny.tiny_inputs(model.config)
    with torch.no_grad():
        expected = trainer.model.eval()(**inputs).logits
        assert torch.equal(model.eval()(**inputs).logits, expected)
    for name in (*CODE_FILES, "README.md"):
        assert (tmp_path / "one" / name).is_file()
    assert "not trained to ask" in (tmp_path / "one" / "README.md").read_text()
    stages = read_provenance(tmp_path / "one")["stages"]
    assert [stage["stage"] for stage in stages] == ["align", "instruct"]
    assert stages[1]["settings"]["full_finetuning"] is True
    with pytest.raises(ValueError, match="A stage with full_finetuning needs no merge"):
        merge_adapter(str(tmp_path / "one"), str(tmp_path / "merged"))
    again = train(parts, tmp_path / "two", tmp_path / "one", **FULL | {"max_steps": 1, "learning_rate": 0.0})
    with torch.no_grad():
        assert torch.equal(again.model.eval()(**inputs).logits, expected)


def test_resumed_run_equals_uninterrupted_run(parts, stage1, tmp_path):
    settings = FULL | {"max_steps": 6, "save_strategy": "steps", "save_steps": 4}
    train(parts, tmp_path / "whole", stage1, **settings)
    train(parts, tmp_path / "resumed", stage1, **settings, resume_from_checkpoint=tmp_path / "whole" / "checkpoint-4")
    whole, resumed = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "resumed"))
    assert_close(whole, resumed, atol=0)


def test_half_precision_base_is_trained_in_full_precision(parts, stage1, tmp_path):
    trainer = train(parts, tmp_path / "run", stage1, **FULL | {"max_steps": 1, "dtype": "bfloat16", "bf16": True})
    for name, parameter in trainer.model.named_parameters():
        assert parameter.dtype == (torch.bfloat16 if "vision_tower" in name else torch.float32), name


def test_half_precision_base_gives_half_precision_files_and_checkpoints_of_full_precision(parts, stage1, tmp_path):
    settings = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1, "dtype": "bfloat16", "bf16": True}
    trainer = train(parts, tmp_path / "run", stage1, **FULL | settings)
    trained = trainer.model.state_dict()
    to_resume = load_file(tmp_path / "run/checkpoint-2/model.safetensors")
    assert all(torch.equal(weight, trained[name]) for name, weight in to_resume.items())
    final = load_file(tmp_path / "run/model.safetensors")
    assert final.keys() == to_resume.keys()
    assert all(torch.equal(weight, trained[name].bfloat16()) for name, weight in final.items())
    assert json.loads((tmp_path / "run/config.json").read_text())["dtype"] == "bfloat16"
    model, _ = load_checkpoint(str(tmp_path / "run"))
    inputs = tiny.tiny_inputs(model.config)
    for parameter in trainer.model.parameters():  # not .bfloat16(), which would cast the buffers of rotary embeddings
        parameter.data = parameter.data.bfloat16()
    with torch.no_grad():
        assert torch.equal(model.eval()(**inputs).logits, trainer.model.eval()(**inputs).logits)


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"lora_r": 8}, "full_finetuning is true, together with lora_r 8"),
        ({"vision_lora_r": 4}, "full_finetuning is true, together with vision_lora_r 4"),
        ({"load_in_4bit": True, "dtype": "float32"}, "full_finetuning is true, together with load_in_4bit True"),
    ],
)
def test_full_finetuning_with_an_adapter_is_refused(settings, error, parts, tmp_path):
    with pytest.raises(ValueError, match=error):
        train(parts, tmp_path / "run", parts, **FULL | settings)


def test_plan_counts_the_weights_gradients_and_optimizer_of_the_language_model(parts, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    train(parts, tmp_path, dry_run="meta", **FULL)
    planned = capsys.readouterr().out
    assert "Steps:" in planned
    text = next(line for line in planned.splitlines() if line.startswith("│ text"))
    trained, frozen = (int(cell.strip().replace(",", "")) for cell in text.split("│")[2:4])
    assert trained > 60_000 and frozen == 0
