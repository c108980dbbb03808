"""Maps the tensors of a released checkpoint to the weights of the model, merges LoRA, and writes files of weights.

`KEY_TABLE` translates all names in released checkpoints. Every tensor of a source must be used or be of a known unused
kind, and every weight must have exactly one source or be declared new. The configuration of the model is made in
`sq_llava/checkpoints/convert.py`.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import torch
from peft.utils.other import get_pattern_key

from sq_llava.checkpoints.layouts import Layout
from sq_llava.checkpoints.parts import group_of
from sq_llava.checkpoints.weight_files import SAFETENSORS_NAMES, Tensor, WeightFile


# Names in released checkpoints, and the names in SQLlavaForConditionalGeneration. The first pattern that matches wins.
KEY_TABLE = (
    # The tower: in the original code; in transformers (older, 4.52 and later, 5.x); in a separate CLIP or SigLIP.
    (r"(?:model\.)?vision_tower\.(?:vision_tower\.)?(?:vision_model\.)?(.+)", r"model.vision_tower.\1"),
    (r"(?:vision_model\.)?((?:embeddings|pre_layrnorm|encoder|post_layernorm|head)\..+)", r"model.vision_tower.\1"),
    # The authors' projector has extractor and MLP in one module.
    (r"(?:model\.)?mm_projector\.((?:c|v|f|ln_1)\.(?:weight|bias))", r"model.prototype_extractor.\1"),
    (r"(?:model\.)?mm_projector\.(sim_alpha|sim_beta)", r"model.prototype_extractor.\1"),
    (r"(?:model\.)?mm_projector\.(?:(?:mlp\.)?0\.)?(weight|bias)", r"model.multi_modal_projector.linear_1.\1"),
    (r"(?:model\.)?mm_projector\.(?:mlp\.)?2\.(weight|bias)", r"model.multi_modal_projector.linear_2.\1"),
    # Other projectors. They are an error, except in a base, where the projector of the source replaces them.
    (r"(?:model\.)?mm_projector\.(.+)", r"model.multi_modal_projector.\1"),
    (r"(?:model\.)?multi_modal_projector\.(.+)", r"model.multi_modal_projector.\1"),
    # The language model.
    (r"(?:language_model\.)?lm_head\.(.+)", r"lm_head.\1"),
    (r"language_model\.model\.(.+)", r"model.language_model.\1"),
    (r"model\.(?:language_model\.)?(.+)", r"model.language_model.\1"),
)
# Tensors in released files that no forward pass of these models reads.
UNUSED = {
    r".*\.rotary_emb\.inv_freq": "inv_freq: buffers of the rotary positions, which are computed instead",
    r".*\.position_ids": "position_ids: buffers that number the positions",
    r".*mm_projector\.ln_1\.(?:weight|bias)": "ln_1: a layer norm that the authors' forward pass never applies",
    r"text_model\..+": "text_model: the text tower of CLIP",
    r"(?:visual_projection|text_projection)\..+": "projection: CLIP's projections of images and texts",
    r"logit_scale|logit_bias": "logit_scale: parameters of CLIP's loss",
}
LORA = re.compile(r"(.+)\.lora_([AB])(?:\.default)?\.weight")
EMBEDDINGS = "model.language_model.embed_tokens.weight"
HEAD = "lm_head.weight"


def weight_name(name: str) -> str:
    """
    Translates the name of a tensor in a released checkpoint to its name in `SQLlavaForConditionalGeneration`.

        model.mm_projector.v.weight -> model.prototype_extractor.v.weight
        base_model.model.model.layers.0.mlp.up_proj.weight -> model.language_model.layers.0.mlp.up_proj.weight

    Raises:
        ValueError: if no pattern of `KEY_TABLE` matches.
    """
    bare = name.removeprefix("base_model.model.")  # PEFT's prefix
    for pattern, replacement in KEY_TABLE:
        if match := re.fullmatch(pattern, bare):
            return match.expand(replacement)
    raise ValueError(f"{name!r} is not the name of a weight in a released SQ-LLaVA, LLaVA, CLIP or language model.")


def unused_kind(name: str) -> str | None:
    """The value in `UNUSED` that describes a tensor of this name; `None` if the tensor is used."""
    return next((kind for pattern, kind in UNUSED.items() if re.fullmatch(pattern, name)), None)


@dataclass(frozen=True)
class Delta:
    """The LoRA of one weight, which adds `scale * up @ down`."""

    down: Tensor
    up: Tensor
    scale: float


@dataclass
class WeightSource:
    """
    Where a weight comes from: either a tensor in a file, or a new value.

    Attributes:
        source ([`Tensor`], *optional*): Header of the tensor.
        delta ([`Delta`], *optional*): LoRA that is added to the tensor.
        rows (`int`, *optional*): Number of rows after the vocabulary has grown. New rows are the mean of the others.
        value (`torch.Tensor`, *optional*): The new value, where there is no source.
    """

    source: Tensor | None = None
    delta: Delta | None = None
    rows: int | None = None
    value: torch.Tensor | None = None

    def shape(self) -> tuple[int, ...]:
        if self.value is not None:
            return tuple(self.value.shape)
        return (self.rows, *self.source.shape[1:]) if self.rows else self.source.shape

    def make(self, file_of: Callable[[Path], WeightFile], dtype: torch.dtype) -> torch.Tensor:
        """Reads the weight from its files, merges LoRA and adds rows."""
        if self.source is None:
            return self.value.to(dtype)
        tensor = file_of(self.source.file)[self.source.name]
        if self.delta is not None:
            down, up = (file_of(part.file)[part.name].float() for part in (self.delta.down, self.delta.up))
            # Added in float32: a delta that is rounded to half precision first loses its small values.
            tensor = torch.addmm(tensor.float(), up, down, alpha=self.delta.scale)
        if self.rows is None or self.rows == len(tensor):
            return tensor.to(dtype).contiguous()
        grown = torch.empty(self.shape(), dtype=dtype)
        grown[: len(tensor)] = tensor
        grown[len(tensor) :] = tensor.mean(0, dtype=torch.float32)
        return grown


@dataclass
class Sources:
    """
    The tensors in the files of a source, its base and its tower.

    Attributes:
        weights (`dict[str, WeightSource]`): By the name of the weight in this library.
        unused (`Counter`): Numbers of tensors of each kind in `UNUSED`.
        replaced (`Counter`): Numbers of tensors that were not used because the source or the base has its own.
        notes (`list[str]`): Messages for the user about LoRA.
        unknown (`list[str]`): Tensors whose name is unknown.
        deltas (`dict[str, Delta]`): LoRA by the name of the weight.
    """

    weights: dict[str, WeightSource] = field(default_factory=dict)
    unused: Counter = field(default_factory=Counter)
    replaced: Counter = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    deltas: dict[str, Delta] = field(default_factory=dict)


def read_sources(layout: Layout) -> Sources:
    """
    Reads names and shapes in all files. Where several have a weight, the source wins over its base, and the base over
    the separate vision tower.

    Raises:
        ValueError: if a file is missing or damaged, or two tensors belong to the same weight.
    """
    sources = Sources()
    adapters, owners = {}, {}
    places = {"source": layout.weight_files, "base": layout.base_files, "vision tower": layout.vision_files}
    for owner, files in places.items():
        for file in files:
            for tensor in WeightFile(file).headers():
                if kind := unused_kind(tensor.name):
                    sources.unused[kind] += 1
                elif match := LORA.fullmatch(tensor.name):
                    weights = adapters.setdefault(file, {}).setdefault(match[1], {})
                    weights[match[2]] = tensor
                else:
                    _add(sources, owners, owner, tensor)
    add_lora(sources, layout, adapters)
    return sources


def _add(sources: Sources, owners: dict[str, str], owner: str, tensor: Tensor) -> None:
    try:
        target = weight_name(tensor.name)
    except ValueError:
        sources.unknown.append(f"{tensor.name} in {tensor.file}")
        return
    # Vision tower and connector are taken as a whole from one owner. The language model is taken weight by weight.
    owned = {"vision": "vision tower", "connector": "connector"}.get(group_of(target), target)
    if owners.setdefault(owned, owner) != owner:
        sources.replaced[f"{owned} of {tensor.file.parent}; the {owners[owned]} has its own"] += 1
        return
    if target in sources.weights:
        other = sources.weights[target].source
        raise ValueError(
            f"{tensor.file}: {tensor.name} and {other.name} (in {other.file}) both belong to {target}. Keep only one."
        )
    sources.weights[target] = WeightSource(tensor)


def add_lora(sources: Sources, layout: Layout, adapters: dict[Path, dict]) -> None:
    """
    Adds LoRA to the weights. A ViT-LoRA can be in `adapter_model.bin`, in `Vit-lora`, or the same one in both.

    Args:
        adapters: For each file and each module in it, the tensors A and B.

    Raises:
        ValueError: if A or B is missing, a rank differs from its configuration, or the two ViT-LoRAs differ.
    """
    of_tower = {}
    for file, modules in adapters.items():
        deltas = _read_deltas(layout, file, modules)
        sources.deltas |= deltas
        of_tower[file] = {target: delta for target, delta in deltas.items() if group_of(target) == "vision"}
    twice = [file for file, deltas in of_tower.items() if deltas]
    if len(twice) == 2 and not _same_deltas(*(of_tower[file] for file in twice)):
        raise ValueError(
            f"The ViT-LoRA in {twice[0]} differs from the one in {twice[1]}. It is not known which is right. Move the "
            "folder Vit-lora away, or remove the keys with vision_tower from adapter_model.bin."
        )
    for target, delta in sources.deltas.items():
        if target not in sources.weights:
            raise ValueError(
                f"{delta.down.file}: {delta.down.name} belongs to {target}, which is neither in the base nor in the "
                "vision tower. Is this the right base?"
            )
        _check_lora_shapes(sources.weights[target], delta)
        sources.weights[target].delta = delta
    _describe_lora(sources)


def _read_deltas(layout: Layout, file: Path, modules: dict[str, dict[str, Tensor]]) -> dict[str, Delta]:
    deltas = {}
    for module, pair in modules.items():
        target = weight_name(f"{module}.weight")
        if pair.keys() != {"A", "B"}:
            (missing,) = {"A", "B"} - pair.keys()
            raise ValueError(f"{file}: lora_{missing} of {module} is missing. Download the file again.")
        config, config_file = _lora_config(layout, group_of(target) == "vision")
        scale = lora_scale(config, config_file, module.removeprefix("base_model.model."), pair["A"])
        deltas[target] = Delta(pair["A"], pair["B"], scale)
    return deltas


def _same_deltas(one: dict[str, Delta], other: dict[str, Delta]) -> bool:
    if one.keys() != other.keys():
        return False
    file_of = lru_cache(WeightFile)
    pairs = [(getattr(one[t], side), getattr(other[t], side)) for t in one for side in ("down", "up")]
    return all(torch.equal(*(file_of(tensor.file)[tensor.name].float() for tensor in pair)) for pair in pairs)


def _lora_config(layout: Layout, in_tower: bool) -> tuple[dict, Path]:
    if in_tower and layout.vision_adapter_config is not None:
        return layout.vision_adapter_config, layout.path / "Vit-lora" / "adapter_config.json"
    if layout.adapter_config is None:
        raise ValueError(
            f"{layout.path} holds LoRA weights, but no adapter_config.json, which has their alpha. Copy it there."
        )
    return layout.adapter_config, layout.path / "adapter_config.json"


def lora_scale(config: dict, config_file: Path, module: str, down: Tensor) -> float:
    """
    The factor of a delta: alpha / r, or alpha / sqrt(r) with rsLoRA. A module's own rank and alpha (`rank_pattern`,
    `alpha_pattern`) replace the general ones.
    """
    ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    rank = ranks.get(get_pattern_key(ranks, module), config["r"])
    alpha = alphas.get(get_pattern_key(alphas, module), config["lora_alpha"])
    for setting in ("use_dora", "fan_in_fan_out"):
        if config.get(setting):
            raise ValueError(f"{config_file}: {setting} is true, which is not supported. Merge it with PEFT first.")
    if down.shape[0] != rank:
        raise ValueError(
            f"{down.file}: {module} has rank {down.shape[0]}, but {config_file} says {rank}, so its alpha is unknown. "
            "Put the adapter_config.json of its training next to it (for a ViT-LoRA: into Vit-lora)."
        )
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _check_lora_shapes(weight: WeightSource, delta: Delta) -> None:
    shape = (delta.up.shape[0], delta.down.shape[1])
    if shape != weight.source.shape or delta.up.shape[1] != delta.down.shape[0]:
        raise ValueError(
            f"{delta.down.name} in {delta.down.file}: LoRA of {delta.up.shape} x {delta.down.shape} does not fit "
            f"{weight.source.name} of {weight.source.shape} in {weight.source.file}. Is this the right base?"
        )


def _describe_lora(sources: Sources) -> None:
    for part, in_tower in (("LLM-LoRA", False), ("ViT-LoRA", True)):
        deltas = [d for target, d in sources.deltas.items() if (group_of(target) == "vision") == in_tower]
        if deltas:
            ranks = ", ".join(map(str, sorted({delta.down.shape[0] for delta in deltas})))
            scales = ", ".join(f"{scale:g}" for scale in sorted({delta.scale for delta in deltas}))
            sources.notes.append(f"{part}: merged into {len(deltas)} matrices, rank {ranks}, scaled by {scales}.")
            file_of = lru_cache(WeightFile)
            if in_tower and not any(file_of(delta.up.file)[delta.up.name].any() for delta in deltas):
                sources.notes.append(
                    "All B matrices of the ViT-LoRA are zero, so it changes nothing. The authors' code runs the tower "
                    "without gradients and cannot train it."
                )


def match(sources: Sources, targets: dict[str, torch.Tensor], vocabulary: int, tied: bool) -> None:
    """
    Compares the sources with the weights of the model, and sets the number of rows of a grown vocabulary.

    Args:
        targets: Weights of the model, on the meta device.
        vocabulary (`int`): Number of rows of the source's embeddings.
        tied (`bool`): Whether the LM head shares the embeddings.

    Raises:
        ValueError: with all names, if a tensor has no place in the model, a weight has no tensor, or shapes differ.
    """
    if tied and sources.weights.pop(HEAD, None):
        sources.unused["lm_head: the configuration ties it to the embeddings"] += 1
    useless = [weight.source for target, weight in sources.weights.items() if target not in targets]
    faults = {
        "tensors without a place in the model": sources.unknown + [f"{t.name} in {t.file}" for t in useless],
        "weights without a tensor": [target for target in targets if target not in sources.weights],
        "wrong shapes": [],
    }
    for target, weight in sources.weights.items():
        if target not in targets:
            continue
        if target in (EMBEDDINGS, HEAD) and weight.source.shape[0] == vocabulary:
            weight.rows = targets[target].shape[0]
        if weight.shape() != tuple(targets[target].shape):
            place = f"{weight.source.name} in {weight.source.file}" if weight.source else target
            faults["wrong shapes"].append(f"{place}: {weight.shape()}, not {tuple(targets[target].shape)}")
    if any(faults.values()):
        texts = [f"{len(names)} {kind}: {'; '.join(names)}" for kind, names in faults.items() if names]
        raise ValueError(f"The checkpoint does not match the model. {'. '.join(texts)}.")


def write_file(
    path: Path, weights: dict[str, WeightSource], dtype: torch.dtype, advance: Callable[[int], None]
) -> None:
    """
    Writes one safetensors file, one weight at a time. (`save_file` takes all of them at once, which needs as much
    memory as the file is large.) The format: https://github.com/huggingface/safetensors#format.

    Args:
        advance: Called with the number of bytes after each weight.
    """
    # At most one file of the source and one of LoRA are open at a time, and each is opened once.
    file_of = lru_cache(maxsize=2)(WeightFile)
    ordered = sorted(weights.items(), key=lambda item: _files_of(item[1]))
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for target, weight in ordered:
        begin, end = end, end + math.prod(weight.shape()) * dtype.itemsize
        entry = {"dtype": SAFETENSORS_NAMES[str(dtype)], "shape": weight.shape(), "data_offsets": [begin, end]}
        header[target] = entry
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for _, weight in ordered:
            tensor = weight.make(file_of, dtype)
            stream.write(tensor.view(torch.uint8).numpy().data)
            advance(tensor.nbytes)


def _files_of(weight: WeightSource) -> tuple[str, str]:
    source, delta = weight.source, weight.delta
    return str(source.file if source else ""), str(delta.down.file if delta else "")
