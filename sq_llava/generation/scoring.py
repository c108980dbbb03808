"""Scores of self-generated turns: log-probabilities of the answers, with the image and a blank one, and CLIPScores.

The turns of a picture are one batch, with the picture and with a blank one. So the scores of a resumed run are equal
to the last bit. They are written beside the questions and answers:

    FOLDER/scored-*.jsonl         log-probabilities of the answers, and their lengths
    FOLDER/clip-<hash>-*.jsonl    CLIPScores by the CLIP model with that hash
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch.nn import functional as F

from sq_llava.data.images import open_image
from sq_llava.data.self_questions import IGNORE_INDEX
from sq_llava.evaluation.questions import ClipScorer, Picture, blank_like
from sq_llava.inference.assistant import Assistant
from sq_llava.resumable.resume import run_resumable
from sq_llava.training.collator import SelfQuestioningCollator


# CLIPScore is 2.5 * max(cosine, 0): Hessel et al. 2021, https://arxiv.org/abs/2104.08718.
CLIP_SCORE_WEIGHT = 2.5
NUM_DIGITS = 4


def score_each(
    folder: Path,
    stem: str,
    pictures: Sequence[Picture],
    asked: Sequence[dict[str, Any]],
    score: Callable[[Picture, dict[str, Any]], dict[str, Any]],
) -> list[dict[str, Any]]:
    """
    Scores the questions and answers about each picture, on all processes. Resumes from the lines in `folder`.

    Args:
        folder (`Path`): Folder of the lines.
        stem (`str`): First part of their file names.
        pictures (`Sequence[Picture]`): The pictures.
        asked (`Sequence[dict]`): For each picture, the line of `ask_about`. A line with an `error` is not scored.
        score (`Callable`): Gives the scores of a picture.

    Returns:
        For each picture, in order: `id`, the scores, `error`.
    """
    asked_of = {picture.id: line for picture, line in zip(pictures, asked, strict=True)}

    def score_one(batch: Sequence[Picture]) -> list[dict[str, Any]]:
        return [score(picture, asked_of[picture.id]) for picture in batch]

    whole = [picture for picture in pictures if asked_of[picture.id]["error"] is None]
    lines = run_resumable(whole, score_one, folder, stem, "Scoring")
    return [lines.get(id, {"id": id, "error": line["error"]}) for id, line in asked_of.items()]


def score_answers(assistant: Assistant, picture: Picture, asked: dict[str, Any]) -> dict[str, list]:
    """
    Scores the answers about a picture.

    Returns:
        `log_probability` (the mean over an answer's tokens, in nats), `blank_log_probability` (the same with a blank
        image) and `num_tokens`; each is a list with an entry per answer. The end of the turn is one of the tokens.
    """
    image = open_image(picture.image)
    turns = list(zip(asked["questions"], asked["answers"], strict=True))
    shown = [(image, *turn) for turn in turns] + [(blank_like(assistant, image), *turn) for turn in turns]
    log_probabilities, num_tokens = mean_log_probabilities(assistant, shown)
    return {
        "log_probability": log_probabilities[: len(turns)],
        "blank_log_probability": log_probabilities[len(turns) :],
        "num_tokens": num_tokens[: len(turns)],
    }


@torch.inference_mode()
def mean_log_probabilities(
    assistant: Assistant, turns: Sequence[tuple[Image.Image, str, str]]
) -> tuple[list[float], list[int]]:
    """
    The mean log-probability of each answer's tokens in nats, and their number. The end of the turn is one of them.

    Args:
        assistant (`Assistant`): Model and processor.
        turns (`Sequence`): Image, question and answer. The vision tower encodes an image once, even in several turns.
    """
    collator = SelfQuestioningCollator(assistant.processor, self_question_ratio=0.0)
    batch = collator([_row(number, *turn) for number, turn in enumerate(turns)])
    inputs = {name: value for name, value in batch.items() if name not in ("labels", "turn_kinds", "row_ids")}
    inputs = {name: torch.as_tensor(value).to(assistant.model.device) for name, value in inputs.items()}
    labels = batch["labels"][:, 1:].to(assistant.model.device)
    spoken = labels != IGNORE_INDEX
    # Logits of all positions would need more memory than everything else if the vocabulary is large.
    logits = assistant.model(**inputs, positions_to_keep=F.pad(spoken, (0, 1)), use_cache=False).logits.float()
    losses = F.cross_entropy(logits, labels[spoken], reduction="none")
    num_tokens = spoken.sum(dim=1).tolist()
    means = [-float(of_answer.mean()) for of_answer in losses.split(num_tokens)]
    return [round(mean, NUM_DIGITS) for mean in means], num_tokens


def _row(number: int, image: Image.Image, question: str, answer: str) -> dict[str, Any]:
    content = [{"type": "image"}, {"type": "text", "text": question}]
    messages = [{"role": "user", "content": content}]
    messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    return {"row_id": number, "messages": messages, "images": [image]}


def score_with_clip(scorer: ClipScorer, picture: Picture, asked: dict[str, Any]) -> dict[str, list[float]]:
    """The CLIPScore of the picture with the question and answer of each turn."""
    texts = [f"{question} {answer}" for question, answer in zip(asked["questions"], asked["answers"], strict=True)]
    cosines = scorer.cosines([open_image(picture.image)], texts).squeeze(1).tolist()
    return {"clip_score": [round(CLIP_SCORE_WEIGHT * max(cosine, 0.0), NUM_DIGITS) for cosine in cosines]}
