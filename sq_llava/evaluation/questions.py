"""What a model asks about pictures, measured: the paper's claim for self-questioning.

    sq-llava evaluate-questions --model runs/demo/model --images runs/demo/data/test.json --truth easy_vqa -n 4

For each picture the model answers once (a description, or `after`), asks n questions, and answers them, with the
picture and with a blank one in its place. A question that is answered the same without the picture was not about it.
With a CLIP, its cosine of picture and text is given for questions and for answers (Figure 2 of the paper), beside that
with another picture, which is what a text unrelated to the picture gets.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoConfig, CLIPModel, CLIPProcessor

from sq_llava.data.images import open_image
from sq_llava.data.messages import place_images
from sq_llava.data.rows import load_rows
from sq_llava.data.sources import DataSource, holds_dataset
from sq_llava.early_checks import IMAGE_SUFFIXES
from sq_llava.evaluation.easy_vqa import answer_question, derive_caption, presumes
from sq_llava.evaluation.question_metrics import distinct_n, self_bleu, type_shares, words_of
from sq_llava.inference.assistant import Assistant
from sq_llava.inference.dialogues import DESCRIBE, Dialogues
from sq_llava.inference.settings import AskSettings
from sq_llava.resumable.resume import run_resumable


@dataclass(frozen=True)
class Picture:
    """
    A picture, and what a data set asks and answers about it.

    Args:
        id (`str`): The picture's path, or its row.
        image: As `sq_llava.data.images.open_image` takes it.
        pairs (`Sequence[tuple[str, str]]`): Questions and answers of the data set.
        number (`int`): The picture's own number, added to the seed.
    """

    id: str
    image: Any
    pairs: Sequence[tuple[str, str]] = ()
    number: int = 0


def read_pictures(place: str, image_root: str | None = None) -> list[Picture]:
    """
    The images of a folder, or those of a data set in any layout that training reads.

    Raises:
        ValueError: if there are none.
    """
    folder = Path(place)
    files = sorted(file for file in folder.glob("*") if file.suffix.lower() in IMAGE_SUFFIXES)
    if files:
        return [Picture(str(file), file, number=number) for number, file in enumerate(files)]
    if folder.is_dir() and not holds_dataset(folder):
        raise ValueError(
            f"--images {place}: holds neither images ({', '.join(sorted(IMAGE_SUFFIXES))}) nor a data set."
        )
    return _pictures_of_rows(place, image_root)


def _pictures_of_rows(place: str, image_root: str | None) -> list[Picture]:
    images: dict[str, Any] = {}
    pairs: dict[str, list[tuple[str, str]]] = {}
    for row in load_rows([DataSource(place, image_root)]):
        if not row["images"]:
            continue
        image = row["images"][0]
        # Rows about the same file are about one picture; an image inside a table is a picture of its own.
        path = image["path"] if isinstance(image, dict) else image
        name = f"row {row['row_id']}" if isinstance(image, dict) and image.get("bytes") else str(path)
        images.setdefault(name, image)
        texts = ["".join(part.get("text") or "" for part in turn["content"]).strip() for turn in row["messages"]]
        roles = [turn["role"] for turn in row["messages"]]
        for index, role in enumerate(roles[1:], start=1):
            if role == "assistant" and roles[index - 1] != "system":
                pairs.setdefault(name, []).append((texts[index - 1], texts[index]))
    if not images:
        raise ValueError(f"--images {place}: none of its rows has an image.")
    return [
        Picture(name, image, tuple(pairs.get(name, ())), number) for number, (name, image) in enumerate(images.items())
    ]


def ask_about(
    assistant: Assistant, pictures: Sequence[Picture], folder: Path, settings: AskSettings, batch_size: int = 4
) -> list[dict[str, Any]]:
    """
    Asks about every picture, over processes, resumed from what `folder` holds.

    Args:
        batch_size (`int`): Pictures asked about together, each with `settings.num_questions` rows.

    Returns:
        For each picture, in order: `id`, `first` (what was said first), `questions`, `answers`, `blank_answers`,
        `error`.
    """
    failed = {"first": "", "questions": [], "answers": [], "blank_answers": []}

    def ask(batch: Sequence[Picture]) -> list[dict[str, Any]]:
        return _ask_together(assistant, batch, settings)

    lines = run_resumable(pictures, ask, folder, "asked", "Asking", batch_size, failed=failed)
    return [lines[picture.id] for picture in pictures]


def _ask_together(assistant: Assistant, batch: Sequence[Picture], settings: AskSettings) -> list[dict[str, Any]]:
    images = [open_image(picture.image) for picture in batch]
    # The seed belongs to the picture: the same questions in any batch, on one process and on many.
    seeds = [settings.seed + picture.number for picture in batch]
    dialogues = Dialogues(
        assistant.model,
        assistant.processor,
        [place_images(image, settings.after or DESCRIBE) for image in images],
        seeds,
    )
    firsts = dialogues.answer(settings.max_new_tokens)
    questions = dialogues.ask(
        settings.num_questions, settings.temperature, settings.top_k, settings.top_p, settings.max_new_tokens
    )
    blanks = {image.size: blank_like(assistant, image) for image in images}
    answers, without = (
        assistant.answer_batch(
            [(image, question) for image, each in zip(shown, questions) for question in each], settings.max_new_tokens
        )
        for shown in (images, [blanks[image.size] for image in images])
    )
    lines = []
    for number, (first, each) in enumerate(zip(firsts, questions)):
        own = slice(number * settings.num_questions, (number + 1) * settings.num_questions)
        lines.append({"first": first, "questions": each, "answers": answers[own], "blank_answers": without[own]})
    return lines


def blank_like(assistant: Assistant, image: Image.Image) -> Image.Image:
    """A picture of the same size in the mean colour of the vision tower's training, which it sees as zeros."""
    mean_colour = tuple(int(255 * mean) for mean in assistant.processor.image_processor.image_mean)
    return Image.new("RGB", image.size, mean_colour)


def figures_of(asked: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The figures that need neither a CLIP nor the truth. Pictures that failed are counted but enter no mean."""
    whole = [line for line in asked if line["error"] is None]
    questions = [question for line in whole for question in line["questions"]]
    if not questions:
        raise ValueError("The model asked nothing: see the errors in asked-*.jsonl.")
    changed = [
        answer != blank for line in whole for answer, blank in zip(line["answers"], line["blank_answers"], strict=True)
    ]
    bleus = [bleu for line in whole if (bleu := self_bleu(line["questions"])) is not None]
    return {
        "num_images": len(asked),
        "num_failed": len(asked) - len(whole),
        "num_questions": len(questions),
        "distinct_questions": len(set(questions)) / len(questions),
        "distinct_1": distinct_n(questions, 1),
        "distinct_2": distinct_n(questions, 2),
        "self_bleu_of_an_image": sum(bleus) / len(bleus) if bleus else None,
        "mean_words": sum(len(words_of(question)) for question in questions) / len(questions),
        "types": type_shares(questions),
        "answer_changes_without_the_image": sum(changed) / len(changed),
    }


def hash_of_pictures(pictures: Sequence[Picture]) -> str:
    """SHA-256 over the ids, questions, answers and image files of all pictures."""
    digest = hashlib.sha256()
    for picture in pictures:
        digest.update(json.dumps([picture.id, picture.pairs]).encode())
        digest.update(_content_of(picture.image))
    return digest.hexdigest()


def _content_of(image: Any) -> bytes:
    if isinstance(image, dict) and image.get("bytes"):
        return image["bytes"]
    path = Path(image["path"] if isinstance(image, dict) else image)
    return path.read_bytes() if path.is_file() else b"missing"  # the picture will be recorded as failed


def captions_of(pictures: Sequence[Picture]) -> list[str | None]:
    """
    What each picture of easy-VQA holds, such as "a red circle"; `None` where its questions and answers do not tell.

    Raises:
        ValueError: if they tell it of no picture, or contradict each other.
    """
    captions = [derive_caption(list(picture.pairs)) if picture.pairs else None for picture in pictures]
    if not any(captions):
        raise ValueError("--truth easy_vqa: no picture comes with the questions and answers of easy-VQA.")
    return captions


def easy_vqa_figures(
    asked: Sequence[dict[str, Any]], captions: Sequence[str | None], known: set[str]
) -> dict[str, Any]:
    """
    Where the truth is known: the share of questions whose premise is true, which are questions of easy-VQA's forms
    that presume no shape or colour that the picture does not hold; the same among those that presume one at all, as
    "what is the red shape?" does; and how many of the model's answers to its questions are right.

    Args:
        captions: As of [`captions_of`]; pictures without one have no part in the figures.
        known (`set[str]`): All questions of the data set, whose forms are understood.
    """
    premises, presumed, right = [], [], []
    for line, caption in zip(asked, captions, strict=True):
        if line["error"] is not None or caption is None:
            continue
        _, colour, shape = caption.split()
        for question, answer in zip(line["questions"], line["answers"], strict=True):
            truth = answer_question(question, colour, shape) if question in known else None
            premises.append(truth is not None)
            if question in known and presumes(question):
                presumed.append(truth is not None)
            if truth is not None:
                right.append(truth == answer)
    return {
        "premise_is_true": sum(premises) / len(premises) if premises else None,
        "num_premises": len(premises),
        "presumed_is_true": sum(presumed) / len(presumed) if presumed else None,
        "num_presuming": len(presumed),
        "own_answer_is_right": sum(right) / len(right) if right else None,
        "num_own_answers": len(right),
    }


class ClipScorer:
    """
    Cosines of pictures and texts by a CLIP of transformers, without a factor (CLIPScore's is 2.5). Texts longer than
    its text tower reads are cut; the share of them is told.

    Args:
        path (`str`): Folder or Hub id of a whole CLIP, with its processor's files.
    """

    def __init__(self, path: str, device: str):
        if AutoConfig.from_pretrained(path).model_type != "clip":
            raise ValueError(f"--clip {path}: is no whole CLIP: give one with both towers.")
        self.model = CLIPModel.from_pretrained(path).to(device).eval()
        self.processor = CLIPProcessor.from_pretrained(path)
        self.max_length = self.model.config.text_config.max_position_embeddings

    @torch.inference_mode()
    def cosines(self, images: Sequence[Image.Image], texts: Sequence[str]) -> torch.Tensor:
        """Cosines `(len(texts), len(images))`."""
        pixel_values = self.processor.image_processor(list(images), return_tensors="pt")["pixel_values"]
        tokens = self.processor.tokenizer(
            list(texts), padding=True, truncation=True, max_length=self.max_length, return_tensors="pt"
        ).to(self.model.device)
        picture = self.model.get_image_features(pixel_values.to(self.model.device)).pooler_output
        text = self.model.get_text_features(tokens["input_ids"], tokens["attention_mask"]).pooler_output
        return torch.nn.functional.normalize(text, dim=-1) @ torch.nn.functional.normalize(picture, dim=-1).T

    def is_cut(self, text: str) -> bool:
        return len(self.processor.tokenizer(text)["input_ids"]) > self.max_length


def clip_figures(
    scorer: ClipScorer, asked: Sequence[dict[str, Any]], pictures: Sequence[Picture]
) -> tuple[dict[str, Any], dict[str, list[float]]]:
    """
    Mean cosines of texts with their picture, and with the next one's; and all the single cosines, for a histogram.

    Returns:
        Figures, and cosines, for `questions` and `answers` of the model, `data_questions` and `data_answers`.
    """
    whole = [(line, picture) for line, picture in zip(asked, pictures, strict=True) if line["error"] is None]
    cosines: dict[str, list[float]] = {}
    others: dict[str, list[float]] = {}
    cut = []
    for number, (line, picture) in enumerate(whole):
        other = whole[(number + 1) % len(whole)][1]
        texts = {
            "questions": line["questions"],
            "answers": line["answers"],
            "data_questions": [question for question, _ in picture.pairs],
            "data_answers": [answer for _, answer in picture.pairs],
        }
        flat = [(kind, text) for kind, each in texts.items() for text in each if text]
        if not flat:
            continue
        found = scorer.cosines([open_image(picture.image), open_image(other.image)], [text for _, text in flat])
        for (kind, text), (own, another) in zip(flat, found.tolist()):
            cosines.setdefault(kind, []).append(own)
            others.setdefault(kind, []).append(another)
            cut.append(scorer.is_cut(text))
    figures: dict[str, Any] = {"texts_cut": sum(cut) / max(1, len(cut))}
    for kind, values in cosines.items():
        figures[kind] = sum(values) / len(values)
        figures[f"{kind}_with_another_image"] = sum(others[kind]) / len(others[kind])
    return figures, cosines
