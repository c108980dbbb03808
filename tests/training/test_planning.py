"""Global batch, steps, memory and dry runs. The estimated memory is compared with what a CPU allocates."""

import json
from pathlib import Path

import datasets
import pytest
import torch
from trl import SFTConfig
from trl.trainer.utils import add_fused_lm_head

import train_sft
from benchmarks.common import allocated_peak
from sq_llava.training.adapter import LoraSize, add_adapter, count_parameters
from sq_llava.training.memory import SHARDINGS, Batch, activation_terms, estimate_memory, weight_bytes
from sq_llava.training.planning import accumulation_steps, describe_steps, longest_rows
from sq_llava.training.stage_model import DRY_RUN_BASE
from tests import runs, tiny


SETTINGS = {
    "stage": "align",
    "per_device_train_batch_size": 2,
    "max_steps": -1,
    "num_train_epochs": 2,
    "max_length": 256,
    "save_strategy": "no",
}
SIZE = LoraSize(8, 16, 0.0)


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> Path:
    """A CLIP, a Llama, and ten captions. The fourth and the eighth are the longest."""
    root = tmp_path_factory.mktemp("parts")
    tiny.save_towers(root)
    tiny.picture().save(root / "a.png")
    rows = []
    for index in range(10):
        text = "A dog in the green grass. " * (4 if index % 4 == 3 else 1)
        turns = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": text}]
        rows.append({"image": "a.png", "conversations": turns})
    (root / "rows.json").write_text(json.dumps(rows))
    return root


def run(parts: Path, output_dir: Path, previous: Path | None = None, **overrides):
    settings = {**SETTINGS, "dataset_path": parts / "rows.json", **overrides}
    return train_sft.main(runs.arguments(parts, output_dir, previous, **settings))


@pytest.fixture
def args(tmp_path) -> SFTConfig:
    return SFTConfig(output_dir=str(tmp_path), bf16=False, use_cpu=True)


@pytest.fixture
def adapted():
    return add_adapter(tiny.tiny_model(), SIZE, SIZE, train_vusr=True)


@pytest.mark.parametrize(("rows", "size", "processes", "steps"), [(256, 32, 8, 1), (128, 4, 1, 32), (128, 8, 2, 8)])
def test_global_batch_is_made_by_accumulation(rows, size, processes, steps):
    assert accumulation_steps(rows, size, processes) == steps


def test_global_batch_that_cannot_be_made_is_refused_with_sizes_that_can():
    message = r"multiple of 24.*per_device_train_batch_size can be 1, 2\..*processes can be 1, 3\."
    with pytest.raises(ValueError, match=message):
        accumulation_steps(12, 4, 6)
    with pytest.raises(ValueError, match="per_device_train_batch_size can be no number"):
        accumulation_steps(16, 1, 3)


def test_global_batch_and_accumulation_exclude_each_other(parts, tmp_path):
    with pytest.raises(ValueError, match=r"global_batch_size is 8 and gradient_accumulation_steps is 2\."):
        run(parts, tmp_path, global_batch_size=8, gradient_accumulation_steps=2)


def test_number_of_gpus_is_refused_without_a_plan(parts, tmp_path):
    with pytest.raises(ValueError, match="num_gpus is 8, which only works with --dry_run meta"):
        run(parts, tmp_path, num_gpus=8)


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{"global_batch_size": 4}, {"global_batch_size": 6, "max_steps": 1}, {}])
def test_planned_steps_are_those_of_the_run(settings, parts, tmp_path, capsys):
    run(parts, tmp_path, dry_run="meta", warmup_steps=0.3, **settings)
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("Steps: 10 rows"))
    trainer = run(parts, tmp_path, warmup_steps=0.3, **settings)
    rows = trainer.args.per_device_train_batch_size * trainer.args.gradient_accumulation_steps
    assert rows == settings.get("global_batch_size", 2)
    steps = trainer.state.max_steps
    warmup = trainer.args.get_warmup_steps(steps)
    assert f"{rows} per step" in line
    assert f" {steps} steps, {trainer.state.epoch:.2f} epochs, {warmup} warmup steps." in line


@pytest.mark.slow
def test_weights_gradients_and_optimizer_are_estimated_exactly(parts, tmp_path):
    trainer = run(parts, tmp_path, max_steps=1, gradient_checkpointing=False)
    sizes = {term.name: term.num_bytes for term in estimate_memory(trainer.model, Batch(2, 50, 2), trainer.args)}
    state = [value for entry in trainer.optimizer.state.values() for name, value in entry.items() if name != "step"]
    assert sizes["optimizer"] == sum(tensor.nbytes for tensor in state)
    trained = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
    assert sizes["gradients"] == sum(parameter.nbytes for parameter in trained)
    storages = {
        t.untyped_storage().data_ptr(): t.nbytes for t in [*trainer.model.parameters(), *trainer.model.buffers()]
    }
    assert sizes["weights"] == pytest.approx(sum(storages.values()), rel=0.01)


WIDE = {"hidden_size": 256, "intermediate_size": 704, "num_attention_heads": 8, "num_key_value_heads": 8}
BIG_EYE = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 6, "image_size": 112}


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    ("text", "vision", "batch"),
    [
        ({}, {}, Batch(4, 96, 4)),
        ({**WIDE, "num_hidden_layers": 6}, {}, Batch(1, 512, 1)),
        ({**WIDE, "num_hidden_layers": 2, "vocab_size": 4000}, {}, Batch(2, 256, 2)),
        ({}, BIG_EYE, Batch(4, 128, 4)),
    ],
    ids=["tiny", "deep", "vocabulary", "vision"],
)
def test_activations_are_estimated_from_above(text, vision, batch, checkpointing, args):
    config = tiny.tiny_config(
        text_config={**tiny.TINY_LLAMA, **text}, vision_config={**tiny.TINY_CLIP, **vision}, initializer_range=0.02
    )
    model = tiny.tiny_model(config)
    add_fused_lm_head(model)
    model = add_adapter(model, LoraSize(8, 16, 0.2), LoraSize(16, 32, 0.05), train_vusr=True).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    prompts = [tiny.tiny_inputs(config, num_words=batch.tokens - config.image_seq_length) for _ in range(batch.rows)]
    inputs = {name: torch.cat([prompt[name] for prompt in prompts]) for name in prompts[0]}

    def step():
        outputs = model(**inputs, labels=inputs["input_ids"], fused_lm_head=True, use_cache=False)
        outputs.log_probs.mean().backward()

    step()  # allocates the gradients
    measured = allocated_peak(step)
    args.gradient_checkpointing = checkpointing
    estimated = sum(term.num_bytes for term in activation_terms(model, batch, args, on_gpu=False))
    assert measured <= estimated < 2.5 * measured


def test_flash_attention_needs_no_mask(adapted, args):
    masks = {}
    for implementation in ("sdpa", "flash_attention_2"):
        adapted.get_base_model().config._attn_implementation_internal = implementation
        terms = {term.name: term.num_bytes for term in activation_terms(adapted, Batch(2, 100, 2), args)}
        masks[implementation] = terms["attention mask"]
    assert masks == {"sdpa": 2 * 100 * 100 * 4, "flash_attention_2": 0}


@pytest.mark.slow
def test_plan_from_configurations_is_that_of_the_loaded_model(parts, tmp_path, capsys):
    run(parts, tmp_path, dry_run="meta", use_dora=True)
    table = capsys.readouterr().out
    trainer = run(parts, tmp_path, max_steps=1, use_dora=True)
    for trained, _ in count_parameters(trainer.model).values():
        assert f" {trained:,} " in table
    weights = next(line for line in table.splitlines() if line.startswith("│ weights"))
    assert f" {weight_bytes(trainer.model) / 1024:.1f} KiB" in weights


def test_each_sharding_divides_what_it_says(adapted, args):
    args.bf16 = True
    sizes = {
        sharding: {t.name: t.num_bytes for t in estimate_memory(adapted, Batch(1, 50, 1), args, 8, sharding)}
        for sharding in SHARDINGS
    }
    ddp, fsdp2, zero2, zero3 = sizes.values()
    about = pytest.approx
    trained = ddp["optimizer"] / 8
    assert ddp["gradients"] == 2 * 4 * trained and fsdp2["gradients"] == about(4 * trained / 8, rel=0.05)
    assert fsdp2["optimizer"] == about(ddp["optimizer"] / 8, rel=0.05)
    for zero in (zero2, zero3):  # in bfloat16, with float32 copies in the optimizer
        assert zero["gradients"] == about(2 * trained / 8, rel=0.05)
        assert zero["optimizer"] == about(12 * trained / 8, rel=0.05)
    assert zero2["weights"] == ddp["weights"] - 2 * trained
    assert ddp["weights"] / 8 < fsdp2["weights"] < ddp["weights"] / 7 and zero3["weights"] < zero2["weights"] / 7
    assert ddp["gathered weights"] == zero2["gathered weights"] == 0
    assert 0 < fsdp2["gathered weights"] == zero3["gathered weights"] < ddp["weights"]


def test_unknown_optimizer_is_refused(adapted, args):
    args.optim = "adafactor"
    with pytest.raises(ValueError, match=r"optim is adafactor, .* supports adamw_torch"):
        estimate_memory(adapted, Batch(1, 50, 1), args)


@pytest.mark.slow
def test_dry_run_takes_the_longest_rows_and_leaves_nothing(parts, tmp_path, capsys):
    trainer = run(parts, tmp_path, dry_run="real", global_batch_size=4, save_strategy="steps", save_steps=1)
    assert trainer.state.global_step == 1
    assert [row["row_id"] for row in trainer.train_dataset] == [3, 7]
    tokens = trainer.data_collator([trainer.train_dataset[0]])["input_ids"].shape[1]
    output = " ".join(capsys.readouterr().out.split())
    assert f"2 rows of {tokens} tokens" in output and "Measured in one step on the longest rows:" in output
    assert "10 rows, 4 per step" in output
    assert not list(tmp_path.rglob("*.*"))


@pytest.mark.slow
def test_dry_run_of_a_base_that_must_be_saved_leaves_that_of_an_earlier_run(parts, tmp_path, monkeypatch):
    monkeypatch.setattr("sq_llava.training.stage_model.loads_in_pieces", lambda: True)
    earlier = tmp_path / "base" / "config.json"
    earlier.parent.mkdir()
    earlier.write_text("{}")
    run(parts, tmp_path, dry_run="real")
    assert list(tmp_path.rglob("*.*")) == [earlier] and not (tmp_path / DRY_RUN_BASE).exists()


@pytest.mark.parametrize(("drop_last", "steps"), [(False, 126), (True, 125)])
def test_plan_counts_the_steps_of_the_trainer(args, drop_last, steps):
    args.dataloader_drop_last = drop_last
    assert f"{steps} steps per epoch" in describe_steps(1001, args, 1)


def test_plan_without_data_says_that_steps_are_unknown(parts, tmp_path, capsys):
    run(parts, tmp_path, dry_run="meta", dataset_path=tmp_path / "missing.json", num_gpus=8)
    output = capsys.readouterr().out
    assert "Steps: unknown without the data." in output and "missing.json" in output


def test_plan_of_a_stage_before_the_previous_one_exists_says_what_to_set(parts, tmp_path):
    with pytest.raises(ValueError, match=r"stage1: no such folder.* add vision_model_name_or_path"):
        run(parts, tmp_path, tmp_path / "stage1", stage="instruct", dry_run="meta")


def test_too_few_rows_are_repeated():
    rows = datasets.Dataset.from_dict({"length": [3, 9, 5], "row_id": [0, 1, 2]})
    assert longest_rows(rows, 2)["row_id"] == [1, 2]
    assert longest_rows(rows, 5)["row_id"] == [1, 2, 0, 0, 0]
