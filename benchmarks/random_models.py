"""SQ-LLaVA models of given sizes with random weights, and batches for them: nothing is downloaded.

    model = with_adapter(make_model(VISION, TEXT, device="cuda", dtype=torch.bfloat16), lora)
    batch = make_batch(model.config, rows=4, words=200, share_labelled=0.3)

What the benchmarks of training share. This is not a benchmark itself.
"""

import torch
from peft import PeftModel
from trl.trainer.utils import add_fused_lm_head

from configuration_sq_llava import SQLlavaConfig
from modeling_sq_llava import SQLlavaForConditionalGeneration
from sq_llava.training.adapter import LoraSize, add_adapter


SMALL_VISION = {
    "model_type": "clip_vision_model",
    "hidden_size": 256,
    "intermediate_size": 1024,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "image_size": 168,
    "patch_size": 14,
}
SMALL_TEXT = {
    "model_type": "llama",
    "vocab_size": 8192,
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "max_position_embeddings": 4096,
}


def make_model(
    vision: dict, text: dict, device: str = "cpu", dtype: torch.dtype = torch.float32, **fields
) -> SQLlavaForConditionalGeneration:
    """`<image>` and `[vusr]` are the last two words, unless `fields`, others of `SQLlavaConfig`, say otherwise."""
    torch.manual_seed(0)
    fields = {"image_token_id": text["vocab_size"] - 2, "vusr_token_id": text["vocab_size"] - 1, **fields}
    config = SQLlavaConfig(vision_config=dict(vision), text_config=dict(text), **fields)
    with torch.device(device):
        return SQLlavaForConditionalGeneration._from_config(config, dtype=dtype)


def with_adapter(
    model: SQLlavaForConditionalGeneration, vision_lora: LoraSize, text_lora: LoraSize, checkpointing: bool = False
) -> PeftModel:
    """The model as the trainer holds it: with TRL's fused head, and what is trained in float32."""
    add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
    model = add_adapter(model, vision_lora, text_lora, train_vusr=text_lora.rank > 0).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def make_batch(
    config: SQLlavaConfig, rows: int, words: int, share_labelled: float, images: int = 1, device: str = "cpu"
) -> dict[str, torch.Tensor]:
    """Rows of `images` images each, then `words` random ids, of which the last ones are labelled."""
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(3, config.image_token_id, (rows, words), generator=generator)
    placeholders = torch.full((rows, images * config.image_seq_length), config.image_token_id)
    batch = {"input_ids": torch.cat([text[:, :1], placeholders, text[:, 1:]], dim=1)}
    batch["labels"] = torch.full_like(batch["input_ids"], -100)
    num_labels = max(1, round(share_labelled * words))
    batch["labels"][:, -num_labels:] = batch["input_ids"][:, -num_labels:]
    if images:
        side = config.vision_config.image_size
        batch["pixel_values"] = torch.randn(rows * images, 3, side, side, generator=generator)
    return {name: tensor.to(device) for name, tensor in batch.items()}


def loss_of(model: PeftModel, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The mean loss, as `SQLlavaTrainer.compute_loss` takes it: the head scores labelled positions alone."""
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    labels = torch.nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=-100)
    kept = labels != -100
    outputs = model(**inputs, positions_to_keep=kept, shift_labels=labels[kept], fused_lm_head=True, use_cache=False)
    return -outputs.log_probs.mean()
