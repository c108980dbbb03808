"""Two processes, of which one never sees an image, equal one process: with DDP in `train_sft.py`, and with FSDP2."""

import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from trl.trainer.utils import add_fused_lm_head

from sq_llava.training.adapter import LoraSize, add_adapter, train_in_full, without_adapter
from tests import tiny
from tests.processes import ended, fork
from tests.runs import arguments, losses, make_parts, run


pytestmark = pytest.mark.slow


SIZE = LoraSize(4, 8, 0.0)


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> Path:
    return make_parts(tmp_path_factory.mktemp("parts"))


def test_two_processes_equal_one_where_one_sees_text_only(parts, tmp_path):
    # In this order, and with batches of two rows a process, the rows of every second batch are text-only.
    rows = json.loads((parts / "train.json").read_text())
    with_image, text_only = ([row for row in rows if ("image" in row) == kind] for kind in (True, False))
    ordered = [row for k in range(0, 6, 2) for row in (*with_image[k : k + 2], *text_only[k : k + 2])]
    (parts / "ordered.json").write_text(json.dumps(ordered))
    settings = {
        "dataset_path": parts / "ordered.json", "train_sampling_strategy": "sequential", "question_loss_weight": 0.3,
        # Plain gradient descent: a difference of gradients is a difference of weights, where Adam divides it away.
        "optim": "sgd", "learning_rate": 0.1, "max_steps": 6, "vision_lora_dropout": 0.0, "lora_dropout": 0.0,
    }  # fmt: skip
    log = tmp_path / "log"
    assert run(arguments(parts, tmp_path / "one", **settings), log) == [0], log.read_text()[-3000:]
    for name, more in {"two": {}, "four": {"gradient_accumulation_steps": 2}}.items():
        size = {"per_device_train_batch_size": 2 if name == "two" else 1}
        two = arguments(parts, tmp_path / name, **settings | size | more)
        assert run(two, log, processes=2) == [0, 0], log.read_text()[-3000:]
    one = load_file(tmp_path / "one" / "adapter_model.safetensors")
    for name in ("two", "four"):
        other = load_file(tmp_path / name / "adapter_model.safetensors")
        assert one.keys() == other.keys()
        for key in one:
            torch.testing.assert_close(other[key], one[key], rtol=0, atol=1e-5, msg=lambda m, key=key: f"{key}: {m}")
        for ours, theirs in zip(losses(tmp_path / "one"), losses(tmp_path / name), strict=True):
            assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-5)


def prompts_of(config) -> tuple[list[dict], list[dict]]:
    """Two prompts with an image, and two text-only ones."""
    return tuple([tiny.tiny_inputs(config, num_images=n, seed=seed) for seed in (0, 1)] for n in (1, 0))


def summed_loss(model, prompts: list[dict]) -> torch.Tensor:
    """Sum of the losses of the eight words at each prompt's end."""
    inputs = tiny.left_padded(prompts)
    positions = torch.zeros_like(inputs["input_ids"], dtype=torch.bool)
    positions[:, -9:-1] = True
    labels = inputs["input_ids"][:, -8:].flatten()
    # As in the trainer, whose accelerate does not shard on a CPU.
    return -model(**inputs, positions_to_keep=positions, shift_labels=labels, fused_lm_head=True).log_probs.sum()


def descend(model, prompts: list[dict], processes: int) -> list[float]:
    """The losses of some steps of plain gradient descent, over all processes."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.01)
    curve = []
    for _ in range(4):
        # FSDP takes the mean of the gradients over the processes.
        loss = summed_loss(model, prompts) / (4 * 8)
        (loss * processes).backward()
        assert all(parameter.grad is not None for parameter in trained)
        optimizer.step()
        optimizer.zero_grad()
        total = loss.detach().clone()
        if processes > 1:
            dist.all_reduce(total)
        curve.append(total.item())
    return curve


def trained_model(full: bool):
    model = tiny.tiny_model()
    add_fused_lm_head(model)
    if full:
        train_in_full(model)
        return model.train()
    return add_adapter(model, SIZE, SIZE, train_vusr=True).train()


def descend_sharded(file: Path, full: bool) -> None:
    """Body of one of two processes: the first sees the prompts with images only, the second those without."""
    dist.init_process_group("gloo")
    model = trained_model(full)
    base = without_adapter(model).model
    mesh = init_device_mesh("cpu", (2,))
    for layer in (*base.language_model.layers, *base.vision_tower.encoder.layers):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    rank = dist.get_rank()
    curve = descend(model, prompts_of(model.config)[rank], processes=2)
    if rank == 0:
        file.write_text(json.dumps(curve))
    dist.destroy_process_group()


@pytest.mark.parametrize("full", [False, True], ids=["adapter", "full"])
def test_fully_sharded_processes_equal_one_where_one_sees_text_only(full, tmp_path):
    file = tmp_path / "curve.json"
    children = fork(descend_sharded, (file, full), tmp_path / "log", processes=2)
    model = trained_model(full)
    pictured, text_only = prompts_of(model.config)
    expected = descend(model, pictured + text_only, processes=1)
    assert ended(children) == [0, 0]
    assert json.loads(file.read_text()) == pytest.approx(expected, abs=1e-5)
    assert expected[-1] < expected[0] - 0.1
