"""Evaluates the demo's model on unseen images: its answers, its answers about a blank image, and its questions.

    python -m demo.evaluate --model runs/demo/model --data runs/demo/data

The answers are those of `sq-llava evaluate --tasks easy_vqa`, whose report is in `evaluation/` beside the model. Every
test question has its own prompt and is answered greedily. The model's own questions are sampled with the release's
settings after one answered turn, because the first question of a conversation is never a self-question in training.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from demo.data import blind_guess, read_questions
from sq_llava import load
from sq_llava.evaluation import easy_vqa
from sq_llava.evaluation.answering import AnswerSettings, answer_examples
from sq_llava.evaluation.easy_vqa import KINDS, answer_question, derive_caption
from sq_llava.evaluation.run import Evaluation, read_examples, score
from sq_llava.evaluation.run import evaluate as run_evaluation
from sq_llava.evaluation.task import Example, Metric, summarize
from sq_llava.output import write_json


FIRST_QUESTION = "what color is the shape?"
NUM_SHEET_IMAGES = 12
BATCH_SIZE = 128
BLANK_SHARE = 4  # every fourth question is also asked about a blank image


def accuracy_by_kind(metrics: list[Metric]) -> dict[str, float]:
    """Accuracy over all questions (`"all"`) and over each kind."""
    values = {metric.name: metric.value for metric in metrics}
    return {"all": values["accuracy"], **{kind: values[f"{kind}/accuracy"] for kind in KINDS}}


def measure_answers(assistant, examples: list[Example], folder: Path) -> dict[str, float]:
    """Accuracies of a loaded model, measured as `sq-llava evaluate` does. The answers are written to `folder`."""
    settings = AnswerSettings(easy_vqa.TASK.max_new_tokens, BATCH_SIZE)
    records = answer_examples(assistant, examples, folder, settings, "Answering")
    return accuracy_by_kind(
        summarize(easy_vqa.TASK, [replace(record, score=score(easy_vqa.TASK, record)) for record in records])
    )


def measure_blank(assistant, examples: list[Example], folder: Path) -> float:
    """Accuracy on the same questions about a blank image."""
    folder.mkdir(exist_ok=True)
    mean_colour = tuple(int(255 * mean) for mean in assistant.processor.image_processor.image_mean)
    Image.new("RGB", (64, 64), mean_colour).save(folder / "blank.png")
    blanks = [replace(example, images=[folder / "blank.png"]) for example in examples]
    return measure_answers(assistant, blanks, folder)["all"]


def is_valid(question: str, known: set[str], caption: str) -> bool:
    """True if a question has a form of easy-VQA and presumes nothing false about the image."""
    _, colour, shape = caption.split()
    return question in known and answer_question(question, colour, shape) is not None


def measure_questions(
    assistant, image_root: Path, num_images: int, questions_per_image: int, seed: int, batch_size: int = 25
) -> dict:
    """Samples questions about the first test images with a derivable caption, and counts the valid ones."""
    test = read_questions("test")
    known = {
        question for split in (test, read_questions("train")) for pairs in split.values() for question, _ in pairs
    }
    captions = {image: caption for image, pairs in test.items() if (caption := derive_caption(pairs)) is not None}
    asked, valid, sheet = [], [], []
    images = list(captions)[:num_images]
    for start in tqdm(range(0, len(images), batch_size), desc="Asking", unit=" batches"):
        batch = images[start : start + batch_size]
        paths = [image_root / f"test/images/{image}.png" for image in batch]
        firsts = assistant.answer_batch([(path, FIRST_QUESTION) for path in paths], max_new_tokens=8)
        histories = [
            [{"role": "user", "content": FIRST_QUESTION}, {"role": "assistant", "content": first}] for first in firsts
        ]
        seeds = [seed + image for image in batch]
        together = assistant.ask_batch(paths, histories, questions_per_image, max_new_tokens=20, seeds=seeds)
        for image, path, first, questions in zip(batch, paths, firsts, together):
            asked += questions
            valid += [is_valid(question, known, captions[image]) for question in questions]
            if len(sheet) < NUM_SHEET_IMAGES:
                answers = assistant.answer_batch([(path, question) for question in questions[:2]], max_new_tokens=8)
                own = list(zip(questions[:2], answers))
                sheet.append({"image": str(path), "turns": [(FIRST_QUESTION, first)], "own_turns": own})
    return {
        "questions_asked": len(asked),
        "questions_distinct": len(set(asked)),
        "questions_valid_share": sum(valid) / len(valid),
        "contact_sheet": sheet,
    }


def evaluate_answers(model_dir: Path, data_dir: Path, folder: Path, max_rows: int | None = None) -> dict[str, float]:
    """Accuracies of a checkpoint on the test questions. The answers are written to `folder`."""
    evaluation = Evaluation("", ["easy_vqa"], str(data_dir), folder, limit=max_rows)
    return measure_answers(load(str(model_dir)), read_examples(easy_vqa.TASK, evaluation), folder)


def evaluate(
    model_dir: Path,
    data_dir: Path,
    output: Path,
    seed: int = 0,
    split: str = "test",
    max_rows: int | None = None,
    num_images: int = 100,
) -> dict:
    """
    Runs all measurements, writes them to `output` as JSON, and returns them.

    Args:
        model_dir: Checkpoint.
        data_dir: Folder with the files of `demo.data.write_data`.
        output: JSON file to write.
        seed: Random seed for sampling questions.
        split: `"test"`, or `"holdout"` for choosing settings; then no questions are sampled.
        max_rows: Evaluate at most this many questions of the split, evenly spaced. Default: all.
        num_images: Number of images that the model asks four questions about.
    """
    folder = output.parent / "evaluation"
    settings = {"split": split, "limit": max_rows, "batch_size": BATCH_SIZE, "seed": seed}
    evaluation = Evaluation(str(model_dir), ["easy_vqa"], str(data_dir), folder, **settings)
    [answered] = run_evaluation(evaluation)
    by_kind = accuracy_by_kind(answered.metrics)
    examples = read_examples(easy_vqa.TASK, evaluation)
    blank_examples = examples[::BLANK_SHARE]
    assistant = load(str(model_dir))
    blind = blind_accuracy(data_dir, split, examples)
    result = {
        "num_test_questions": len(examples),
        "num_blank_questions": len(blank_examples),
        "test_accuracy": by_kind.pop("all"),
        "blank_image_accuracy": measure_blank(assistant, blank_examples, folder / "blank"),
        "blind_guess_accuracy": blind.pop("all"),
        "accuracy_by_kind": by_kind,
        "blind_guess_by_kind": blind,
    }
    if split == "test":
        image_root = easy_vqa.image_root_of(data_dir / "test.json")
        result |= measure_questions(assistant, image_root, num_images=num_images, questions_per_image=4, seed=seed)
    write_json(output, result)
    return result


def blind_accuracy(data_dir: Path, split: str, examples: list[Example]) -> dict[str, float]:
    """Accuracies of `blind_guess` on these questions."""
    rows = {row["id"]: row for row in json.loads((data_dir / f"{split}.json").read_text())}
    train_rows = json.loads((data_dir / "stage2_train.json").read_text())
    return blind_guess(train_rows, [rows[example.id] for example in examples])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("runs/demo/model"), help="Checkpoint.")
    parser.add_argument("--data", type=Path, default=Path("runs/demo/data"), help="Folder with the data.")
    parser.add_argument("--output", type=Path, help="JSON file to write. Default: evaluation.json beside the model.")
    parser.add_argument("--seed", type=int, default=0, help="Random seed for sampling questions.")
    parser.add_argument("--split", choices=("test", "holdout"), default="test", help="Questions to evaluate on.")
    parser.add_argument("--limit", type=int, help="Evaluate at most N questions, evenly spaced. Default: all.")
    args = parser.parse_args()
    output = args.output or args.model.parent / "evaluation.json"
    result = evaluate(args.model, args.data, output, args.seed, args.split, args.limit)
    print(json.dumps({name: value for name, value in result.items() if name != "contact_sheet"}, indent=2))


if __name__ == "__main__":
    main()
