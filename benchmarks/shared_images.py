"""Training speed on rows that share images: TRL's stock trainer, batches by length, packs, packs with shared images.

    python -m benchmarks.shared_images         # writes benchmarks/results/shared_images.{json,md}, half an hour

The result is the number of tokens with loss per second over whole epochs of `trainer.train()`, on the CPU in float32.
The three first ways and the lengths are those of `benchmarks/train_step.py`: a row is a ninth as long as in
llava_v1_5_mix665k, and an image has 64 tokens. Each workload is measured with two sizes of models:

    small      those of `benchmarks/train_step.py`, 8 rows a step. About half of the time of a step with shared images
               is its constant cost (Python, optimizer), so the ratios are below those of the positions
    larger     a language model of 26M weights and a tower of 6M, 24 rows a step: arithmetic dominates, as in large
               models

    mix         the shares of llava_v1_5_mix665k (https://github.com/haotian-liu/LLaVA/issues/657): 55% of the rows are
                about images of COCO, 3.1 rows an image (364,100 rows on 118,287 images); 39% are about an image of
                their own; 6% are text only (ShareGPT) and long, like 1,000 tokens on average at full length
    instruct    two rows an image, as in LLaVA-Instruct-158K
    self-made   eight rows of one question and answer an image, as `generate-data self` writes
    captions    one short row an image, as in stage 1: nothing is shared

Also reported: the positions of the language model (with padding), the images that the vision tower encodes, and the
peak of the memory that PyTorch allocates in one step.

A second table is calculated, not measured: the operations of CLIP ViT-L/14-336 and Vicuna-7B on the mix at its full
lengths, with LoRA and gradient checkpointing. Each position takes 4 operations for each weight (2 forward, 2 backward
to the inputs) and 2 more to compute it again; attention between positions comes on top. Memory is that of the inputs
of all layers, which checkpointing keeps, for a step of 16 rows.
"""

import tempfile
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
import torch
from transformers import Trainer, logging
from transformers.trainer_callback import PrinterCallback

from benchmarks import common
from benchmarks.random_models import clip_sizes, llama_sizes
from benchmarks.train_step import (
    MAX_LENGTH,
    NUM_WORDS,
    PROTOTYPES,
    SIDE,
    TOWERS,
    Data,
    conversation,
    draw_image,
    draw_words,
    own_trainer,
    read_data,
    show_image,
    stock_trainer,
)
from sq_llava.data.shared_images import ImageSharing
from sq_llava.training.packing import PackSampler


WORKLOADS = ("mix", "instruct", "self-made", "captions")
WAYS = ("stock", "by length", "packed", "shared")
MAX_ROWS_PER_IMAGE = 8


@dataclass(frozen=True)
class Size:
    """Sizes of the towers, the rows of an optimizer step, and the rows of a workload."""

    towers: tuple[dict, dict]
    rows_per_step: int
    num_rows: int


SIZES = {
    "small": Size(TOWERS, rows_per_step=8, num_rows=96),
    "larger": Size(
        (
            clip_sizes(256, layers=8, heads=4, side=SIDE),
            llama_sizes(512, 1408, layers=8, heads=8, vocabulary=NUM_WORDS),
        ),
        rows_per_step=24,
        num_rows=48,
    ),
}

# Weights of the linear layers, without embeddings.
IMAGE_TOKENS, PACK_7B = 576, 2048
TEXT_7B = {"weights": 32 * (4 * 4096**2 + 3 * 4096 * 11008), "head": 4096 * 32000, "layers": 32, "width": 4096}
VISION_7B = {"weights": 23 * 12 * 1024**2, "layers": 23, "width": 1024}


def images_of_rows(workload: str, num_rows: int, generator: np.random.Generator) -> list[int | None]:
    """The number of each row's image, or `None` for a text-only row."""
    if workload == "instruct":
        return [row // 2 for row in range(num_rows)]
    if workload == "self-made":
        return [row // 8 for row in range(num_rows)]
    if workload == "captions":
        return list(range(num_rows))
    images, number = [], 0
    # Share of the rows, and mean rows an image: at least one, the others as a Poisson distribution.
    for share, mean in ((0.547, 3.08), (0.392, 1.0)):
        end = len(images) + round(share * num_rows)
        while len(images) < end:
            rows = min(1 + generator.poisson(mean - 1), end - len(images))
            images += [number] * rows
            number += 1
    return images + [None] * (num_rows - len(images))


def num_exchanges_and_words(workload: str, is_text_only: bool, generator: np.random.Generator) -> tuple[int, int]:
    """Exchanges and words of a row. Rows of a mix with an image have the words of `benchmarks/train_step.py`."""
    if is_text_only:
        return 3, min(12 + int(generator.gamma(1.6, 111 / 1.6)), MAX_LENGTH - 3 * 4)
    if workload == "self-made":
        return 1, 6 + int(generator.gamma(3, 2.0))
    if workload == "captions":
        return 1, 3 + int(generator.gamma(3, 0.7))
    words = min(3 + int(generator.gamma(1.6, 31 / 1.6)), MAX_LENGTH - 64 - 3 * 4)
    return min(int(generator.integers(1, 4)), max(1, words // 3)), words


def make_data(folder: Path, workload: str, num_rows: int) -> Data:
    generator = np.random.default_rng(0)
    raw = []
    for image in images_of_rows(workload, num_rows, generator):
        num_exchanges, num_words = num_exchanges_and_words(workload, image is None, generator)
        row = {"id": str(len(raw))} | conversation(draw_words(num_words, generator), num_exchanges)
        if image is not None:
            if not (path := folder / f"{image}.jpg").exists():
                draw_image(path, generator)
            show_image(row, path.name)
        raw.append(row)
    return read_data(folder, raw)


def make_trainers(data: Data, folder: Path, size: Size) -> dict[str, Trainer]:
    own = {"by length": (False, 1), "packed": (True, 1), "shared": (True, MAX_ROWS_PER_IMAGE)}
    rows, towers = size.rows_per_step, size.towers
    trainers = {"stock": stock_trainer(data, folder, rows, towers)}
    for name, (packing, max_rows) in own.items():
        trainers[name] = own_trainer(data, folder, rows, packing, PROTOTYPES, max_rows, towers)
    for trainer in trainers.values():
        trainer.remove_callback(PrinterCallback)
    return trainers


def work_of_an_epoch(data: Data, trainer: Trainer) -> dict[str, int]:
    """Counts what the model computes in an epoch, and checks that every label is trained on."""
    labels = positions = images = 0
    for batch in trainer.get_train_dataloader():
        labels += int((batch["labels"] != -100).sum())
        positions += batch["input_ids"].numel()
        images += len(batch.get("pixel_values", ()))
    assert labels == data.num_labels, f"{labels} labels, expected {data.num_labels}"
    return {"positions": positions, "images": images}


def peak_of_a_step(trainer: Trainer) -> int:
    """Bytes that PyTorch allocates at most in the forward and backward pass of the first batch."""
    batch = next(iter(trainer.get_train_dataloader()))
    model = trainer.model.train()

    def step():
        inputs = trainer._prepare_inputs(dict(batch))
        trainer.compute_loss(model, inputs).backward()
        model.zero_grad()

    step()
    return common.allocated_peak(step)


def calculated_7b(num_rows: int) -> dict[str, dict[str, float]]:
    """Operations and memory of an epoch of the mix at its full lengths, by way of training."""
    generator = np.random.default_rng(0)
    images = images_of_rows("mix", num_rows, generator)
    groups = np.array([-1 - row if image is None else image for row, image in enumerate(images)])
    prefixes = np.where(groups < 0, 0, IMAGE_TOKENS + 1)
    text = 24 + generator.gamma(1.6, np.where(groups < 0, 610.0, 175.0)).astype(int)
    lengths = np.minimum(text + prefixes, PACK_7B)
    labels = 0.5 * (lengths - prefixes).sum()
    batches = np.split(generator.permutation(num_rows), num_rows // 16)
    padded = np.concatenate([np.full(len(rows), lengths[rows].max()) for rows in batches])
    found = {"stock": _operations(padded, np.zeros(1), num_rows - (groups < 0).sum(), padded.sum())}
    for name, max_rows in (("packed", 1), ("shared", MAX_ROWS_PER_IMAGE)):
        sharing = ImageSharing(groups, prefixes, max_rows)
        sampler = PackSampler(lengths, PACK_7B, 1, 1, 0, torch.zeros(()), sharing)
        items = [item for pack in sampler._pack(0, 0) for item in pack]
        shared = np.array([prefixes[item[0]] for item in items for _ in item[1:]] or [0])
        found[name] = _operations(lengths, shared, sum(groups[item[0]] >= 0 for item in items), labels)
    return {
        name: {
            "teraflops_per_label": of_way["operations"] / labels / 1e12,
            "times_fewer": found["stock"]["operations"] / of_way["operations"],
            "gib_of_a_step": of_way["positions"] / num_rows * 16 * TEXT_7B["layers"] * TEXT_7B["width"] * 2 / 2**30,
        }
        for name, of_way in found.items()
    }


def _operations(lengths: np.ndarray, shared: np.ndarray, images: int, head_positions: float) -> dict[str, float]:
    """Operations on rows of these lengths, less the prefixes that are shared, and on these images."""
    positions = int(lengths.sum() - shared.sum())
    pairs = (np.square(lengths).sum() - np.square(shared).sum()) / 2
    text = 6 * TEXT_7B["weights"] * positions + 6 * TEXT_7B["head"] * head_positions
    text += 16 * TEXT_7B["layers"] * TEXT_7B["width"] * pairs
    patches = IMAGE_TOKENS + 1
    vision = images * (6 * VISION_7B["weights"] * patches + 16 * VISION_7B["layers"] * VISION_7B["width"] * patches**2)
    return {"operations": text + vision, "positions": positions}


def measure(folder: Path, workload: str, size: Size, num_rows: int, rounds: int) -> dict:
    folder.mkdir()
    data = make_data(folder, workload, num_rows)
    trainers = make_trainers(data, folder, size)
    work = {name: work_of_an_epoch(data, trainer) for name, trainer in trainers.items()}
    times = common.interleave({name: trainer.train for name, trainer in trainers.items()}, rounds)
    return {
        "rows": num_rows,
        "tokens_with_loss": data.num_labels,
        "work": work,
        "peak_mib": {name: peak_of_a_step(trainer) / common.MEBIBYTE for name, trainer in trainers.items()},
        "seconds": times,
        "per_second": {name: common.summary([data.num_labels / s for s in times[name]]) for name in times},
        "times_faster": {name: common.ratio(times, "stock", name) for name in times},
    }


def to_markdown(report: dict) -> str:
    blocks = [
        "# Training speed on rows that share images",
        "`stock` is TRL's SFTTrainer with transformers' LLaVA. `by length`, `packed` and `shared` are this project "
        f"with batches of similar length, with packing, and with packing and share_images (at most "
        f"{MAX_ROWS_PER_IMAGE} rows an image). All train on the same labels; median (lowest to highest) of "
        f"{report['rounds']} rounds. Positions are those of the language model in an epoch, with padding.",
    ]
    for size, workloads in report["sizes"].items():
        blocks.append(f"## {size.capitalize()} models, {SIZES[size].rows_per_step} rows a step")
        for workload, found in workloads.items():
            rows = [
                [
                    way,
                    common.with_spread(found["per_second"][way]),
                    f"**{common.with_spread(found['times_faster'][way])}**",
                    f"{found['work'][way]['positions']:,}",
                    found["work"][way]["images"],
                    f"{found['peak_mib'][way]:,.0f}",
                ]
                for way in WAYS
            ]
            header = ["way", "tokens with loss per second", "times faster", "positions", "images", "MiB"]
            blocks += [f"{workload}: {found['rows']} rows.", common.table(header, rows)]
    calculated = [
        [
            way,
            f"{found['teraflops_per_label']:.2f}",
            f"**{found['times_fewer']:.2f}**",
            f"{found['gib_of_a_step']:.1f}",
        ]
        for way, found in report["calculated_7b"].items()
    ]
    header = ["way", "TFLOP for each token with loss", "times fewer", "GiB of layer inputs, 16 rows"]
    left = [size for size in SIZES if size not in report["sizes"]]
    if left:
        blocks.append(f"Not measured yet: {', '.join(left)} models.")
    blocks += [
        "## CLIP ViT-L/14-336 and Vicuna-7B, by calculation",
        "Calculated, not measured, for CLIP ViT-L/14-336 and Vicuna-7B on the mix at its full lengths, in packs of "
        f"{PACK_7B} tokens that FlashAttention takes without padding; stock has batches of 16 rows:",
        common.table(header, calculated),
    ]
    return common.text(*blocks)


def main():
    arguments = common.parse_arguments(__doc__)
    rounds = 1 if arguments.quick else 3
    logging.set_verbosity_error()
    datasets.disable_progress_bars()
    torch.manual_seed(0)
    sizes = {}
    with tempfile.TemporaryDirectory() as name:
        for size in ["small"] if arguments.quick else SIZES:
            sizes[size] = {}
            for workload in WORKLOADS:
                print(f"{size} models, workload {workload}", flush=True)
                folder = Path(name) / f"{size}-{workload}"
                num_rows = 16 if arguments.quick else SIZES[size].num_rows
                sizes[size][workload] = measure(folder, workload, SIZES[size], num_rows, rounds)
    report = {"rounds": rounds, "sizes": sizes, "calculated_7b": calculated_7b(1024 if arguments.quick else 16384)}
    common.save("shared_images", report, to_markdown, arguments)


if __name__ == "__main__":
    main()
