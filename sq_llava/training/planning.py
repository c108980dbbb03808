"""Estimates a run before it starts: gradient accumulation, number of steps, and memory of each GPU.

    python -m train_sft --config recipes/sq-llava-7b/stage2.yaml --dry_run meta --num_gpus 8 --use_cpu true \\
        --vision_model_name_or_path openai/clip-vit-large-patch14-336 \\
        --text_model_name_or_path lmsys/vicuna-7b-v1.5
    accelerate launch -m train_sft --config recipes/sq-llava-7b/stage2.yaml --dry_run real

`meta` needs only the configurations of the models: it builds the model without weights and adds up its memory. `real`
loads everything, trains one step on the longest rows, and measures. Weights, gradients and optimizer states are added
up tensor by tensor. Activations are an upper estimate: on a CPU it was 1.0 to 1.7 times the measured peak of fourteen
small dense models; on a GPU it was not compared. Time is not estimated.
"""

import math
import resource
import sys
from dataclasses import dataclass

import datasets
import torch
from rich.console import Console
from rich.filesize import pick_unit_and_suffix
from rich.table import Table
from torch import nn
from transformers import BitsAndBytesConfig
from trl import ModelConfig, SFTConfig, SFTTrainer

from configuration_sq_llava import SQLlavaConfig
from modeling_sq_llava import SQLlavaForConditionalGeneration, UpcastLinear
from sq_llava.checkpoints.compose import compose_config
from sq_llava.data.rows import hold_out, load_rows
from sq_llava.locations import base_of_adapter, find_config, is_adapter
from sq_llava.training.adapter import count_parameters, without_adapter
from sq_llava.training.packing import PackSampler, pack_sampler
from sq_llava.training.settings import SQLlavaArguments
from sq_llava.training.sharding import sharding_of
from sq_llava.training.stage_model import architecture, prepare_stage, quantization_config, starting_point


# Bytes of optimizer state for each trained (float32) parameter.
OPTIMIZER_BYTES = {
    "adamw_torch": 8,
    "adamw_torch_fused": 8,
    "adamw_8bit": 2,
    "adamw_bnb_8bit": 2,
    "paged_adamw_8bit": 2,
    "paged_adamw_32bit": 8,
    "sgd": 0,
}
SHARDINGS = ("DDP", "ZeRO-2", "ZeRO-3, FSDP2")
SHARDING_OF = {
    "zero-2": SHARDINGS[1],
    "zero-3": SHARDINGS[2],
    "fsdp2-full": SHARDINGS[2],
    "fsdp2-sharded": SHARDINGS[2],
}
# Size of a tile of logits in TRL's fused LM head: maximum tokens, and vocabulary entries.
HEAD_TOKENS, HEAD_WORDS = 4096, 32768


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


@dataclass(frozen=True)
class Batch:
    """The batch of one device in one forward pass: rows, tokens of the longest row (with image tokens), and images."""

    rows: int
    tokens: int
    images: int


@dataclass(frozen=True)
class Term:
    """One part of the memory of a GPU: its name, its size in bytes, and how the size is computed, in words."""

    name: str
    num_bytes: float
    formula: str


def estimate_memory(
    model: nn.Module,
    batch: Batch,
    training_args: SFTConfig,
    num_gpus: int = 1,
    sharding: str = "DDP",
    quantization: BitsAndBytesConfig | None = None,
    on_gpu: bool = True,
) -> list[Term]:
    """
    Estimates the memory of one GPU.

    Args:
        model ([`~torch.nn.Module`]): The model with its adapter, or trained in full. Its weights may be on the meta
            device.
        batch ([`Batch`]): The batch of one device.
        training_args (`SFTConfig`): Settings; `optim`, `gradient_checkpointing`, `bf16` and `fp16` matter here.
        num_gpus (`int`): Number of GPUs that `sharding` divides memory among.
        sharding (`str`): One of `SHARDINGS`.
        quantization (`BitsAndBytesConfig`, *optional*): The planned quantization, for a model on the meta device.
        on_gpu (`bool`): Whether TRL's fused head runs its Triton kernels; without them it needs more memory.

    Returns:
        `list[Term]`: The parts of the memory, in bytes.

    Raises:
        ValueError: for an optimizer whose state size is unknown.
    """
    full, half = sharding == SHARDINGS[2], sharding == SHARDINGS[1]
    pieces = num_gpus if full or half else 1
    buckets = 2 if num_gpus > 1 and not (full or half) else 1
    return [
        _weight_term(model, quantization, pieces if full else 1),
        *_optimizer_terms(model, training_args, pieces, buckets),
        *activation_terms(model, batch, training_args, on_gpu),
    ]


def _weight_term(model: nn.Module, quantization: BitsAndBytesConfig | None, pieces: int) -> Term:
    weights = weight_bytes(model, quantization)
    if pieces == 1:
        return Term("weights", weights, "all weights, trained and frozen, each in its own precision")
    gathered = 2 * max(sum(p.nbytes for p in layer.parameters()) for layer in _layers(_text_tower(model)))
    formula = f"all weights / {pieces} GPUs + two gathered layers"
    return Term("weights", weights / pieces + gathered, formula)


def _optimizer_terms(model: nn.Module, training_args: SFTConfig, pieces: int, buckets: int) -> list[Term]:
    """Gradients and the optimizer's state."""
    optim = str(getattr(training_args.optim, "value", training_args.optim))
    if optim not in OPTIMIZER_BYTES:
        raise ValueError(
            f"optim is {optim}, whose memory is unknown. The estimate supports {', '.join(OPTIMIZER_BYTES)}."
        )
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    numbers, gradients = sum(p.numel() for p in trained), sum(p.nbytes for p in trained)
    count, state = f"{numbers:,} trained parameters x", OPTIMIZER_BYTES[optim]
    in_buckets = " x 2 (DDP's buckets)" if buckets == 2 else ""
    in_pieces = f" / {pieces} GPUs" if pieces > 1 else ""
    formula = f"{count} {gradients / max(numbers, 1):.0f} bytes{in_buckets}{in_pieces}"
    return [
        Term("gradients", gradients * buckets / pieces, formula),
        Term("optimizer", numbers * state / pieces, f"{count} {state} bytes ({optim}){in_pieces}"),
    ]


def weight_bytes(model: nn.Module, quantization: BitsAndBytesConfig | None = None) -> float:
    """Bytes of all weights and buffers (shared ones once), after the planned quantization if there is one."""
    tensors = {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}
    scales = []
    for parameter in model.parameters():
        if (state := getattr(parameter, "quant_state", None)) is not None:  # 4 bits: scales of blocks
            nested = [state.state2.absmax, state.state2.code] if state.nested else []
            scales += [state.absmax, state.code, *nested]
        if (scale := getattr(parameter, "SCB", None)) is not None:  # 8 bits: scales of rows
            scales.append(scale)
    total = float(sum(tensor.nbytes for tensor in [*tensors.values(), *scales]))
    if quantization is not None:
        for name, module in model.named_modules():
            in_tower = ".vision_tower." in name or ".language_model." in name
            if in_tower and ".lora_" not in name and type(module) is nn.Linear:
                total -= module.weight.nbytes
                total += quantized_bytes(module, quantization)
    return total


def quantized_bytes(linear: nn.Linear, quantization: BitsAndBytesConfig) -> float:
    """Bytes of a linear layer's weight after quantization, with its scales."""
    numbers = linear.weight.numel()
    if quantization.load_in_8bit:
        return numbers + 4 * linear.out_features
    # One scale for 64 numbers: a float32, or (nested) one byte plus a float32 for every 256 scales. Each weight also
    # has a table of 16 float32 values.
    scale = 1 + 4 / 256 if quantization.bnb_4bit_use_double_quant else 4
    return numbers / 2 + numbers / 64 * scale + 64


def activation_terms(model: nn.Module, batch: Batch, training_args: SFTConfig, on_gpu: bool = True) -> list[Term]:
    """An upper estimate of what the forward pass keeps for the backward pass, and of the largest workspace."""
    base = without_adapter(model)
    config, text_config = base.config, base.config.get_text_config()
    held = base.get_input_embeddings().weight.itemsize
    # Bytes for each input and output feature of a linear layer (LoRA included) at one position. Measurements show that
    # the size of the number plus 2 bytes also covers activations between the layers and the backward pass.
    feature_bytes = held + 2
    tokens = batch.rows * batch.tokens
    # A text-only batch runs the vision side on one blank image.
    patches = max(batch.images, 1) * (config.num_vision_tokens + 1)
    towers = {
        "text": (_layers(_text_tower(model)), tokens, batch.tokens, text_config),
        "vision": (
            _layers(base.model.vision_tower)[: config.num_vision_layers_used],
            patches,
            config.num_vision_tokens + 1,
            config.vision_config,
        ),
    }
    terms = []
    workspaces = {"the language model's head": _head_bytes(text_config, tokens, held, training_args, on_gpu)}
    for name, (layers, positions, length, tower_config) in towers.items():
        experts_per_token = getattr(tower_config, "num_experts_per_tok", None) or 1
        inside = positions * feature_bytes * max(_features(layer, experts_per_token) for layer in layers)
        if config._attn_implementation == "eager":
            inside += positions * length * tower_config.num_attention_heads * 12
        width, count = tower_config.hidden_size, len(layers)
        if training_args.gradient_checkpointing:
            kept, formula = count * positions * width * held, f"{width} x {held} bytes: the input of each layer"
            workspaces[f"the inside of a {name} layer"] = inside
        else:
            kept, formula = count * inside, "all inner activations: no gradient checkpointing"
        terms.append(Term(f"activations, {name}", kept, f"{count} layers x {positions:,} positions x {formula}"))
    connector = 6 * (_features(base.model.prototype_extractor) + _features(base.model.multi_modal_projector))
    connector += 16 * config.num_prototypes * (config.num_prototype_iterations + 1)
    formula = f"{patches:,} image tokens x {connector:,} bytes: prototypes and projections"
    terms.append(Term("activations, connector", patches * connector, formula))
    # FlashAttention takes lengths instead of a mask.
    mask = 0 if "flash" in config._attn_implementation else tokens * batch.tokens * held
    formula = f"{tokens:,} x {batch.tokens:,} x {held} bytes" if mask else "none: FlashAttention"
    terms.append(Term("attention mask", mask, formula))
    largest = max(workspaces, key=workspaces.get)
    return [*terms, Term("workspace", workspaces[largest], f"of the largest part: {largest}")]


def _head_bytes(text_config, tokens: int, held: int, training_args: SFTConfig, on_gpu: bool) -> int:
    """Memory of TRL's fused LM head: a tile of logits, the hidden states, and their gradient in float32."""
    tile, words = min(tokens, HEAD_TOKENS), min(text_config.vocab_size, HEAD_WORDS)
    precision = 2 if training_args.bf16 or training_args.fp16 else held
    total = tokens * text_config.hidden_size * (held + 8) + tile * HEAD_WORDS * precision
    # Without Triton, PyTorch makes several copies of the tile, and casts the head's weight to float32.
    return total if on_gpu else total + tile * words * 28 + words * text_config.hidden_size * 4


def _text_tower(model: nn.Module) -> nn.Module:
    return without_adapter(model).model.language_model


def _layers(tower: nn.Module) -> nn.ModuleList:
    return max((module for module in tower.modules() if isinstance(module, nn.ModuleList)), key=len)


def _features(module: nn.Module, experts_per_token: int = 1) -> int:
    linears = [m for m in module.modules() if isinstance(m, (nn.Linear, UpcastLinear))]
    of_experts = sum(sum(parameter.shape[1:]) for parameter in expert_parameters(module))
    return sum(linear.in_features + linear.out_features for linear in linears) + experts_per_token * of_experts


def expert_parameters(module: nn.Module) -> list[nn.Parameter]:
    """The expert weights of a mixture of experts. All experts of a layer share one 3D tensor, not linear layers."""
    return [
        parameter
        for name, parameter in module.named_parameters()
        if ".experts." in f".{name}" and ".lora_" not in name and parameter.ndim == 3
    ]


def describe_steps(
    num_rows: int, training_args: SFTConfig, num_processes: int, packs: PackSampler | None = None
) -> str:
    """Describes rows (or packs), global batch, epochs, optimizer steps and warmup of a run in one line."""
    unit, what = ("rows", f"{num_rows:,} rows") if packs is None else ("packs", f"{packs.num_packs:,} packs")
    num_rows = num_rows if packs is None else packs.num_packs
    at_once = training_args.per_device_train_batch_size * num_processes
    accumulation = training_args.gradient_accumulation_steps
    batches = math.ceil(num_rows / at_once)
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
    sharding = SHARDING_OF.get(sharding_of(trainer.accelerator).removesuffix("-offload"), SHARDINGS[0])
    estimate = estimate_memory(trainer.model, batch, args, world_size, sharding, on_gpu=on_gpu)
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
    experts = [weight for weight in expert_parameters(_text_tower(model)) if not weight.requires_grad]
    if experts and count_parameters(model)["text"][0]:
        print(
            f"The {sum(weight.numel() for weight in experts):,} expert weights of the language model stay frozen: "
            "LoRA is added to linear layers only, and the experts are stacked in 3D tensors."
        )


def plan_from_configs(
    arguments: SQLlavaArguments, training_args: SFTConfig, model_config: ModelConfig, num_gpus: int
) -> None:
    """Prints parameters, memory and steps of a run. It loads only the configurations of the models."""
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
        model = prepare_stage(model, None, arguments, model_config)
    print_parameters(model, arguments.part_learning_rates, training_args.learning_rate)
    print_plan(model, training_args, num_gpus, quantization_config(model_config), arguments.packing)
    try:
        rows = load_rows(arguments.datasets, training_args.seed, config.image_seq_length)
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
