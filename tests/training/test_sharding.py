"""FSDP2, launched as accelerate launches it, equals one process; its runs are killed, resumed and merged."""

import json
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, LlamaConfig, LlamaForCausalLM

from sq_llava.checkpoints.load import merge_adapter
from tests import runs, tiny
from tests.launches import allow_fsdp_on_cpu, environment_of
from tests.runs import arguments, die, in_step, losses, make_parts, steps_saved


pytestmark = pytest.mark.slow


# Plain gradient descent: a difference of gradients is a difference of weights, where Adam divides it away.
DESCENT = {
    "optim": "sgd", "learning_rate": 0.05, "max_steps": 4, "vision_lora_dropout": 0.0, "lora_dropout": 0.0,
    "question_loss_weight": 0.3, "save_strategy": "no",
}  # fmt: skip
FULL = {"full_finetuning": True, "lora_r": 0, "vision_lora_r": 0}


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> Path:
    """Towers and rows. Of both files of rows, every second pair of rows is text-only."""
    root = make_parts(tmp_path_factory.mktemp("parts"))
    rows = json.loads((root / "train.json").read_text())
    with_image, text_only = ([row for row in rows if ("image" in row) == kind] for kind in (True, False))
    pairs = [(with_image[at : at + 2], text_only[at : at + 2]) for at in (0, 2, 4)]
    for name, order in {"images-first": 1, "text-first": -1}.items():
        ordered = [row for pair in pairs for half in pair[::order] for row in half]
        (root / f"{name}.json").write_text(json.dumps(ordered))
    tied = LlamaConfig(**tiny.TINY_LLAMA | {"vocab_size": len(tiny.llama_tokenizer()), "tie_word_embeddings": True})
    LlamaForCausalLM(tied).save_pretrained(root / "tied")
    tiny.llama_tokenizer().save_pretrained(root / "tied")
    return root


def run(args: list[str], folder: Path, prepare=(), sharded: bool = True, **launch) -> list[int]:
    """Runs two sharded processes, or one plain one."""
    log = folder / "log"
    if not sharded:
        return runs.run(args, log, prepare or None)
    environment = environment_of("fsdp2", num_processes=2, **launch)
    return runs.run(args, log, (allow_fsdp_on_cpu, *prepare), 2, environment)


def log_of(folder: Path) -> str:
    return (folder / "log").read_text()[-4000:]


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
    for name, size in {"one": 4, "two": 2}.items():
        args = arguments(parts, tmp_path / name, **settings, per_device_train_batch_size=size)
        assert set(run(args, tmp_path, sharded=name == "two")) == {0}, log_of(tmp_path)
    assert_close_runs(tmp_path / "one", tmp_path / "two", 1e-6)


@pytest.mark.parametrize("state_dict_type", ["FULL_STATE_DICT", "SHARDED_STATE_DICT"])
@pytest.mark.parametrize("trained", ["adapter", "full"])
def test_killed_sharded_run_resumes_exactly_and_leaves_what_one_process_leaves(
    parts, tmp_path, state_dict_type, trained
):
    settings = {"max_steps": 5, "per_device_train_batch_size": 2} | (FULL if trained == "full" else {})
    launch = {"fsdp_state_dict_type": state_dict_type}
    plain = arguments(parts, tmp_path / "plain", **settings | {"max_steps": 1})
    assert run(plain, tmp_path, sharded=False) == [0], log_of(tmp_path)
    whole = arguments(parts, tmp_path / "whole", **settings)
    assert run(whole, tmp_path, **launch) == [0, 0], log_of(tmp_path)
    resumed = arguments(parts, tmp_path / "run", **settings, resume=True)
    assert -signal.SIGKILL in run(resumed, tmp_path, (in_step, 4, die), **launch)
    assert steps_saved(tmp_path / "run") == [2]
    # The weights of a new start would be others.
    assert run(resumed, tmp_path, **launch) == [0, 0], log_of(tmp_path)
    assert "training resumes from" in log_of(tmp_path)
    assert_close_runs(tmp_path / "whole", tmp_path / "run", 1e-7)

    files = [{file.name for file in (tmp_path / name).iterdir() if file.is_file()} for name in ("plain", "run")]
    assert files[0] == files[1]
    model_folder = tmp_path / "run"
    if trained == "adapter":
        model_folder = tmp_path / "merged"
        merge_adapter(str(tmp_path / "run"), str(model_folder))
    model = AutoModel.from_pretrained(model_folder, trust_remote_code=True)
    assert type(model).__name__ == "SQLlavaForConditionalGeneration"


def test_sharded_run_is_resumed_under_its_own_launch_alone(parts, tmp_path):
    args = arguments(parts, tmp_path / "run", max_steps=2, per_device_train_batch_size=2)
    assert run(args, tmp_path) == [0, 0], log_of(tmp_path)
    resumed = arguments(parts, tmp_path / "run", max_steps=4, per_device_train_batch_size=2, resume=True)
    assert run(resumed, tmp_path, sharded=False) == [1]
    assert "was written under fsdp2-full by 2 processes; this launch is none with 1" in log_of(
        tmp_path
    ) and "fsdp2.yaml --num_processes 2 -m train_sft ... --resume" in log_of(tmp_path)
    assert 1 in run(resumed, tmp_path, fsdp_state_dict_type="SHARDED_STATE_DICT")
    assert "this launch is fsdp2-sharded with 2" in log_of(tmp_path)
