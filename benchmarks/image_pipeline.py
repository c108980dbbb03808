"""From the bytes of a photo to the pixels of a vision tower: the cost of each step, and the cores that a GPU needs.

    python -m benchmarks.image_pipeline            # a minute; writes benchmarks/results/image_pipeline.{json,md}

The photos are JPEG files of 640 x 480 pixels, the size of COCO's, and of 2000 x 1500. Both are mosaics of one real
photo; the tower takes 336 x 336 pixels. The steps run in turn on one core. Two short cuts that are not exact are
measured too, with their largest and mean difference in 8-bit levels at 336 x 336: padding the image after it is
resized, and JPEG's draft mode, which decodes at half the size where that is still twice the tower's size. Training
uses neither.

Then the collator makes whole rows, with text, and workers deliver its batches to a loop that only sleeps for the time
of a GPU step. The extra time that the loop waits is the time that a GPU would wait. The time of a step is assumed, not
measured: 6.7e9 parameters, 843 tokens a row, three passes of two operations for each parameter and token (forward,
recomputed forward, backward; LoRA needs no gradients of the large matrices), at half of an H100's 989e12 operations
per second. Disks are not measured: the files' bytes are in memory.
"""

import io
import time
from functools import partial

import numpy as np
import torch
from matplotlib.cbook import get_sample_data
from PIL import Image
from torch.utils.data import DataLoader
from transformers import LlavaImageProcessorPil

from benchmarks import common
from benchmarks.random_models import square_image_processor, train_tokenizer
from image_processing_sq_llava import SQLlavaImageProcessor
from processing_sq_llava import SQLlavaProcessor
from sq_llava.data.images import open_image
from sq_llava.training.collator import SelfQuestioningCollator


SIDE = 336
SIZES = ((640, 480), (2000, 1500))
PARAMETERS, TOKENS, PASSES, OPERATIONS_PER_SECOND = 6.7e9, 843, 3, 0.5 * 989e12
SECONDS_PER_ROW = PARAMETERS * TOKENS * PASSES * 2 / OPERATIONS_PER_SECOND
BATCH = 16
STEPS = {
    "decode": "decode, rotate, convert to RGB",
    "stock": "pad, resize, normalise: transformers' processor",
    "project": "pad, resize, normalise: this project's processor (identical pixels)",
    "stock_whole": "**all steps, transformers' processor**",
    "project_whole": "**all steps, as in training**",
    "padded_after": "all steps, padding after resizing (not exact)",
    "draft": "all steps, JPEG's draft mode (not exact)",
}


def make_photo(width: int, height: int) -> dict[str, bytes]:
    """A JPEG file in memory."""
    tile = Image.open(get_sample_data("grace_hopper.jpg", asfileobj=True)).convert("RGB")
    photo = Image.new("RGB", (width, height))
    for left in range(0, width, tile.width):
        for top in range(0, height, tile.height):
            photo.paste(tile, (left, top))
    stream = io.BytesIO()
    photo.save(stream, "JPEG", quality=90)
    return {"bytes": stream.getvalue()}


def padded_after(image: Image.Image, image_processor) -> Image.Image:
    scale = SIDE / max(image.size)
    small = image.resize((round(image.width * scale), round(image.height * scale)), image_processor.resample)
    return image_processor.pad_and_resize(small)


def opened_as_draft(photo: dict[str, bytes]) -> Image.Image:
    with Image.open(io.BytesIO(photo["bytes"])) as file:
        file.draft("RGB", (2 * SIDE, 2 * SIDE * file.height // file.width))
        return file.convert("RGB")


def time_steps(photo: dict[str, bytes], image_processor: SQLlavaImageProcessor, rounds: int) -> dict:
    image, stock = open_image(photo), LlavaImageProcessorPil.from_dict(image_processor.to_dict())

    def pixels(image: Image.Image, image_processor=image_processor) -> torch.Tensor:
        return image_processor(image, return_tensors="pt")["pixel_values"]

    if not torch.equal(pixels(image), pixels(image, stock)):
        raise AssertionError("This project's pixels differ from those of transformers' processor.")
    functions = {
        "decode": partial(open_image, photo),
        "stock": partial(pixels, image, stock),
        "project": partial(pixels, image),
        "stock_whole": lambda: pixels(open_image(photo), stock),
        "project_whole": lambda: pixels(open_image(photo)),
        "padded_after": lambda: pixels(padded_after(open_image(photo), image_processor)),
        "draft": lambda: pixels(opened_as_draft(photo)),
    }
    times = common.interleave(functions, rounds)
    return {
        "milliseconds": {name: common.summary([1000 * value for value in times[name]]) for name in functions},
        "times_faster": common.ratio(times, "stock_whole", "project_whole"),
        "differences": {
            "padded_after": difference(image, padded_after(image, image_processor), image_processor),
            "draft": difference(image, opened_as_draft(photo), image_processor),
        },
    }


def difference(image: Image.Image, other: Image.Image, image_processor) -> dict[str, float]:
    """The largest and the mean difference of two images after padding and resizing, in levels of 0 to 255."""
    exact, found = (np.asarray(image_processor.pad_and_resize(each), dtype=int) for each in (image, other))
    levels = np.abs(exact - found)
    return {"largest": int(levels.max()), "mean": float(levels.mean())}


def make_row(index: int, photo: dict[str, bytes]) -> dict:
    content = [{"type": "image"}, {"type": "text", "text": f"What stands at the place {index} of the picture?"}]
    answer = {"role": "assistant", "content": [{"type": "text", "text": "There is a person before a flag. " * 20}]}
    # Every image gets different bytes: the collator opens equal images of a batch only once.
    image = {"bytes": photo["bytes"] + index.to_bytes(4, "little")}
    return {"row_id": index, "messages": [{"role": "user", "content": content}, answer], "images": [image]}


def time_loading(photo: dict[str, bytes], collator: SelfQuestioningCollator, steps: int) -> dict:
    """Rows per second of the collator on one core, and the share of time that a training loop waits."""
    rows = [make_row(index, photo) for index in range(BATCH * (steps + 1))]
    collator(rows[:BATCH])
    seconds = min(common.seconds_of(lambda: collator(rows[:BATCH])) for _ in range(3))
    result = {"rows_per_second": BATCH / seconds, "waiting_share": {}}
    for workers in (0, 1):
        loader = iter(DataLoader(rows, BATCH, collate_fn=collator, num_workers=workers))
        next(loader)  # starts the workers
        waited = 0.0
        for _ in range(steps):
            time.sleep(BATCH * SECONDS_PER_ROW)
            waited += common.seconds_of(partial(next, loader))
        result["waiting_share"][workers] = waited / (waited + steps * BATCH * SECONDS_PER_ROW)
    return result


def to_markdown(report: dict) -> str:
    sizes = report["sizes"]
    steps = [
        [title, *(common.with_spread(size["milliseconds"][step]) for size in sizes.values())]
        for step, title in STEPS.items()
    ]
    faster = [f"**{common.with_spread(size['times_faster'])}**" for size in sizes.values()]
    steps.append(["times faster than transformers' processor", *faster])
    for step, title in (("padded_after", "padding after resizing"), ("draft", "draft mode")):
        found = [size["differences"][step] for size in sizes.values()]
        cells = [f"{each['largest']}, {each['mean']:.2f}" for each in found]
        steps.append([f"difference by {title}, of 255 levels: largest, mean", *cells])
    loads = []
    for name, size in sizes.items():
        needed = 1 / SECONDS_PER_ROW / size["loading"]["rows_per_second"]
        shares = [f"{share:.1%}" for share in size["loading"]["waiting_share"].values()]
        loads.append([name, f"{size['loading']['rows_per_second']:.0f}", f"{needed:.2f}", *shares])
    return common.text(
        "# Images on their way to the vision tower",
        f"On one core; medians (lowest to highest) of {report['rounds']} rounds in which the steps run in turn.",
        common.table(["milliseconds per photo", *sizes], steps),
        "The next table shows how fast the collator makes whole rows (the best of three times), and how long a GPU "
        f"would wait for them. It assumes a GPU that trains a 7B model on {1 / SECONDS_PER_ROW:.1f} rows per second "
        f"({PARAMETERS:.1e} parameters, {TOKENS} tokens per row, {PASSES} passes, "
        f"{OPERATIONS_PER_SECOND / 1e12:.0f}e12 operations per second). The recipes for 7B and 13B use four workers "
        "per GPU.",
        common.table(
            ["photos", "rows/s per core", "workers needed per GPU", "GPU waits without workers", "with one worker"],
            loads,
        ),
    )


def main():
    arguments = common.parse_arguments(__doc__)
    rounds, steps = (3, 1) if arguments.quick else (15, 3)
    torch.set_num_threads(1)
    processor = SQLlavaProcessor(square_image_processor(SIDE), train_tokenizer([]))
    collator = SelfQuestioningCollator(processor)
    report = {"rounds": rounds, "seconds_per_row_of_a_gpu": SECONDS_PER_ROW, "sizes": {}}
    for width, height in SIZES:
        photo = make_photo(width, height)
        result = time_steps(photo, processor.image_processor, rounds)
        report["sizes"][f"{width} x {height}"] = result | {"loading": time_loading(photo, collator, steps)}
    common.save("image_pipeline", report, to_markdown, arguments)


if __name__ == "__main__":
    main()
