"""Both stages through `train_sft.py`, with tiny models on a CPU."""

import os
import subprocess
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

import sq_llava
import train_sft
from modeling_sq_llava import SQLlavaForConditionalGeneration
from sq_llava.checkpoints.load import load_checkpoint, merge_adapter
from sq_llava.checkpoints.parts import group_of
from sq_llava.resources import CODE_FILES
from sq_llava.training.adapter import LoraSize, add_adapter, load_adapter_weights
from sq_llava.training.trainer import SQLlavaTrainer
from tests import tiny
from tests.warm_python import warm_python


pytestmark = pytest.mark.slow


ROOT = Path(train_sft.__file__).parent
# Plain gradient descent: a difference of gradients is a difference of weights, where Adam divides it away.
COMMON = {
    "optim": "sgd",
    "learning_rate": 0.1,
    "vision_lr": 0.3,
    "connector_lr": 0.2,
    "lr_scheduler_type": "constant",
    "vision_lora_r": 4,
    "vision_lora_alpha": 8,
    "vision_lora_dropout": 0.0,
    "lora_r": 4,
    "lora_alpha": 8,
    "lora_dropout": 0.0,
    "system_message": "Be kind.",
    "per_device_train_batch_size": 4,
    "max_steps": 3,
    "gradient_checkpointing": False,
    "bf16": False,
    "use_cpu": True,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "max_length": 256,
}


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> Path:
    """Folders as people have them: a CLIP, a Llama, and LLaVA's JSON with pictures, every third row text-only."""
    root = tmp_path_factory.mktemp("parts")
    tiny.save_towers(root)
    return tiny.write_rows(
        root, lambda index: [(f"What colour is it {turn}?", f"A dog {index}.") for turn in range(4)]
    )


def arguments(stage: str, parts: Path, output_dir: Path, **overrides) -> list[str]:
    settings = {**COMMON, "stage": stage, "dataset_path": parts / "train.json", "output_dir": output_dir}
    if stage == "align":
        settings |= {
            "vision_model_name_or_path": parts / "clip",
            "text_model_name_or_path": parts / "llama",
            "num_prototypes": 5,
        }
    settings |= overrides
    return [text for name, value in settings.items() for text in (f"--{name}", str(value))]


def train(*args, **overrides) -> SQLlavaTrainer:
    return train_sft.main(arguments(*args, **overrides))


@pytest.fixture(scope="module")
def stage1(parts, tmp_path_factory) -> Path:
    output_dir = tmp_path_factory.mktemp("stage1")
    train("align", parts, output_dir)
    return output_dir


@pytest.fixture(scope="module")
def stage2(parts, stage1, tmp_path_factory) -> SQLlavaTrainer:
    output_dir = tmp_path_factory.mktemp("stage2")
    return train("instruct", parts, output_dir, model_name_or_path=stage1, optim="adamw_torch")


def untrained(stage: str, base: Path) -> dict[str, torch.Tensor]:
    """The adapter weights of a stage before its first step, except that LoRA's A is random."""
    model = SQLlavaForConditionalGeneration.from_pretrained(base)
    size, none = LoraSize(4, 8, 0.0), LoraSize(0, 8, 0.0)
    peft_model = add_adapter(model, size, size if stage == "instruct" else none, train_vusr=stage == "instruct")
    return {name: parameter for name, parameter in peft_model.named_parameters() if parameter.requires_grad}


def test_stage_one_trains_vision_lora_extractor_and_projector(parts, tmp_path):
    trainer = train("align", parts, tmp_path, optim="adamw_torch", learning_rate=1e-3)
    start = untrained("align", tmp_path / "base")
    trained = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert trained.keys() == start.keys()
    assert {group_of(name) for name in trained} == {"vision", "connector"}
    for name, parameter in trained.items():
        assert not torch.equal(parameter, start[name]), f"{name} was not trained"
    for name, weight in SQLlavaForConditionalGeneration.from_pretrained(tmp_path / "base").named_parameters():
        now = trainer.model.get_base_model().get_parameter(_wrapped_name(trainer.model, name))
        assert torch.equal(now, weight), f"{name} is frozen, but changed"


def test_stage_two_trains_every_part_and_only_the_vusr_row_of_the_embedding(stage1, stage2):
    model = stage2.model
    assert {group_of(name) for name, p in model.named_parameters() if p.requires_grad} == {
        "vision",
        "connector",
        "text",
    }
    start = untrained("instruct", stage1 / "base")
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert not torch.equal(parameter, start[name]), f"{name} was not trained"
    base = SQLlavaForConditionalGeneration.from_pretrained(stage1 / "base")
    for name, weight in base.named_parameters():
        now = model.get_base_model().get_parameter(_wrapped_name(model, name))
        assert torch.equal(now, weight), f"{name} is frozen, but changed"
    merged = load_checkpoint(stage2.args.output_dir)[0].merge_and_unload().get_input_embeddings().weight
    changed = (merged != base.get_input_embeddings().weight).any(dim=1).nonzero().flatten().tolist()
    assert changed == [base.config.vusr_token_id]


def _wrapped_name(model: PeftModel, name: str) -> str:
    """The name of a base weight after PEFT put its wrappers around the modules."""
    names = {n for n, _ in model.get_base_model().named_parameters()}
    module, _, parameter = name.rpartition(".")
    candidates = [name, f"{module}.base_layer.{parameter}", f"{module}.token_adapter.base_layer.{parameter}"]
    for wrapped in ("multi_modal_projector.", "prototype_extractor."):
        candidates.append(name.replace(wrapped, f"{wrapped}original_module."))
    return next(candidate for candidate in candidates if candidate in names)


def test_vision_lora_receives_gradient_in_every_layer_that_is_run(stage2):
    adapter = load_file(Path(stage2.args.output_dir) / "adapter_model.safetensors")
    vision_b = {name: weight for name, weight in adapter.items() if "vision_tower" in name and "lora_B" in name}
    # Two of three layers are run; q, k, v, out, fc1 and fc2 in each.
    assert len(vision_b) == 12
    assert all(weight.abs().sum() > 0 for weight in vision_b.values())


def test_stage_two_begins_with_the_logits_of_stage_one(stage1):
    trained, processor = load_checkpoint(str(stage1))
    base = SQLlavaForConditionalGeneration.from_pretrained(stage1 / "base")
    size = LoraSize(4, 8, 0.0)
    continued = add_adapter(base, size, size, train_vusr=True)
    load_adapter_weights(continued, str(stage1))
    messages = [
        {"role": "user", "content": [{"type": "image", "image": tiny.picture()}, {"type": "text", "text": "Hi"}]}
    ]
    inputs = processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt")
    with torch.no_grad():
        assert torch.equal(trained.eval()(**inputs).logits, continued.eval()(**inputs).logits)


def test_each_part_has_its_learning_rate_and_the_losses_are_logged_apart(stage2):
    first = stage2.state.log_history[0]
    assert (first["learning_rate_vision"], first["learning_rate_connector"], first["learning_rate_text"]) == (
        0.3,
        0.2,
        0.1,
    )
    assert first["loss_answers"] > 0 and first["loss_questions"] > 0
    assert 0 < first["self_question_share"] < 0.5
    # With a question weight of one, the loss is the mean over all tokens, so it lies between the two.
    assert min(first["loss_answers"], first["loss_questions"]) < first["loss"]
    assert first["loss"] < max(first["loss_answers"], first["loss_questions"])


def adapter_weights(output_dir: Path) -> dict[str, torch.Tensor]:
    return load_file(output_dir / "adapter_model.safetensors")


def assert_close(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor], tolerance: float):
    assert left.keys() == right.keys()
    for name in left:
        torch.testing.assert_close(left[name], right[name], rtol=0, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


def test_accumulated_batches_equal_one_large_batch_with_weighted_questions(parts, stage1, tmp_path):
    weights = []
    for name, size, accumulation in (("one", 4, 1), ("four", 1, 4)):
        train(
            "instruct", parts, tmp_path / name, model_name_or_path=stage1, question_loss_weight=0.3, max_steps=2,
            per_device_train_batch_size=size, gradient_accumulation_steps=accumulation,
        )  # fmt: skip
        weights.append(adapter_weights(tmp_path / name))
    assert_close(*weights, tolerance=1e-5)


def test_question_weight_zero_leaves_the_loss_of_the_answers(parts, stage1, tmp_path):
    trainer = train("instruct", parts, tmp_path, model_name_or_path=stage1, question_loss_weight=0.0, max_steps=1)
    first = trainer.state.log_history[0]
    assert first["loss_questions"] > 0
    assert first["loss"] == pytest.approx(first["loss_answers"], rel=1e-4)


def test_resumed_run_equals_uninterrupted_run(parts, stage1, tmp_path):
    # Five epochs of 16 rows: the resume begins in the middle of the second, whose self-questions are its own.
    settings = {"model_name_or_path": stage1, "max_steps": 10, "save_strategy": "steps", "save_steps": 6}
    train("instruct", parts, tmp_path / "whole", **settings)
    train(
        "instruct", parts, tmp_path / "whole2", **settings, resume_from_checkpoint=tmp_path / "whole" / "checkpoint-6"
    )
    assert_close(adapter_weights(tmp_path / "whole"), adapter_weights(tmp_path / "whole2"), tolerance=0)


def test_two_processes_equal_one(parts, stage1, tmp_path):
    settings = {"model_name_or_path": stage1, "max_steps": 3, "question_loss_weight": 0.3}
    train("instruct", parts, tmp_path / "one", **settings, per_device_train_batch_size=4)
    command = [
        warm_python(), "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "0",
        "--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0", str(ROOT / "train_sft.py"),
    ]  # fmt: skip
    command += arguments("instruct", parts, tmp_path / "two", **settings | {"per_device_train_batch_size": 2})
    result = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert_close(adapter_weights(tmp_path / "one"), adapter_weights(tmp_path / "two"), tolerance=1e-5)


def test_merged_checkpoint_has_the_adapters_logits_and_its_code(stage2, tmp_path):
    adapter_dir = stage2.args.output_dir
    merge_adapter(adapter_dir, str(tmp_path / "merged"))
    adapter, processor = load_checkpoint(adapter_dir)
    merged, merged_processor = load_checkpoint(str(tmp_path / "merged"))
    assert merged_processor.chat_template == processor.chat_template
    for file in CODE_FILES:
        assert (tmp_path / "merged" / file).read_text() == (ROOT / file).read_text()
    messages = [
        {"role": "user", "content": [{"type": "image", "image": tiny.picture()}, {"type": "text", "text": "Hi"}]}
    ]
    inputs = processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt")
    with torch.no_grad():
        expected = adapter.eval()(**inputs).logits
        difference = (merged.eval()(**inputs).logits - expected).abs().max()
    assert difference < 1e-5 * expected.abs().max()


def test_adapter_folder_and_merged_model_answer_alike_and_unlike_the_base(stage1, stage2, tmp_path):
    merge_adapter(stage2.args.output_dir, str(tmp_path / "merged"))
    question = [{"role": "user", "content": "What colour is it?"}]
    answers = [
        sq_llava.load(folder, device="cpu", dtype="float32").answer(tiny.picture(), question, max_new_tokens=12)
        for folder in (stage2.args.output_dir, tmp_path / "merged", stage1 / "base")
    ]
    assert answers[0] == answers[1] != answers[2]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"self_question_ratio": 1.5}, "self_question_ratio is 1.5: it must be a number from 0 to 1"),
        ({"model_name_or_path": "x"}, "model_name_or_path is 'x', vision_model_name_or_path is"),
        ({"use_liger_kernel": True}, "use_liger_kernel is True, which is not supported"),
    ],
)
def test_wrong_settings_are_refused_before_work_starts(parts, tmp_path, overrides, message):
    with pytest.raises(ValueError, match=message):
        train("align", parts, tmp_path, **overrides)


def test_adapter_of_another_size_is_refused(parts, stage1, tmp_path):
    with pytest.raises(ValueError, match="vision_lora_r"):
        train("instruct", parts, tmp_path, model_name_or_path=stage1, vision_lora_r=8)
