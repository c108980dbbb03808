"""What the forward pass of a training step keeps for the backward pass, by part, with and without checkpointing.

    python -m benchmarks.memory            # writes benchmarks/results/memory.{json,md}, under 60 seconds
    python -m benchmarks.memory --quick    # small, writes nothing

A step of stage 2 (LoRA on both towers, extractor and projector whole) of a small random model, float32, CPU. The bytes
that autograd saves are summed over the tensors' storages, each counted where it is first saved: in the vision tower,
the extractor and projector, or the language model and its loss; weights are not counted. The peak is that of what
PyTorch allocates in the step. Gradient checkpointing keeps the input of each layer and computes the rest again.

What it does not measure: a GPU; the memory of weights and optimizer, which `--dry_run meta` adds up exactly.
"""

import os
from collections import defaultdict
from functools import partial

import torch
from torch.autograd.graph import saved_tensors_hooks

from benchmarks import common
from benchmarks.prototype_extractor import MEBIBYTE, allocated_peak
from benchmarks.random_models import SMALL_TEXT, SMALL_VISION, loss_of, make_batch, make_model, with_adapter
from sq_llava.training.adapter import LoraSize


VISION = SMALL_VISION | {"image_size": 336, "num_hidden_layers": 6}
CHECKPOINTED = {"nothing": (), "vision tower": ("vision",), "language model": ("text",), "both": ("vision", "text")}
PARTS = ("vision tower", "extractor and projector", "language model and loss")
LORA = LoraSize(8, 16, 0.05)


def checkpoint_only(model: torch.nn.Module, towers: tuple[str, ...]) -> None:
    """Of the towers that `gradient_checkpointing: true` checkpoints, both of them, takes some back."""
    base = model.get_base_model().model
    layers = {"vision": base.vision_tower.encoder.layers, "text": base.language_model.layers}
    for name, members in layers.items():
        for layer in members:
            layer.gradient_checkpointing = name in towers


def saved_bytes(model: torch.nn.Module, batch: dict) -> dict[str, int]:
    """Bytes kept by each part."""
    base = model.get_base_model().model
    part, seen, sizes = [PARTS[2]], set(), defaultdict(int)
    seen |= {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}

    def enter(name):
        return lambda *call: part.append(name)

    hooks = []
    for name, module in ((PARTS[0], base.vision_tower.embeddings), (PARTS[1], base.prototype_extractor),
                         (PARTS[2], base.language_model)):  # fmt: skip
        hooks.append(module.register_forward_pre_hook(enter(name)))

    kept = []  # so that no storage is freed and its place taken by another

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


def step(model: torch.nn.Module, batch: dict) -> None:
    model.zero_grad()
    loss_of(model, batch).backward()


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
        times = common.interleave({name: partial(step, model, batch) for name, model in models.items()}, rounds)
        for name, model in models.items():
            row = {"variant": variant, "checkpointed": name, "rows": rows, "words": words}
            row["saved_mib"] = {part: size / MEBIBYTE for part, size in saved_bytes(model, batch).items()}
            row["peak_mib"] = allocated_peak(partial(step, model, batch)) / MEBIBYTE
            row["slower"] = common.ratio(times, name, "nothing")
            measured.append(row)
    return measured


def to_markdown(report: dict) -> str:
    rows = report["rows"]
    lines = [
        "# What a step keeps for its backward pass",
        "",
        f"{rows[0]['rows']} rows with an image of 576 tokens and {rows[0]['words']} words; vision width "
        f"{VISION['hidden_size']}, {VISION['num_hidden_layers']} layers, K = 256; language model width "
        f"{SMALL_TEXT['hidden_size']}, {SMALL_TEXT['num_hidden_layers']} layers. MiB saved by each part, MiB "
        "allocated at the peak, and the time beside that without checkpointing.",
        "",
        "| extractor | checkpointed | vision tower | extractor, projector | language model, loss | peak | time |",
        "|---|---|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        cells = [row["variant"], row["checkpointed"], *(f"{row['saved_mib'].get(part, 0):.1f}" for part in PARTS)]
        cells += [f"{row['peak_mib']:.0f}", f"{common.with_spread(row['slower'])}x"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main():
    arguments = common.parse_arguments(__doc__)
    os.environ["KINETO_LOG_LEVEL"] = "6"  # the profiler of the process to come would print its start and stop
    sizes = (1, 60, ("paper",), 1) if arguments.quick else (1, 200, ("paper", "released"), 3)
    report = {"rows": common.in_fresh_process(measure, *sizes)}
    common.save("memory", report, to_markdown(report), arguments)


if __name__ == "__main__":
    main()
