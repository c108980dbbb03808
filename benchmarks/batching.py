"""Batches grouped by modality and length beside random ones: padding, and time of the same rows.

    python benchmarks/batching.py            # writes benchmarks/results/batching.{json,md}
    python benchmarks/batching.py --quick    # fewer rows, writes nothing

Padding is counted on a simulated mix as of llava_v1_5_mix665k: 6% text-only rows, 576 tokens an image, texts of gamma
distributed length (mean 846 tokens a row, 95% below 1,302), global batches of 128 rows. Time is that of forward and
backward passes of a small random SQ-LLaVA over rows an eighth as long, on the CPU: what real hardware gains depends on
its model. Both orders run in turn. Memory, data loading and the optimizer are not measured.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import numpy as np
import torch

from configuration_sq_llava import SQLlavaConfig
from modeling_sq_llava import SQLlavaForConditionalGeneration
from sq_llava.batching import ModalityLengthSampler


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
    text |= {"num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 4}
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


def time_order(model, order: np.ndarray, lengths: np.ndarray, num_images: np.ndarray, batch: int) -> float:
    tokens = model.config.image_seq_length
    batches = [make_batch(rows, lengths, num_images, tokens) for rows in order.reshape(-1, batch)]
    start = time.perf_counter()
    for inputs in batches:
        model(**inputs).loss.backward()
        model.zero_grad()
    return time.perf_counter() - start


def to_markdown(report: dict) -> str:
    lines = [
        "# Batches grouped by modality and length beside random ones",
        "",
        f"Made by `{report['command']}` on {report['rows']:,} simulated rows; {report['threads']} CPU threads, torch "
        f"{torch.__version__}.",
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
    lines += [
        "",
        f"Forward and backward over the same {timing['rows']} rows, batches of {timing['batch']}, median of "
        f"{timing['rounds']} rounds: {timing['random_seconds']:.1f} s random, {timing['grouped_seconds']:.1f} s "
        f"grouped: **{timing['times_faster']:.2f} times faster**.",
    ]
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer rows, one round; print, write nothing")
    parser.add_argument("--output-dir", type=Path, default=Path(__file__).parent / "results")
    arguments = parser.parse_args()
    num_rows, rounds, timed = (5_000, 1, 128) if arguments.quick else (100_000, 3, 384)

    lengths, num_images = simulated_mix(num_rows)
    report = {"command": "python benchmarks/batching.py", "rows": num_rows, "threads": torch.get_num_threads()}
    report["padding"] = []
    for batch, processes in ((4, 8), (16, 8), (16, 1)):
        row = {"batch": batch, "processes": processes}
        for name, order in orders(lengths, num_images, 128).items():
            row[name] = padding(order, lengths, batch)["padding_share"]
            row[f"{name}_imbalance"] = imbalance(order, lengths, batch, processes)
        report["padding"].append(row)

    model, batch = small_model(), 8
    lengths = np.maximum(lengths // SCALE, 8 + model.config.image_seq_length * num_images)
    times = {"grouped": [], "random": []}
    for _ in range(rounds):
        for name, order in orders(lengths[:timed], num_images[:timed], 64).items():
            times[name].append(time_order(model, order, lengths, num_images, batch))
    report["time"] = {"rows": timed, "batch": batch, "rounds": rounds}
    report["time"] |= {f"{name}_seconds": statistics.median(seconds) for name, seconds in times.items()}
    report["time"]["times_faster"] = statistics.median(r / g for r, g in zip(times["random"], times["grouped"]))

    print(to_markdown(report))
    if not arguments.quick:
        arguments.output_dir.mkdir(parents=True, exist_ok=True)
        (arguments.output_dir / "batching.json").write_text(json.dumps(report, indent=2) + "\n")
        (arguments.output_dir / "batching.md").write_text(to_markdown(report))


if __name__ == "__main__":
    main()
