"""Estimates the memory of a process in training: weights, gradients, optimizer states, activations.

    terms = estimate_memory(model, Batch(rows=4, tokens=2048, images=4), training_args, num_gpus=8, sharding="FSDP2")
    print(sum(term.num_bytes for term in terms))

Weights, gradients and optimizer states are added up tensor by tensor; tests compare them with what processes really
hold under each launcher. Activations are an upper estimate: on a CPU it was 1.0 to 1.7 times the measured peak of
fourteen small dense models; on a GPU it was not compared.
"""

import math
from dataclasses import dataclass

from torch import nn
from transformers import BitsAndBytesConfig
from trl import SFTConfig

from modeling_sq_llava import UpcastLinear
from sq_llava.checkpoints.load import without_adapter
from sq_llava.training.sharding import stacked_layers


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
SHARDINGS = ("DDP", "FSDP2", "ZeRO-2", "ZeRO-3")
# Size of a tile of logits in TRL's fused LM head: maximum tokens, and vocabulary entries.
HEAD_TOKENS, HEAD_WORDS = 4096, 32768


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
        num_gpus (`int`): Number of processes that `sharding` divides memory among.
        sharding (`str`): One of `SHARDINGS`.
        quantization (`BitsAndBytesConfig`, *optional*): The planned quantization, for a model on the meta device.
        on_gpu (`bool`): Whether TRL's fused head runs its Triton kernels; without them it needs more memory.

    Returns:
        `list[Term]`: The parts of the memory, in bytes.

    Raises:
        ValueError: for an optimizer whose state size is unknown.
    """
    return [
        *_held_terms(model, training_args, num_gpus, sharding, quantization),
        *activation_terms(model, batch, training_args, on_gpu),
    ]


def _held_terms(
    model: nn.Module, training_args: SFTConfig, num_gpus: int, sharding: str, quantization: BitsAndBytesConfig | None
) -> list[Term]:
    """Weights, gradients and optimizer states of one process. The texts hold for each sharding."""
    optim = str(getattr(training_args.optim, "value", training_args.optim))
    if optim not in OPTIMIZER_BYTES:
        raise ValueError(
            f"optim is {optim}, whose memory is unknown. The estimate supports {', '.join(OPTIMIZER_BYTES)}."
        )
    half = training_args.bf16 or training_args.fp16
    is_zero = sharding.startswith("ZeRO")
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    # DeepSpeed keeps trained weights in half precision, and float32 copies of them in its optimizer. It makes copies
    # even of weights in float32.
    itemsize = 2 if is_zero and half else max((parameter.itemsize for parameter in trained), default=4)
    state = OPTIMIZER_BYTES[optim] + (4 if is_zero else 0)
    numbers, own = sum(map(_numbers, trained)), sum(_numbers(p, sharding, num_gpus) for p in trained)
    weights = weight_bytes(model, quantization) - sum(_numbers(p) * (p.itemsize - itemsize) for p in trained)
    if sharding in ("FSDP2", "ZeRO-3"):
        sizes = {p: itemsize if p.requires_grad else p.itemsize for p in model.parameters()}
        weights -= sum((_numbers(p) - _numbers(p, sharding, num_gpus)) * size for p, size in sizes.items())
    count, adam = f"{numbers:,} trained parameters", f"{OPTIMIZER_BYTES[optim]} bytes ({optim})"
    if num_gpus == 1:
        return [
            Term("weights", weights, "all weights, trained and frozen, each in its own precision"),
            Term("gradients", own * itemsize, f"{count} x {itemsize} bytes"),
            Term("optimizer", own * state, f"{count} x {adam}"),
        ]
    gathered = _gathered_bytes(model, half) if sharding in ("FSDP2", "ZeRO-3") else 0
    buckets = 2 if sharding == "DDP" else 1
    return [
        Term("weights", weights, "trained and frozen, each in its own precision; FSDP2 and ZeRO-3 divide them"),
        Term("gathered weights", gathered, "FSDP2 and ZeRO-3: two layers, and all weights outside of layers"),
        Term("gradients", own * itemsize * buckets, f"of {count}; DDP holds them twice, the others divide them"),
        Term("optimizer", own * state, f"{count} x {adam}; ZeRO adds copies of the weights; all but DDP divide it"),
    ]


def _numbers(parameter: nn.Parameter, sharding: str = "DDP", num_gpus: int = 1) -> int:
    """The number of elements of a parameter, or of its part in the first process."""
    shape = getattr(parameter, "ds_shape", parameter.shape)  # ZeRO-3 leaves the parameter itself empty
    if sharding == "FSDP2" and shape:  # divides the first dimension
        return math.ceil(shape[0] / num_gpus) * math.prod(shape[1:])
    return math.ceil(math.prod(shape) / (1 if sharding == "DDP" else num_gpus))


def _gathered_bytes(model: nn.Module, half: bool) -> float:
    """Bytes of the weights that a process gathers at one time in the forward pass."""

    def size(module: nn.Module) -> int:
        return sum(_numbers(p) * (2 if half else p.itemsize) for p in module.parameters())

    layers = [size(layer) for layer in stacked_layers(model)]
    return size(model) - sum(layers) + sum(sorted(layers)[-2:])


def weight_bytes(model: nn.Module, quantization: BitsAndBytesConfig | None = None) -> float:
    """Bytes of all weights and buffers (shared ones once), after the planned quantization if there is one."""
    tensors = {id(tensor): tensor for tensor in model.buffers()}
    scales = []
    for parameter in model.parameters():
        if (state := getattr(parameter, "quant_state", None)) is not None:  # 4 bits: scales of blocks
            nested = [state.state2.absmax, state.state2.code] if state.nested else []
            scales += [state.absmax, state.code, *nested]
        if (scale := getattr(parameter, "SCB", None)) is not None:  # 8 bits: scales of rows
            scales.append(scale)
    total = float(sum(tensor.nbytes for tensor in [*tensors.values(), *scales]))
    total += sum(_numbers(parameter) * parameter.itemsize for parameter in model.parameters())
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
