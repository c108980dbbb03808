"""Two processes train like one, with DDP and with FSDP2; sharded runs are killed, resumed, merged and loaded.

Both are launched with the environment that `accelerate launch` gives its processes.
"""

import json
import os
import subprocess
from pathlib import Path

import pytest
from accelerate import PartialState

from sq_llava.training.sharding import require_same_checkpoint
from tests import ROOT, tiny
from tests.launches import allow_fsdp_on_cpu, environment_of, held_bytes, write_held_bytes
from tests.processes import ended, fork, free_port
from tests.runs import (
    PLAIN_DESCENT,
    Run,
    assert_equal_runs,
    assert_killed_run_equals,
    assert_memory_is_planned,
    assert_similar_runs,
    history,
    kill_at_random_moments,
    write_in_order,
)
from tests.training.test_text_probe import measured, write_probe
from tests.warm_python import warm_python


pytestmark = pytest.mark.slow


DESCENT = PLAIN_DESCENT | {"learning_rate": 0.05, "question_loss_weight": 0.3, "max_steps": 5, "save_strategy": "no"}
FULL = {"full_finetuning": True, "lora_r": 0, "vision_lora_r": 0}
PACKING = {"packing": True, "share_images": True, "train_sampling_strategy": "random"}


class LaunchedRun(Run):
    """A run as `accelerate launch --config_file recipes/accelerate/LAUNCH.yaml --num_processes 2` starts it."""

    def __init__(
        self, launch: str, parts: Path, folder: Path, options: dict | None = None, processes: int = 2, **settings
    ):
        environment = environment_of(launch, num_processes=processes, **(options or {}))
        super().__init__(parts, folder, processes, environment, **{"per_device_train_batch_size": 2} | settings)

    def start(self, *prepare):
        return super().start(allow_fsdp_on_cpu, *prepare)


@pytest.fixture(scope="module")
def tied(tmp_path_factory) -> Path:
    return tiny.save_tied_llama(tmp_path_factory.mktemp("tied"))


ACCUMULATED = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}


def evaluated(rows: Path, parts: Path, folder: Path) -> dict:
    """
    Settings of an evaluation on the ten rows of `write_in_order`. One of two processes has a text-only batch while the
    other has images, and in the end only rows that repeat.
    """
    recipe = folder / "recipe.yaml"
    recipe.write_text(json.dumps({"eval_datasets": [{"path": str(rows), "image_root": str(parts)}]}))
    return {"config": recipe, "eval_strategy": "steps", "eval_steps": 5, "per_device_eval_batch_size": 2}


@pytest.mark.parametrize(
    ("launch", "first", "settings"),
    [
        pytest.param("ddp", "images", ACCUMULATED, marks=pytest.mark.long),
        pytest.param("fsdp2", "images", {}, marks=pytest.mark.long),
        ("fsdp2", "text", ACCUMULATED),
        ("fsdp2", "images", PACKING),
        pytest.param("fsdp2", "text", FULL, marks=pytest.mark.long),
    ],
    ids=["ddp", "images first", "text first, accumulated", "packed", "in full"],
)
def test_two_processes_equal_one_where_one_sees_text_only(parts, tmp_path, launch, first, settings):
    settings = DESCENT | write_in_order(parts, tmp_path / "ordered.json", first) | settings
    settings |= {"text_probe": write_probe(tmp_path)} | evaluated(settings["dataset_path"], parts, tmp_path)
    two = LaunchedRun(launch, parts, tmp_path / "two", **settings)
    two.finish(write_held_bytes, tmp_path)
    assert_memory_is_planned(two, held_bytes(tmp_path), "DDP" if launch == "ddp" else "FSDP2")
    alone = settings | {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1}
    one = Run(parts, tmp_path / "one", **alone).finish()
    assert_similar_runs(one, two.output_dir)
    for step, losses in measured(one).items():
        assert losses == pytest.approx(measured(two.output_dir)[step], rel=1e-4)
    ours, theirs = ([entry for entry in history(folder) if "eval_loss" in entry] for folder in (one, two.output_dir))
    assert len(ours) == len(theirs) == 1
    for name in ("eval_loss_answers", "eval_loss_questions", "eval_mean_token_accuracy", "eval_self_question_share"):
        assert ours[0][name] == pytest.approx(theirs[0][name], rel=1e-4)


@pytest.mark.long
def test_four_processes_replicate_and_shard_and_two_resume_their_run(parts, tmp_path):
    # With this epsilon, Adam does not enlarge the differences of sums in another order.
    settings = DESCENT | {"optim": "adamw_torch", "adam_epsilon": 0.01, "learning_rate": 5e-3}
    settings |= {"lr_scheduler_type": "constant"}
    settings |= write_in_order(parts, tmp_path / "ordered.json") | {"save_strategy": "steps"}
    mesh = {f"parallelism_config_dp_{name}_size": 2 for name in ("replicate", "shard")} | {"num_machines": 1}
    four = settings | {"max_steps": 2, "per_device_train_batch_size": 1}
    run = LaunchedRun("hsdp", parts, tmp_path, mesh, processes=4, **four)
    run.finish(write_held_bytes, tmp_path)
    assert_memory_is_planned(run, held_bytes(tmp_path), "FSDP2", pieces=2)
    resumed = LaunchedRun("fsdp2", parts, tmp_path, **settings, resume=True).finish()
    assert_similar_runs(Run(parts, tmp_path / "one", **settings).finish(), resumed)


def start_launcher(port: int, run: Run, machines: int = 2) -> subprocess.Popen:
    """Starts the launcher of one of several machines, as `recipes/accelerate/multi_node.sbatch` does."""
    counts = f"--nnodes {machines} --nproc_per_node {2 // machines}"
    rendezvous = f"{counts} --rdzv_backend c10d --rdzv_endpoint 127.0.0.1:{port}".split()
    command = [warm_python(), "-m", "torch.distributed.run", *rendezvous, "--local_addr", "127.0.0.1"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo"}
    with run.log.open("a") as log:
        return subprocess.Popen([*command, "-m", "train_sft", *run.args], env=environment, stdout=log, stderr=log)


@pytest.mark.long
def test_two_machines_train_like_one_process(parts, tmp_path):
    settings = DESCENT | write_in_order(parts, tmp_path / "ordered.json") | {"max_steps": 3}
    two = Run(parts, tmp_path / "two", **settings | {"per_device_train_batch_size": 2})
    port = free_port()
    machines = [start_launcher(port, two) for _ in range(2)]
    assert [machine.wait(120) for machine in machines] == [0, 0], two.text[-3000:]
    assert_similar_runs(Run(parts, tmp_path / "one", **settings).finish(), two.output_dir)


@pytest.mark.long
def test_error_of_one_process_ends_the_run_and_the_launcher_names_row_and_process(parts, tmp_path):
    settings = write_in_order(parts, tmp_path / "ordered.json", "text")
    rows = json.loads((tmp_path / "ordered.json").read_text())
    rows[6]["image"] = "missing.png"  # a row of the second process in the second step
    (tmp_path / "ordered.json").write_text(json.dumps(rows))
    run = Run(parts, tmp_path, **settings | {"per_device_train_batch_size": 2, "doctor": "off"})
    assert start_launcher(free_port(), run, machines=1).wait(120) == 1
    root_cause = run.text.partition("Root Cause")[2]
    assert "(local_rank: 1)" in root_cause and "Row 6 (id" in root_cause, run.text[-3000:]


def resume_from_what_is_seen() -> None:
    """Body of one of two processes, of which only the second sees a checkpoint."""
    rank = PartialState(cpu=True).process_index
    require_same_checkpoint("checkpoint-2" if rank else None, num_processes=2)


def test_machine_that_does_not_see_the_checkpoint_stops_the_run(tmp_path):
    log = tmp_path / "log"
    children = fork(resume_from_what_is_seen, (), log, processes=2)
    assert 0 not in ended(children)
    assert "The processes see different checkpoints (none on process 0, checkpoint-2 on process 1)" in log.read_text()


IN_FULL = pytest.param(FULL, marks=pytest.mark.long)


@pytest.mark.long
@pytest.mark.parametrize("settings", [{}, IN_FULL], ids=["adapter", "in full"])
def test_tied_head_is_sharded(parts, tied, tmp_path, settings):
    settings = DESCENT | settings | {"text_model_name_or_path": tied, "max_steps": 3}
    two = LaunchedRun("fsdp2", parts, tmp_path / "two", **settings).finish()
    assert_similar_runs(Run(parts, tmp_path / "one", **settings).finish(), two)


@pytest.mark.long
@pytest.mark.parametrize(
    ("state_dict_type", "settings"),
    [("SHARDED_STATE_DICT", {}), ("FULL_STATE_DICT", FULL)],
    ids=["adapter from shards", "in full"],
)
def test_killed_sharded_run_resumes_and_leaves_what_one_process_leaves(parts, tmp_path, state_dict_type, settings):
    # Three steps per epoch: the run is resumed before the last one, which has half a batch.
    settings = settings | write_in_order(parts, tmp_path / "ordered.json") | {"max_steps": 5}
    options = {"fsdp_state_dict_type": state_dict_type}
    plain = Run(parts, tmp_path / "plain", **settings | {"max_steps": 1}).finish()
    whole = LaunchedRun("fsdp2", parts, tmp_path / "whole", options, **settings)
    whole.finish(write_held_bytes, tmp_path)
    assert_memory_is_planned(whole, held_bytes(tmp_path), "FSDP2")
    run = LaunchedRun("fsdp2", parts, tmp_path / "killed", options, **settings, resume=True)
    assert_killed_run_equals(run, whole.output_dir, plain, tmp_path / "merged")


@pytest.mark.long
def test_sharded_run_killed_at_random_moments_equals_the_uninterrupted_one(parts, tmp_path):
    settings = write_in_order(parts, tmp_path / "ordered.json") | {"max_steps": 15}
    whole = LaunchedRun("fsdp2", parts, tmp_path / "whole", **settings).finish()
    run = LaunchedRun("fsdp2", parts, tmp_path / "killed", **settings, resume=True)
    kill_at_random_moments(run, num_kills=3)
    assert_equal_runs(whole, run.finish())


@pytest.mark.long
def test_sharded_run_resumes_only_under_its_own_launch(parts, tmp_path):
    LaunchedRun("fsdp2", parts, tmp_path, max_steps=2).finish()
    settings = {"max_steps": 4, "resume": True}
    plain = Run(parts, tmp_path, **settings)
    assert plain.exit_codes() == [1]
    assert "was written by 2 processes with fsdp2-full, but this launch has 1 process without sharding." in plain.text
    assert "fsdp2.yaml --num_processes 2 -m train_sft ... --resume" in plain.text
    options = {"fsdp_state_dict_type": "SHARDED_STATE_DICT"}
    sharded = LaunchedRun("fsdp2", parts, tmp_path, options, **settings)
    assert 1 in sharded.exit_codes()
    assert "this launch has 2 processes with fsdp2-sharded" in sharded.text
