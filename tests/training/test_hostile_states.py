"""Checkpoints of a run whose files hold code are refused in one line before training, and the code does not run."""

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from torch.distributed import checkpoint as sharded

from sq_llava.checkpoints.completeness import RUN_FILE, STATE_FILE, file_sizes
from sq_llava.training.recovery import find_checkpoint, require_plain_states


class Touch:
    """A pickle of it makes a file when it is loaded."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    """The states that transformers saves, complete by their names and sizes."""
    folder = tmp_path / "run" / "checkpoint-2"
    folder.mkdir(parents=True)
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([parameter])
    parameter.sum().backward()
    optimizer.step()
    torch.save(optimizer.state_dict(), folder / "optimizer.pt")
    torch.save(torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0).state_dict(), folder / "scheduler.pt")
    torch.save({"python": (3, (1, 2), None), "cpu": torch.random.get_rng_state()}, folder / "rng_state.pth")
    sharded.save({"a": torch.ones(2)}, checkpoint_id=folder / "pytorch_model_fsdp_0", no_dist=True)
    return folder


def complete(checkpoint: Path) -> str:
    """Writes what a complete checkpoint has, and finds it as `--resume` does."""
    (checkpoint / RUN_FILE).write_text(json.dumps({"files": file_sizes(checkpoint)}))
    (checkpoint / STATE_FILE).write_text("{}")
    return find_checkpoint(str(checkpoint.parent), resume=True, given=None)


def test_states_of_a_run_pass(checkpoint):
    require_plain_states(complete(checkpoint))


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "pytorch_model_fsdp_0/.metadata"])
@pytest.mark.parametrize("kind", ["torch", "pickle", "damaged"])
def test_state_with_code_is_refused_and_the_code_is_not_run(checkpoint, tmp_path, name, kind):
    file, trap = checkpoint / name, tmp_path / "ran"
    if kind == "torch":
        torch.save({"state": Touch(trap)}, tmp_path / "state.pt")
        (tmp_path / "state.pt").replace(file)
    else:
        file.write_bytes(pickle.dumps(Touch(trap)) if kind == "pickle" else file.read_bytes()[:-20])
    with pytest.raises(ValueError, match=rf"{name} was not loaded: it is damaged, or holds") as raised:
        require_plain_states(complete(checkpoint))
    assert "\n" not in str(raised.value) and not trap.exists()
    if kind == "pickle":
        pickle.loads(file.read_bytes())
        assert trap.exists()


def test_arguments_of_the_run_are_not_loaded(checkpoint, tmp_path):
    (checkpoint / "training_args.bin").write_bytes(pickle.dumps(Touch(tmp_path / "ran")))
    require_plain_states(complete(checkpoint))
    assert not (tmp_path / "ran").exists()


def test_index_that_lies_about_its_files_is_refused(checkpoint):
    (checkpoint / "run.json").write_text('{"files": {"../../x": 1}}')
    (checkpoint / STATE_FILE).write_text("{}")
    shutil.rmtree(checkpoint / "pytorch_model_fsdp_0")
    with pytest.raises(ValueError, match=r"\.\./\.\./x is missing"):
        find_checkpoint(str(checkpoint.parent), resume=True, given=None)
