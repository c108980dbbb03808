"""Estimates a run before it starts: gradient accumulation, number of steps, and memory of each GPU.

    python -m train_sft --config recipes/sq-llava-7b/stage2.yaml --dry_run meta --num_gpus 8 --use_cpu true \\
        --vision_model_name_or_path openai/clip-vit-large-patch14-336 \\
        --text_model_name_or_path lmsys/vicuna-7b-v1.5
    accelerate launch -m train_sft --config recipes/sq-llava-7b/stage2.yaml --dry_run real

`meta` needs only the configurations of the models: it builds the model without weights and adds up its memory. `real`
loads everything, trains one step on the longest rows, and measures. Time is not estimated.
"""

import math
import resource
import sys

import datasets
import torch
from rich.console import Console
from rich.filesize import pick_unit_and_suffix
from rich.table import Table
from torch import nn
from transformers import BitsAndBytesConfig
from trl import ModelConfig, SFTConfig, SFTTrainer

from configuration_sq_llava import SQLlavaConfig
from modeling_sq_llava import SQLlavaForConditionalGeneration
from sq_llava.checkpoints.compose import compose_config
from sq_llava.checkpoints.load import without_adapter
from sq_llava.data.rows import hold_out, load_rows
from sq_llava.locations import base_of_adapter, find_config, is_adapter
from sq_llava.training.adapter import count_parameters
from sq_llava.training.memory import SHARDINGS, Batch, Term, estimate_memory, expert_parameters
from sq_llava.training.packing import PackSampler, pack_sampler
from sq_llava.training.settings import SQLlavaArguments
from sq_llava.training.sharding import processes_per_model, sharding_of
from sq_llava.training.stage_model import architecture, prepare_stage, quantization_config, starting_point


# The column of the plan for each sharding. The others keep weights and gradients whole, like DDP.
COLUMN_OF = {"fsdp2-full": "FSDP2", "fsdp2-sharded": "FSDP2", "zero-2": "ZeRO-2", "zero-3": "ZeRO-3"}


def accumulation_steps(global_batch_size: int, per_device_train_batch_size: int, num_processes: int) -> int:
    """
    Computes the gradient accumulation steps for a global batch size.

    Args:
        global_batch_size (`int`): Rows of an optimizer step, over all processes.
        per_device_train_batch_size (`int`): Rows of one forward pass of one process.
        num_processes (`int`): Number of processes.

    Raises:
        ValueError: if the rows of one forward pass over all processes do not divide the global batch size. The
            message lists sizes that do.
    """
    at_once = per_device_train_batch_size * num_processes
    if global_batch_size < 1 or global_batch_size % at_once:
        sizes = [size for size in range(1, global_batch_size + 1) if global_batch_size % (size * num_processes) == 0]
        counts = [
            count
            for count in range(1, global_batch_size + 1)
            if global_batch_size % (count * per_device_train_batch_size) == 0
        ]
        raise ValueError(
            f"global_batch_size is {global_batch_size}, which is not a multiple of {at_once}: {num_processes} "
            f"processes x per_device_train_batch_size {per_device_train_batch_size}. With {num_processes} processes, "
            f"per_device_train_batch_size can be {_one_of(sizes)}. With per_device_train_batch_size "
            f"{per_device_train_batch_size}, the number of processes can be {_one_of(counts)}."
        )
    return global_batch_size // at_once


def complete_settings(arguments: SQLlavaArguments, training_args: SFTConfig) -> int:
    """
    Sets the settings that are the same for every run, and those that follow from others.

    Returns:
        `int`: The number of processes of this launch, or the number planned for with `num_gpus`.
    """
    training_args.remove_unused_columns = False  # the collator makes the model's inputs from our columns
    training_args.ddp_find_unused_parameters = False  # every trained weight is in the graph of every batch
    if training_args.data_seed is None:
        training_args.data_seed = training_args.seed  # else the order of rows depends on PyTorch's generator state
    if arguments.num_gpus is not None and arguments.dry_run != "meta":
        raise ValueError(
            f"num_gpus is {arguments.num_gpus}, which only works with --dry_run meta. In training, the launcher sets "
            "the number of processes: remove num_gpus."
        )
    num_processes = arguments.num_gpus or training_args.world_size
    if (global_batch_size := arguments.global_batch_size) is not None:
        if training_args.gradient_accumulation_steps != 1:
            raise ValueError(
                f"global_batch_size is {global_batch_size} and gradient_accumulation_steps is "
                f"{training_args.gradient_accumulation_steps}. The second follows from the first: remove one of them."
            )
        training_args.gradient_accumulation_steps = accumulation_steps(
            global_batch_size, training_args.per_device_train_batch_size, num_processes
        )
    return num_processes


def _one_of(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers)) if numbers else "no number"


def describe_steps(
    num_rows: int, training_args: SFTConfig, num_processes: int, packs: PackSampler | None = None
) -> str:
    """Describes rows (or packs), global batch, epochs, optimizer steps and warmup of a run in one line."""
    unit, what = ("rows", f"{num_rows:,} rows") if packs is None else ("packs", f"{packs.num_packs:,} packs")
    num_rows = num_rows if packs is None else packs.num_packs
    at_once = training_args.per_device_train_batch_size * num_processes
    accumulation = training_args.gradient_accumulation_steps
    batches = num_rows // at_once if training_args.dataloader_drop_last else math.ceil(num_rows / at_once)
    if batches == 0:
        raise ValueError(
            f"dataloader_drop_last is true, and a batch of all processes has {at_once:,} {unit}, but there are only "
            f"{num_rows:,}: no batch would be trained. Remove dataloader_drop_last."
        )
    per_epoch = math.ceil(batches / accumulation)
    steps = training_args.max_steps
    if steps <= 0:
        steps = math.ceil(training_args.num_train_epochs * per_epoch)
    whole, rest = divmod(steps, per_epoch)  # the last step of an epoch may be smaller
    epochs = whole + rest * accumulation / batches
    warmup = training_args.get_warmup_steps(steps)
    rows = training_args.per_device_train_batch_size
    return (
        f"Steps: {what}, {at_once * accumulation} per step ({num_processes} processes x {rows} {unit} x "
        f"{accumulation} accumulation steps), {per_epoch:,} steps per epoch. "
        f"Total: {steps:,} steps, {epochs:.2f} epochs, {warmup:,} warmup steps."
    )


def print_plan(
    model: nn.Module,
    training_args: SFTConfig,
    num_gpus: int,
    quantization: BitsAndBytesConfig | None,
    packing: bool = False,
) -> None:
    """
    Prints the estimated memory of a model without weights, on rows of maximum length.

    Each row is assumed to have one image; a packed row as many as fit.
    """
    text_config = model.config.get_text_config()
    rows = training_args.per_device_train_batch_size
    tokens = training_args.max_length or text_config.max_position_embeddings
    images = max(1, tokens // model.config.image_seq_length) if packing else 1
    batch = Batch(rows, tokens, rows * images)
    shardings = SHARDINGS if num_gpus > 1 and quantization is None else SHARDINGS[:1]
    estimates = {
        sharding: estimate_memory(model, batch, training_args, num_gpus, sharding, quantization)
        for sharding in shardings
    }
    print_memory(estimates, batch, num_gpus)


def print_memory(estimates: dict[str, list[Term]], batch: Batch, num_gpus: int) -> None:
    """Prints a table of the terms, with one column of sizes for each kind of sharding."""
    title = f"Estimated memory per device: {batch.rows} rows of {batch.tokens:,} tokens"
    columns = [f"{num_gpus} x {sharding}" for sharding in estimates] if num_gpus > 1 else ["1 device"]
    table = Table("", *columns, "How it is computed", title=title)
    for index, term in enumerate(next(iter(estimates.values()))):
        sizes = [size(terms[index].num_bytes) for terms in estimates.values()]
        table.add_row(term.name, *sizes, term.formula)
    totals = [size(sum(term.num_bytes for term in terms)) for terms in estimates.values()]
    table.add_row("total", *totals, "not included: 1 to 2 GiB for CUDA itself, and its allocator's fragmentation")
    Console().print(table)


def size(num_bytes: float) -> str:
    unit, suffix = pick_unit_and_suffix(num_bytes, ["bytes", "KiB", "MiB", "GiB"], 1024)
    return f"{num_bytes / unit:.1f} {suffix}"


def leave_one_step(rows: datasets.Dataset, arguments: SQLlavaArguments, training_args: SFTConfig) -> str:
    """
    Changes the settings to a single step on one batch. Nothing is saved or reported.

    Returns:
        `str`: The description of the steps of the whole run.
    """
    packs = None
    if arguments.packing:
        shared = arguments.rows_per_image_pass
        packs = pack_sampler(rows, training_args, training_args.world_size, max_rows_per_image=shared)
    steps = describe_steps(len(rows), training_args, training_args.world_size, packs)
    training_args.max_steps = training_args.gradient_accumulation_steps = 1
    training_args.save_strategy = training_args.eval_strategy = "no"
    training_args.eval_on_start = training_args.push_to_hub = False
    training_args.report_to = []
    arguments.text_probe = None
    return steps


def longest_rows(rows: datasets.Dataset, count: int) -> datasets.Dataset:
    """Selects the rows with the greatest (approximate) `length`; repeats the last one if there are too few rows."""
    lengths = torch.as_tensor(rows.with_format("numpy")["length"][:])
    order = lengths.argsort(descending=True)[:count].tolist()
    return rows.select([order[min(index, len(order) - 1)] for index in range(count)])


def resident_peak() -> int:
    """Peak resident memory of this process so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def try_one_step(trainer: SFTTrainer, resident_before: int) -> int:
    """
    Trains one step on the longest rows or fullest packs. Prints the estimated and the measured memory.

    Args:
        trainer ([`SFTTrainer`]): A trainer that has not trained, with settings from [`leave_one_step`].
        resident_before (`int`): Value of [`resident_peak`] before the model was loaded, in bytes.

    Returns:
        `int`: The measured memory in bytes.
    """
    args, world_size = trainer.args, trainer.args.world_size
    on_gpu = args.device.type == "cuda"
    if trainer.packs is None:
        rows = longest_rows(trainer.train_dataset, args.per_device_train_batch_size * world_size)
        own = range(args.process_index, len(rows), world_size)
        inputs = trainer.data_collator([rows[index] for index in own])
        trainer.train_dataset = rows
    else:
        trainer.packs.keep_fullest()
        inputs = next(iter(trainer.get_train_dataloader()))
    batch = Batch(*inputs["input_ids"].shape, len(inputs.get("pixel_values", [])))
    sharding = COLUMN_OF.get(sharding_of(trainer.accelerator).removesuffix("-offload"), SHARDINGS[0])
    num_gpus = processes_per_model(trainer.accelerator)
    estimate = estimate_memory(trainer.model, batch, args, num_gpus, sharding, on_gpu=on_gpu)
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    trainer.train()
    peak = torch.cuda.max_memory_allocated() if on_gpu else resident_peak() - resident_before
    if trainer.accelerator.is_main_process:
        print_memory({sharding: estimate}, batch, world_size)
        what = "torch.cuda.max_memory_allocated" if on_gpu else "growth of resident memory since the start"
        which = "longest rows" if trainer.packs is None else "fullest packs"
        print(f"Measured in one step on the {which}: {size(peak)} ({what}).")
    return peak


def print_parameters(model, part_learning_rates: dict[str, float], learning_rate: float) -> None:
    """Prints the trained and frozen parameters and the learning rate of each part."""
    table = Table("Part", "Trained", "Frozen", "Learning rate", title="Parameters")
    for part, (trained, frozen) in count_parameters(model).items():
        rate = part_learning_rates.get(part, learning_rate)
        table.add_row(part, f"{trained:,}", f"{frozen:,}", f"{rate:g}" if trained else "-")
    Console().print(table)
    language_model = without_adapter(model).model.language_model
    experts = [weight for weight in expert_parameters(language_model) if not weight.requires_grad]
    if experts and count_parameters(model)["text"][0]:
        print(
            f"The {sum(weight.numel() for weight in experts):,} expert weights of the language model stay frozen: "
            "LoRA is added to linear layers only, and the experts are stacked in 3D tensors."
        )


def model_from_configs(arguments: SQLlavaArguments, model_config: ModelConfig) -> nn.Module:
    """Builds the model of a stage on the meta device, from the configurations of the models."""
    parts = (arguments.vision_model_name_or_path, arguments.text_model_name_or_path)
    if None not in parts:  # used even if a previous stage is set, because it may not exist yet
        config = compose_config(*parts, arguments.qformer_model_name_or_path, **architecture(arguments))
    else:
        start, _ = starting_point(arguments, model_config)
        base = base_of_adapter(start) if is_adapter(start) else start
        config = SQLlavaConfig.from_pretrained(find_config(base).parent)
    dtype = config.text_config.dtype if model_config.dtype in (None, "auto") else getattr(torch, model_config.dtype)
    with torch.device("meta"):
        model = SQLlavaForConditionalGeneration._from_config(
            config, dtype=dtype, attn_implementation=model_config.attn_implementation
        )
        return prepare_stage(model, None, arguments, model_config)


def plan_from_configs(
    arguments: SQLlavaArguments, training_args: SFTConfig, model_config: ModelConfig, num_gpus: int
) -> None:
    """Prints parameters, memory and steps of a run. It loads only the configurations of the models."""
    model = model_from_configs(arguments, model_config)
    print_parameters(model, arguments.part_learning_rates, training_args.learning_rate)
    print_plan(model, training_args, num_gpus, quantization_config(model_config), arguments.packing)
    try:
        rows = load_rows(arguments.datasets, training_args.seed, without_adapter(model).config.image_seq_length)
        if arguments.num_eval_rows:
            rows, _ = hold_out(rows, arguments.num_eval_rows, training_args.seed)
        packs = pack_sampler(rows, training_args, num_gpus) if arguments.packing else None
    except ValueError as error:
        print(f"Steps: unknown without the data. {error}")
    else:
        print(describe_steps(len(rows), training_args, num_gpus, packs))
        if packs is not None:
            unknown = "text was not tokenized"
            if arguments.share_images:
                unknown += ", and rows with the same image were counted as if they shared nothing"
            print(f"The number of packs is approximate, because {unknown}; --dry_run real counts exactly.")
