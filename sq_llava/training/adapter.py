"""One PEFT adapter holds everything that is trained: ViT-LoRA, LLM-LoRA, extractor, projector, and `[vusr]`.

Stage 1 ("align") trains ViT-LoRA, and all weights of extractor and projector. Stage 2 ("instruct") adds LLM-LoRA and
the embedding of `[vusr]`. It starts from a copy of the stage-1 weights. New LoRA B matrices are zero, so stage 2
starts with the logits of stage 1. LLaVA's stage 2 trains all weights of language model and projector, without an
adapter: [`train_in_full`].
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from peft import (
    LoraConfig,
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from peft.tuners.lora import LoraLayer
from peft.utils.constants import DUMMY_TARGET_MODULES
from peft.utils.other import TrainableTokensWrapper
from safetensors.torch import load_file
from torch import nn

from modeling_sq_llava import SQLlavaForConditionalGeneration
from sq_llava.checkpoints.parts import GROUPS, group_of


ADAPTER = "default"


@dataclass(frozen=True)
class LoraSize:
    """Rank, alpha and dropout of the LoRA on one tower; rank 0 means no LoRA."""

    rank: int
    alpha: int
    dropout: float


@dataclass(frozen=True)
class LoraOptions:
    """
    Further options of PEFT's LoRA, with PEFT's names. All but `target_modules` apply to both towers.

    Attributes:
        target_modules (`tuple[str, ...]`, *optional*): Names of linear layers of the language model, such as
            `"q_proj"`. Default: all of its linear layers. LoRA on the vision tower is always on all linear layers.
        use_rslora (`bool`): Scale by alpha / sqrt(rank) instead of alpha / rank (https://arxiv.org/abs/2312.03732).
        use_dora (`bool`): Learn the magnitude of the weights separately from their direction
            (https://arxiv.org/abs/2402.09353).
        init_lora_weights (`bool` or `str`): `True`, `"gaussian"` or `"orthogonal"`. With each of them, a new adapter
            does not change the base's weights, nor its outputs beyond rounding.
    """

    target_modules: tuple[str, ...] | None = None
    use_rslora: bool = False
    use_dora: bool = False
    init_lora_weights: bool | str = True


VISION_PATTERN = ".*vision_tower.*"


def add_adapter(
    model: SQLlavaForConditionalGeneration,
    vision_lora: LoraSize,
    text_lora: LoraSize,
    train_vusr: bool,
    trained_dtype: torch.dtype = torch.float32,
    options: LoraOptions | None = None,
) -> PeftModel:
    """
    Freezes the model and adds a new adapter to it.

    Args:
        model ([`SQLlavaForConditionalGeneration`]): The base model.
        vision_lora ([`LoraSize`]): LoRA on every linear layer of the vision tower whose output is used.
        text_lora ([`LoraSize`]): LoRA on the language model's linear layers: those named in `options`, or all.
        train_vusr (`bool`): Whether to train the embedding of `[vusr]` (if the marker is a token).
        trained_dtype (`torch.dtype`): Precision of all trained weights. bfloat16 would round small updates away.
        options ([`LoraOptions`], *optional*): Default: plain LoRA.

    Returns:
        [`~peft.PeftModel`]: The model with its adapter; only the adapter's weights require gradients.
    """
    options = options or LoraOptions()
    peft_model = get_peft_model(model, _lora_config(model, vision_lora, text_lora, train_vusr, options))
    _set_dropout(peft_model, vision_lora.dropout)
    # PEFT also wraps a head that is tied to the embeddings. TRL's loss reads the head's bias, which the wrapper lacks.
    head = model.get_output_embeddings()
    if isinstance(head, TrainableTokensWrapper):
        head.bias = head.original_module.bias
    # PEFT casts LoRA weights to float32, but keeps extractor and projector in the precision of the base.
    for parameter in peft_model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(trained_dtype)
    return peft_model


def _lora_config(
    model: SQLlavaForConditionalGeneration,
    vision_lora: LoraSize,
    text_lora: LoraSize,
    train_vusr: bool,
    options: LoraOptions,
) -> LoraConfig:
    config = model.config
    modules_to_save = ["multi_modal_projector"]
    if config.prototype_variant != "none":
        modules_to_save.append("prototype_extractor")
    trains_token = train_vusr and config.vusr_token_id is not None
    embeddings = model.input_embeddings_path.rpartition(".")[2]
    return LoraConfig(
        r=text_lora.rank or vision_lora.rank or 1,
        lora_alpha=text_lora.alpha if text_lora.rank else vision_lora.alpha,
        lora_dropout=text_lora.dropout,
        target_modules=_target_pattern(model, vision_lora, text_lora, options.target_modules),
        rank_pattern={VISION_PATTERN: vision_lora.rank} if vision_lora.rank else {},
        alpha_pattern={VISION_PATTERN: vision_lora.alpha} if vision_lora.rank else {},
        use_rslora=options.use_rslora,
        use_dora=options.use_dora,
        init_lora_weights=options.init_lora_weights,
        modules_to_save=modules_to_save,
        trainable_token_indices={embeddings: [config.vusr_token_id]} if trains_token else None,
    )


def _target_pattern(
    model: SQLlavaForConditionalGeneration,
    vision_lora: LoraSize,
    text_lora: LoraSize,
    text_names: tuple[str, ...] | None,
) -> str:
    """A regular expression that matches the names of the linear layers that get LoRA."""
    patterns = []
    if vision_lora.rank:
        # Layers above the feature layer are not run, so LoRA there would get no gradient.
        layers = "|".join(map(str, range(model.config.num_vision_layers_used)))
        names = "|".join(_linear_names(model.model.vision_tower))
        patterns.append(rf"model\.vision_tower\.encoder\.layers\.({layers})\..*\b({names})")
    if text_lora.rank:
        names = "|".join(_text_targets(model, text_names))
        patterns.append(rf"model\.language_model\..*\b({names})")
    # PEFT requires targets; the dummy matches nothing.
    return "|".join(patterns) if patterns else DUMMY_TARGET_MODULES


def _set_dropout(peft_model: PeftModel, vision_dropout: float) -> None:
    """Sets the dropout of the vision tower's LoRA. PEFT's config has only one dropout for all layers."""
    for name, module in peft_model.named_modules():
        if "vision_tower" in name and isinstance(module, LoraLayer):
            module.lora_dropout[ADAPTER] = nn.Dropout(vision_dropout) if vision_dropout else nn.Identity()


def _linear_names(tower: nn.Module) -> list[str]:
    return sorted({name.rpartition(".")[2] for name, module in tower.named_modules() if isinstance(module, nn.Linear)})


def _text_targets(model: SQLlavaForConditionalGeneration, names: tuple[str, ...] | None) -> list[str]:
    """The names of the linear layers that get LoRA. Refuses names that the language model does not have."""
    known = _linear_names(model.model.language_model)
    if not known:
        raise ValueError(
            f"lora_r is above 0, but a language model of type {model.config.text_config.model_type!r} has no layer of "
            "the class torch.nn.Linear. Set lora_r to 0, or choose another language model."
        )
    if unknown := [name for name in names or () if name not in known]:
        raise ValueError(
            f"lora_target_modules contains {', '.join(unknown)}, but the linear layers of this language model are "
            f"{', '.join(known)}. Name only these. (All weights of extractor and projector are trained, the vision "
            "tower has its own LoRA, and TRL's loss would ignore LoRA on lm_head.)"
        )
    return known if names is None else sorted(names)


def load_adapter_weights(model: PeftModel, folder: str) -> None:
    """
    Copies the weights of a saved adapter into the model's adapter, which may have more weights than the saved one.

    Args:
        model ([`~peft.PeftModel`]): A model with an adapter.
        folder (`str`): Folder of the saved adapter, such as the output_dir of stage 1.

    Raises:
        ValueError: if a saved weight does not exist in the model, has another shape there, or would be scaled
            differently.
    """
    file = Path(folder) / "adapter_model.safetensors"
    if not file.is_file():
        raise ValueError(f"{folder} contains no adapter_model.safetensors. Finish the stage that writes it first.")
    weights = load_file(file)
    _require_same_lora(model, folder, list(weights))
    own = get_peft_model_state_dict(model, save_embedding_layers=False)
    for name, weight in weights.items():
        if name not in own or own[name].shape != weight.shape:
            place = f"has shape {tuple(own[name].shape)}" if name in own else "does not exist"
            raise ValueError(
                f"{file}: {name} has shape {tuple(weight.shape)} there, but {place} in this stage. Give the same "
                "vision_lora_r, lora_r, lora_target_modules and prototype settings as for the stage that wrote it; "
                "with lora_r 0 also the same self_question_ratio."
            )
    # PEFT expects all weights of the adapter, including the new ones.
    set_peft_model_state_dict(model, {**own, **weights})


def _require_same_lora(model: PeftModel, folder: str, names: list[str]) -> None:
    """Refuses a model that would scale or use the LoRA weights of the saved adapter differently."""
    before, now = PeftConfig.from_pretrained(folder), model.peft_config[ADAPTER]
    on_vision, on_text = (
        any(f".{tower}." in name and ".lora_A." in name for name in names)
        for tower in ("vision_tower", "language_model")
    )
    pairs = {}
    if on_vision or on_text:
        pairs |= {name: (getattr(before, name), getattr(now, name)) for name in ("use_rslora", "use_dora")}
    if on_vision:
        alphas = [config.alpha_pattern.get(VISION_PATTERN, config.lora_alpha) for config in (before, now)]
        pairs["vision_lora_alpha"] = tuple(alphas)
    if on_text:
        pairs["lora_alpha"] = (before.lora_alpha, now.lora_alpha)
    for name, (old, new) in pairs.items():
        if old != new:
            raise ValueError(
                f"{name} is {new}, but the stage that wrote {folder} used {old}, so its LoRA weights would be scaled "
                f"differently. Set {name} to {str(old).lower()}, or merge that stage first "
                f"(sq-llava merge {folder} --out FOLDER) and start from the merged folder."
            )


def train_in_full(model: SQLlavaForConditionalGeneration, trained_dtype: torch.dtype = torch.float32) -> None:
    """Unfreezes language model, extractor and projector, as LLaVA's stage 2 does. The vision tower stays frozen."""
    model.requires_grad_(False)
    base = model.model
    for part in (base.prototype_extractor, base.multi_modal_projector, base.language_model, model.lm_head):
        for parameter in part.parameters():  # part.to() would also cast the buffers of rotary embeddings
            parameter.requires_grad = True
            parameter.data = parameter.data.to(trained_dtype)


def count_parameters(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Counts (trained, frozen) parameters of each part. Weights that an adapter replaces are counted once."""
    counts = {group: [0, 0] for group in GROUPS}
    for name, parameter in model.named_parameters():
        if ".original_module." in name:
            continue
        # bitsandbytes stores two 4-bit numbers in one element.
        packed = getattr(parameter, "quant_state", None)
        size = parameter.numel() if packed is None else packed.shape.numel()
        counts[group_of(name)][0 if parameter.requires_grad else 1] += size
    return {group: (trained, frozen) for group, (trained, frozen) in counts.items()}


def trained_parameters(model: nn.Module) -> dict[str, list[tuple[str, torch.nn.Parameter]]]:
    """The trained parameters of each part, by name."""
    groups = {group: [] for group in GROUPS}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[group_of(name)].append((name, parameter))
    return groups
