"""Runs a released checkpoint without converting it. A conversion must give the same results.

No code of the conversion or of `modeling_sq_llava.py` is used. Vision tower and language model are the classes of
transformers, PEFT adds LoRA without merging it, and the authors' extractor is written below in its direct form, which
builds `[B, K, N, D]`. `llava-hf` checkpoints run in the LLaVA of transformers. There is only a forward pass for single
prompts: no generation, training or batches.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
)

from sq_llava.checkpoints.layouts import Layout
from sq_llava.checkpoints.weight_files import TORCH_NAMES, WeightFile, read_headers


@dataclass
class Prompt:
    """
    A prompt for the comparison.

    Attributes:
        input_ids (`torch.LongTensor` of shape `(1, length)`): With one placeholder for each image token.
        pixel_values (`torch.Tensor` of shape `(num_images, 3, height, width)`, *optional*): The images.
    """

    name: str
    input_ids: torch.Tensor
    pixel_values: torch.Tensor | None
    image_token_id: int

    @property
    def num_images(self) -> int:
        return 0 if self.pixel_values is None else len(self.pixel_values)


@dataclass(frozen=True)
class Precision:
    """
    The dtype to compute in, and the dtype in which the result is stored.

    If both are float32, LoRA is added to the outputs of the layers. Otherwise, weights are rounded, which changes the
    output of every layer. So PEFT merges LoRA, and the reference's weights are rounded like those of the result. The
    comparison then still finds small differences.
    """

    compute: torch.dtype
    stored: torch.dtype

    @property
    def exact(self) -> bool:
        return self.compute == self.stored == torch.float32

    def load_dtype(self, folder: Path) -> torch.dtype:
        """The dtype to load a folder in, so that weights are not rounded before LoRA is merged."""
        return torch.float32 if self.compute == torch.float32 else stored_dtype(folder)

    def round(self, weight: torch.Tensor) -> torch.Tensor:
        return weight.to(self.stored).to(self.compute)

    def apply(self, model: nn.Module) -> nn.Module:
        for module in model.modules():
            if isinstance(module, LoraLayer) and not self.exact:
                weight = module.get_base_layer().weight
                weight.data = weight.data.float()
                module.merge()
                weight.data = self.round(weight.data)
        # `model.to` would also round the buffers of the rotary positions.
        for parameter in model.parameters():
            parameter.data = self.round(parameter.data)
        return model.eval()


@torch.inference_mode()
def run_original(layout: Layout, prompts: list[Prompt], precision: Precision) -> list[dict[str, torch.Tensor]]:
    """
    Runs the released checkpoint on each prompt.

    Returns:
        For each prompt the outputs of embeddings, layers, extractor and projector by name, in the order in which they
        were computed. The last entry is `"logits"`.

    Raises:
        ValueError: if the source is incomplete.
    """
    if layout.kind == "llava_hf":
        return _run_llava(layout, prompts, precision)
    tower, model = _original_tower(layout, precision), _original_language_model(layout, precision)
    # A base that is a LLaVA has a projector, too; the trained one replaces it.
    weights = read_weights(layout.weight_files, "mm_projector.") or read_weights(layout.base_files, "mm_projector.")
    weights = {name: precision.round(tensor) for name, tensor in weights.items()}
    stages = []
    for prompt in prompts:
        found = {}
        placeholders = prompt.input_ids == prompt.image_token_id
        embeddings = model.get_input_embeddings()(prompt.input_ids.masked_fill(placeholders, 0))
        if prompt.num_images:
            hidden_states = tower(prompt.pixel_values.to(precision.compute), output_hidden_states=True).hidden_states
            features = _keep_vision_states(found, hidden_states, layout.feature_layer)
            features = features if layout.feature_select == "cls_patch" else features[:, 1:]
            found |= run_projector(weights, features, layout.num_prototypes)
            embeddings[placeholders] = found["projector"].flatten(0, 1)
        keep_language_states(found, model(inputs_embeds=embeddings, output_hidden_states=True, use_cache=False))
        stages.append(found)
    return stages


def stored_dtype(folder: Path) -> torch.dtype:
    """The dtype of most weights in a folder, from their headers, because the configuration can be wrong."""
    sizes = dict.fromkeys(("F32", "F16", "BF16"), 0)
    for tensor in read_headers(folder):
        if tensor.dtype in sizes:
            sizes[tensor.dtype] += tensor.num_elements
    return getattr(torch, TORCH_NAMES[max(sizes, key=sizes.get)])


def read_weights(files: tuple[Path, ...], infix: str) -> dict[str, torch.Tensor]:
    """The tensors whose names contain `infix`, by the part of the name after it."""
    tensors = {}
    for weights in map(WeightFile, files):
        for name in (tensor.name for tensor in weights.headers() if infix in tensor.name):
            tensors[name[name.index(infix) + len(infix) :]] = weights[name]
    return tensors


def _run_llava(layout: Layout, prompts: list[Prompt], precision: Precision) -> list[dict[str, torch.Tensor]]:
    model, report = LlavaForConditionalGeneration.from_pretrained(
        layout.path, dtype=precision.load_dtype(layout.path), output_loading_info=True
    )
    _require_complete(layout.path, report)
    precision.apply(model)
    stages = []
    for prompt in prompts:
        found = {}
        if prompt.num_images:
            layer = model.config.vision_feature_layer
            hidden_states = model.model.vision_tower(
                prompt.pixel_values.to(precision.compute), output_hidden_states=True
            ).hidden_states
            features = _keep_vision_states(found, hidden_states, layer)
            if model.config.vision_feature_select_strategy == "default":
                features = features[:, 1:]
            found["projector"] = model.model.multi_modal_projector(features)
        pixel_values = None if prompt.pixel_values is None else prompt.pixel_values.to(precision.compute)
        outputs = model(
            input_ids=prompt.input_ids, pixel_values=pixel_values, output_hidden_states=True, use_cache=False
        )
        keep_language_states(found, outputs)
        stages.append(found)
    return stages


def keep_language_states(stages: dict[str, torch.Tensor], outputs) -> None:
    """Adds the embeddings, the outputs of the layers and the logits of a language model to `stages`."""
    stages["embeddings"] = outputs.hidden_states[0]
    # The last hidden state is after the final norm.
    for index, states in enumerate(outputs.hidden_states[1:]):
        stages[f"language layer {index}"] = states
    stages["logits"] = outputs.logits


def _keep_vision_states(stages: dict[str, torch.Tensor], hidden_states: tuple, layer: int) -> torch.Tensor:
    used = hidden_states[: layer + 1 if layer >= 0 else len(hidden_states) + layer + 1]
    stages["vision embeddings"] = used[0]
    for index, states in enumerate(used[1:]):
        stages[f"vision layer {index}"] = states
    return used[-1]


def _require_complete(path: Path, report: dict) -> None:
    if report["missing_keys"] or report["mismatched_keys"]:
        missing = sorted([*report["missing_keys"], *map(str, report["mismatched_keys"])])
        raise ValueError(
            f"{path}: {len(missing)} weights are missing or have a wrong shape, the first is {missing[0]}. The source "
            "is incomplete."
        )


def _original_tower(layout: Layout, precision: Precision) -> nn.Module:
    if layout.vision is None:
        raise ValueError(f"{layout.path} needs the vision tower {layout.vision_name}. Give its folder as --vision.")
    config = CLIPVisionConfig.from_pretrained(layout.vision)
    # A tower in the source or in its base wins over the separate one.
    inside = _inside_tower(layout.weight_files) or _inside_tower(layout.base_files)
    if inside:
        tower = CLIPVisionModel(config)
        inside.pop("embeddings.position_ids", None)
        tower.load_state_dict(inside)
    else:
        tower, report = CLIPVisionModel.from_pretrained(
            layout.vision, dtype=precision.load_dtype(layout.vision), output_loading_info=True
        )
        _require_complete(layout.vision, report)
    folder = layout.path / "Vit-lora" if (layout.path / "Vit-lora").is_dir() else layout.path
    return precision.apply(_with_lora(tower, folder, in_tower=True))


def _inside_tower(files: tuple[Path, ...]) -> dict[str, torch.Tensor]:
    weights = read_weights(files, "vision_tower.vision_tower.vision_model.")
    return {name: tensor for name, tensor in weights.items() if ".lora_" not in name}


def _with_lora(model: PreTrainedModel, folder: Path, in_tower: bool) -> nn.Module:
    """Adds a folder's LoRA of the vision tower, or of the language model, to a model without merging it."""
    if not (folder / "adapter_config.json").is_file():
        return model
    root = "encoder.layers." if in_tower else "model.layers."
    weights = {
        f"base_model.model.{name[name.index(root) :]}": tensor
        for name, tensor in read_weights(tuple(folder.glob("adapter_model.*")), "").items()
        if ".lora_" in name and ("vision_tower." in name) == in_tower
    }
    if not weights:
        return model
    targets = sorted({name.removeprefix("base_model.model.").partition(".lora_")[0] for name in weights})
    config = LoraConfig.from_pretrained(folder)
    # With a task type, PEFT expects a language model, but the model may be a vision tower. With the name of a base,
    # PEFT warns that the path differs.
    config = replace(config, target_modules=targets, task_type=None, base_model_name_or_path=None, inference_mode=True)
    peft_model = get_peft_model(model, config)
    set_peft_model_state_dict(peft_model, weights)
    absent = get_peft_model_state_dict(peft_model).keys() ^ weights.keys()
    if absent:
        raise ValueError(f"{folder}: the LoRA does not fit the model in {len(absent)} weights such as {min(absent)}.")
    return peft_model


def run_projector(
    weights: dict[str, torch.Tensor], states: torch.Tensor, num_prototypes: int
) -> dict[str, torch.Tensor]:
    """The outputs of the authors' projector of any type, by name. `"projector"` is the last."""
    if "sim_alpha" in weights:
        enriched = cluster(weights, states, num_prototypes).to(states.dtype)
        hidden = _linear(weights, "mlp.0", enriched)
        tokens = _linear(weights, "mlp.2", hidden * torch.sigmoid(1.702 * hidden))
        return {"prototype extractor": enriched, "projector": tokens}
    if "weight" in weights:
        return {"projector": F.linear(states, weights["weight"], weights["bias"])}
    return {"projector": _linear(weights, "2", F.gelu(_linear(weights, "0", states)))}


def _linear(weights: dict[str, torch.Tensor], name: str, inputs: torch.Tensor) -> torch.Tensor:
    return F.linear(inputs, weights[f"{name}.weight"].to(inputs), weights[f"{name}.bias"].to(inputs))


def cluster(weights: dict[str, torch.Tensor], features: torch.Tensor, num_prototypes: int) -> torch.Tensor:
    """
    The authors' extractor in its direct form, in float32. One image at a time, because `[K, N, D]` is large.

    Args:
        weights: The weights of `mm_projector`, among them `c`, `v`, `f`, `sim_alpha`, `sim_beta`.
        features (`torch.Tensor` of shape `(B, N, D)`): Image tokens of the vision tower.
        num_prototypes (`int`): K.

    Returns:
        Enriched image tokens of shape `(B, N, D)`.
    """
    enriched = []
    for tokens in features.float()[:, None]:
        feature, value = _linear(weights, "f", tokens), _linear(weights, "v", tokens)
        centers = F.adaptive_avg_pool1d(tokens.mT, num_prototypes).mT
        feature_centers = F.adaptive_avg_pool1d(feature.mT, num_prototypes).mT
        for _ in range(2):
            scores = F.normalize(_linear(weights, "c", centers), dim=-1) @ F.normalize(value.mT, dim=-1)
            centers = scores.softmax(dim=-2) @ feature
        cosine = F.normalize(centers, dim=-1) @ F.normalize(tokens, dim=-1).mT
        similarity = torch.sigmoid(weights["sim_beta"].float() + weights["sim_alpha"].float() * cosine)
        mask = torch.zeros_like(similarity).scatter_(1, similarity.argmax(dim=1, keepdim=True), 1.0)
        weight = (similarity * mask)[..., None]  # [1, K, N, 1]
        gathered = ((feature[:, None] * weight).sum(2) + feature_centers) / (mask.sum(-1, keepdim=True) + 1)
        enriched.append(tokens + (gathered[:, :, None] * weight).sum(1))
    return torch.cat(enriched)


def _original_language_model(layout: Layout, precision: Precision) -> nn.Module:
    folder = layout.text_folder
    fields = json.loads((folder / "config.json").read_text())
    if fields.get("model_type", "llava").startswith("llava"):
        # LLaVA's configuration is Llama's with more fields. Its model_type means another class in transformers.
        fields.pop("model_type", None)
        config = LlamaConfig(**{name: value for name, value in fields.items() if not name.startswith("mm_")})
    else:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    model, report = AutoModelForCausalLM.from_pretrained(
        folder,
        config=config,
        dtype=precision.load_dtype(folder),
        output_loading_info=True,
        trust_remote_code=False,
    )
    _require_complete(folder, report)
    return precision.apply(_with_lora(model, layout.path, in_tower=False))
