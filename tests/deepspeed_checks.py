"""Two processes train with DeepSpeed like one process: run by `make test-deepspeed`.

    .venv-deepspeed/bin/python -m pytest tests/deepspeed_checks.py

The processes have the environment that `accelerate launch --config_file recipes/accelerate/zero2.yaml` (or zero3.yaml)
gives them, on CPUs (gloo), in float32. Under ZeRO-3 every weight is sharded. What the tests do not do: run on a GPU,
in bfloat16, or with offload.
"""

import math
import os
from pathlib import Path

import pytest
from accelerate import DeepSpeedPlugin

from sq_llava.checkpoints.load import merge_adapter
from sq_llava.training.trainer import SQLlavaTrainer
from tests import ROOT, processes, tiny
from tests.launches import allow_deepspeed_on_cpu, environment_of, held_bytes, launch_environment, write_held_bytes
from tests.runs import (
    PLAIN_DESCENT,
    Run,
    assert_killed_run_equals,
    assert_memory_is_planned,
    assert_similar_runs,
    make_parts,
    poison_row,
    trained_weights,
    write_in_order,
)


os.environ["DS_ACCELERATOR"] = "cpu"  # for the server of the processes
processes.PRELOADED += ["deepspeed"]

LAUNCHES = ["zero2", "zero3"]
COLUMN = {"zero2": "ZeRO-2", "zero3": "ZeRO-3"}
DESCENT = PLAIN_DESCENT | {"learning_rate": 0.05, "question_loss_weight": 0.3, "max_steps": 5, "save_strategy": "no"}
FULL = {"full_finetuning": True, "lora_r": 0, "vision_lora_r": 0}


class ZeroRun(Run):
    """A run as `accelerate launch --config_file recipes/accelerate/LAUNCH.yaml` starts it."""

    def __init__(self, launch: str, parts: Path, folder: Path, num_processes: int = 2, **settings):
        environment = environment_of(launch, num_processes=num_processes)
        settings = {"per_device_train_batch_size": 2, "use_cpu": False} | settings
        super().__init__(parts, folder, num_processes, environment, **settings)

    def start(self, *prepare):
        return super().start(allow_deepspeed_on_cpu, *prepare)


def count_steps() -> None:
    """Prints a line for each step that DeepSpeed applies in this process."""
    from deepspeed.runtime.engine import DeepSpeedEngine

    original = DeepSpeedEngine._take_model_step

    def step(self, *args, **kwargs):
        original(self, *args, **kwargs)
        print("DeepSpeed applied a step" if self._step_applied else "DeepSpeed skipped a step")

    DeepSpeedEngine._take_model_step = step


def poison_row_and_count(row_id: int) -> None:
    poison_row(row_id)
    count_steps()


def poison_gradient(step: int, skipped: bool) -> None:
    """Makes the gradient of a step nan, and not its loss. If not `skipped`, DeepSpeed seems to have applied it."""
    from accelerate.utils import DeepSpeedOptimizerWrapper

    original = SQLlavaTrainer.compute_loss

    def compute_loss(self, *args, **kwargs):
        loss = original(self, *args, **kwargs)
        if self.state.global_step + 1 == step:
            loss.register_hook(lambda gradient: gradient * math.nan)
        return loss

    SQLlavaTrainer.compute_loss = compute_loss
    if not skipped:
        DeepSpeedOptimizerWrapper.step_was_skipped = False
    count_steps()


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> Path:
    return make_parts(tmp_path_factory.mktemp("parts"))


@pytest.fixture(scope="module")
def tied(tmp_path_factory) -> Path:
    return tiny.save_tied_llama(tmp_path_factory.mktemp("tied"))


@pytest.fixture(scope="module")
def stage1(parts, tmp_path_factory) -> tuple[Path, Path]:
    """The adapter of stage 1, and the checkpoint that it is merged into."""
    folder = tmp_path_factory.mktemp("stage1")
    adapter = Run(parts, folder, stage="align", lora_r=0, self_question_ratio=0, max_steps=2).finish()
    merge_adapter(str(adapter), str(folder / "merged"))
    return adapter, folder / "merged"


@pytest.fixture(scope="module")
def one_process(parts, tmp_path_factory):
    """Returns the output folder of a run of one process; each is trained once."""
    outputs = {}

    def output(name: str, **settings) -> Path:
        if name not in outputs:
            folder = tmp_path_factory.mktemp("one")
            outputs[name] = Run(parts, folder, **settings | {"gradient_accumulation_steps": 1}).finish()
        return outputs[name]

    return output


@pytest.mark.parametrize(
    "case",
    ["images first", "text first, accumulated", "packed", "stage 1", "images first, in full", "text first, in full",
     "tied head, in full", "stage 1, in full"],
)  # fmt: skip
@pytest.mark.parametrize("launch", LAUNCHES)
def test_two_processes_equal_one_where_one_sees_text_only(parts, tied, stage1, one_process, tmp_path, launch, case):
    full = "in full" in case
    first = "text" if "text first" in case else "images"
    settings = DESCENT | write_in_order(parts, tmp_path / "ordered.json", first) | (FULL if full else {})
    if "stage 1" in case:
        settings["previous"] = stage1[full]
    elif "tied" in case:
        settings["text_model_name_or_path"] = tied
    elif case == "packed":
        settings |= {"packing": True, "share_images": True, "train_sampling_strategy": "random"}
    expected = one_process(case, **settings)
    if "accumulated" in case:
        settings |= {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
    run = ZeroRun(launch, parts, tmp_path, **settings)
    assert_similar_runs(expected, run.finish(write_held_bytes, tmp_path))
    assert_memory_is_planned(run, held_bytes(tmp_path), COLUMN[launch])


@pytest.mark.parametrize("settings", [{}, FULL], ids=["adapter", "in full"])
@pytest.mark.parametrize("launch", LAUNCHES)
def test_killed_run_resumes_and_leaves_what_one_process_leaves(parts, one_process, tmp_path, launch, settings):
    plain = one_process(f"files, {settings}", **settings, max_steps=1)
    # Three steps per epoch, of which the last has half a batch: the run is killed and resumed there.
    settings = settings | write_in_order(parts, tmp_path / "ordered.json") | {"max_steps": 5}
    whole = ZeroRun(launch, parts, tmp_path / "whole", **settings)
    whole.finish(write_held_bytes, tmp_path)
    assert_memory_is_planned(whole, held_bytes(tmp_path), COLUMN[launch])
    run = ZeroRun(launch, parts, tmp_path / "killed", **settings, resume=True)
    model = assert_killed_run_equals(run, whole.output_dir, plain, tmp_path / "merged")
    if settings.get("full_finetuning"):
        weights = trained_weights(run.output_dir)
        assert {weight.dtype for weight in weights.values()} == {model.dtype}


def test_run_resumes_only_under_its_own_launch(parts, tmp_path):
    ZeroRun("zero2", parts, tmp_path, max_steps=2).finish()
    settings = {"max_steps": 4, "resume": True}
    for other, launched in {
        Run(parts, tmp_path, **settings): "1 process without sharding",
        ZeroRun("zero3", parts, tmp_path, **settings): "2 processes with zero-3",
        ZeroRun("zero2", parts, tmp_path, num_processes=3, **settings): "3 processes with zero-2",
    }.items():
        other.log.write_text("")
        assert 1 in other.exit_codes()
        assert f"was written by 2 processes with zero-2, but this launch has {launched}" in other.text
        assert "zero2.yaml --num_processes 2 -m train_sft ... --resume" in other.text
        assert "Loading weights" not in other.text


def test_checkpoint_of_one_process_is_not_resumed_with_deepspeed(parts, tmp_path):
    Run(parts, tmp_path, max_steps=2).finish()
    run = ZeroRun("zero3", parts, tmp_path, max_steps=4, resume=True)
    assert 1 in run.exit_codes()
    assert "was written by 1 process without sharding, but this launch has 2 processes with zero-3" in run.text
    assert "`python -m train_sft ... --resume`" in run.text


@pytest.mark.parametrize("launch", LAUNCHES)
def test_step_that_is_refused_is_not_applied(parts, tmp_path, launch):
    settings = DESCENT | write_in_order(parts, tmp_path / "ordered.json")
    run = ZeroRun(launch, parts, tmp_path / "nan", **settings)
    assert run.exit_codes(poison_row_and_count, 4) == [1, 1]
    assert "Step 2 was not applied: its loss is nan." in run.text and "rows 4, 5 (loss nan)" in run.text
    assert run.text.count("DeepSpeed applied a step") == 2  # one in each process
    run = ZeroRun(launch, parts, tmp_path / "diverging", **settings, max_loss=1.0)
    assert run.exit_codes(count_steps) == [1, 1]
    assert "Step 1 was not applied: its loss is" in run.text and "above max_loss 1. " in run.text
    assert "DeepSpeed applied a step" not in run.text


@pytest.mark.parametrize("launch", LAUNCHES)
def test_single_process_saves_the_steps_before_one_that_is_refused(parts, tmp_path, launch):
    settings = write_in_order(parts, tmp_path / "ordered.json") | {"max_steps": 5, "per_device_train_batch_size": 4}
    whole = ZeroRun(launch, parts, tmp_path / "whole", num_processes=1, **settings).finish()
    run = ZeroRun(launch, parts, tmp_path / "poisoned", num_processes=1, **settings, resume=True)
    assert run.exit_codes(poison_row, 4) == [1]
    assert "Step 2 was not applied: its loss is nan." in run.text
    assert run.steps_saved == [1]
    assert_similar_runs(whole, run.finish(), atol=1e-7)


@pytest.mark.parametrize("skipped", [True, False], ids=["skipped", "applied"])
@pytest.mark.parametrize("launch", LAUNCHES)
def test_error_says_whether_a_step_whose_gradient_is_not_finite_was_applied(parts, tmp_path, launch, skipped):
    run = ZeroRun(launch, parts, tmp_path, **DESCENT)
    assert run.exit_codes(poison_gradient, 2, skipped) == [1, 1]
    assert run.text.count("DeepSpeed applied a step") == run.text.count("DeepSpeed skipped a step") == 2
    said = "Step 2 was not applied: its gradient norm is inf. Its batches" if skipped else (
        "The gradient norm of step 2 is inf, and DeepSpeed has applied this step"
    )  # fmt: skip
    assert said in run.text


def test_zero3_asks_to_merge_an_adapter_before_full_finetuning(parts, stage1, tmp_path):
    run = ZeroRun("zero3", parts, tmp_path, previous=stage1[0], **FULL)
    assert run.exit_codes() == [1, 1]
    assert f"sq-llava merge {stage1[0]}" in run.text


def test_tied_head_is_trained_with_lora_under_zero2_but_not_zero3(parts, tied, one_process, tmp_path):
    settings = DESCENT | write_in_order(parts, tmp_path / "ordered.json") | {"text_model_name_or_path": tied}
    run = ZeroRun("zero2", parts, tmp_path / "zero2", **settings)
    assert_similar_runs(one_process("tied head", **settings), run.finish())
    run = ZeroRun("zero3", parts, tmp_path / "zero3", **settings)
    assert run.exit_codes() == [1, 1]
    assert "ZeRO-3 cannot train the embedding of [vusr]" in run.text


@pytest.mark.parametrize("launch", [*LAUNCHES, "zero3_offload"])
def test_settings_fit_the_schema_of_deepspeed(launch, monkeypatch):
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    for name, value in launch_environment(ROOT / "recipes" / "accelerate" / f"{launch}.yaml").items():
        monkeypatch.setenv(name, value)
    settings = DeepSpeedPlugin().deepspeed_config["zero_optimization"]
    config = DeepSpeedZeroConfig(**settings)
    assert config.stage == int(launch[4])
    assert config.offload_param.device == config.offload_optimizer.device == ("cpu" if "offload" in launch else "none")
