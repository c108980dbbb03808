"""Folders to publish, for the tests of pushes."""

from pathlib import Path

import torch

from sq_llava.checkpoints.load import load_checkpoint
from sq_llava.checkpoints.provenance import write_provenance
from sq_llava.training.adapter import LoraSize, add_adapter
from tests import tiny


# Files that are often in such folders and must not be published.
NOT_PUBLISHED = (
    "optimizer.pt", "training_args.bin", "trainer_state.json", "rng_state.pth", "token", ".env", "run.log",
    "pytorch_model.bin", "notes.py",
)  # fmt: skip
INPUTS = tiny.tiny_inputs(tiny.tiny_config(image_token_id=tiny.tiny_processor().image_token_id))


@torch.no_grad()
def logits_of(model) -> torch.Tensor:
    return model(**INPUTS).logits


def write_model(folder: Path, seed: int = 0) -> torch.Tensor:
    """Writes a checkpoint in several files, and files that must not be published. Returns its logits of `INPUTS`."""
    processor = tiny.tiny_processor()
    model = tiny.tiny_model(
        tiny.tiny_config(image_token_id=processor.image_token_id, vusr_token_id=processor.vusr_token_id), seed
    )
    model.generation_config.update(eos_token_id=processor.tokenizer.eos_token_id, pad_token_id=0)
    model.config.text_config.name_or_path = "/home/somebody/models/llama"
    model.save_pretrained(folder, max_shard_size="200KB")
    processor.save_pretrained(folder)
    write_provenance(folder, {"converted_from": "org/source"})
    for name in NOT_PUBLISHED:
        (folder / name).write_text("secret")
    for name in ("checkpoint-5", "runs"):
        (folder / name).mkdir(exist_ok=True)
        (folder / name / "model.safetensors").write_text("secret")
    return logits_of(model)


def write_adapter(base: Path, folder: Path) -> torch.Tensor:
    """Writes the output of a training stage with random weights. Returns its logits of `INPUTS`."""
    model, processor = load_checkpoint(str(base))
    peft_model = add_adapter(model, LoraSize(2, 4, 0.0), LoraSize(4, 8, 0.0), train_vusr=True)
    torch.manual_seed(2)
    for parameter in peft_model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    peft_model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return logits_of(load_checkpoint(str(folder))[0].eval())


def append_code(folder: Path, code: str, name: str = "modeling_sq_llava.py") -> None:
    with (folder / name).open("a") as file:
        file.write(f"\n{code}\n")
