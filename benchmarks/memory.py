"""The memory that a training step keeps for its backward pass, by part, with and without gradient checkpointing.

    python -m benchmarks.memory            # writes benchmarks/results/memory.{json,md}, under 60 seconds

A step of stage 2 (LoRA on both towers, extractor and projector trained in full) of a small random model in float32 on
the CPU. The bytes that autograd saves are summed over the tensors' storages. Each storage counts for the part that
saves it first: the vision tower, the extractor and projector, or the language model and its loss. Weights do not
count. The peak is the largest amount that PyTorch allocates in the step. Gradient checkpointing keeps the input of
each layer and computes the rest again. Not measured: a GPU; weights and optimizer, which `--dry_run meta` adds up
exactly.
"""

from collections import defaultdict
from functools import partial

import torch
from torch.autograd.graph import saved_tensors_hooks

from benchmarks import common
from benchmarks.random_models import (
    SMALL_TEXT,
    SMALL_VISION,
    compute_gradients,
    loss_of,
    make_batch,
    make_model,
    with_adapter,
)
from sq_llava.training.adapter import LoraSize


VISION = SMALL_VISION | {"image_size": 336, "num_hidden_layers": 6}
CHECKPOINTED = {"nothing": (), "vision tower": ("vision",), "language model": ("text",), "both": ("vision", "text")}
PARTS = ("vision tower", "extractor and projector", "language model and loss")
LORA = LoraSize(8, 16, 0.05)


def checkpoint_only(model: torch.nn.Module, towers: tuple[str, ...]) -> None:
    """Checkpoints these towers only. `gradient_checkpointing: true` checkpoints both."""
    base = model.get_base_model().model
    layers = {"vision": base.vision_tower.encoder.layers, "text": base.language_model.layers}
    for name, members in layers.items():
        for layer in members:
            layer.gradient_checkpointing = name in towers


def saved_bytes(model: torch.nn.Module, batch: dict) -> dict[str, int]:
    """The bytes that each part saves."""
    base = model.get_base_model().model
    part, seen, sizes = [PARTS[2]], set(), defaultdict(int)
    seen |= {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}

    def enter(name):
        return lambda *call: part.append(name)

    hooks = []
    for name, module in ((PARTS[0], base.vision_tower.embeddings), (PARTS[1], base.prototype_extractor),
                         (PARTS[2], base.language_model)):  # fmt: skip
        hooks.append(module.register_forward_pre_hook(enter(name)))

    kept = []  # keeps storages alive, so that no other storage gets the same address

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            sizes[part[-1]] += storage.nbytes()
            kept.append(storage)
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        loss_of(model, batch)
    for hook in hooks:
        hook.remove()
    return dict(sizes)


def measure(rows: int, words: int, variants: tuple[str, ...], rounds: int) -> list[dict]:
    measured = []
    for variant in variants:
        models = {}
        for name, towers in CHECKPOINTED.items():
            models[name] = with_adapter(
                make_model(VISION, SMALL_TEXT, prototype_variant=variant), LORA, LORA, checkpointing=True
            )
            checkpoint_only(models[name], towers)
        batch = make_batch(models["nothing"].config, rows, words, share_labelled=0.3)
        times = common.interleave(
            {name: partial(compute_gradients, model, batch) for name, model in models.items()}, rounds
        )
        for name, model in models.items():
            row = {"variant": variant, "checkpointed": name, "rows": rows, "words": words}
            row["saved_mib"] = {part: size / common.MEBIBYTE for part, size in saved_bytes(model, batch).items()}
            row["peak_mib"] = common.allocated_peak(partial(compute_gradients, model, batch)) / common.MEBIBYTE
            row["slower"] = common.ratio(times, name, "nothing")
            measured.append(row)
    return measured


def to_markdown(report: dict) -> str:
    rows = []
    for row in report["rows"]:
        saved = [f"{row['saved_mib'].get(part, 0):.1f}" for part in PARTS]
        peak, slower = f"{row['peak_mib']:.0f}", f"{common.with_spread(row['slower'])}x"
        rows.append([row["variant"], row["checkpointed"], *saved, peak, slower])
    first = report["rows"][0]
    return common.text(
        "# The memory that a step keeps for its backward pass",
        f"Rows: {first['rows']}, each with an image of 576 tokens and {first['words']} words. Vision tower: width "
        f"{VISION['hidden_size']}, {VISION['num_hidden_layers']} layers. Extractor: 256 prototypes. Language model: "
        f"width {SMALL_TEXT['hidden_size']}, {SMALL_TEXT['num_hidden_layers']} layers. The table has the MiB that "
        "each part keeps for the backward pass, the peak of allocated MiB, and the time relative to a step without "
        "gradient checkpointing.",
        common.table(["extractor", "checkpointed", *PARTS, "peak", "time"], rows, left=2),
    )


def main():
    arguments = common.parse_arguments(__doc__)
    sizes = (1, 60, ("paper",), 1) if arguments.quick else (1, 200, ("paper", "released"), 3)
    report = {"rows": common.in_fresh_process(measure, *sizes)}
    common.save("memory", report, to_markdown, arguments)


if __name__ == "__main__":
    main()
