"""Both stages with `train_sft.py`, with tiny models on a CPU."""

import os
import subprocess
from pathlib import Path

import pytest
import torch
from peft import PeftModel

import sq_llava
import train_sft
from modeling_sq_llava import SQLlavaForConditionalGeneration
from sq_llava.checkpoints.load import load_checkpoint, merge_adapter
from sq_llava.checkpoints.parts import group_of
from sq_llava.resources import CODE_FILES
from sq_llava.training.adapter import LoraSize, add_adapter, load_adapter_weights
from sq_llava.training.trainer import SQLlavaTrainer
from tests import runs, tiny
from tests.runs import assert_close, trained_weights
from tests.warm_python import warm_python


pytestmark = pytest.mark.slow


ROOT = Path(train_sft.__file__).parent
# Both stages, with a learning rate for each part of the model.
RATES = runs.PLAIN_DESCENT | {"vision_lr": 0.3, "connector_lr": 0.2, "save_strategy": "no"}
STAGE1 = RATES | {"stage": "align"}
SIZE, NO_LORA = LoraSize(4, 8, 0.0), LoraSize(0, 8, 0.0)


def train(parts: Path, output_dir: Path, previous: Path | None = None, **overrides) -> SQLlavaTrainer:
    """Stage 2 if it starts from `previous`, else stage 1."""
    return runs.train(parts, output_dir, previous, **(RATES if previous else STAGE1) | overrides)


@pytest.fixture(scope="module")
def stage1(parts, tmp_path_factory) -> Path:
    output_dir = tmp_path_factory.mktemp("stage1")
    train(parts, output_dir)
    return output_dir


@pytest.fixture(scope="module")
def stage2(parts, stage1, tmp_path_factory) -> SQLlavaTrainer:
    return train(parts, tmp_path_factory.mktemp("stage2"), stage1, optim="adamw_torch")


def untrained(stage: str, base: Path) -> dict[str, torch.Tensor]:
    """The adapter weights of a stage before its first step, except that LoRA's A is random."""
    model = SQLlavaForConditionalGeneration.from_pretrained(base)
    peft_model = add_adapter(model, SIZE, SIZE if stage == "instruct" else NO_LORA, train_vusr=stage == "instruct")
    return {name: parameter for name, parameter in peft_model.named_parameters() if parameter.requires_grad}


def test_stage_one_trains_vision_lora_extractor_and_projector(parts, tmp_path):
    trainer = train(parts, tmp_path, optim="adamw_torch", learning_rate=1e-3)
    assert_trained(trainer.model, {"vision", "connector"}, tmp_path / "base")


def assert_trained(model: PeftModel, groups: set[str], base: Path) -> None:
    """Every weight of these parts changed, and every frozen weight is as in the base."""
    start = untrained("instruct" if "text" in groups else "align", base)
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained.keys() == start.keys() and {group_of(name) for name in trained} == groups
    for name, parameter in trained.items():
        assert not torch.equal(parameter, start[name]), f"{name} was not trained"
    for name, weight in SQLlavaForConditionalGeneration.from_pretrained(base).named_parameters():
        now = model.get_base_model().get_parameter(_wrapped_name(model, name))
        assert torch.equal(now, weight), f"{name} is frozen, but changed"


def test_stage_two_trains_every_part_and_only_the_vusr_row_of_the_embedding(stage1, stage2):
    assert_trained(stage2.model, {"vision", "connector", "text"}, stage1 / "base")
    base = SQLlavaForConditionalGeneration.from_pretrained(stage1 / "base")
    merged = load_checkpoint(stage2.args.output_dir)[0].merge_and_unload().get_input_embeddings().weight
    changed = (merged != base.get_input_embeddings().weight).any(dim=1).nonzero().flatten().tolist()
    assert changed == [base.config.vusr_token_id]


def _wrapped_name(model: PeftModel, name: str) -> str:
    """The name of a base weight after PEFT wrapped the modules."""
    names = {n for n, _ in model.get_base_model().named_parameters()}
    module, _, parameter = name.rpartition(".")
    candidates = [name, f"{module}.base_layer.{parameter}", f"{module}.token_adapter.base_layer.{parameter}"]
    for wrapped in ("multi_modal_projector.", "prototype_extractor."):
        candidates.append(name.replace(wrapped, f"{wrapped}original_module."))
    return next(candidate for candidate in candidates if candidate in names)


def test_vision_lora_receives_gradient_in_every_layer_that_is_run(stage2):
    adapter = trained_weights(Path(stage2.args.output_dir))
    vision_b = {name: weight for name, weight in adapter.items() if "vision_tower" in name and "lora_B" in name}
    # Two of three layers are run. Each has q, k, v, out, fc1 and fc2.
    assert len(vision_b) == 12
    assert all(weight.abs().sum() > 0 for weight in vision_b.values())


def test_stage_two_begins_with_the_logits_of_stage_one(stage1):
    trained, processor = load_checkpoint(str(stage1))
    base = SQLlavaForConditionalGeneration.from_pretrained(stage1 / "base")
    continued = add_adapter(base, SIZE, SIZE, train_vusr=True)
    load_adapter_weights(continued, str(stage1))
    assert torch.equal(runs.logits(trained, processor), runs.logits(continued, processor))


def test_each_part_has_its_learning_rate_and_the_losses_are_logged_apart(stage2):
    first = stage2.state.log_history[0]
    assert [first[f"learning_rate_{part}"] for part in ("vision", "connector", "text")] == [0.3, 0.2, 0.1]
    assert first["loss_answers"] > 0 and first["loss_questions"] > 0
    assert 0 < first["self_question_share"] < 0.5
    # With a question weight of 1, the loss is the mean over all tokens, so it lies between the two.
    low, high = sorted((first["loss_answers"], first["loss_questions"]))
    assert low < first["loss"] < high


def test_accumulated_batches_equal_one_large_batch_with_weighted_questions(parts, stage1, tmp_path):
    weights = []
    for size in (4, 1):
        batch = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 4 // size}
        train(parts, tmp_path / str(size), stage1, question_loss_weight=0.3, max_steps=2, **batch)
        weights.append(trained_weights(tmp_path / str(size)))
    assert_close(*weights)


def test_question_weight_zero_leaves_only_the_loss_of_the_answers(parts, stage1, tmp_path):
    first = train(parts, tmp_path, stage1, question_loss_weight=0.0, max_steps=1).state.log_history[0]
    assert first["loss_questions"] > 0
    assert first["loss"] == pytest.approx(first["loss_answers"], rel=1e-4)


def test_resumed_run_equals_uninterrupted_run(parts, stage1, tmp_path):
    # Resumes in the middle of the second epoch, which has other self-questions than the first.
    settings = {"max_steps": 10, "save_strategy": "steps", "save_steps": 6}
    whole = train(parts, tmp_path / "whole", stage1, **settings)
    checkpoint = tmp_path / "whole" / "checkpoint-6"
    resumed = train(parts, tmp_path / "resumed", stage1, **settings, resume_from_checkpoint=checkpoint)
    assert_close(trained_weights(tmp_path / "whole"), trained_weights(tmp_path / "resumed"), atol=0)
    assert whole.watch.first_losses == resumed.watch.first_losses


@pytest.mark.long
def test_two_processes_equal_one(parts, stage1, tmp_path):
    settings = {"question_loss_weight": 0.3}
    train(parts, tmp_path / "one", stage1, **settings)
    command = [
        warm_python(), "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "0",
        "--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0", str(ROOT / "train_sft.py"),
    ]  # fmt: skip
    settings |= RATES | {"max_steps": 3, "lr_scheduler_type": "constant", "per_device_train_batch_size": 2}
    command += runs.arguments(parts, tmp_path / "two", stage1, **settings)
    result = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert_close(trained_weights(tmp_path / "one"), trained_weights(tmp_path / "two"))


def test_merged_checkpoint_has_the_adapters_logits_and_its_code(stage2, tmp_path):
    adapter_dir = stage2.args.output_dir
    merge_adapter(adapter_dir, str(tmp_path / "merged"))
    adapter, processor = load_checkpoint(adapter_dir)
    merged, merged_processor = load_checkpoint(str(tmp_path / "merged"))
    assert merged_processor.chat_template == processor.chat_template
    for file in CODE_FILES:
        assert (tmp_path / "merged" / file).read_text() == (ROOT / file).read_text()
    expected = runs.logits(adapter, processor)
    assert (runs.logits(merged, processor) - expected).abs().max() < 1e-4 * expected.abs().max()


def test_adapter_folder_and_merged_model_answer_alike_and_unlike_the_base(stage1, stage2, tmp_path):
    merge_adapter(stage2.args.output_dir, str(tmp_path / "merged"))
    question = [{"role": "user", "content": "What colour is it?"}]
    answers = [
        sq_llava.load(folder, device="cpu", dtype="float32").answer(tiny.picture(), question, max_new_tokens=12)
        for folder in (stage2.args.output_dir, tmp_path / "merged", stage1 / "base")
    ]
    assert answers[0] == answers[1] != answers[2]


def test_start_from_both_a_model_and_parts_is_refused(parts, tmp_path):
    with pytest.raises(ValueError, match="model_name_or_path is 'x', vision_model_name_or_path is"):
        train(parts, tmp_path, model_name_or_path="x")


def test_adapter_of_another_size_is_refused(parts, stage1, tmp_path):
    with pytest.raises(ValueError, match="vision_lora_r"):
        train(parts, tmp_path, stage1, vision_lora_r=8)
