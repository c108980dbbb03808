"""FSDP2, launched as accelerate launches it, equals one process; its runs are killed, resumed and merged."""

import json
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, LlamaConfig, LlamaForCausalLM

from sq_llava.checkpoints.load import merge_adapter
from tests import tiny
from tests.launches import allow_fsdp_on_cpu, environment_of
from tests.runs import Run, die, in_step, losses, make_parts


pytestmark = pytest.mark.slow


# Plain gradient descent: a difference of gradients is a difference of weights, where Adam divides it away.
DESCENT = {
    "optim": "sgd", "learning_rate": 0.05, "max_steps": 4, "vision_lora_dropout": 0.0, "lora_dropout": 0.0,
    "question_loss_weight": 0.3, "save_strategy": "no",
}  # fmt: skip
FULL = {"full_finetuning": True, "lora_r": 0, "vision_lora_r": 0}


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> Path:
    """Towers and rows. In `images-first.json`, the rows alternate: two with an image, two without."""
    root = make_parts(tmp_path_factory.mktemp("parts"))
    rows = json.loads((root / "train.json").read_text())
    with_image, text_only = ([row for row in rows if ("image" in row) == kind] for kind in (True, False))
    pairs = [(with_image[at : at + 2], text_only[at : at + 2]) for at in (0, 2, 4)]
    for name, order in {"images-first": 1, "text-first": -1}.items():
        # Ten rows: the last batch of an epoch is half empty.
        ordered = [row for pair in pairs for half in pair[::order] for row in half][:10]
        (root / f"{name}.json").write_text(json.dumps(ordered))
    tied = LlamaConfig(**tiny.TINY_LLAMA | {"vocab_size": len(tiny.llama_tokenizer()), "tie_word_embeddings": True})
    LlamaForCausalLM(tied).save_pretrained(root / "tied")
    tiny.llama_tokenizer().save_pretrained(root / "tied")
    return root


class ShardedRun(Run):
    """A run of two processes, as `accelerate launch --config_file recipes/accelerate/fsdp2.yaml` starts them."""

    def __init__(self, parts: Path, folder: Path, launch: dict | None = None, **settings):
        environment = environment_of("fsdp2", num_processes=2, **(launch or {}))
        super().__init__(parts, folder, 2, environment, **{"per_device_train_batch_size": 2} | settings)

    def start(self, *prepare):
        return super().start(allow_fsdp_on_cpu, *prepare)


def weights_of(output_dir: Path) -> dict[str, torch.Tensor]:
    (file,) = (
        output_dir / name
        for name in ("adapter_model.safetensors", "model.safetensors")
        if (output_dir / name).is_file()
    )
    return load_file(file)


def assert_close_runs(left: Path, right: Path, tolerance: float) -> None:
    ours, theirs = weights_of(left), weights_of(right)
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(
            ours[name], theirs[name], rtol=0, atol=tolerance, msg=lambda m, name=name: f"{name}: {m}"
        )
    for one, other in zip(losses(left), losses(right), strict=True):
        assert one == pytest.approx(other, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize(
    ("order", "settings"),
    [("images-first", {}), ("text-first", {}), ("images-first", {"packing": True}), ("text-first", FULL)],
    ids=["images first", "text first", "packed", "full fine-tuning"],
)
@pytest.mark.parametrize("text_model", ["llama", "tied"])
def test_sharded_processes_equal_one_where_one_sees_text_only(parts, tmp_path, order, settings, text_model):
    settings = DESCENT | settings | {
        "dataset_path": parts / f"{order}.json", "text_model_name_or_path": parts / text_model,
        "train_sampling_strategy": "random" if "packing" in settings else "sequential",
    }  # fmt: skip
    one = Run(parts, tmp_path / "one", **settings).finish()
    two = ShardedRun(parts, tmp_path / "two", **settings).finish()
    assert_close_runs(one, two, 1e-6)


@pytest.mark.parametrize("state_dict_type", ["FULL_STATE_DICT", "SHARDED_STATE_DICT"])
@pytest.mark.parametrize("trained", ["adapter", "full"])
def test_killed_sharded_run_resumes_exactly_and_leaves_what_one_process_leaves(
    parts, tmp_path, state_dict_type, trained
):
    settings = {"max_steps": 5} | (FULL if trained == "full" else {})
    launch = {"fsdp_state_dict_type": state_dict_type}
    plain = Run(parts, tmp_path / "plain", **settings | {"max_steps": 1}).finish()
    whole = ShardedRun(parts, tmp_path / "whole", launch, **settings).finish()
    run = ShardedRun(parts, tmp_path / "killed", launch, **settings, resume=True)
    assert -signal.SIGKILL in run.exit_codes(in_step, 4, die)
    assert run.steps_saved == [2]
    run.finish()
    assert "training resumes from" in run.text
    assert_close_runs(whole, run.output_dir, 1e-7)

    files = [{file.name for file in folder.iterdir() if file.is_file()} for folder in (plain, run.output_dir)]
    assert files[0] == files[1]
    folder = run.output_dir
    if trained == "adapter":
        folder = tmp_path / "merged"
        merge_adapter(str(run.output_dir), str(folder))
    model = AutoModel.from_pretrained(folder, trust_remote_code=True)
    assert type(model).__name__ == "SQLlavaForConditionalGeneration"


def test_sharded_run_is_resumed_under_its_own_launch_alone(parts, tmp_path):
    ShardedRun(parts, tmp_path, max_steps=2).finish()
    settings = {"max_steps": 4, "resume": True}
    plain = Run(parts, tmp_path, **settings)
    assert plain.exit_codes() == [1]
    assert "was written under fsdp2-full by 2 processes; this launch is none with 1" in plain.text
    assert "fsdp2.yaml --num_processes 2 -m train_sft ... --resume" in plain.text
    sharded = ShardedRun(parts, tmp_path, {"fsdp_state_dict_type": "SHARDED_STATE_DICT"}, **settings)
    assert 1 in sharded.exit_codes()
    assert "this launch is fsdp2-sharded with 2" in sharded.text
