"""Measures the questions that a model asks about images: the ability that self-questioning trains.

    sq-llava evaluate-questions --model runs/demo/model --images runs/demo/data/test.json --truth easy_vqa -n 4

For each image, the model first answers a prompt (a description, or `after`) and then asks n questions. It answers each
question twice: with the image, and with a blank image. If both answers are equal, the question was not about the
image. `--clip` adds the cosine similarity of each question and answer with its image (Figure 2 of the paper). The
baseline is the similarity of the same text with another image.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
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
from sq_llava.early_checks import IMAGE_SUFFIXES, is_image_file
from sq_llava.evaluation.easy_vqa import answer_question, derive_caption, presumes
from sq_llava.evaluation.question_metrics import distinct_n, self_bleu, type_shares, words_of
from sq_llava.inference.assistant import Assistant
from sq_llava.inference.dialogues import DESCRIBE, Dialogues
from sq_llava.inference.settings import AskSettings
from sq_llava.resumable.resume import run_resumable
from sq_llava.resumable.run_note import RunNote


ASKED = "asked"  # first part of the names of the files with the questions


@dataclass(frozen=True)
class Picture:
    """
    An image, with the questions and answers that a dataset has about it.

    Args:
        id (`str`): Path of the image, or `row N` for an image that is stored in a table.
        image: Any input of `sq_llava.data.images.open_image`.
        pairs (`Sequence[tuple[str, str]]`): (question, answer) pairs of the dataset.
        number (`int`): Number of the image. It is added to the seed.
    """

    id: str
    image: Any
    pairs: Sequence[tuple[str, str]] = ()
    number: int = 0


def read_pictures(place: str, image_root: str | None = None) -> list[Picture]:
    """
    The images of a folder, or of a dataset in any layout that training reads.

    Args:
        place (`str`): Folder of images, or path or Hub id of a dataset.
        image_root (`str`, *optional*): Folder that the dataset's image paths are relative to.

    Raises:
        ValueError: If there are no images.
    """
    folder = Path(place)
    files = sorted(filter(is_image_file, folder.glob("*")))
    if files:
        return [Picture(str(file), file, number=number) for number, file in enumerate(files)]
    if folder.is_dir() and not holds_dataset(folder):
        raise ValueError(
            f"--images {place}: contains neither images ({', '.join(sorted(IMAGE_SUFFIXES))}) nor a dataset."
        )
    return _pictures_of_rows(place, image_root)


def _pictures_of_rows(place: str, image_root: str | None) -> list[Picture]:
    images: dict[str, Any] = {}
    pairs: dict[str, list[tuple[str, str]]] = {}
    for row in load_rows([DataSource(place, image_root)]):
        if not row["images"]:
            continue
        image = row["images"][0]
        # Rows with the same image file are about one image. An image stored in a table belongs to its row alone.
        path = image["path"] if isinstance(image, dict) else image
        name = f"row {row['row_id']}" if isinstance(image, dict) and image.get("bytes") else str(path)
        images.setdefault(name, image)
        texts = ["".join(part.get("text") or "" for part in turn["content"]).strip() for turn in row["messages"]]
        roles = [turn["role"] for turn in row["messages"]]
        for index, role in enumerate(roles[1:], start=1):
            if role == "assistant" and roles[index - 1] != "system":
                pairs.setdefault(name, []).append((texts[index - 1], texts[index]))
    if not images:
        raise ValueError(f"--images {place}: no row has an image.")
    return [
        Picture(name, image, tuple(pairs.get(name, ())), number) for number, (name, image) in enumerate(images.items())
    ]


def ask_about(
    assistant: Assistant,
    pictures: Sequence[Picture],
    folder: Path,
    settings: AskSettings,
    batch_size: int = 4,
    note: RunNote | None = None,
    hashes: Mapping[str, str] | None = None,
) -> list[dict[str, Any]]:
    """
    Lets the model ask about every image. Runs on several processes and resumes from what `folder` holds.

    Args:
        batch_size (`int`): Images per batch. The model gets `settings.num_questions` rows for each.
        note ([`RunNote`], *optional*): The note of the run. It is written before the first line.
        hashes (`Mapping[str, str]`, *optional*): Image id -> hash of the image. Questions about another version of it
            are refused.

    Returns:
        One `dict` per image, in order: `id`, `first` (the first answer), `questions`, `answers`, `blank_answers`,
        `error`.
    """
    failed = {"first": "", "questions": [], "answers": [], "blank_answers": []}

    def ask(batch: Sequence[Picture]) -> list[dict[str, Any]]:
        return _ask_together(assistant, batch, settings)

    lines = run_resumable(pictures, ask, folder, ASKED, "Asking", batch_size, failed=failed, note=note, hashes=hashes)
    return [lines[picture.id] for picture in pictures]


def _ask_together(assistant: Assistant, batch: Sequence[Picture], settings: AskSettings) -> list[dict[str, Any]]:
    images = [open_image(picture.image) for picture in batch]
    # Each image has its own seed, so its questions do not depend on the batch or on the number of processes.
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
    """A blank image of the same size, in the mean colour of the image processor: all zeros after normalization."""
    mean_colour = tuple(int(255 * mean) for mean in assistant.processor.image_processor.image_mean)
    return Image.new("RGB", image.size, mean_colour)


def figures_of(asked: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The metrics that need neither a CLIP nor the truth. Failed images are counted, but no mean includes them."""
    whole = [line for line in asked if line["error"] is None]
    questions = [question for line in whole for question in line["questions"]]
    if not questions:
        raise ValueError("The model asked no questions. See the errors in asked-*.jsonl.")
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


def hashes_of_pictures(pictures: Sequence[Picture]) -> dict[str, str]:
    """Image id -> SHA-256 over the id, number, questions, answers and file of the image."""
    return {
        picture.id: hashlib.sha256(
            json.dumps([picture.id, picture.number, picture.pairs]).encode() + _content_of(picture.image)
        ).hexdigest()
        for picture in pictures
    }


def _content_of(image: Any) -> bytes:
    if isinstance(image, dict) and image.get("bytes"):
        return image["bytes"]
    path = Path(image["path"] if isinstance(image, dict) else image)
    return path.read_bytes() if path.is_file() else b"missing"  # the run will record the image as failed


def captions_of(pictures: Sequence[Picture]) -> list[str | None]:
    """
    The content of each easy-VQA image, such as "a red circle"; `None` if its questions and answers do not tell.

    Raises:
        ValueError: If the content of no image can be determined, or if the answers about an image contradict each
            other.
    """
    captions = [derive_caption(list(picture.pairs)) if picture.pairs else None for picture in pictures]
    if not any(captions):
        raise ValueError("--truth easy_vqa: no image has questions and answers of easy-VQA. Check --images.")
    return captions


def easy_vqa_figures(
    asked: Sequence[dict[str, Any]], captions: Sequence[str | None], known: set[str]
) -> dict[str, Any]:
    """
    The metrics that need the truth about the images.

    A question has a true premise if it has the form of an easy-VQA question and assumes no shape or colour that is
    not in the image.

    Args:
        captions: From [`captions_of`]. Images without a caption are left out.
        known (`set[str]`): All questions of the dataset. Any other question counts as having no true premise.

    Returns:
        `premise_is_true`: share of questions with a true premise. `presumed_is_true`: the same, among questions that
        assume something, as "what is the red shape?" does. `own_answer_is_right`: share of correct answers by the
        model to its own questions with a true premise. Each share comes with its number of questions.
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
    Cosine similarities of images and texts, computed by a CLIP of transformers. They are not rescaled (CLIPScore is
    2.5 times as large). Texts are cut to the maximum length of the text tower.

    Args:
        path (`str`): Folder or Hub id of a complete CLIP (both towers) with the files of its processor.
        device (`str`): Device to run on.

    Raises:
        ValueError: If the model is not a complete CLIP.
    """

    def __init__(self, path: str, device: str):
        if AutoConfig.from_pretrained(path, trust_remote_code=False).model_type != "clip":
            raise ValueError(f"--clip {path}: is not a complete CLIP. Use a model with both towers.")
        self.model = CLIPModel.from_pretrained(path).to(device).eval()
        self.processor = CLIPProcessor.from_pretrained(path, trust_remote_code=False)
        self.max_length = self.model.config.text_config.max_position_embeddings

    @torch.inference_mode()
    def cosines(self, images: Sequence[Image.Image], texts: Sequence[str]) -> torch.Tensor:
        """Cosine similarities of shape `(len(texts), len(images))`."""
        pixel_values = self.processor.image_processor(list(images), return_tensors="pt")["pixel_values"]
        tokens = self.processor.tokenizer(
            list(texts), padding=True, truncation=True, max_length=self.max_length, return_tensors="pt"
        ).to(self.model.device)
        picture = self.model.get_image_features(pixel_values.to(self.model.device)).pooler_output
        text = self.model.get_text_features(tokens["input_ids"], tokens["attention_mask"]).pooler_output
        return torch.nn.functional.normalize(text, dim=-1) @ torch.nn.functional.normalize(picture, dim=-1).T

    def is_cut(self, text: str) -> bool:
        """True if a text is longer than the text tower allows."""
        return len(self.processor.tokenizer(text)["input_ids"]) > self.max_length


def clip_figures(
    scorer: ClipScorer, asked: Sequence[dict[str, Any]], pictures: Sequence[Picture]
) -> tuple[dict[str, Any], dict[str, list[float]]]:
    """
    Mean cosine similarities of texts with their own image, and with the next image as a baseline.

    Returns:
        The means, and all values for a histogram. The keys are `questions` and `answers` for the model's texts, and
        `data_questions` and `data_answers` for the dataset's.
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
