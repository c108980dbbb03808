"""How a launch divides a model among its processes, and what FSDP2 and DeepSpeed need besides accelerate.

A sharding has one of these names, also in `run.json` of a checkpoint: `"none"` (one process, or DDP), `"fsdp2-full"`,
`"fsdp2-sharded"`, `"zero-1"`, `"zero-2"`, `"zero-3"`, `"zero-3-offload"`. The sharding itself is done by accelerate.
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from accelerate import Accelerator, DeepSpeedPlugin, FullyShardedDataParallelPlugin, ParallelismConfig
from accelerate.utils import DistributedType, gather_object
from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers.distributed.fsdp import is_fsdp_enabled
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.training_args import TrainingArguments

from sq_llava.checkpoints.completeness import RUN_FILE


NONE = "none"
# The launch that resumes a checkpoint of each sharding.
LAUNCHES = {
    NONE: "accelerate launch --config_file recipes/accelerate/ddp.yaml",
    "fsdp2-full": "accelerate launch --config_file recipes/accelerate/fsdp2.yaml",
    "fsdp2-sharded": "accelerate launch --config_file recipes/accelerate/fsdp2.yaml "
    "--fsdp_state_dict_type SHARDED_STATE_DICT",
    "zero-2": "accelerate launch --config_file recipes/accelerate/zero2.yaml",
    "zero-3": "accelerate launch --config_file recipes/accelerate/zero3.yaml",
    "zero-3-offload": "accelerate launch --config_file recipes/accelerate/zero3_offload.yaml",
}


def sharding_asked_for(training_args: TrainingArguments) -> str:
    """
    Returns the sharding of the launch settings. It is known before a model is loaded.

    Raises:
        ValueError: if the launch asks for a kind of parallelism that does not work here.
    """
    if os.environ.get("ACCELERATE_USE_PARALLELISM_CONFIG", "false").lower() == "true":
        _require_data_parallel(ParallelismConfig(), training_args.world_size)
    if training_args.deepspeed_plugin is not None:
        return _zero_name(training_args.deepspeed_plugin)
    if training_args.fsdp_plugin_args is not None:
        return _fsdp_name(FullyShardedDataParallelPlugin(**training_args.fsdp_plugin_args))
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        return _fsdp_name(FullyShardedDataParallelPlugin())
    return NONE


def _fsdp_name(plugin: FullyShardedDataParallelPlugin) -> str:
    if plugin.fsdp_version != 2:
        raise ValueError(
            "The launch asks for FSDP1, which is not supported. Set fsdp_version to 2, as in "
            "recipes/accelerate/fsdp2.yaml."
        )
    return "fsdp2-full" if "FULL" in str(plugin.state_dict_type) else "fsdp2-sharded"


def _require_data_parallel(mesh: ParallelismConfig, num_processes: int) -> None:
    """A mesh may only replicate and shard (HSDP): the loss needs whole sequences in each process."""
    sizes = {name: getattr(mesh, name, 1) for name in ("tp_size", "cp_size", "sp_size")}  # older ones have no sp_size
    if others := [f"{name} {size}" for name, size in sizes.items() if size > 1]:
        raise ValueError(
            f"The launch sets {', '.join(others)}. The loss needs whole sequences in each process, so tensor, context "
            "and sequence parallelism do not work: use recipes/accelerate/hsdp.yaml, fsdp2.yaml or zero3.yaml."
        )
    if mesh.data_parallel_size != num_processes:
        raise ValueError(
            f"The launch has dp_replicate_size {mesh.dp_replicate_size} and dp_shard_size {mesh.dp_shard_size}, which "
            f"is {mesh.data_parallel_size} processes, but {num_processes} were started. Set "
            "--parallelism_config_dp_replicate_size and --parallelism_config_dp_shard_size, so that their product is "
            f"{num_processes}."
        )


def processes_per_model(accelerator: Accelerator) -> int:
    """Returns the number of processes that hold one copy of a sharded model together."""
    mesh = accelerator.parallelism_config
    return accelerator.num_processes if mesh is None else mesh.dp_shard_size


def sharding_of(accelerator: Accelerator) -> str:
    """Returns the sharding that accelerate really uses."""
    if accelerator.distributed_type == DistributedType.FSDP:
        return _fsdp_name(accelerator.state.fsdp_plugin)
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return _zero_name(accelerator.state.deepspeed_plugin)
    return NONE


def _zero_name(plugin: DeepSpeedPlugin) -> str:
    # With offload, DeepSpeed uses its own optimizer, which has other states.
    offloads = {plugin.offload_optimizer_device, plugin.offload_param_device} - {"none", None}
    return f"zero-{plugin.zero_stage}{'-offload' if offloads else ''}" if plugin.zero_stage else NONE


def loads_in_pieces() -> bool:
    """Returns whether only the first process holds a whole model: ZeRO-3, or FSDP2 with efficient loading."""
    return is_deepspeed_zero3_enabled() or is_fsdp_enabled()


def require_launch(asked: str, accelerator: Accelerator) -> None:
    """
    Raises:
        ValueError: if accelerate ignores the sharding of the launch, as it does on a CPU.
    """
    if (sharding := sharding_of(accelerator)) != asked:
        raise ValueError(
            f"The launch asks for {asked}, but accelerate runs {sharding} on this device ({accelerator.device}), with "
            "all weights in each process. FSDP and DeepSpeed need GPUs: launch with recipes/accelerate/ddp.yaml here."
        )


def require_same_checkpoint(checkpoint: str | None, num_processes: int) -> None:
    """
    Raises:
        ValueError: if the processes would resume from different checkpoints. Then a machine does not see `output_dir`.
    """
    if num_processes == 1:
        return
    found = gather_object([checkpoint])
    if len(set(found)) > 1:
        which = ", ".join(f"{name or 'none'} on process {rank}" for rank, name in enumerate(found))
        raise ValueError(
            f"The processes see different checkpoints ({which}). Give an output_dir that all machines share."
        )


def require_resumable(checkpoint: str, sharding: str, num_processes: int) -> None:
    """
    Raises:
        ValueError: if this launch cannot read the states of optimizer and scheduler, because it has another sharding,
            or with DeepSpeed another number of processes.
    """
    run = json.loads((Path(checkpoint) / RUN_FILE).read_text())
    before, processes = run.get("sharding", NONE), run["num_processes"]
    # A DeepSpeed checkpoint has one part per process.
    wrong_number = before.startswith("zero-") and processes != num_processes
    if before == sharding and not wrong_number:
        return
    if before == NONE and processes == 1:
        command = "python"
    else:
        launch = LAUNCHES.get(before, f"accelerate launch, with DeepSpeed's {before},")
        command = f"{launch} --num_processes {processes}"
    raise ValueError(
        f"{checkpoint} was written by {_describe(before, processes)}, but this launch has "
        f"{_describe(sharding, num_processes)}. It cannot read the states of optimizer and scheduler. Resume with "
        f"`{command} -m train_sft ... --resume`."
    )


def _describe(sharding: str, num_processes: int) -> str:
    """A launch in words, such as `2 processes with fsdp2-full`."""
    processes = "1 process" if num_processes == 1 else f"{num_processes} processes"
    return f"{processes} {'without sharding' if sharding == NONE else f'with {sharding}'}"


def wrap_layers(plugin: FullyShardedDataParallelPlugin, model: nn.Module) -> None:
    """
    Makes FSDP2 shard layer by layer, whatever the towers are.

    The Trainer replaces the wrap policy of the launch by PEFT's, which accelerate 1.15 ignores for FSDP2. Without this
    function no layer would be wrapped, and all weights would be gathered at once.
    """
    if plugin.transformer_cls_names_to_wrap is None:
        plugin.transformer_cls_names_to_wrap = sorted({type(layer).__name__ for layer in stacked_layers(model)})
    os.environ["FSDP_TRANSFORMER_CLS_TO_WRAP"] = ",".join(plugin.transformer_cls_names_to_wrap)  # PEFT reads it
    policy = plugin.auto_wrap_policy
    plugin.set_auto_wrap_policy = lambda model: setattr(plugin, "auto_wrap_policy", policy)


def stacked_layers(model: nn.Module) -> Iterator[nn.Module]:
    """Yields all stacked layers, the members of each outermost `ModuleList`."""
    for child in model.children():
        if isinstance(child, nn.ModuleList):
            yield from child
        else:
            yield from stacked_layers(child)


@contextmanager
def embeddings_in_the_root_unit(model: nn.Module) -> Iterator[None]:
    """
    Keeps accelerate from making FSDP units of the embeddings and the head, and from untying them.

    TRL's loss multiplies by the weight of the head and does not call the head. If the head were its own unit, its
    gradient would not be averaged over the processes. accelerate ties weights by their names, which PEFT changes, so
    they are tied here.
    """
    shared = shared_parameters(model)

    def tie_weights() -> None:
        for (owner, name), *others in shared:
            for module, other_name in others:
                module._parameters[other_name] = owner._parameters[name]

    replaced = {
        "get_input_embeddings": lambda: None,
        "get_output_embeddings": lambda: None,
        "tie_weights": tie_weights,
    }
    for name, function in replaced.items():
        setattr(model, name, function)
    try:
        yield
    finally:
        for name in replaced:
            delattr(model, name)


def shared_parameters(model: nn.Module) -> list[list[tuple[nn.Module, str]]]:
    """Returns each parameter that several modules share, as a list of (module, name of the parameter in it)."""
    places: dict[nn.Parameter, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                places.setdefault(parameter, []).append((module, name))
    return [found for found in places.values() if len(found) > 1]


@contextmanager
def own_class(model: nn.Module) -> Iterator[None]:
    """
    Gives a model its original class while it is saved.

    FSDP2 replaces the class. `save_pretrained` would then save the name of that class, and a code file of PyTorch.
    """
    sharded_class = type(model)
    if isinstance(model, FSDPModule):
        model.__class__ = next(parent for parent in sharded_class.__mro__[1:] if not issubclass(parent, FSDPModule))
    try:
        yield
    finally:
        model.__class__ = sharded_class
