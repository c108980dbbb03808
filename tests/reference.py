"""The forward pass of SQ-LLaVA and LLaVA from the formulas, on the original files with the original names.

    reference = read_reference(folder, base=base, vision=tower)
    logits = reference.logits(input_ids, pixel_values, image_token_id)

Tests compare converted models with it, so it uses neither `modeling_sq_llava.py` nor a model class of transformers.
LoRA is added on the fly, never merged. It runs one sequence at a time in float32, without a cache, to stay simple.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch.nn import functional as F


@dataclass
class Lora:
    """`x A^T B^T * scale` for each module that has matrices; names as in the weights that it is added to."""

    weights: dict[str, torch.Tensor]
    scale: float


@dataclass
class Part:
    """Weights of one tower, by the names inside of it, with its configuration."""

    weights: dict[str, torch.Tensor]
    config: dict
    lora: Lora | None = None

    def linear(self, name: str, inputs: torch.Tensor) -> torch.Tensor:
        outputs = inputs @ self.weights[f"{name}.weight"].T
        if f"{name}.bias" in self.weights:
            outputs = outputs + self.weights[f"{name}.bias"]
        if self.lora and f"{name}.lora_A.weight" in self.lora.weights:
            down, up = (self.lora.weights[f"{name}.lora_{letter}.weight"] for letter in "AB")
            outputs = outputs + self.lora.scale * (inputs @ down.T @ up.T)
        return outputs

    def layer_norm(self, name: str, inputs: torch.Tensor) -> torch.Tensor:
        centered = inputs - inputs.mean(-1, keepdim=True)
        normal = centered / (centered.square().mean(-1, keepdim=True) + self.config.get("layer_norm_eps", 1e-5)).sqrt()
        return normal * self.weights[f"{name}.weight"] + self.weights[f"{name}.bias"]

    def rms_norm(self, name: str, inputs: torch.Tensor) -> torch.Tensor:
        mean_square = inputs.square().mean(-1, keepdim=True)
        return inputs / (mean_square + self.config["rms_norm_eps"]).sqrt() * self.weights[f"{name}.weight"]


def quick_gelu(inputs: torch.Tensor) -> torch.Tensor:
    return inputs * torch.sigmoid(1.702 * inputs)


def attention(query, key, value, causal: bool) -> torch.Tensor:
    """`[..., heads, length, size]`."""
    scores = query @ key.mT / math.sqrt(query.shape[-1])
    if causal:
        future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        scores = scores.masked_fill(future, float("-inf"))
    return scores.softmax(-1) @ value


def heads(inputs: torch.Tensor, number: int) -> torch.Tensor:
    return inputs.unflatten(-1, (number, -1)).transpose(-3, -2)


def vision_features(tower: Part, pixel_values: torch.Tensor, layer: int = -2) -> torch.Tensor:
    """CLIP's hidden state `layer` of images `[B, 3, height, width]`, without the CLS token: `[B, N, D]`."""
    patches = F.conv2d(
        pixel_values, tower.weights["embeddings.patch_embedding.weight"], stride=tower.config["patch_size"]
    )
    patches = patches.flatten(2).mT
    cls = tower.weights["embeddings.class_embedding"].expand(len(patches), 1, -1)
    states = torch.cat([cls, patches], 1) + tower.weights["embeddings.position_embedding.weight"]
    states = tower.layer_norm("pre_layrnorm", states)
    number = tower.config["num_attention_heads"]
    for index in range(tower.config["num_hidden_layers"] + 1 + layer):
        prefix = f"encoder.layers.{index}"
        normal = tower.layer_norm(f"{prefix}.layer_norm1", states)
        query, key, value = (heads(tower.linear(f"{prefix}.self_attn.{name}_proj", normal), number) for name in "qkv")
        attended = attention(query, key, value, causal=False).transpose(1, 2).flatten(2)
        states = states + tower.linear(f"{prefix}.self_attn.out_proj", attended)
        normal = tower.layer_norm(f"{prefix}.layer_norm2", states)
        states = states + tower.linear(f"{prefix}.mlp.fc2", quick_gelu(tower.linear(f"{prefix}.mlp.fc1", normal)))
    return states[:, 1:]


def cluster(projector: Part, features: torch.Tensor) -> torch.Tensor:
    """The released extractor, in its `[B, K, N, D]` form."""

    def pool(tokens):
        return F.adaptive_avg_pool1d(tokens.mT, projector.config["num_latents"]).mT

    def unit(tokens, dim):
        return tokens / tokens.norm(dim=dim, keepdim=True).clamp_min(1e-12)

    feature = projector.linear("f", features)
    value = unit(projector.linear("v", features), 1)  # over the tokens, as released
    centers, feature_centers = pool(features), pool(feature)
    for _ in range(projector.config.get("iterations", 2)):
        scores = unit(projector.linear("c", centers), 2) @ value.mT
        centers = scores.softmax(1) @ feature
    cosine = unit(centers, 2) @ unit(features, 2).mT
    similarity = torch.sigmoid(projector.weights["sim_beta"] + projector.weights["sim_alpha"] * cosine)
    members = F.one_hot(similarity.argmax(1), centers.shape[1]).mT.to(similarity)  # [B, K, N]
    weight = similarity * members
    gathered = (weight[..., None] * feature[:, None]).sum(2) + feature_centers
    gathered = gathered / (members.sum(2) + 1)[..., None]
    return features + (weight[..., None] * gathered[:, :, None]).sum(1)


def image_tokens(projector: Part, features: torch.Tensor) -> torch.Tensor:
    """Extractor and MLP, of the kind that `mm_projector_type` names: `[B, N, D]` to `[B, N, H]`."""
    kind = projector.config["mm_projector_type"]
    if kind == "linear":
        return features @ projector.weights["weight"].T + projector.weights["bias"]
    if kind == "cluster":
        return projector.linear("mlp.2", quick_gelu(projector.linear("mlp.0", cluster(projector, features))))
    hidden = projector.linear("0", features)
    return projector.linear("2", hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2))))


def rotate(inputs: torch.Tensor, theta: float) -> torch.Tensor:
    """Rotary positions of `[heads, length, size]`: the first half of the channels is paired with the second."""
    length, size = inputs.shape[-2:]
    angles = torch.arange(length)[:, None] * theta ** -(torch.arange(0, size, 2) / size)
    first, second = inputs.chunk(2, -1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


def language_logits(llm: Part, states: torch.Tensor) -> torch.Tensor:
    """Llama, from embeddings `[length, H]` to logits `[length, vocabulary]`."""
    config = llm.config
    number = config["num_attention_heads"]
    key_number = config.get("num_key_value_heads", number)
    for index in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{index}"
        normal = llm.rms_norm(f"{prefix}.input_layernorm", states)
        query, key, value = (llm.linear(f"{prefix}.self_attn.{name}_proj", normal) for name in "qkv")
        theta = config.get("rope_theta", 10000.0)
        query, key = rotate(heads(query, number), theta), rotate(heads(key, key_number), theta)
        key, value = (x.repeat_interleave(number // key_number, 0) for x in (key, heads(value, key_number)))
        attended = attention(query, key, value, causal=True).transpose(0, 1).flatten(1)
        states = states + llm.linear(f"{prefix}.self_attn.o_proj", attended)
        normal = llm.rms_norm(f"{prefix}.post_attention_layernorm", states)
        gate, up = llm.linear(f"{prefix}.mlp.gate_proj", normal), llm.linear(f"{prefix}.mlp.up_proj", normal)
        states = states + llm.linear(f"{prefix}.mlp.down_proj", gate * torch.sigmoid(gate) * up)
    head = "model.embed_tokens" if config.get("tie_word_embeddings") else "lm_head"
    return llm.linear(head, llm.rms_norm("model.norm", states))


@dataclass
class Reference:
    """A whole model, in parts."""

    vision: Part
    projector: Part
    llm: Part
    vision_layer: int = -2

    def logits(
        self, input_ids: torch.Tensor, pixel_values: torch.Tensor | None = None, image_token_id: int = -1
    ) -> torch.Tensor:
        """
        Args:
            input_ids: `[length]`, with one placeholder `image_token_id` for each image token.
            pixel_values: `[B, 3, height, width]`.

        Returns:
            `[length, vocabulary]`.
        """
        placeholders = input_ids == image_token_id
        states = self.llm.weights["model.embed_tokens.weight"][input_ids.masked_fill(placeholders, 0)]
        if pixel_values is not None:
            features = vision_features(self.vision, pixel_values, self.vision_layer)
            states[placeholders] = image_tokens(self.projector, features).flatten(0, 1)
        return language_logits(self.llm, states)


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """All weights of a file, or of the whole model in a folder."""
    files = [path] if path.is_file() else sorted([*path.glob("model*.safetensors"), *path.glob("pytorch_model*.bin")])
    weights = {}
    for file in files:
        weights |= load_file(file) if file.suffix == ".safetensors" else torch.load(file, weights_only=True)
    return weights


def take(weights: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """The weights whose names begin with `prefix`, under the names behind it."""
    return {name[len(prefix) :]: tensor.float() for name, tensor in weights.items() if name.startswith(prefix)}


def _read_json(path: Path) -> dict:
    return json.loads(path.read_text())


def _lora(folder: Path, prefix: str) -> Lora:
    config = _read_json(folder / "adapter_config.json")
    divisor = math.sqrt(config["r"]) if config.get("use_rslora") else config["r"]
    return Lora(take(read_weights(folder / "adapter_model.bin"), prefix), config["lora_alpha"] / divisor)


def _clip(folder: Path) -> Part:
    config = _read_json(folder / "config.json")
    return Part(take(read_weights(folder), "vision_model."), config.get("vision_config", config))


def read_reference(source: Path, base: Path | None = None, vision: Path | None = None) -> Reference:
    """
    Args:
        source: A folder that `tests/released.py` wrote: whole, LoRA, `mm_projector.bin`, or `llava-hf`.
        base: The language model of a LoRA or of a projector alone.
        vision: The folder of CLIP; always needed but for `llava-hf`, as it holds the tower's configuration.
    """
    config = _read_json(source / "config.json")
    if "text_config" in config:
        return _read_llava_hf(source, config)
    weights = read_weights(base or source)
    llm = Part(take(weights, ""), _read_json((base or source) / "config.json"))
    tower = _clip(vision)
    tower_inside = take(weights, "model.vision_tower.vision_tower.vision_model.")
    if tower_inside:
        tower.weights = tower_inside
    projector = Part(take(weights, "model.mm_projector."), config)
    if (source / "adapter_config.json").is_file():
        llm.lora = _lora(source, "base_model.model.")
        llm.lora.weights = {name: w for name, w in llm.lora.weights.items() if "vision_tower" not in name}
        tower.lora = _lora(source, "base_model.model.model.vision_tower.vision_tower.vision_model.")
        if (source / "Vit-lora").is_dir():
            tower.lora = _lora(source / "Vit-lora", "base_model.model.vision_tower.vision_model.")
        trained = read_weights(source / "non_lora_trainables.bin")
        projector.weights = take(trained, "base_model.model.model.mm_projector.")
    elif (source / "mm_projector.bin").is_file():
        projector.weights = take(read_weights(source / "mm_projector.bin"), "model.mm_projector.")
    return Reference(tower, projector, llm, config["mm_vision_select_layer"])


def _read_llava_hf(source: Path, config: dict) -> Reference:
    weights = read_weights(source)
    names = {"linear_1": "0", "linear_2": "2"}
    text = take(weights, "model.language_model.")
    if text:
        llm = {f"model.{name}": tensor for name, tensor in text.items()} | take(weights, "")
    else:
        llm = take(weights, "language_model.")
    tower = take(weights, "model.vision_tower.vision_model.") or take(weights, "vision_tower.vision_model.")
    projector = take(weights, "model.multi_modal_projector.") or take(weights, "multi_modal_projector.")
    projector = {f"{names[name.split('.')[0]]}.{name.split('.')[1]}": tensor for name, tensor in projector.items()}
    return Reference(
        Part(tower or take(weights, "vision_tower."), config["vision_config"]),
        Part(projector, {"mm_projector_type": "mlp2x_gelu"}),
        Part(llm, config["text_config"]),
        config["vision_feature_layer"],
    )
