"""`sq-llava ask` and `sq-llava answer`."""

import json
import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.progress import Progress

from sq_llava.cli.chat import Printer
from sq_llava.cli.images import image_files, named
from sq_llava.cli.options import AsJson, Model, OptionsOf, check_model_options, load_model, takes_options
from sq_llava.console import console, errors_in_one_line, examples, loading, messages_console
from sq_llava.inference.settings import AskSettings, SelfQuestioning


if TYPE_CHECKING:
    from sq_llava.inference.assistant import Assistant


Images = Annotated[
    list[str] | None,
    typer.Argument(help="Image files, folders of images, URLs, or - for standard input.", show_default=False),
]
BatchSize = Annotated[int, typer.Option(min=1, help="Number of images in a batch.")]
Together = Annotated[bool, typer.Option("--together", help="Show the model all images at once, in one prompt.")]

app = typer.Typer()


@dataclass(frozen=True)
class Shown:
    """Images that the model sees in one prompt, and their name in the output."""

    name: str
    files: list[Path]


@app.command(
    epilog=examples(
        "sq-llava ask runs/demo/images/test/images/0.png --model runs/demo/model -n 5",
        "sq-llava ask photos/ --model org/sq-llava-7b --seed 0 --json > questions.json",
        "sq-llava ask https://example.org/photo.jpg --model org/sq-llava-7b",
    )
)
@takes_options
def ask(
    model: Model,
    asking: Annotated[dict, OptionsOf(AskSettings, num_questions=1, max_new_tokens=300, seed=None)],
    images: Images = None,
    together: Together = False,
    batch_size: BatchSize = 8,
    as_json: AsJson = False,
) -> None:
    """Let the model ask questions about images."""
    with errors_in_one_line(), _open(images, together, model, "sq-llava ask IMAGE ...") as (shown, assistant):
        work = partial(_ask, assistant, **asking)
        _show_all(shown, batch_size, "Asking", work, as_json, lambda result: _indented(*result["questions"]))


def _ask(
    assistant, batch: list[Shown], after: str | None, max_new_tokens: int, seed: int | None, **sampling
) -> list[dict]:
    histories = None
    if after is not None:
        firsts = assistant.answer_batch([(shown.files, after) for shown in batch], max_new_tokens)
        histories = [[{"role": "user", "content": after}, {"role": "assistant", "content": first}] for first in firsts]
    # Each image gets the same seed, so that its questions do not depend on the other images.
    seeds = None if seed is None else [seed] * len(batch)
    files = [shown.files for shown in batch]
    asked = assistant.ask_batch(files, histories, max_new_tokens=max_new_tokens, seeds=seeds, **sampling)
    return [{"image": shown.name, "questions": questions} for shown, questions in zip(batch, asked, strict=True)]


@app.command(
    epilog=examples(
        'sq-llava answer runs/demo/images/test/images/0.png "what color is the shape?" --model runs/demo/model',
        'sq-llava answer photos/ "What is it?" --model org/sq-llava-7b --json > answers.json',
        'sq-llava answer before.jpg after.jpg "What has changed?" --together --model org/sq-llava-7b',
        'curl -s https://example.org/photo.jpg | sq-llava answer - "Who is it?" --model org/sq-llava-7b',
    )
)
@takes_options
def answer(
    *,
    images: Images = None,
    question: Annotated[str, typer.Argument(help="Question about each image.", show_default=False)],
    model: Model,
    thinking: Annotated[dict, OptionsOf(SelfQuestioning)],
    together: Together = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Maximum length of an answer, in tokens.")] = 512,
    batch_size: BatchSize = 8,
    seed: Annotated[int, typer.Option(help="Random seed of the questions of --self-questions.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Answer a question about images, with greedy decoding."""
    example = f"sq-llava answer IMAGE {shlex.quote(question)} ..."
    with errors_in_one_line():
        thinking = SelfQuestioning(**thinking)
        with _open(images, together, model, example) as (shown, assistant):
            work = partial(_answer, assistant, question, thinking, max_new_tokens, seed)
            if len(shown) == 1 and console.is_terminal and not (as_json or thinking.self_questions):
                work = partial(_stream, assistant, question, max_new_tokens)
            _show_all(shown, batch_size, "Answering", work, as_json, _text_of)


def _answer(
    assistant, question: str, thinking: SelfQuestioning, max_new_tokens: int, seed: int, batch: list[Shown]
) -> list[dict]:
    requests = [(shown.files, question) for shown in batch]
    if not thinking.self_questions:
        answers = assistant.answer_batch(requests, max_new_tokens)
        return [{"image": shown.name, "answer": text} for shown, text in zip(batch, answers, strict=True)]
    found = assistant.consider_batch(requests, thinking, max_new_tokens, [seed] * len(batch))
    return [{"image": shown.name, **asdict(result)} for shown, result in zip(batch, found, strict=True)]


def _text_of(result: dict) -> str:
    pairs = chain.from_iterable(result.get("asked", []))
    asked = (line for pair in pairs for line in (f"vusr: {pair['question']}", f"assistant: {pair['answer']}"))
    return _indented(*asked, result["answer"])


def _indented(*lines: str) -> str:
    return "\n".join(f"  {line}" for line in lines)


def _stream(assistant, question: str, max_new_tokens: int, batch: list[Shown]) -> list[dict]:
    """Prints the answer about the only image of the batch word by word. Returns nothing more to print."""
    printer = Printer("  ")
    try:
        for piece in assistant.stream(batch[0].files, question, max_new_tokens):
            printer(piece)
    finally:
        printer("", stream_end=True)
    return []


@contextmanager
def _open(
    images: list[str] | None, together: bool, model: dict, example: str
) -> Iterator[tuple[list[Shown], "Assistant"]]:
    """Yields the images and an [`Assistant`], after checks of both. The fast checks come first."""
    check_model_options(**model)
    with image_files(images, example) as names:
        with loading():
            from sq_llava.data.images import require_whole_images

        for file, name in names.items():
            with named(file, name):
                require_whole_images([file])
        shown = [Shown(name, [file]) for file, name in names.items()]
        if together:
            shown = [Shown(", ".join(names.values()), list(names))]
        yield shown, load_model(**model)


def _show_all(
    shown: list[Shown],
    batch_size: int,
    description: str,
    work: Callable[[list[Shown]], list[dict]],
    as_json: bool,
    text_of: Callable[[dict], str],
) -> None:
    """
    Calls `work` on batches of the images, and prints the results: texts after each batch, JSON at the end. If an image
    fails or the command is stopped, the results before it are printed too.
    """
    is_quiet = len(shown) == 1 or (console.is_terminal and not as_json)
    # With redirect_stdout, what is printed to a file would go to the terminal of the bar.
    progress = Progress(console=messages_console, transient=True, redirect_stdout=False, disable=is_quiet)
    results = []
    try:
        with progress:
            bar = progress.add_task(description, total=len(shown))
            for start in range(0, len(shown), batch_size):
                batch = shown[start : start + batch_size]
                for result in _together_or_alone(batch, work):
                    results.append(result)
                    if not as_json:
                        _print(result, text_of, has_name=len(shown) > 1)
                progress.advance(bar, len(batch))
    finally:
        if as_json:
            print(json.dumps(results, indent=2, ensure_ascii=False))


def _together_or_alone(batch: list[Shown], work: Callable[[list[Shown]], list[dict]]) -> Iterator[dict]:
    """
    Calls `work` on a batch. If that fails, it is called on each image alone.

    Raises:
        ValueError: if it fails on a single image. The message names it.
    """
    try:
        results = work(batch)
    except (ValueError, RuntimeError) as error:
        if len(batch) == 1:
            raise ValueError(f"{batch[0].name}: {error}") from error
        results = chain.from_iterable(_together_or_alone([shown], work) for shown in batch)
    yield from results


def _print(result: dict, text_of: Callable[[dict], str], has_name: bool) -> None:
    if has_name:
        console.out(result["image"], style="bold", highlight=False)
    # Not with rich, which would wrap lines and expand tabs.
    print(text_of(result), flush=True)
