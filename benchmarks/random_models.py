"""SQ-LLaVA models of given sizes with random weights, and batches for them. Nothing is downloaded.

    model = with_adapter(make_model(VISION, TEXT, device="cuda", dtype=torch.bfloat16), lora, lora)
    batch = make_batch(model.config, rows=4, words=200, share_labelled=0.3)

The benchmarks share this module; it is not a benchmark itself.
"""

import torch
from peft import PeftModel
from tokenizers import ByteLevelBPETokenizer
from transformers import CLIPImageProcessorPil, PreTrainedTokenizerFast
from trl.trainer.utils import add_fused_lm_head

from configuration_sq_llava import SQLlavaConfig
from modeling_sq_llava import SQLlavaForConditionalGeneration
from processing_sq_llava import SYSTEM_MESSAGE
from sq_llava.training.adapter import LoraSize, add_adapter


def clip_sizes(width: int, layers: int, heads: int, side: int, patch: int = 14, inner: int | None = None) -> dict:
    """Fields of a CLIP vision tower. `side` and `patch` are in pixels; `inner` is 4 times `width` by default."""
    sizes = {"hidden_size": width, "intermediate_size": inner or 4 * width, "num_hidden_layers": layers}
    sizes |= {"num_attention_heads": heads, "image_size": side, "patch_size": patch}
    return {"model_type": "clip_vision_model", **sizes}


def llama_sizes(width: int, inner: int, layers: int, heads: int, vocabulary: int, kv_heads: int | None = None) -> dict:
    """Fields of a Llama; it has as many key-value heads as heads by default."""
    sizes = {"hidden_size": width, "intermediate_size": inner, "num_hidden_layers": layers}
    sizes |= {"num_attention_heads": heads, "num_key_value_heads": kv_heads or heads}
    return {"model_type": "llama", "vocab_size": vocabulary, "max_position_embeddings": 4096, **sizes}


SMALL_VISION = clip_sizes(256, layers=4, heads=4, side=168)
SMALL_TEXT = llama_sizes(256, inner=704, layers=6, heads=4, vocabulary=8192)


def make_model(
    vision: dict, text: dict, device: str = "cpu", dtype: torch.dtype = torch.float32, **fields
) -> SQLlavaForConditionalGeneration:
    """
    Args:
        vision, text: Configuration fields of the vision tower and the language model.
        device, dtype: Where and in which precision the weights are made.
        fields: Further fields of `SQLlavaConfig`. `<image>` and `[vusr]` are the last two ids by default.
    """
    torch.manual_seed(0)
    fields = {"image_token_id": text["vocab_size"] - 2, "vusr_token_id": text["vocab_size"] - 1, **fields}
    config = SQLlavaConfig(vision_config=dict(vision), text_config=dict(text), **fields)
    with torch.device(device):
        return SQLlavaForConditionalGeneration._from_config(config, dtype=dtype)


def with_adapter(
    model: SQLlavaForConditionalGeneration, vision_lora: LoraSize, text_lora: LoraSize, checkpointing: bool = False
) -> PeftModel:
    """The model as the trainer has it: with TRL's fused head, and trained weights in float32."""
    add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
    model = add_adapter(model, vision_lora, text_lora, train_vusr=text_lora.rank > 0).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def make_batch(config: SQLlavaConfig, rows: int, words: int, share_labelled: float) -> dict[str, torch.Tensor]:
    """Rows of one image and `words` random token ids each; the last `share_labelled` of the ids have labels."""
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(3, config.image_token_id, (rows, words), generator=generator)
    placeholders = torch.full((rows, config.image_seq_length), config.image_token_id)
    batch = {"input_ids": torch.cat([text[:, :1], placeholders, text[:, 1:]], dim=1)}
    batch["labels"] = torch.full_like(batch["input_ids"], -100)
    num_labels = max(1, round(share_labelled * words))
    batch["labels"][:, -num_labels:] = batch["input_ids"][:, -num_labels:]
    side = config.vision_config.image_size
    return batch | {"pixel_values": torch.randn(rows, 3, side, side, generator=generator)}


def loss_of(model: PeftModel, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The mean loss as `SQLlavaTrainer.compute_loss` computes it: the head runs on labelled positions only."""
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    labels = torch.nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=-100)
    kept = labels != -100
    outputs = model(**inputs, positions_to_keep=kept, shift_labels=labels[kept], fused_lm_head=True, use_cache=False)
    return -outputs.log_probs.mean()


def compute_gradients(model: PeftModel, batch: dict[str, torch.Tensor]) -> None:
    """One training step without the optimizer."""
    model.zero_grad()
    loss_of(model, batch).backward()


def train_tokenizer(texts: list[str], **settings) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on the system message and these texts."""
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator([SYSTEM_MESSAGE, *texts], special_tokens=["</s>"], show_progress=False, **settings)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer._tokenizer, eos_token="</s>")


def square_image_processor(side: int) -> CLIPImageProcessorPil:
    """CLIP's image processor for images of `side` by `side` pixels."""
    return CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
