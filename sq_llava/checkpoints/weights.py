"""Which tensor of which file becomes which weight: names, LoRA, shapes; and the filling of one output file at a time.

`KEY_TABLE` is the one place that knows the names in released checkpoints. Every tensor of a source is used, or is of a
known kind that is not; every weight has one source, or is declared new. What this module does not do: decide what the
model is (`sq_llava/checkpoints/convert.py`).
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


# Names in any released layout, and in SQLlavaForConditionalGeneration; the first pattern that fits a name counts.
KEY_TABLE = (
    # The tower: inside of the original code, of transformers (older, 4.52 and later, 5.x), of a CLIP or SigLIP alone.
    (r"(?:model\.)?vision_tower\.(?:vision_tower\.)?(?:vision_model\.)?(.+)", r"model.vision_tower.\1"),
    (r"(?:vision_model\.)?((?:embeddings|pre_layrnorm|encoder|post_layernorm|head)\..+)", r"model.vision_tower.\1"),
    # The authors' projector: extractor and MLP in one module.
    (r"(?:model\.)?mm_projector\.((?:c|v|f|ln_1)\.(?:weight|bias))", r"model.prototype_extractor.\1"),
    (r"(?:model\.)?mm_projector\.(sim_alpha|sim_beta)", r"model.prototype_extractor.\1"),
    (r"(?:model\.)?mm_projector\.(?:(?:mlp\.)?0\.)?(weight|bias)", r"model.multi_modal_projector.linear_1.\1"),
    (r"(?:model\.)?mm_projector\.(?:mlp\.)?2\.(weight|bias)", r"model.multi_modal_projector.linear_2.\1"),
    # Of another kind: no use for it, unless it stands in a base, where the source's takes its place.
    (r"(?:model\.)?mm_projector\.(.+)", r"model.multi_modal_projector.\1"),
    (r"(?:model\.)?multi_modal_projector\.(.+)", r"model.multi_modal_projector.\1"),
    # The language model.
    (r"(?:language_model\.)?lm_head\.(.+)", r"lm_head.\1"),
    (r"language_model\.model\.(.+)", r"model.language_model.\1"),
    (r"model\.(?:language_model\.)?(.+)", r"model.language_model.\1"),
)
# What released files hold and no forward pass of these models reads.
UNUSED = {
    r".*\.rotary_emb\.inv_freq": "inv_freq: buffers of rotary positions, which are computed",
    r".*\.position_ids": "position_ids: buffers that count the positions",
    r".*mm_projector\.ln_1\.(?:weight|bias)": "ln_1: a layer norm that the authors' forward pass never applies",
    r"text_model\..+": "text_model: the text tower of a whole CLIP",
    r"(?:visual_projection|text_projection)\..+": "projection: of a whole CLIP into its common space",
    r"logit_scale|logit_bias": "logit_scale: of a whole CLIP's loss",
}
LORA = re.compile(r"(.+)\.lora_([AB])(?:\.default)?\.weight")
EMBEDDINGS = "model.language_model.embed_tokens.weight"
HEAD = "lm_head.weight"


def weight_name(name: str) -> str:
    """
    The name in `SQLlavaForConditionalGeneration` of a tensor of a released checkpoint.

        model.mm_projector.v.weight -> model.prototype_extractor.v.weight
        base_model.model.model.layers.0.mlp.up_proj.weight -> model.language_model.layers.0.mlp.up_proj.weight

    Raises:
        ValueError: if no pattern of `KEY_TABLE` fits.
    """
    bare = name.removeprefix("base_model.model.")  # of PEFT
    for pattern, replacement in KEY_TABLE:
        if match := re.fullmatch(pattern, bare):
            return match.expand(replacement)
    raise ValueError(f"{name!r} is not a name of a weight of a released SQ-LLaVA, LLaVA, CLIP or language model.")


def unused_kind(name: str) -> str | None:
    """Of what known kind of tensors that nothing reads one is; `None` if it is none."""
    return next((kind for pattern, kind in UNUSED.items() if re.fullmatch(pattern, name)), None)


@dataclass(frozen=True)
class Delta:
    """The LoRA of one weight: `scale * up @ down`."""

    down: Tensor
    up: Tensor
    scale: float


@dataclass
class WeightSource:
    """
    Where a weight comes from: a tensor of a file, with LoRA on it and mean rows below it; or a new value.

    Attributes:
        rows (`int`, *optional*): The number of rows that the matrix of a grown vocabulary has.
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
        """The weight, from the files that it is in."""
        if self.source is None:
            return self.value.to(dtype)
        tensor = file_of(self.source.file)[self.source.name]
        if self.delta is not None:
            down, up = (file_of(part.file)[part.name].float() for part in (self.delta.down, self.delta.up))
            # In float32 until the end: a delta that was rounded to half precision first would lose its small parts.
            tensor = torch.addmm(tensor.float(), up, down, alpha=self.delta.scale)
        if self.rows is None or self.rows == len(tensor):
            return tensor.to(dtype).contiguous()
        grown = torch.empty(self.shape(), dtype=dtype)
        grown[: len(tensor)] = tensor
        grown[len(tensor) :] = tensor.mean(0, dtype=torch.float32)
        return grown


@dataclass
class Sources:
    """All that the files of a source, its base and its tower hold, by the names of the weights."""

    weights: dict[str, WeightSource] = field(default_factory=dict)
    unused: Counter = field(default_factory=Counter)
    replaced: Counter = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    deltas: dict[str, Delta] = field(default_factory=dict)


def read_sources(layout: Layout) -> Sources:
    """
    Reads names and shapes of all files. A source goes before its base, and that before a tower of its own.

    Raises:
        ValueError: if a file is not there or damaged, or holds two tensors for one weight.
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
    # Vision tower and connector come from one place as a whole, the weights of the language model one by one.
    owned = {"vision": "vision tower", "connector": "connector"}.get(group_of(target), target)
    if owners.setdefault(owned, owner) != owner:
        sources.replaced[f"{owned} of {tensor.file.parent}; the {owners[owned]} has its own"] += 1
        return
    if target in sources.weights:
        other = sources.weights[target].source
        raise ValueError(
            f"{tensor.file}: {tensor.name} and {other.name} (in {other.file}) are both {target}. Keep one of them."
        )
    sources.weights[target] = WeightSource(tensor)


def add_lora(sources: Sources, layout: Layout, adapters: dict[Path, dict]) -> None:
    """
    Puts LoRA on the weights. A ViT-LoRA may stand in `adapter_model.bin`, in `Vit-lora`, or in both.

    Raises:
        ValueError: if half of a pair is missing, a rank is not that of its configuration, or the two differ.
    """
    of_tower = {}
    for file, modules in adapters.items():
        deltas = _read_deltas(layout, file, modules)
        sources.deltas |= deltas
        of_tower[file] = {target: delta for target, delta in deltas.items() if group_of(target) == "vision"}
    twice = [file for file, deltas in of_tower.items() if deltas]
    if len(twice) == 2 and not _same(*(of_tower[file] for file in twice)):
        raise ValueError(
            f"The ViT-LoRA in {twice[0]} differs from that in {twice[1]}: which was trained is not known. Move the "
            "folder Vit-lora away, or take the keys with vision_tower out of adapter_model.bin."
        )
    for target, delta in sources.deltas.items():
        if target not in sources.weights:
            place = f"{delta.down.file}: {delta.down.name}"
            raise ValueError(f"{place}: neither base nor tower has the weight that it is added to.")
        _check_lora_shapes(sources.weights[target], delta)
        sources.weights[target].delta = delta
    _describe_lora(sources)


def _read_deltas(layout: Layout, file: Path, modules: dict[str, dict[str, Tensor]]) -> dict[str, Delta]:
    deltas = {}
    for module, pair in modules.items():
        target = weight_name(f"{module}.weight")
        if pair.keys() != {"A", "B"}:
            raise ValueError(f"{file}: {module} has lora_{next(iter(pair))}, but not the other half of it.")
        config, config_file = _lora_config(layout, group_of(target) == "vision")
        scale = lora_scale(config, config_file, module.removeprefix("base_model.model."), pair["A"])
        deltas[target] = Delta(pair["A"], pair["B"], scale)
    return deltas


def _same(one: dict[str, Delta], other: dict[str, Delta]) -> bool:
    if one.keys() != other.keys():
        return False
    file_of = lru_cache(WeightFile)

    def value(tensor: Tensor) -> torch.Tensor:
        return file_of(tensor.file)[tensor.name].float()

    return all(
        torch.equal(value(one[target].down), value(other[target].down))
        and torch.equal(value(one[target].up), value(other[target].up))
        for target in one
    )


def _lora_config(layout: Layout, in_tower: bool) -> tuple[dict, Path]:
    if in_tower and layout.vision_adapter_config is not None:
        return layout.vision_adapter_config, layout.path / "Vit-lora" / "adapter_config.json"
    if layout.adapter_config is None:
        raise ValueError(f"{layout.path} holds LoRA, but no adapter_config.json that says its alpha: put it there.")
    return layout.adapter_config, layout.path / "adapter_config.json"


def lora_scale(config: dict, config_file: Path, module: str, down: Tensor) -> float:
    """What a delta is multiplied by: alpha / r, or alpha / sqrt(r); the patterns of one module count before all."""
    ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    rank = ranks.get(get_pattern_key(ranks, module), config["r"])
    alpha = alphas.get(get_pattern_key(alphas, module), config["lora_alpha"])
    for setting in ("use_dora", "fan_in_fan_out"):
        if config.get(setting):
            raise ValueError(f"{config_file}: {setting} is true, which is not merged here. Merge it with PEFT first.")
    if down.shape[0] != rank:
        raise ValueError(
            f"{down.file}: {module} has the rank {down.shape[0]}, but {config_file} says {rank}, so its alpha is not "
            "known. Put the adapter_config.json that it was trained with beside it (a ViT-LoRA's into Vit-lora)."
        )
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _check_lora_shapes(weight: WeightSource, delta: Delta) -> None:
    shape = (delta.up.shape[0], delta.down.shape[1])
    if shape != weight.source.shape or delta.up.shape[1] != delta.down.shape[0]:
        raise ValueError(
            f"{delta.down.name} in {delta.down.file}: LoRA of {delta.up.shape} x {delta.down.shape} does not fit "
            f"{weight.source.name} of {weight.source.shape} in {weight.source.file}. Is that the right base?"
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
                    "All B matrices of the ViT-LoRA are zero, so it changes nothing: the authors' code runs the tower "
                    "without gradients, and could not train it."
                )


def match(sources: Sources, targets: dict[str, torch.Tensor], vocabulary: int, tied: bool) -> None:
    """
    Compares the sources with the weights of the model, and grows the matrices of the vocabulary.

    Args:
        targets: The weights to fill, on the meta device.
        vocabulary (`int`): The number of rows of the source's embeddings.
        tied (`bool`): Whether the head is the embeddings.

    Raises:
        ValueError: with all names, if a tensor has no use, a weight no source, or a shape is wrong.
    """
    if tied and sources.weights.pop(HEAD, None):
        sources.unused["lm_head: the configuration ties it to the embeddings"] += 1
    useless = [weight.source for target, weight in sources.weights.items() if target not in targets]
    faults = {
        "tensors that have no use": sources.unknown + [f"{tensor.name} in {tensor.file}" for tensor in useless],
        "weights that no tensor fills": [target for target in targets if target not in sources.weights],
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
        raise ValueError(f"The checkpoint and the model do not fit together. {'. '.join(texts)}.")


def write_file(
    path: Path, weights: dict[str, WeightSource], dtype: torch.dtype, advance: Callable[[int], None]
) -> None:
    """
    Writes one safetensors file, a weight at a time: `save_file` takes a dictionary of all of them, which needs the
    memory of the whole file. The format: https://github.com/huggingface/safetensors#format. `advance` is told the
    bytes of each weight.
    """
    # One file of the source and one of LoRA are mapped at a time; each is opened once.
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
