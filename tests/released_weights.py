"""Random weights with the names of the public releases. `tests/released.py` writes them into files."""

import torch


VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 42,
    "patch_size": 14,
}
TEXT = {
    "vocab_size": 450,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
}
TEXT_LINEARS = {
    "self_attn.q_proj": ("hidden_size", "hidden_size"),
    "self_attn.k_proj": ("key_size", "hidden_size"),
    "self_attn.v_proj": ("key_size", "hidden_size"),
    "self_attn.o_proj": ("hidden_size", "hidden_size"),
    "mlp.gate_proj": ("intermediate_size", "hidden_size"),
    "mlp.up_proj": ("intermediate_size", "hidden_size"),
    "mlp.down_proj": ("hidden_size", "intermediate_size"),
}
VISION_LINEARS = {
    "self_attn.q_proj": ("hidden_size", "hidden_size"),
    "self_attn.k_proj": ("hidden_size", "hidden_size"),
    "self_attn.v_proj": ("hidden_size", "hidden_size"),
    "self_attn.out_proj": ("hidden_size", "hidden_size"),
    "mlp.fc1": ("intermediate_size", "hidden_size"),
    "mlp.fc2": ("hidden_size", "intermediate_size"),
}


class _Random:
    """Tensors with a standard deviation of 0.2. Weights of norms have a mean of one."""

    def __init__(self, seed: int):
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, *shape: int, mean: float = 0.0) -> torch.Tensor:
        return mean + 0.2 * torch.randn(*shape, generator=self.generator)

    def linear(self, name: str, outputs: int, inputs: int, bias: bool = True) -> dict[str, torch.Tensor]:
        return {f"{name}.weight": self(outputs, inputs)} | ({f"{name}.bias": self(outputs)} if bias else {})

    def norm(self, name: str, width: int, bias: bool = True) -> dict[str, torch.Tensor]:
        return {f"{name}.weight": self(width, mean=1.0)} | ({f"{name}.bias": self(width)} if bias else {})


def _sizes(config: dict) -> dict[str, int]:
    head_size = config["hidden_size"] // config["num_attention_heads"]
    key_heads = config.get("num_key_value_heads", config["num_attention_heads"])
    return {**config, "key_size": key_heads * head_size}


def text_weights(seed: int = 0, inv_freq: bool = False, **changes) -> dict[str, torch.Tensor]:
    """Names as in `LlamaForCausalLM`; `changes` are fields of the configuration."""
    random, size = _Random(seed), _sizes({**TEXT, **changes})
    width = size["hidden_size"]
    weights = {"model.embed_tokens.weight": random(size["vocab_size"], width)}
    for layer in range(size["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        for name, (outputs, inputs) in TEXT_LINEARS.items():
            weights |= random.linear(f"{prefix}.{name}", size[outputs], size[inputs], bias=False)
        if inv_freq:
            head_size = width // size["num_attention_heads"]
            frequencies = 10000.0 ** -(torch.arange(0, head_size, 2) / head_size)
            weights[f"{prefix}.self_attn.rotary_emb.inv_freq"] = frequencies
        weights |= random.norm(f"{prefix}.input_layernorm", width, bias=False)
        weights |= random.norm(f"{prefix}.post_attention_layernorm", width, bias=False)
    weights |= random.norm("model.norm", width, bias=False)
    if not size.get("tie_word_embeddings"):
        weights["lm_head.weight"] = random(size["vocab_size"], width)
    return weights


def vision_weights(seed: int = 1, position_ids: bool = False) -> dict[str, torch.Tensor]:
    """Names as in the `vision_model` of a CLIP."""
    random, size = _Random(seed), _sizes(VISION)
    width, patch = size["hidden_size"], size["patch_size"]
    num_positions = (size["image_size"] // patch) ** 2 + 1
    weights = {
        "embeddings.class_embedding": random(width),
        "embeddings.patch_embedding.weight": random(width, 3, patch, patch) / 4,
        "embeddings.position_embedding.weight": random(num_positions, width),
    }
    if position_ids:
        weights["embeddings.position_ids"] = torch.arange(num_positions).unsqueeze(0)
    weights |= random.norm("pre_layrnorm", width)
    for layer in range(size["num_hidden_layers"]):
        prefix = f"encoder.layers.{layer}"
        weights |= random.norm(f"{prefix}.layer_norm1", width) | random.norm(f"{prefix}.layer_norm2", width)
        for name, (outputs, inputs) in VISION_LINEARS.items():
            weights |= random.linear(f"{prefix}.{name}", size[outputs], size[inputs])
    return weights | random.norm("post_layernorm", width)


def projector_weights(kind: str = "cluster", seed: int = 2) -> dict[str, torch.Tensor]:
    """Names inside the authors' `mm_projector` of type `cluster`, `mlp2x_gelu` or `linear`."""
    random, width, hidden = _Random(seed), VISION["hidden_size"], TEXT["hidden_size"]
    if kind == "linear":
        return {"weight": random(hidden, width), "bias": random(hidden)}
    if kind == "mlp2x_gelu":
        return random.linear("0", hidden, width) | random.linear("2", hidden, hidden)
    weights = {"sim_alpha": random(1, 1, 1, mean=1.0), "sim_beta": random(1, 1, 1)}
    for name in "cvf":
        weights |= random.linear(name, width, width)
    weights |= random.norm("ln_1", width)
    return weights | random.linear("mlp.0", hidden, width) | random.linear("mlp.2", hidden, hidden)


def lora_weights(
    prefix: str, linears: dict, config: dict, rank: int, seed: int = 3, zero_b: bool = False
) -> dict[str, torch.Tensor]:
    """Names as written by PEFT 0.4, without the adapter's name: `{prefix}.layers.0.mlp.fc1.lora_A.weight`."""
    random, size = _Random(seed), _sizes(config)
    weights = {}
    for layer in range(size["num_hidden_layers"]):
        for name, (outputs, inputs) in linears.items():
            module = f"{prefix}.layers.{layer}.{name}"
            weights[f"{module}.lora_A.weight"] = random(rank, size[inputs])
            weights[f"{module}.lora_B.weight"] = random(size[outputs], rank) * (0.0 if zero_b else 1.0)
    return weights


def prefixed(prefix: str, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {prefix + name: tensor for name, tensor in weights.items()}


def clip_text_weights(seed: int) -> dict[str, torch.Tensor]:
    random = _Random(seed)
    weights = {
        "logit_scale": torch.tensor(4.6),
        "text_model.embeddings.position_ids": torch.arange(77).unsqueeze(0),
        "text_model.embeddings.token_embedding.weight": random(99, 16),
        "text_model.embeddings.position_embedding.weight": random(77, 16),
    }
    layer = "text_model.encoder.layers.0"
    for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
        weights |= random.linear(f"{layer}.self_attn.{name}", 16, 16)
    weights |= random.linear(f"{layer}.mlp.fc1", 24, 16) | random.linear(f"{layer}.mlp.fc2", 16, 24)
    weights |= random.norm(f"{layer}.layer_norm1", 16) | random.norm(f"{layer}.layer_norm2", 16)
    weights |= random.norm("text_model.final_layer_norm", 16) | random.linear("text_projection", 24, 16, bias=False)
    return weights | random.linear("visual_projection", 24, VISION["hidden_size"], bias=False)


def llava_hf_weights(layout: str, seed: int) -> dict[str, torch.Tensor]:
    text = text_weights(seed, vocab_size=512)
    head = text.pop("lm_head.weight")
    vision, projector = vision_weights(seed + 1), projector_weights("mlp2x_gelu", seed + 2)
    projector = {name.replace("0.", "linear_1.").replace("2.", "linear_2."): w for name, w in projector.items()}
    if layout == "newer":
        text = {name.replace("model.", "model.language_model.", 1): tensor for name, tensor in text.items()}
        weights = prefixed("model.vision_tower.vision_model.", vision)
        weights |= prefixed("model.multi_modal_projector.", projector) | text
        return weights | {"lm_head.weight": head}
    tower_prefix = {"older": "vision_tower.vision_model.", "transformers5": "vision_tower."}[layout]
    weights = prefixed(tower_prefix, vision) | prefixed("multi_modal_projector.", projector)
    return weights | prefixed("language_model.", text) | {"language_model.lm_head.weight": head}
