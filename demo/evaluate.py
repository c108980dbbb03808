"""Measures the demo's model on images it never saw: its answers, its answers to a blank image, and its questions.

    python -m demo.evaluate --model runs/demo/model --data runs/demo/data

Every test question is asked alone, in a prompt of its own, and decoded greedily. Questions are sampled with the
release's settings after one answered turn: training never puts a self-question first.
"""

import argparse
import json
from collections import defaultdict
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm
from transformers.modeling_outputs import BaseModelOutputWithPooling

from demo.data import blind_guess, image_root, read_questions
from sq_llava.evaluation.easy_vqa import KINDS, answer_question, derive_caption
from sq_llava.inference import load


FIRST_QUESTION = "what color is the shape?"
NUM_SHEET_IMAGES = 12


@torch.inference_mode()
def encode_images(assistant, images: list[Image.Image], batch_size: int = 64) -> torch.Tensor:
    """Image tokens `(num_images, image_seq_length, hidden_size)`: each image is encoded once for all its questions."""
    tokens = []
    for start in range(0, len(images), batch_size):
        pixel_values = assistant.processor.image_processor(images[start : start + batch_size], return_tensors="pt")
        pixel_values = pixel_values["pixel_values"].to(assistant.model.device)
        tokens.append(assistant.model.get_image_features(pixel_values, return_dict=True).pooler_output)
    return torch.cat(tokens)


@torch.inference_mode()
def answer_all(assistant, questions: list[str], image_tokens: torch.Tensor, batch_size: int = 128) -> list[str]:
    """
    Answers each question about its image, greedily.

    Args:
        questions: One for each prompt.
        image_tokens: `(num_questions, image_seq_length, hidden_size)`, the image of each question.
    """
    processor = assistant.processor
    image_text = processor.image_token * processor.image_seq_length
    answers = []
    for start in tqdm(range(0, len(questions), batch_size), desc="Answering", unit=" batches"):
        prompts = [
            processor.apply_chat_template(
                [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}],
                add_generation_prompt=True,
            ).replace(processor.image_token, image_text)
            for question in questions[start : start + batch_size]
        ]
        inputs = processor.tokenizer(prompts, padding=True, add_special_tokens=False, return_tensors="pt")
        image = BaseModelOutputWithPooling(pooler_output=image_tokens[start : start + batch_size])
        output = assistant.model.generate(
            **inputs.to(assistant.model.device), mm_encoder_outputs={"image": image}, max_new_tokens=4, do_sample=False
        )
        texts = processor.batch_decode(output[:, inputs.input_ids.shape[1] :], skip_special_tokens=True)
        answers += [text.strip() for text in texts]
    return answers


def accuracy_by_kind(rows: list[dict], answers: list[str]) -> dict[str, float]:
    """Accuracy over all rows (`"all"`) and over each kind of question."""
    hits = defaultdict(list)
    for row, given in zip(rows, answers, strict=True):
        for name in ("all", row["kind"]):
            hits[name].append(given == row["conversations"][1]["value"])
    return {name: sum(hits[name]) / len(hits[name]) for name in ("all", *KINDS)}


def question_of(row: dict) -> str:
    return row["conversations"][0]["value"].removeprefix("<image>\n")


def measure_answers(assistant, rows: list[dict], train_rows: list[dict], blank_share: int = 4) -> dict:
    """Accuracies on the images, on a blank one (every `blank_share`-th question) and of the best blind guess."""
    paths = sorted({row["image"] for row in rows})
    index_of_path = {path: index for index, path in enumerate(paths)}
    image_tokens = encode_images(assistant, [Image.open(image_root() / path).convert("RGB") for path in paths])
    index = torch.tensor([index_of_path[row["image"]] for row in rows], device=image_tokens.device)
    answers = answer_all(assistant, [question_of(row) for row in rows], image_tokens[index])
    by_kind = accuracy_by_kind(rows, answers)

    mean_colour = tuple(int(255 * mean) for mean in assistant.processor.image_processor.image_mean)
    blank_tokens = encode_images(assistant, [Image.new("RGB", (64, 64), mean_colour)])
    blank_rows = rows[::blank_share]
    blank_answers = answer_all(
        assistant, [question_of(row) for row in blank_rows], blank_tokens.expand(len(blank_rows), -1, -1)
    )
    blind = blind_guess(train_rows, rows)
    return {
        "num_test_questions": len(rows),
        "num_blank_questions": len(blank_rows),
        "test_accuracy": by_kind.pop("all"),
        "blank_image_accuracy": accuracy_by_kind(blank_rows, blank_answers)["all"],
        "blind_guess_accuracy": blind.pop("all"),
        "accuracy_by_kind": by_kind,
        "blind_guess_by_kind": blind,
    }


def is_valid(question: str, known: set[str], caption: str) -> bool:
    """Whether a question has a form of easy-VQA, and presumes nothing that the image does not hold."""
    _, colour, shape = caption.split()
    return question in known and answer_question(question, colour, shape) is not None


def measure_questions(assistant, num_images: int, questions_per_image: int, seed: int, batch_size: int = 25) -> dict:
    """Samples questions about the first test images whose content is known for sure, and judges them."""
    test = read_questions("test")
    known = {
        question for split in (test, read_questions("train")) for pairs in split.values() for question, _ in pairs
    }
    captions = {image: caption for image, pairs in test.items() if (caption := derive_caption(pairs)) is not None}
    asked, valid, sheet = [], [], []
    images = list(captions)[:num_images]
    for start in tqdm(range(0, len(images), batch_size), desc="Asking", unit=" batches"):
        batch = images[start : start + batch_size]
        paths = [image_root() / f"test/images/{image}.png" for image in batch]
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
    Runs all measurements and writes them to `output` as JSON.

    Args:
        split: `"test"`, or `"holdout"`, without questions: to choose settings on.
        max_rows: Of the split's questions, the first so many; default all.
        num_images: How many images to ask questions about, four each.
    """
    assistant = load(str(model_dir))
    rows = json.loads((data_dir / f"{split}.json").read_text())[:max_rows]
    train_rows = json.loads((data_dir / "stage2_train.json").read_text())
    result = measure_answers(assistant, rows, train_rows)
    if split == "test":
        result |= measure_questions(assistant, num_images=num_images, questions_per_image=4, seed=seed)
    output.write_text(json.dumps(result, indent=2) + "\n")
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("runs/demo/model"))
    parser.add_argument("--data", type=Path, default=Path("runs/demo/data"))
    parser.add_argument("--output", type=Path, help="default: evaluation.json beside the model")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--split", choices=("test", "holdout"), default="test", help="holdout: to choose settings on")
    parser.add_argument("--limit", type=int, help="of the split's questions, the first so many; default all")
    args = parser.parse_args()
    output = args.output or args.model.parent / "evaluation.json"
    result = evaluate(args.model, args.data, output, args.seed, args.split, args.limit)
    print(json.dumps({name: value for name, value in result.items() if name != "contact_sheet"}, indent=2))


if __name__ == "__main__":
    main()
