"""`sq-llava ask`, `sq-llava answer` and `sq-llava chat`."""

import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.progress import Progress

from sq_llava.cli.options import AsJson, Model, OptionsOf, check_model_options, load_model, takes_options
from sq_llava.console import console, errors_in_one_line, examples, messages_console
from sq_llava.early_checks import find_images, require_image
from sq_llava.inference.settings import AskSettings


Images = Annotated[list[Path], typer.Argument(help="Image files, or folders of images.", show_default=False)]
BatchSize = Annotated[int, typer.Option(min=1, help="Number of images in a batch.")]

app = typer.Typer()


@app.command(
    epilog=examples(
        "sq-llava ask runs/demo/images/test/images/0.png --model runs/demo/model -n 5",
        "sq-llava ask photos/ --model org/sq-llava-7b --seed 0 --json > questions.json",
    )
)
@takes_options
def ask(
    images: Images,
    model: Model,
    asking: Annotated[dict, OptionsOf(AskSettings, num_questions=1, max_new_tokens=300, seed=None)],
    batch_size: BatchSize = 8,
    as_json: AsJson = False,
) -> None:
    """Let the model ask questions about images."""
    with errors_in_one_line():
        files, assistant = _open(images, model)
        results = _in_batches(files, batch_size, "Asking", partial(_ask, assistant, **asking))
        _show(results, as_json, lambda result: "\n".join(f"  {question}" for question in result["questions"]))


def _ask(
    assistant, files: list[Path], after: str | None, max_new_tokens: int, seed: int | None, **sampling
) -> list[dict]:
    histories = None
    if after is not None:
        firsts = assistant.answer_batch([(file, after) for file in files], max_new_tokens)
        histories = [[{"role": "user", "content": after}, {"role": "assistant", "content": first}] for first in firsts]
    # Each image gets the same seed, so that its questions do not depend on the other images.
    seeds = None if seed is None else [seed] * len(files)
    asked = assistant.ask_batch(files, histories, max_new_tokens=max_new_tokens, seeds=seeds, **sampling)
    return [{"image": str(file), "questions": questions} for file, questions in zip(files, asked, strict=True)]


@app.command(
    epilog=examples(
        'sq-llava answer runs/demo/images/test/images/0.png "what color is the shape?" --model runs/demo/model',
        'sq-llava answer photos/ "What is it?" --model org/sq-llava-7b --json > answers.json',
    )
)
@takes_options
def answer(
    images: Images,
    question: Annotated[str, typer.Argument(help="Question about each image.", show_default=False)],
    model: Model,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Maximum length of an answer, in tokens.")] = 512,
    batch_size: BatchSize = 8,
    as_json: AsJson = False,
) -> None:
    """Answer a question about images, with greedy decoding."""
    with errors_in_one_line():
        files, assistant = _open(images, model)

        def answer_all(batch: list[Path]) -> list[dict]:
            answers = assistant.answer_batch([(file, question) for file in batch], max_new_tokens)
            return [{"image": str(file), "answer": text} for file, text in zip(batch, answers, strict=True)]

        results = _in_batches(files, batch_size, "Answering", answer_all)
        _show(results, as_json, lambda result: f"  {result['answer']}")


def _open(images: list[Path], model: dict):
    """Returns the image files and an [`Assistant`], after checks of both. The fast checks come first."""
    files = find_images(images)
    check_model_options(**model)
    from sq_llava.data.images import require_whole_images

    require_whole_images(files)
    return files, load_model(**model)


def _in_batches(
    files: list[Path], batch_size: int, description: str, work: Callable[[list[Path]], list[dict]]
) -> list[dict]:
    """Calls `work` on batches of the files, with a progress bar, and returns all results."""
    results = []
    with Progress(console=messages_console, transient=True, disable=len(files) == 1) as progress:
        bar = progress.add_task(description, total=len(files))
        for start in range(0, len(files), batch_size):
            batch = files[start : start + batch_size]
            results += _together_or_alone(batch, work)
            progress.advance(bar, len(batch))
    return results


def _together_or_alone(batch: list[Path], work: Callable[[list[Path]], list[dict]]) -> list[dict]:
    """
    Calls `work` on a batch. If that fails, it is called on each file alone.

    Raises:
        ValueError: if it fails on a single file. The message names the file.
    """
    try:
        return work(batch)
    except (ValueError, RuntimeError) as error:
        if len(batch) == 1:
            raise ValueError(f"{batch[0]}: {error}") from error
    return [result for file in batch for result in _together_or_alone([file], work)]


def _show(results: list[dict], as_json: bool, text_of: Callable[[dict], str]) -> None:
    if as_json:
        json.dump(results, sys.stdout, indent=2, ensure_ascii=False)
        print()
        return
    for result in results:
        if len(results) > 1:
            console.print(result["image"], style="bold", markup=False)
        console.print(text_of(result), markup=False, highlight=False)


@app.command(
    epilog=examples(
        "sq-llava chat runs/demo/images/test/images/0.png --model runs/demo/model",
        "sq-llava chat dog.png --model org/sq-llava-7b --load-in-4bit",
    )
)
@takes_options
def chat(
    image: Annotated[Path, typer.Argument(help="Image file.", show_default=False)],
    model: Model,
    asking: Annotated[dict, OptionsOf(AskSettings, without=("num_questions", "after"), max_new_tokens=512, seed=None)],
) -> None:
    """Chat about an image.

    /ask: the model asks itself a question (shown as vusr) and answers it. /new: start over. /quit: end.
    Ctrl-C stops an answer and drops that turn.
    """
    with errors_in_one_line():
        require_image(image)
        if sys.stdin is None:
            raise ValueError("Standard input is closed, but chat reads your messages from it.")
        assistant = load_model(**model)
    from sq_llava.inference.dialogues import Dialogues

    console.print(
        "Ask about the image. /ask: the model asks itself a question (shown as vusr). /new: start over. /quit: end. "
        "Ctrl-C: stop an answer.",
        style="dim",
    )
    start = partial(Dialogues, assistant.model, assistant.processor)
    dialogue = start([[]])
    while (line := _read_line()) not in (None, "/quit"):
        history = list(dialogue.messages[0])
        try:
            if line == "/new":
                dialogue = start([[]])
            elif line:
                _reply(dialogue, image, line, **asking)
        except ValueError as error:  # e.g. a control token in the message
            messages_console.print(f"[red]Error:[/red] {escape(str(error))}", soft_wrap=True)
            dialogue = start([history])
        except KeyboardInterrupt:
            messages_console.print("Stopped. This turn was dropped.")
            # Start with an empty cache: the old one may hold half of a step.
            dialogue = start([history])


def _reply(dialogue, image: Path, line: str, max_new_tokens: int, seed: int | None, **sampling) -> None:
    """Lets the model answer `line`, or ask and answer (`/ask`), and prints the new turns."""
    from sq_llava.data.messages import place_images
    from sq_llava.inference.dialogues import DESCRIBE

    [messages] = dialogue.messages
    is_asked = line != "/ask"
    if is_asked or not messages:
        messages += place_images(None if messages else image, line if is_asked else DESCRIBE)
        [text] = dialogue.answer(max_new_tokens)
        console.print(text if is_asked else f"assistant: {text}", markup=False)
    if not is_asked:
        dialogue.seed(None if seed is None else [seed])
        [[question]] = dialogue.ask(1, max_new_tokens=max_new_tokens, **sampling)
        console.print(f"vusr: {question}", style="cyan", markup=False)
        messages.append({"role": "vusr", "content": question})
        [text] = dialogue.answer(max_new_tokens)
        console.print(f"assistant: {text}", markup=False)


def _read_line() -> str | None:
    try:
        return console.input("> ").strip()
    except EOFError:
        console.print()
        return None
    except KeyboardInterrupt:
        console.print()
        raise
