"""Batches grouped by modality and length beside random ones: padding, and time of the same rows.

    python -m benchmarks.batching            # writes benchmarks/results/batching.{json,md}
    python -m benchmarks.batching --quick    # fewer rows, writes nothing

Padding is counted on a simulated mix as of llava_v1_5_mix665k: 6% text-only rows, 576 tokens an image, texts of gamma
distributed length (mean 846 tokens a row, 95% below 1,302), global batches of 128 rows. Time is that of forward and
backward passes of a small random SQ-LLaVA over rows an eighth as long, on the CPU: what real hardware gains depends on
its model. Both orders run in turn. Memory, data loading and the optimizer are not measured.
"""

from functools import partial

import numpy as np
import torch

from benchmarks import common
from configuration_sq_llava import SQLlavaConfig
from modeling_sq_llava import SQLlavaForConditionalGeneration
from sq_llava.training.length_sampler import ModalityLengthSampler


IMAGE_TOKENS = 576
SCALE = 8  # the timed rows are shorter by this, the padding's share is the same
IMAGE_ID, VUSR_ID, VOCABULARY = 510, 511, 512


def simulated_mix(num_rows: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Lengths in tokens and numbers of images."""
    generator = np.random.default_rng(seed)
    num_images = (generator.random(num_rows) >= 0.06).astype(int)
    text = 24 + generator.gamma(1.6, 175.0, num_rows).astype(int)
    return np.minimum(text + IMAGE_TOKENS * num_images, 2048), num_images


def orders(lengths: np.ndarray, num_images: np.ndarray, global_batch: int) -> dict[str, np.ndarray]:
    """Row numbers in the order of both, without the last, incomplete global batch."""
    whole = len(lengths) // global_batch * global_batch
    grouped = list(ModalityLengthSampler(lengths, num_images, global_batch, 0, torch.tensor(0)))
    return {"grouped": np.array(grouped)[:whole], "random": np.random.default_rng(1).permutation(len(lengths))[:whole]}


def padding(order: np.ndarray, lengths: np.ndarray, batch: int) -> dict[str, float]:
    of_batch = lengths[order.reshape(-1, batch)]
    longest = of_batch.max(axis=1)
    return {"padding_share": 1 - float(of_batch.sum() / (longest.sum() * batch))}


def imbalance(order: np.ndarray, lengths: np.ndarray, batch: int, processes: int) -> float:
    """How much longer the slowest process's batch is than the mean one, as they run at the same time."""
    longest = lengths[order.reshape(-1, processes, batch)].max(axis=2)
    return float((longest.max(axis=1) / longest.mean(axis=1)).mean() - 1)


def small_model() -> SQLlavaForConditionalGeneration:
    torch.manual_seed(0)
    vision = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision |= {"model_type": "clip_vision_model", "image_size": 48, "patch_size": 6, "num_channels": 3}
    text = {"model_type": "llama", "vocab_size": VOCABULARY, "hidden_size": 256, "intermediate_size": 512}
    text |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4}
    config = SQLlavaConfig(vision_config=vision, text_config=text, image_token_id=IMAGE_ID, vusr_token_id=VUSR_ID)
    return SQLlavaForConditionalGeneration(config).train()


def make_batch(rows: np.ndarray, lengths: np.ndarray, num_images: np.ndarray, model_tokens: int) -> dict:
    width = int(lengths[rows].max())
    ids = torch.full((len(rows), width), 1)
    mask = torch.zeros_like(ids)
    for place, row in enumerate(rows):
        ids[place, : lengths[row]] = torch.randint(2, IMAGE_ID, (int(lengths[row]),))
        ids[place, 1 : 1 + model_tokens * num_images[row]] = IMAGE_ID
        mask[place, : lengths[row]] = 1
    batch = {
        "input_ids": ids,
        "attention_mask": mask,
        "labels": ids.masked_fill((mask == 0) | (ids == IMAGE_ID), -100),
    }
    if num_images[rows].sum():
        batch["pixel_values"] = torch.randn(int(num_images[rows].sum()), 3, 48, 48)
    return batch


def train(model, batches: list[dict]) -> None:
    for inputs in batches:
        model(**inputs).loss.backward()
        model.zero_grad()


def time_orders(lengths: np.ndarray, num_images: np.ndarray, rows: int, rounds: int) -> dict:
    model, batch = small_model(), 8
    lengths = np.maximum(lengths // SCALE, 8 + model.config.image_seq_length * num_images)
    functions = {}
    for name, order in orders(lengths[:rows], num_images[:rows], 64).items():
        image_tokens = model.config.image_seq_length
        batches = [make_batch(chosen, lengths, num_images, image_tokens) for chosen in order.reshape(-1, batch)]
        functions[name] = partial(train, model, batches)
    times = common.interleave(functions, rounds)
    return {
        "rows": rows,
        "batch": batch,
        "rounds": rounds,
        "seconds": {name: common.summary(seconds) for name, seconds in times.items()},
        "times_faster": common.ratio(times, "random", "grouped"),
    }


def to_markdown(report: dict) -> str:
    lines = [
        "# Batches grouped by modality and length beside random ones",
        "",
        f"{report['rows']:,} simulated rows:",
        "",
        "| rows a batch | processes | padding, random | grouped | slowest process, random | grouped |",
        "|--:|--:|--:|--:|--:|--:|",
    ]
    for row in report["padding"]:
        cells = [row["batch"], row["processes"]]
        cells += [f"{row[name]:.1%}" for name in ("random", "grouped")]
        cells += [f"+{row[f'{name}_imbalance']:.1%}" for name in ("random", "grouped")]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    timing = report["time"]
    random, grouped = (timing["seconds"][name]["median"] for name in ("random", "grouped"))
    lines += [
        "",
        f"Forward and backward over the same {timing['rows']} rows, batches of {timing['batch']}, median of "
        f"{timing['rounds']} rounds: {random:.1f} s random, {grouped:.1f} s grouped: "
        f"**{common.with_spread(timing['times_faster'])} times faster**.",
    ]
    return "\n".join(lines)


def main():
    arguments = common.parse_arguments(__doc__)
    num_rows, rounds, timed = (5_000, 1, 64) if arguments.quick else (100_000, 2, 128)
    lengths, num_images = simulated_mix(num_rows)
    report = {"rows": num_rows, "padding": []}
    for batch, processes in ((4, 8), (16, 8), (16, 1)):
        row = {"batch": batch, "processes": processes}
        for name, order in orders(lengths, num_images, 128).items():
            row[name] = padding(order, lengths, batch)["padding_share"]
            row[f"{name}_imbalance"] = imbalance(order, lengths, batch, processes)
        report["padding"].append(row)
    report["time"] = time_orders(lengths, num_images, timed, rounds)
    common.save("batching", report, to_markdown(report), arguments)


if __name__ == "__main__":
    main()
