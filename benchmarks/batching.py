"""Batches grouped by modality and length, compared with random batches: padding, and time for the same rows.

    python -m benchmarks.batching            # writes benchmarks/results/batching.{json,md}

Padding is counted on a simulation of llava_v1_5_mix665k: 6% text-only rows, 576 tokens an image, text lengths from a
gamma distribution (a row has 846 tokens on average, and 95% have fewer than 1,302), global batches of 128 rows. The
timed work is forward and backward passes of a small random SQ-LLaVA on the CPU, over rows an eighth as long. The gain
on a GPU depends on the model. Both orders run in turn. Not measured: memory, data loading, the optimizer.
"""

from functools import partial

import numpy as np
import torch

from benchmarks import common
from benchmarks.random_models import clip_sizes, llama_sizes, make_model
from sq_llava.training.length_sampler import ModalityLengthSampler


IMAGE_TOKENS = 576
SCALE = 8  # the timed rows are shorter by this factor; their share of padding is the same
VISION = clip_sizes(64, layers=2, heads=2, side=48, patch=6, inner=128)
TEXT = llama_sizes(256, inner=512, layers=2, heads=4, vocabulary=512)
ORDERS = ("random", "grouped")


def simulated_mix(num_rows: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """The length of each row in tokens, and its number of images."""
    generator = np.random.default_rng(seed)
    num_images = (generator.random(num_rows) >= 0.06).astype(int)
    text = 24 + generator.gamma(1.6, 175.0, num_rows).astype(int)
    return np.minimum(text + IMAGE_TOKENS * num_images, 2048), num_images


def orders(lengths: np.ndarray, num_images: np.ndarray, global_batch: int) -> dict[str, np.ndarray]:
    """The row numbers in both orders, without the last, incomplete global batch."""
    whole = len(lengths) // global_batch * global_batch
    grouped = list(ModalityLengthSampler(lengths, num_images, global_batch, 0, torch.tensor(0)))
    return {"grouped": np.array(grouped)[:whole], "random": np.random.default_rng(1).permutation(len(lengths))[:whole]}


def padding(order: np.ndarray, lengths: np.ndarray, batch: int) -> float:
    """The share of positions that are padding."""
    of_batch = lengths[order.reshape(-1, batch)]
    return 1 - float(of_batch.sum() / (of_batch.max(axis=1).sum() * batch))


def imbalance(order: np.ndarray, lengths: np.ndarray, batch: int, processes: int) -> float:
    """How much longer the slowest process's batch is than the mean batch of all processes of a step."""
    longest = lengths[order.reshape(-1, processes, batch)].max(axis=2)
    return float((longest.max(axis=1) / longest.mean(axis=1)).mean() - 1)


def make_batch(rows: np.ndarray, lengths: np.ndarray, num_images: np.ndarray, config) -> dict:
    width = int(lengths[rows].max())
    ids = torch.full((len(rows), width), 1)
    mask = torch.zeros_like(ids)
    for place, row in enumerate(rows):
        ids[place, : lengths[row]] = torch.randint(2, config.image_token_id, (int(lengths[row]),))
        ids[place, 1 : 1 + config.image_seq_length * num_images[row]] = config.image_token_id
        mask[place, : lengths[row]] = 1
    labels = ids.masked_fill((mask == 0) | (ids == config.image_token_id), -100)
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    if num_images[rows].sum():
        batch["pixel_values"] = torch.randn(int(num_images[rows].sum()), 3, 48, 48)
    return batch


def train(model, batches: list[dict]) -> None:
    for inputs in batches:
        model(**inputs).loss.backward()
        model.zero_grad()


def time_orders(lengths: np.ndarray, num_images: np.ndarray, rows: int, rounds: int) -> dict:
    model, batch = make_model(VISION, TEXT).train(), 8
    lengths = np.maximum(lengths // SCALE, 8 + model.config.image_seq_length * num_images)
    functions = {}
    for name, order in orders(lengths[:rows], num_images[:rows], 64).items():
        batches = [make_batch(chosen, lengths, num_images, model.config) for chosen in order.reshape(-1, batch)]
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
    rows = []
    for row in report["padding"]:
        cells = [f"{row[name]:.1%}" for name in ORDERS] + [f"+{row[f'{name}_imbalance']:.1%}" for name in ORDERS]
        rows.append([row["batch"], row["processes"], *cells])
    timing = report["time"]
    random, grouped = (timing["seconds"][name]["median"] for name in ORDERS)
    header = ["rows per batch", "processes", "padding, random", "grouped", "slowest process, random", "grouped"]
    return common.text(
        "# Batches grouped by modality and length, compared with random batches",
        f"{report['rows']:,} simulated rows, in random order or grouped. The last two columns say how much longer the "
        "longest batch is than the mean batch of all processes:",
        common.table(header, rows, left=0),
        f"Forward and backward over the same {timing['rows']} rows in batches of {timing['batch']}, median of "
        f"{timing['rounds']} rounds: {random:.1f} s in random order, {grouped:.1f} s grouped. Grouped batches are "
        f"**{common.with_spread(timing['times_faster'])} times faster**.",
    )


def main():
    arguments = common.parse_arguments(__doc__)
    num_rows, rounds, timed = (5_000, 1, 64) if arguments.quick else (100_000, 2, 128)
    lengths, num_images = simulated_mix(num_rows)
    report = {"rows": num_rows, "padding": []}
    for batch, processes in ((4, 8), (16, 8), (16, 1)):
        row = {"batch": batch, "processes": processes}
        for name, order in orders(lengths, num_images, 128).items():
            row[name] = padding(order, lengths, batch)
            row[f"{name}_imbalance"] = imbalance(order, lengths, batch, processes)
        report["padding"].append(row)
    report["time"] = time_orders(lengths, num_images, timed, rounds)
    common.save("batching", report, to_markdown, arguments)


if __name__ == "__main__":
    main()
