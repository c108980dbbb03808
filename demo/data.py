"""Turns the PyPI package `easy_vqa` into LLaVA-format JSON files for the demo.

    python -m demo.data --output-dir demo/out/data --images demo/out/images

writes four files. Their image paths are relative to the folder `images`, which gets links to the package's images:

    stage1_train.json    one caption per image
    stage2_train.json    an image's questions as multi-turn conversations
    holdout.json         single questions about held-out training images, for choosing hyperparameters
    test.json            single questions about the test images, for the final evaluation only

easy-VQA has 4,000 training and 1,000 test images of 64 x 64 pixels, with 38,575 and 9,673 templated questions. Each
image shows a circle, rectangle or triangle in one of eight colours. The package has no captions; they are derived from
the answers:

    "is there a red shape?" yes, "what shape is present?" circle   ->   "a red circle"
    "is there a red shape?" no,  "what shape is present?" circle   ->   no caption (any of seven colours)
"""

import argparse
import json
import math
import os
import random
import shutil
from collections import Counter, defaultdict
from pathlib import Path

import easy_vqa

from sq_llava.evaluation.easy_vqa import KINDS, derive_caption, question_kind
from sq_llava.output import write_text


def image_root() -> Path:
    """The package's folder of images. The image paths in the JSON files are relative to it."""
    return Path(easy_vqa.__file__).parent / "data"


def read_questions(split: str) -> dict[int, list[tuple[str, str]]]:
    """Reads the questions of one split of easy-VQA.

    Args:
        split: "train" or "test".

    Returns:
        The (question, answer) pairs of each image, by the image's number in ascending order.
    """
    readers = {"train": easy_vqa.get_train_questions, "test": easy_vqa.get_test_questions}
    questions_of_image = defaultdict(list)
    for question, answer, image in zip(*readers[split](), strict=True):
        questions_of_image[image].append((question, answer))
    return dict(sorted(questions_of_image.items()))


def image_path(split: str, image: int) -> str:
    return f"{split}/images/{image}.png"


def caption_rows(questions_of_image: dict[int, list[tuple[str, str]]]) -> list[dict]:
    """Makes one row of stage 1 for each training image whose caption can be derived."""
    rows = []
    for image, questions in questions_of_image.items():
        caption = derive_caption(questions)
        if caption is not None:
            turns = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": caption}]
            rows.append({"id": f"caption-{image}", "image": image_path("train", image), "conversations": turns})
    return rows


def conversation_rows(
    questions_of_image: dict[int, list[tuple[str, str]]], max_turns: int, shuffler: random.Random
) -> list[dict]:
    """Makes the rows of stage 2: an image's questions in random order, in as few conversations as `max_turns` allows.

    Example:
        {"id": "chat-7-0", "image": "train/images/7.png", "conversations": [
            {"from": "human", "value": "<image>\\nwhat color is the shape?"}, {"from": "gpt", "value": "blue"},
            {"from": "human", "value": "is there a circle?"}, {"from": "gpt", "value": "no"}]}
    """
    rows = []
    for image, questions in questions_of_image.items():
        questions = shuffler.sample(questions, len(questions))
        num_rows = math.ceil(len(questions) / max_turns)
        for part in range(num_rows):
            turns = []
            for question, answer in questions[part::num_rows]:
                prompt = question if turns else f"<image>\n{question}"
                turns += [{"from": "human", "value": prompt}, {"from": "gpt", "value": answer}]
            rows.append({"id": f"chat-{image}-{part}", "image": image_path("train", image), "conversations": turns})
    return rows


def question_rows(split: str, questions_of_image: dict[int, list[tuple[str, str]]]) -> list[dict]:
    """Makes evaluation rows: one row per question, with its `kind`."""
    rows = []
    for image, questions in questions_of_image.items():
        for number, (question, answer) in enumerate(questions):
            turns = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}]
            rows.append(
                {
                    "id": f"{split}-{image}-{number}",
                    "image": image_path(split, image),
                    "kind": question_kind(question),
                    "conversations": turns,
                }
            )
    return rows


def write_data(
    output_dir: str | Path, seed: int = 0, num_holdout_images: int = 200, max_turns: int = 8
) -> dict[str, Path]:
    """Writes the four JSON files of the demo.

    Args:
        output_dir: Folder to write to. It is created if it does not exist.
        seed: Random seed for the order of the turns. The held-out images are the same for every seed.
        num_holdout_images: Number of training images that both stages leave out, for choosing hyperparameters.
        max_turns: Maximum number of questions in a conversation. An image with more gets several conversations.

    Returns:
        The path of each file by its name: `stage1_train`, `stage2_train`, `holdout` and `test`.
    """
    all_train = read_questions("train")
    holdout_images = set(random.Random(0).sample(sorted(all_train), num_holdout_images))
    train = {image: questions for image, questions in all_train.items() if image not in holdout_images}
    holdout = {image: questions for image, questions in all_train.items() if image in holdout_images}
    rows_of_file = {
        "stage1_train": caption_rows(train),
        "stage2_train": conversation_rows(train, max_turns, random.Random(seed)),
        "holdout": question_rows("train", holdout),
        "test": question_rows("test", read_questions("test")),
    }
    output_dir = Path(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    paths = {name: output_dir / f"{name}.json" for name in rows_of_file}
    for name, path in paths.items():
        write_text(path, json.dumps(rows_of_file[name]) + "\n")
    return paths


def provide_images(folder: str | Path) -> None:
    """Hard-links the package's 5,000 images into `folder`. Symbolic links would point outside the image root."""
    for split in ("train", "test"):
        shutil.copytree(image_root() / split / "images", Path(folder) / split / "images", copy_function=_link_or_copy)


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # on another file system, or hard links are not supported
        shutil.copyfile(source, target)


def questions_and_answers(rows: list[dict]) -> list[tuple[str, str]]:
    """The (question, answer) pairs of LLaVA rows, without the image placeholder."""
    pairs = []
    for row in rows:
        turns = [turn["value"].removeprefix("<image>\n") for turn in row["conversations"]]
        pairs += zip(turns[::2], turns[1::2], strict=True)
    return pairs


def blind_guess(train_rows: list[dict], test_rows: list[dict]) -> dict[str, float]:
    """Accuracy without the image: each question gets its most frequent answer in the training rows.

    Args:
        train_rows: Rows of `stage2_train.json`.
        test_rows: Rows of `test.json` or `holdout.json`.

    Returns:
        The accuracy over all questions ("all"), and over each of the four `KINDS`.
    """
    counts = defaultdict(Counter)
    for question, answer in questions_and_answers(train_rows):
        counts[question][answer] += 1
    hits = defaultdict(list)
    for question, answer in questions_and_answers(test_rows):
        is_hit = counts[question].most_common(1)[0][0] == answer
        hits["all"].append(is_hit)
        hits[question_kind(question)].append(is_hit)
    return {name: sum(hits[name]) / len(hits[name]) for name in ("all", *KINDS)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, default=Path("demo/out/data"), help="Folder for the JSON files.")
    parser.add_argument("--images", type=Path, help="New folder for the images. Default: they stay in the package.")
    parser.add_argument("--seed", type=int, default=0, help="Random seed.")
    parser.add_argument("--num-holdout-images", type=int, default=200, help="Number of held-out training images.")
    parser.add_argument("--max-turns", type=int, default=8, help="Maximum number of questions in a conversation.")
    args = parser.parse_args()
    if args.images is not None:
        provide_images(args.images)
    settings = {name: value for name, value in vars(args).items() if name != "images"}
    for name, path in write_data(**settings).items():
        print(f"{name}: {len(json.loads(path.read_text(encoding='utf-8')))} rows in {path}")


if __name__ == "__main__":
    main()
