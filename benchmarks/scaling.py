"""How the cost of a step grows with image tokens, prototypes, images and rows.

    python -m benchmarks.scaling            # writes benchmarks/results/scaling.{json,md,png}, under 90 seconds

Forward and backward on the CPU in float32, in a small random model (vision width 256, 4 layers; a language model of
width 256 with 4 layers) with the adapter of stage 2. For N tokens, K prototypes and the number of images, only the
vision side runs (tower, extractor, projector), in the three `prototype_variant`s. For the number of rows, each with
one image, the whole step up to the gradients runs. The exponent is that of the power law through the first and the
last point; 1 means that the cost grows in proportion. Not measured: a GPU, the optimizer, data loading.
"""

import math
from functools import partial
from pathlib import Path

import matplotlib
import torch


matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.ticker import LogLocator

from benchmarks import common
from benchmarks.random_models import SMALL_TEXT, SMALL_VISION, compute_gradients, make_batch, make_model, with_adapter
from sq_llava.training.adapter import LoraSize


VARIANTS = ("none", "paper", "released")
LORA = LoraSize(8, 16, 0.0)
# Side of an image in pixels; with patches of 14 pixels, 64 to 1,024 tokens.
SIDES = (112, 168, 252, 336, 448)
PROTOTYPES = (16, 64, 256, 1024)
IMAGES = (1, 2, 4, 8)
ROWS = (1, 2, 4, 8)


def vision_side(variant: str, side: int, prototypes: int, images: int):
    """Returns a function that encodes images and computes the gradients."""
    text = SMALL_TEXT | {"num_hidden_layers": 1}
    model = make_model(SMALL_VISION | {"image_size": side}, text, prototype_variant=variant, num_prototypes=prototypes)
    model = with_adapter(model, LORA, LORA).get_base_model()
    pixel_values = torch.randn(images, 3, side, side)

    def run():
        model.zero_grad()
        model.get_image_features(pixel_values).pooler_output.square().mean().backward()

    return run


def whole_step(variant: str, rows: int):
    """Returns a function that computes the loss of rows and its gradients."""
    text = SMALL_TEXT | {"num_hidden_layers": 4}
    model = with_adapter(make_model(SMALL_VISION, text, prototype_variant=variant), LORA, LORA)
    return partial(compute_gradients, model, make_batch(model.config, rows, 100, share_labelled=0.3))


def measure(make, sizes: tuple[int, ...], rounds: int) -> dict[str, list[dict]]:
    """Seconds of each variant at each size. All of them run in turn."""
    functions = {f"{variant} {size}": make(variant, size) for size in sizes for variant in VARIANTS}
    times = common.interleave(functions, rounds)
    return {variant: [common.summary(times[f"{variant} {size}"]) for size in sizes] for variant in VARIANTS}


def exponent(sizes: list[int], seconds: list[dict]) -> float:
    return math.log(seconds[-1]["median"] / seconds[0]["median"]) / math.log(sizes[-1] / sizes[0])


def draw(report: dict, path: Path) -> None:
    figure, axes = plt.subplots(2, 2, figsize=(9, 7), layout="constrained")
    for panel, axis in zip(report["panels"], axes.flat):
        for variant, marker in zip(VARIANTS, "o^s"):
            points = panel["seconds"][variant]
            medians = [point["median"] for point in points]
            below, above = [p["median"] - p["low"] for p in points], [p["high"] - p["median"] for p in points]
            axis.errorbar(
                panel["sizes"], medians, [below, above], label=variant, marker=marker, markersize=5, capsize=2
            )
        axis.set(xscale="log", yscale="log", xlabel=panel["size"], ylabel="seconds", title=panel["what"])
        axis.set_xticks(panel["sizes"], [f"{size:,}" for size in panel["sizes"]])
        axis.minorticks_off()
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter("{x:g}")
        axis.grid(alpha=0.3)
    axes[0, 0].legend(title="prototype_variant")
    figure.suptitle("Forward and backward on the CPU: median, lowest and highest round")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def to_markdown(report: dict) -> str:
    blocks = [
        "# How the cost of a step grows with its sizes",
        f"Seconds; medians of {report['rounds']} rounds. The exponent is that of the power law through the "
        "first and the last point: 1 means that the cost grows in proportion to the size.",
    ]
    for panel in report["panels"]:
        header = ["variant", *(f"{size:,}" for size in panel["sizes"]), "exponent"]
        rows = [
            [name, *(f"{point['median']:.3f}" for point in seconds), f"{exponent(panel['sizes'], seconds):.2f}"]
            for name, seconds in panel["seconds"].items()
        ]
        what = panel["what"][0].upper() + panel["what"][1:]
        blocks += [f"{what}. Columns: {panel['size']}.", common.table(header, rows)]
    return common.text(*blocks, "![Cost against sizes](scaling.png)")


def main():
    arguments = common.parse_arguments(__doc__)
    rounds = 1 if arguments.quick else 2
    sides, prototypes, images, rows = (
        (sizes[0], sizes[2]) if arguments.quick else sizes for sizes in (SIDES, PROTOTYPES, IMAGES, ROWS)
    )
    tokens = [(side // SMALL_VISION["patch_size"]) ** 2 for side in sides]
    panels = []
    for what, size, labels, make, values in (
        ("vision side, 1 image, K = 64", "N, tokens of an image", tokens,
         lambda variant, side: vision_side(variant, side, 64, 1), sides),
        ("vision side, 2 images, N = 144", "K, prototypes", prototypes,
         lambda variant, number: vision_side(variant, 168, number, 2), prototypes),
        ("vision side, N = 144, K = 64", "images", images,
         lambda variant, number: vision_side(variant, 168, 64, number), images),
        ("whole step, N = 144, K = 256", "rows, each with an image and 100 words", rows, whole_step, rows),
    ):  # fmt: skip
        print(f"{what}, against {size}", flush=True)
        panels.append({"what": what, "size": size, "sizes": list(labels), "seconds": measure(make, values, rounds)})
    report = {"rounds": rounds, "panels": panels}
    common.save("scaling", report, to_markdown, arguments, draw)


if __name__ == "__main__":
    main()
