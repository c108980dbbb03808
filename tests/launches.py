"""Processes as `accelerate launch --config_file FILE` starts them, and FSDP2 and DeepSpeed on CPUs.

    accelerate launch --config_file recipes/accelerate/fsdp2.yaml --num_processes 2 --mixed_precision no \
        -m tests.launches --config RECIPE

runs `train_sft.py` with FSDP2 over gloo, which needs `ACCELERATE_USE_CPU=true`. With zero2.yaml or zero3.yaml it runs
DeepSpeed, which needs `DS_ACCELERATOR=cpu` and the option `--use_cpu false`. accelerate has both for GPUs only, and
would run DDP or one process without a word; all that it, DeepSpeed and PyTorch do then works on CPUs too.
"""

import json
import os
from collections import Counter
from importlib import import_module
from pathlib import Path

import torch
from accelerate import DeepSpeedPlugin
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from peft.tuners.trainable_tokens.layer import TrainableTokensLayer, gather_params_ctx
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import register_optimizer_step_post_hook

import train_sft
from sq_llava.training.recovery import StepWatch
from tests import ROOT
from tests.processes import environments_of


def launch_environment(file: Path, **options) -> dict[str, str]:
    """The environment in which `accelerate launch --config_file FILE` starts processes."""
    given = [f"--{name}={value}" for name, value in options.items()]
    arguments = launch_command_parser().parse_args([f"--config_file={file}", *given, "train_sft.py"])
    arguments, defaults, _ = _validate_launch_command(arguments)
    if arguments.use_deepspeed:
        arguments.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
        return prepare_deepspeed_cmd_env(arguments)[1]
    return prepare_multi_gpu_env(arguments)


def environment_of(launch: str, **options) -> dict[str, str]:
    """What `recipes/accelerate/LAUNCH.yaml` adds to the environment of processes, here on CPUs in float32."""
    environment = launch_environment(
        ROOT / "recipes" / "accelerate" / f"{launch}.yaml", **{"mixed_precision": "no"} | options
    )
    added = {name: value for name, value in environment.items() if os.environ.get(name) != value}
    # `ACCELERATE_USE_CPU` would make accelerate ignore DeepSpeed.
    device = {"DS_ACCELERATOR": "cpu"} if "ACCELERATE_USE_DEEPSPEED" in added else {"ACCELERATE_USE_CPU": "true"}
    if options.get("num_processes") == 1:  # a launcher gives a single process a rank too
        device |= environments_of(2)[0] | {"WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    return added | device | {"GLOO_SOCKET_IFNAME": "lo"}


def allow_fsdp_on_cpu(*prepare) -> None:
    """Also calls what else is done to a process before it trains: a function, and its arguments."""
    original = AcceleratorState.__init__

    def init(self, *args, fsdp_plugin=None, **kwargs):
        original(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if self.distributed_type == DistributedType.MULTI_CPU and os.environ.get("ACCELERATE_USE_FSDP") == "true":
            self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            self.fsdp_plugin = fsdp_plugin
            if self._mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self._mixed_precision)

    AcceleratorState.__init__ = init
    if prepare:
        function, *arguments = prepare
        function(*arguments)


def allow_deepspeed_on_cpu(*prepare) -> None:
    """Lets accelerate run DeepSpeed on CPUs, where `use_cpu` is false. Then it calls `prepare`, as above."""
    plugin_init = DeepSpeedPlugin.__post_init__

    def init(self):
        plugin_init(self)
        if self.zero_stage == 3:
            # By default, weights of less than 100,000 numbers are not sharded. Tiny models have no others.
            self.deepspeed_config["zero_optimization"]["stage3_param_persistence_threshold"] = 0

    def collect(self, weight, rows, embed_dim):
        with gather_params_ctx([weight], modifier_rank=None):
            return weight[rows].clone()

    DeepSpeedPlugin.__post_init__ = init
    # Without a GPU, accelerate would choose no backend.
    PartialState._prepare_backend = lambda self, *args: ("gloo", DistributedType.MULTI_CPU)
    # Otherwise DeepSpeed would compile a C++ file, for processes that share memory.
    import_module("deepspeed.comm.torch").build_shm_op = lambda: None
    # PEFT's own function makes a tensor on a CUDA device.
    TrainableTokensLayer._collect_token_weights = collect
    if prepare:
        function, *arguments = prepare
        function(*arguments)


def write_held_bytes(folder: Path) -> None:
    """
    Writes the bytes that this process holds after its first step to `folder/held<RANK>.json`: `weights` (also by
    precision), `gradients` and `optimizer`.
    """
    held, shards = Counter(), set()

    def count_optimizer(optimizer, *_) -> None:
        # DeepSpeed steps each parameter group by itself, on flat copies of this process's parts.
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        for parameter in parameters:
            if parameter.grad is not None:
                tensors = {name: state for name, state in optimizer.state[parameter].items() if torch.is_tensor(state)}
                states = [state for name, state in tensors.items() if name != "step"]
                held["gradients"] += _local(parameter.grad).nbytes
                held["optimizer"] += sum(_local(state).nbytes for state in states)
                held[_local(parameter).untyped_storage().data_ptr()] = parameter.nbytes

    original = StepWatch.on_step_end

    def on_step_end(self, args, state, control, model=None, **kwargs):
        original(self, args, state, control, model=model, **kwargs)
        if not shards:
            for tensor in [*model.parameters(), *model.buffers()]:
                local = _local(tensor)
                shards.add(local.untyped_storage().data_ptr())
                held["weights"] += local.nbytes
                held[f"weights in {str(local.dtype).removeprefix('torch.')}"] += local.nbytes
            # Copies of the weights, which only DeepSpeed's optimizer has.
            held["optimizer"] += sum(size for key, size in held.items() if isinstance(key, int) and key not in shards)
            figures = {name: size for name, size in held.items() if isinstance(name, str)}
            (folder / f"held{args.process_index}.json").write_text(json.dumps(figures))

    register_optimizer_step_post_hook(count_optimizer)
    StepWatch.on_step_end = on_step_end


def _local(tensor: torch.Tensor) -> torch.Tensor:
    """The part of a tensor that this process holds, under FSDP2 and ZeRO-3 too."""
    tensor = getattr(tensor, "ds_tensor", tensor)
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def held_bytes(folder: Path) -> dict[str, int]:
    """What `write_held_bytes` wrote, in the process that holds most."""
    processes = [json.loads(file.read_text()) for file in folder.glob("held*.json")]
    return {name: max(process[name] for process in processes) for name in processes[0]}


if __name__ == "__main__":
    if "ACCELERATE_USE_DEEPSPEED" in os.environ:
        allow_deepspeed_on_cpu()
    else:
        allow_fsdp_on_cpu()
    train_sft.main()
    PartialState().destroy_process_group()
