"""Generates a model's answers to the examples of a task: in batches, on several processes, resumable.

Answers are appended to `answers-<rank>.jsonl` as they are generated (`sq_llava/resumable/resume.py`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from PIL import Image

from sq_llava.data.images import open_image
from sq_llava.evaluation.reading import TaskImage
from sq_llava.evaluation.served_model import ServedModel
from sq_llava.evaluation.task import Example, Record
from sq_llava.inference.asking_first import AsksFirst
from sq_llava.inference.assistant import Assistant
from sq_llava.resumable.resume import run_resumable
from sq_llava.resumable.run_note import RunNote


# What answers prompts: `render` and `answer_batch` are all that an evaluation needs.
Model = Assistant | AsksFirst | ServedModel
ANSWERS = "answers"  # first part of the names of their files


@dataclass(frozen=True)
class AnswerSettings:
    """How answers are generated. Without a `system_message`, the model uses its own."""

    max_new_tokens: int
    batch_size: int = 8
    system_message: str | None = None


def answer_examples(
    model: Model,
    examples: Sequence[Example],
    folder: Path,
    settings: AnswerSettings,
    description: str,
    note: RunNote | None = None,
    hashes: Mapping[str, str] | None = None,
) -> list[Record]:
    """
    Answers every example with greedy decoding.

    Args:
        examples (`Sequence[Example]`): Examples with unique ids.
        folder (`Path`): Folder for the answers. Answers that are already in it are not generated again.
        description (`str`): Label of the progress bar.
        note ([`RunNote`], *optional*): The note of the run. It is written before the first answer.
        hashes (`Mapping[str, str]`, *optional*): Example id -> hash of the example. An answer to another version of
            an example is refused.

    Returns:
        One unscored record per example, in the order of `examples`, on every process.
    """
    prompts = {example.id: render(model, example, settings.system_message) for example in examples}

    def make_batches(left: Sequence[Example]) -> list[list[Example]]:
        return _same_number_of_images(by_images(left, prompts), settings.batch_size)

    def answer(batch: Sequence[Example]) -> list[dict[str, str]]:
        images = {image: open_task_image(image) for example in batch for image in example.images}
        requests = [
            ([images[image] for image in example.images] or None, conversation(example, settings.system_message))
            for example in batch
        ]
        return [{"answer": text} for text in model.answer_batch(requests, settings.max_new_tokens)]

    lines = run_resumable(
        examples,
        answer,
        folder,
        ANSWERS,
        description,
        make_batches=make_batches,
        failed={"answer": ""},
        note=note,
        hashes=hashes,
    )
    return [
        Record(example, prompts[example.id], lines[example.id]["answer"], lines[example.id]["error"])
        for example in examples
    ]


def by_images(examples: Sequence[Example], prompts: dict[str, str]) -> list[Example]:
    """
    Puts examples about the same images next to each other, because a batch processes their common prefix once. The
    longest prompts come first, within a group and among groups, so that an out-of-memory error occurs at the start.
    Examples without images come last.

    Args:
        prompts (`dict[str, str]`): Example id -> its whole prompt.
    """
    groups: dict[tuple[TaskImage, ...], list[Example]] = {}
    for example in examples:
        groups.setdefault(tuple(example.images), []).append(example)

    def length(example: Example) -> tuple[int, int]:
        return len(example.images), len(prompts[example.id])

    in_order = [sorted(group, key=length, reverse=True) for group in groups.values()]
    in_order.sort(key=lambda group: length(group[0]), reverse=True)
    return list(chain.from_iterable(in_order))


def conversation(example: Example, system_message: str | None) -> list[dict[str, Any]]:
    """The chat messages of an example, with placeholders for its images."""
    content = [{"type": "image"} for _ in example.images]
    messages = [{"role": "user", "content": [*content, {"type": "text", "text": example.prompt}]}]
    if system_message is not None:
        messages.insert(0, {"role": "system", "content": [{"type": "text", "text": system_message}]})
    return messages


def render(model: Model, example: Example, system_message: str | None) -> str:
    """
    The prompt as text.

    Raises:
        ValueError: If the model's chat template rejects the example.
    """
    try:
        return model.render(conversation(example, system_message))
    except TemplateError as error:
        raise ValueError(f"example {example.id}: {error}") from error


def _same_number_of_images(examples: Sequence[Example], batch_size: int) -> list[list[Example]]:
    batches: list[list[Example]] = []
    for example in examples:
        last = batches[-1] if batches else None
        if last and len(last) < batch_size and len(last[0].images) == len(example.images):
            last.append(example)
        else:
            batches.append([example])
    return batches


def open_task_image(image: TaskImage) -> Image.Image:
    """Opens an image of an example, in RGB."""
    return open_image(image if isinstance(image, Path) else image.read())
