"""`sq-llava ask`, `answer` and `chat`: a model talks about images."""

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


Images = Annotated[list[Path], typer.Argument(help="Image files, or folders of them.", show_default=False)]
BatchSize = Annotated[int, typer.Option(min=1, help="Number of images at a time.")]

app = typer.Typer()


@app.command(
    epilog=examples(
        "sq-llava ask dog.png --model org/sq-llava-7b -n 5",
        "sq-llava ask photos/ --model runs/demo/model --seed 0 --json > questions.json",
        'sq-llava ask shape.png --model runs/demo/model --after "what color is the shape?"',
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
    """Let the model ask questions about each image."""
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
    # The same seed for each image: its questions are those that are asked about it alone.
    seeds = None if seed is None else [seed] * len(files)
    asked = assistant.ask_batch(files, histories, max_new_tokens=max_new_tokens, seeds=seeds, **sampling)
    return [{"image": str(file), "questions": questions} for file, questions in zip(files, asked, strict=True)]


@app.command(
    epilog=examples(
        'sq-llava answer dog.png "What is the dog doing?" --model org/sq-llava-7b',
        'sq-llava answer photos/ "What is it?" --model runs/demo/model --json',
    )
)
@takes_options
def answer(
    images: Images,
    question: Annotated[str, typer.Argument(help="The question, asked of each image.", show_default=False)],
    model: Model,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Maximum length of an answer, in tokens.")] = 512,
    batch_size: BatchSize = 8,
    as_json: AsJson = False,
) -> None:
    """Answer a question about each image, greedily."""
    with errors_in_one_line():
        files, assistant = _open(images, model)

        def answer_all(batch: list[Path]) -> list[dict]:
            answers = assistant.answer_batch([(file, question) for file in batch], max_new_tokens)
            return [{"image": str(file), "answer": text} for file, text in zip(batch, answers, strict=True)]

        results = _in_batches(files, batch_size, "Answering", answer_all)
        _show(results, as_json, lambda result: f"  {result['answer']}")


def _open(images: list[Path], model: dict):
    """The image files and the [`Assistant`], once what is wrong with either has been told: cheap checks first."""
    files = find_images(images)
    check_model_options(**model)
    from sq_llava.data.images import require_whole_images

    require_whole_images(files)
    return files, load_model(**model)


def _in_batches(
    files: list[Path], batch_size: int, description: str, work: Callable[[list[Path]], list[dict]]
) -> list[dict]:
    """What `work` gives for all files, beside a bar."""
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
    What `work` gives for a batch. If it fails, it is tried with each file alone.

    Raises:
        ValueError: if it fails with a file alone: with the name of the file.
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


@app.command(epilog=examples("sq-llava chat dog.png --model org/sq-llava-7b"))
@takes_options
def chat(
    image: Annotated[Path, typer.Argument(help="An image file.", show_default=False)],
    model: Model,
    asking: Annotated[dict, OptionsOf(AskSettings, without=("num_questions", "after"), max_new_tokens=512, seed=None)],
) -> None:
    """Talk about an image. /ask lets the model ask and answer, /new starts over, /quit ends.

    Ctrl-C stops an answer; the conversation goes on as if that turn had not been.
    """
    with errors_in_one_line():
        require_image(image)
        if sys.stdin is None:
            raise ValueError("Standard input is closed: chat reads what you say from it.")
        assistant = load_model(**model)
    from sq_llava.inference.dialogues import Dialogues

    console.print(
        "Ask about the image. /ask: the model asks itself. /new: start over. /quit: end. Ctrl-C: stop an answer.",
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
        except ValueError as error:  # such as a control token in what was typed
            messages_console.print(f"[red]Error:[/red] {escape(str(error))}", soft_wrap=True)
            dialogue = start([history])
        except KeyboardInterrupt:
            messages_console.print("Stopped. The conversation goes on without this turn.")
            # Without a cache, which may hold half of a step.
            dialogue = start([history])


def _reply(dialogue, image: Path, line: str, max_new_tokens: int, seed: int | None, **sampling) -> None:
    """Lets the model ask and answer (`/ask`), or answer `line`, and prints what is new."""
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
