"""Two processes, one of which never sees an image, train like a single process: with DDP, and with FSDP2."""

import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from trl.trainer.utils import add_fused_lm_head

from sq_llava.training.adapter import LoraSize, add_adapter, train_in_full, without_adapter
from tests import tiny
from tests.processes import ended, fork
from tests.runs import PLAIN_DESCENT, Run, assert_similar_runs, write_in_order


pytestmark = pytest.mark.slow


SIZE = LoraSize(4, 8, 0.0)


def test_two_processes_equal_one_where_one_sees_text_only(parts, tmp_path):
    settings = PLAIN_DESCENT | {"question_loss_weight": 0.3, "max_steps": 6}
    settings |= write_in_order(parts, tmp_path / "ordered.json")
    one = Run(parts, tmp_path / "one", **settings).finish()
    for name, size in {"two": 2, "four": 1}.items():
        batch = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 2 // size}
        assert_similar_runs(one, Run(parts, tmp_path / name, 2, **settings | batch).finish())


def prompts_of(config) -> tuple[list[dict], list[dict]]:
    """Makes two prompts with an image, and two text-only prompts."""
    return tuple([tiny.tiny_inputs(config, num_images=n, seed=seed) for seed in (0, 1)] for n in (1, 0))


def summed_loss(model, prompts: list[dict]) -> torch.Tensor:
    """Sums the losses of the last eight words of each prompt."""
    inputs = tiny.left_padded(prompts)
    positions = torch.zeros_like(inputs["input_ids"], dtype=torch.bool)
    positions[:, -9:-1] = True
    labels = inputs["input_ids"][:, -8:].flatten()
    # Like the trainer, which cannot be used here: accelerate does not shard on a CPU.
    return -model(**inputs, positions_to_keep=positions, shift_labels=labels, fused_lm_head=True).log_probs.sum()


def descend(model, prompts: list[dict], processes: int) -> list[float]:
    """Returns the losses of four steps of plain gradient descent, over all processes."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.01)
    curve = []
    for _ in range(4):
        # FSDP averages the gradients over the processes.
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
    """Runs in each of two processes: the first sees only prompts with images, the second only text."""
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
