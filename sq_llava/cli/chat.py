"""`sq-llava chat`: a conversation about an image, in the terminal."""

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from sq_llava.cli.options import (
    Device,
    Dtype,
    LoadIn4Bit,
    LoadIn8Bit,
    MaxNewTokens,
    Model,
    Seed,
    Temperature,
    TopK,
    TopP,
    load_model,
)
from sq_llava.console import console, errors_in_one_line, messages_console
from sq_llava.early_checks import require_image


def chat(
    image: Annotated[Path, typer.Argument(help="An image file.", show_default=False)],
    model: Model,
    temperature: Temperature = 1.2,
    top_k: TopK = 300,
    top_p: TopP = 0.95,
    max_new_tokens: MaxNewTokens = 512,
    seed: Seed = None,
    device: Device = None,
    dtype: Dtype = "auto",
    load_in_4bit: LoadIn4Bit = False,
    load_in_8bit: LoadIn8Bit = False,
) -> None:
    """Talk about an image. /ask lets the model ask and answer, /new starts over, /quit ends.

    Ctrl-C stops an answer; the conversation goes on as if that turn had not been.
    """
    with errors_in_one_line():
        require_image(image)
        if sys.stdin is None:
            raise ValueError("Standard input is closed: chat reads what you say from it.")
        assistant = load_model(model, device, dtype, load_in_4bit, load_in_8bit)
    sampling = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed}
    console.print(
        "Ask about the image. /ask: the model asks itself. /new: start over. /quit: end. Ctrl-C: stop an answer.",
        style="dim",
    )
    history: list[dict] = []
    while (line := _read_line()) not in (None, "/quit"):
        if line == "/new":
            history = []
        elif line:
            try:
                history = _reply(assistant, image, history, line, max_new_tokens, sampling)
            except ValueError as error:  # such as a control token in what was typed
                messages_console.print(f"[red]Error:[/red] {escape(str(error))}", soft_wrap=True)
            except KeyboardInterrupt:
                messages_console.print("Stopped. The conversation goes on without this turn.")


def _reply(assistant, image: Path, history: list[dict], line: str, max_new_tokens: int, sampling: dict) -> list[dict]:
    """The history after the model has asked and answered (`/ask`), or has answered `line`; prints what is new."""
    from sq_llava.data.messages import place_images

    images = None if history else image  # it stands in the first turn
    if line == "/ask":
        talk = assistant.converse(images, 1, history or None, max_new_tokens=max_new_tokens, **sampling)
        for message in talk[len(history) :]:
            if isinstance(message["content"], str):
                style = "cyan" if message["role"] == "vusr" else ""
                console.print(f"{message['role']}: {message['content']}", style=style, markup=False)
        return talk
    history = [*history, {"role": "user", "content": line}]
    messages = place_images(images, history)
    text = assistant.answer(None, messages, max_new_tokens)
    console.print(text, markup=False)
    return [*messages, {"role": "assistant", "content": text}]


def _read_line() -> str | None:
    try:
        return console.input("> ").strip()
    except EOFError:
        console.print()
        return None
    except KeyboardInterrupt:
        console.print()
        raise
