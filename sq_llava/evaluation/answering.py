"""Answers of a model to the examples of a task: in batches, over processes, resumed from what was written.

The answers are appended to `answers-<rank>.jsonl` as they come (`sq_llava/resumable/resume.py`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from PIL import Image

from sq_llava.data.images import open_image
from sq_llava.evaluation.reading import TaskImage
from sq_llava.evaluation.task import Example, Record
from sq_llava.inference.assistant import Assistant
from sq_llava.resumable.resume import run_resumable


@dataclass(frozen=True)
class AnswerSettings:
    """How examples are asked; without a `system_message`, the model uses its own."""

    max_new_tokens: int
    batch_size: int = 8
    system_message: str | None = None


def answer_examples(
    assistant: Assistant, examples: Sequence[Example], folder: Path, settings: AnswerSettings, description: str
) -> list[Record]:
    """
    Answers every example, greedily.

    Args:
        folder (`Path`): For the answers; those that it holds already are kept.

    Returns:
        One unscored record for each example, in their order; on every process.
    """
    prompts = {example.id: render(assistant, example, settings.system_message) for example in examples}

    def make_batches(left: Sequence[Example]) -> list[list[Example]]:
        return _same_number_of_images(by_images(left, prompts), settings.batch_size)

    def answer(batch: Sequence[Example]) -> list[dict[str, str]]:
        return [{"answer": text} for text in _answer(assistant, batch, settings)]

    lines = run_resumable(
        examples, answer, folder, "answers", description, make_batches=make_batches, failed={"answer": ""}
    )
    return [
        Record(example, prompts[example.id], lines[example.id]["answer"], lines[example.id]["error"])
        for example in examples
    ]


def by_images(examples: Sequence[Example], prompts: dict[str, str]) -> list[Example]:
    """
    Sorts examples so that those about the same images, which share a pass of the model, follow one another. Within a
    group, and among the groups, the longest come first, so that too little memory shows at once. Examples without
    images come last.
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
    """The messages of an example, with placeholders for its images."""
    content = [{"type": "image"} for _ in example.images]
    messages = [{"role": "user", "content": [*content, {"type": "text", "text": example.prompt}]}]
    if system_message is not None:
        messages.insert(0, {"role": "system", "content": [{"type": "text", "text": system_message}]})
    return messages


def render(assistant: Assistant, example: Example, system_message: str | None) -> str:
    """
    The prompt as text.

    Raises:
        ValueError: if the model's template refuses the example.
    """
    try:
        return assistant.processor.apply_chat_template(
            conversation(example, system_message), add_generation_prompt=True, tokenize=False
        )
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


def _answer(assistant: Assistant, batch: Sequence[Example], settings: AnswerSettings) -> list[str]:
    images = {image: open_task_image(image) for example in batch for image in example.images}
    requests = [
        ([images[image] for image in example.images] or None, conversation(example, settings.system_message))
        for example in batch
    ]
    return assistant.answer_batch(requests, settings.max_new_tokens)


def open_task_image(image: TaskImage) -> Image.Image:
    """An image of an example, in RGB."""
    return open_image(image if isinstance(image, Path) else image.read())
