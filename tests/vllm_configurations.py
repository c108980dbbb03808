"""The models on which `make test-vllm` compares vLLM with transformers: made of tiny parts, with random weights.

Each differs from the others in several respects at once: language model, vision tower, prompt layout, prototype
extractor and preparation of images. `docs/serving.md` lists them.
"""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import (
    Gemma2Config,
    Gemma3TextConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
    set_seed,
)

from sq_llava import compose
from sq_llava.checkpoints.load import load_checkpoint, merge_adapter
from sq_llava.training.adapter import LoraOptions, LoraSize, add_adapter
from tests import chat_tokenizers, tiny


# vLLM's attention needs heads of at least 32 channels on a CPU.
SIZES = {"hidden_size": 128, "intermediate_size": 192}
HEADS = {"head_dim": 32}
# Shorter than prompts with their answers.
WINDOW = {"sliding_window": 24}
# With larger weights, a Gemma would repeat one token. The caps lie within the range of the scores.
GEMMA = {**HEADS, **WINDOW, "initializer_range": 0.02, "query_pre_attn_scalar": 1}
CAPS = {"attn_logit_softcapping": 0.3, "final_logit_softcapping": 1.0}


@dataclass
class Configuration:
    """
    Attributes:
        name (`str`): Name of its folder.
        description (`str`): How it differs from the others, for people.
        save_vision (`Callable`): Writes the vision model to a folder.
        tokenizer (`Callable`): Makes the tokenizer of the language model.
        text_config (`type`): Family of the language model.
        text_fields (`dict`): Fields of its configuration.
        settings (`dict`): Keywords of [`compose`].
        has_lora (`bool`): Whether a LoRA on both towers is merged into the model.
        is_served (`bool`): Whether vLLM's server is tested with it too, not only the engine.
    """

    name: str
    description: str
    save_vision: Callable[[Path], object]
    tokenizer: Callable[[], PreTrainedTokenizerBase]
    text_config: type[PreTrainedConfig]
    text_fields: dict = field(default_factory=dict)
    settings: dict = field(default_factory=dict)
    has_lora: bool = False
    is_served: bool = False

    def save(self, folder: Path) -> None:
        """Writes the checkpoint to a folder."""
        with tempfile.TemporaryDirectory() as parts:
            vision, text = Path(parts, "vision"), Path(parts, "text")
            set_seed(0)
            self.save_vision(vision)
            chat_tokenizers.save_language_model(text, self.tokenizer(), self.text_config, **SIZES | self.text_fields)
            qformer = str(vision) if self.save_vision is tiny.save_blip2 else None
            settings = {"num_prototypes": 5, "initializer_range": 0.2} | self.settings
            model, processor = compose(str(vision), str(text), qformer, **settings)
            randomize_vectors(model)
            composed = Path(parts, "composed") if self.has_lora else folder
            model.save_pretrained(composed)
            processor.save_pretrained(composed)
            if self.has_lora:
                merge_random_lora(composed, folder)


@torch.no_grad()
def randomize_vectors(model: torch.nn.Module) -> None:
    """Changes biases, which begin at zero, and weights of norms, which begin at zero or one."""
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.add_(0.2 * torch.randn_like(parameter))


def merge_random_lora(base: Path, folder: Path) -> None:
    """Puts a LoRA with random weights on both towers, saves it, and merges it as `sq-llava merge` does."""
    adapter = base.parent / "adapter"
    model, processor = load_checkpoint(str(base))
    size = LoraSize(rank=4, alpha=8, dropout=0.0)
    add_adapter(model, size, size, train_vusr=True, options=LoraOptions(init_lora_weights=False)).save_pretrained(
        adapter
    )
    processor.save_pretrained(adapter)
    merge_adapter(str(adapter), str(folder))


def save_siglip2(folder: Path) -> None:
    """The sizes of SigLIP 2: patches of 16 pixels."""
    tiny.save_siglip(folder, image_size=64, patch_size=16)


def save_siglip(folder: Path) -> None:
    """As in SigLIP so400m, the side of an image is no multiple of that of a patch."""
    tiny.save_siglip(folder, image_size=48)


CROP = {"processor_kwargs": {"image_aspect_ratio": "crop"}}
MINIGPT4 = {"processor_kwargs": {"prompt_layout": "minigpt4"}, "projector_type": "linear"}
CONFIGURATIONS = [
    Configuration(
        "llama", "CLIP, Llama, Vicuna's layout, the paper's prototypes",
        tiny.save_clip, tiny.llama_tokenizer, LlamaConfig,
    ),
    Configuration(
        "llama3", "CLIP, Llama 3 with tied embeddings and biases, its layout, released prototypes, cropped images",
        tiny.save_clip, chat_tokenizers.llama31, LlamaConfig,
        {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
        {"prototype_variant": "released", **CROP},
    ),
    Configuration(
        "qwen2", "SigLIP, Qwen2, ChatML, no prototypes (LLaVA-1.5)", save_siglip, chat_tokenizers.qwen_base,
        Qwen2Config, settings={"prototype_variant": "none"},
    ),
    Configuration(
        "qwen3", "CLIP, Qwen3 with tied embeddings, ChatML with an empty think block, the paper's prototypes",
        tiny.save_clip, chat_tokenizers.qwen3, Qwen3Config, {**HEADS, "tie_word_embeddings": True}, is_served=True,
    ),
    Configuration(
        "mistral", "SigLIP 2, Mistral with a sliding window, its layout, the paper's prototypes", save_siglip2,
        chat_tokenizers.mistral, MistralConfig, WINDOW,
    ),
    Configuration(
        "gemma2", "SigLIP, Gemma 2, its layout, the released prototypes", save_siglip, chat_tokenizers.gemma,
        Gemma2Config, GEMMA | CAPS, {"prototype_variant": "released"},
    ),
    Configuration(
        "gemma3", "SigLIP 2, Gemma 3, its layout, the paper's prototypes, cropped images", save_siglip2,
        chat_tokenizers.gemma, Gemma3TextConfig,
        GEMMA | {"layer_types": ["sliding_attention", "full_attention"]}, CROP,
    ),
    Configuration(
        "phi3", "CLIP, Phi-3, Vicuna's layout, no prototypes, a linear projector (LLaVA)", tiny.save_clip,
        tiny.llama_tokenizer, Phi3Config, settings={"prototype_variant": "none", "projector_type": "linear"},
    ),
    Configuration(
        "smollm3", "SigLIP 2, SmolLM3 with a layer without positions, ChatML, the paper's prototypes", save_siglip2,
        chat_tokenizers.smollm3, SmolLM3Config, {"no_rope_layers": [1, 0]},
    ),
    Configuration(
        "olmo2", "CLIP, OLMo 2, Vicuna's layout, no prototypes, cropped images", tiny.save_clip,
        tiny.byte_level_tokenizer, Olmo2Config, settings={"prototype_variant": "none", **CROP},
    ),
    Configuration(
        "gpt_neox", "CLIP with its CLS token and its last layer, GPT-NeoX, Vicuna's layout, the released prototypes",
        tiny.save_clip, tiny.byte_level_tokenizer, GPTNeoXConfig, {"num_key_value_heads": 4},
        {"prototype_variant": "released", "vision_feature_select_strategy": "full", "vision_feature_layer": -1},
    ),
    Configuration(
        "merged_lora", "SigLIP, Llama, Vicuna's layout, the paper's prototypes, a merged LoRA on both towers",
        save_siglip, tiny.llama_tokenizer, LlamaConfig, has_lora=True,
    ),
    Configuration(
        "minigpt4", "BLIP-2's vision tower and Q-Former, Llama, a linear projector (MiniGPT-4), its layout",
        tiny.save_blip2, tiny.llama_tokenizer, LlamaConfig, settings={"prototype_variant": "none", **MINIGPT4},
    ),
]  # fmt: skip
