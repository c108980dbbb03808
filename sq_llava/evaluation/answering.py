"""Answers of a model to the examples of a task: in batches, over processes, resumed from what was written.

Each process appends its answers to `answers-<rank>.jsonl` as they come. A run that was killed reads what all of them
wrote, whatever their number was, and goes on with the rest; examples that failed are tried again.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import gather_object
from jinja2 import TemplateError
from PIL import Image
from rich.console import Console
from rich.progress import Progress

from sq_llava.data.images import open_image
from sq_llava.evaluation.reading import TaskImage
from sq_llava.evaluation.task import Example, Record
from sq_llava.inference.assistant import Assistant
from sq_llava.resumable.resume import open_lines, read_lines, write_line


@dataclass(frozen=True)
class AnswerSettings:
    """How examples are asked; `system_message` is that of the model if it is `None`."""

    max_new_tokens: int
    batch_size: int = 8
    system_message: str | None = None


def answer_examples(
    assistant: Assistant, examples: Sequence[Example], folder: Path, settings: AnswerSettings, description: str
) -> list[Record]:
    """
    Answers every example, greedily.

    Args:
        folder (`Path`): For the answers; those that are there already are taken over.

    Returns:
        One unscored record for each example, in their order; on every process.
    """
    state = PartialState()
    done = read_lines(folder, "answers", [example.id for example in examples])
    prompts = {example.id: render(assistant, example, settings.system_message) for example in examples}
    rest = by_images([example for example in examples if example.id not in done], prompts)
    batches = _batches(rest, settings.batch_size)[state.process_index :: state.num_processes]
    fresh = []
    with (
        open_lines(folder, "answers") as file,
        Progress(console=Console(stderr=True), transient=True, disable=not state.is_main_process) as progress,
    ):
        bar = progress.add_task(description, total=sum(map(len, batches)))
        for batch in batches:
            for example, (answer, error) in zip(batch, _answer(assistant, batch, settings)):
                line = {"id": example.id, "answer": answer, "error": error}
                fresh.append(line)
                write_line(file, line)
            file.flush()
            progress.advance(bar, len(batch))
    for line in gather_object(fresh):
        done[line["id"]] = line
    return [
        Record(example, prompts[example.id], done[example.id]["answer"], done[example.id]["error"])
        for example in examples
    ]


def by_images(examples: Sequence[Example], prompts: dict[str, str]) -> list[Example]:
    """
    Examples about the same images one after another, as they share a pass of the model; among them, and of all such
    groups, the longest first: if memory does not suffice, that is known at once. Text alone goes apart from images.
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
    """The messages of an example, its images not yet in their places."""
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


def _batches(examples: Sequence[Example], batch_size: int) -> list[list[Example]]:
    batches: list[list[Example]] = []
    for example in examples:
        last = batches[-1] if batches else None
        if last and len(last) < batch_size and len(last[0].images) == len(example.images):
            last.append(example)
        else:
            batches.append([example])
    return batches


def _answer(
    assistant: Assistant, batch: Sequence[Example], settings: AnswerSettings
) -> Iterator[tuple[str, str | None]]:
    """An answer and an error for each example. If a batch fails, its examples are asked one by one."""
    try:
        images = {image: open_task_image(image) for example in batch for image in example.images}
        requests = [
            ([images[image] for image in example.images] or None, conversation(example, settings.system_message))
            for example in batch
        ]
        for answer in assistant.answer_batch(requests, settings.max_new_tokens):
            yield answer, None
    except (ValueError, RuntimeError) as error:
        if len(batch) == 1:
            yield "", f"{type(error).__name__}: {error}"
            return
        for example in batch:
            yield from _answer(assistant, [example], settings)


def open_task_image(image: TaskImage) -> Image.Image:
    """An image of an example, in RGB."""
    return open_image(image if isinstance(image, Path) else image.read())
