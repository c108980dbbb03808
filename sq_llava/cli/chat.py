"""`sq-llava chat`: a conversation about an image in the terminal."""

import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from sq_llava.cli.images import image_files
from sq_llava.cli.options import Model, OptionsOf, load_model, takes_options
from sq_llava.console import console, errors_in_one_line, examples, messages_console
from sq_llava.inference.settings import AskSettings
from sq_llava.output import write_json


HELP = """/ask          the model asks itself a question (shown as vusr) and answers it
/image FILE   start over with another image (file or URL)
/new          start over
/save FILE    write the conversation into a JSON file
/help         show this list
/quit         end (Ctrl-D ends too)
Ctrl-C stops an answer, and drops that turn."""

app = typer.Typer()


@app.command(
    epilog=examples(
        "sq-llava chat runs/demo/images/test/images/0.png --model runs/demo/model",
        "sq-llava chat dog.png --model org/sq-llava-7b --load-in-4bit",
    )
)
@takes_options
def chat(
    model: Model,
    asking: Annotated[dict, OptionsOf(AskSettings, without=("num_questions", "after"), max_new_tokens=512, seed=None)],
    image: Annotated[str | None, typer.Argument(help="Image file, or URL.", show_default=False)] = None,
) -> None:
    """Chat about an image. The arrow keys bring earlier lines back; /help lists the commands."""
    with errors_in_one_line():
        if sys.stdin is None:
            raise ValueError("Standard input is closed, but chat reads your messages from it.")
        with _one_image(image) as (file, name):
            assistant = load_model(**model)
            _use_line_editor()
            console.print("Ask about the image. /ask: the model asks itself a question. /help: more.", style="dim")
            Chat(assistant, file, name, asking).run()


@contextmanager
def _one_image(image: str | None) -> Iterator[tuple[Path, str]]:
    """Yields the image as a file, and its name for the user. What is downloaded is deleted at the end."""
    if image == "-":
        raise ValueError("chat reads your messages from standard input. Give the image as a file.")
    with image_files(None if image is None else [image], "sq-llava chat IMAGE ...") as names:
        [(file, name), *others] = names.items()
        if others:
            raise ValueError(f"{image} is a folder. Give one image.")
        yield file, name


def _use_line_editor() -> None:
    """The arrow keys then work in `input`, where Python has the module."""
    try:
        import readline  # noqa: F401
    except ModuleNotFoundError:
        return


class Chat:
    """
    A conversation about one image.

    Args:
        assistant ([`Assistant`]): The model.
        file (`Path`), name (`str`): The image, and its name for the user.
        asking (`dict`): Settings of questions.
    """

    def __init__(self, assistant, file: Path, name: str, asking: dict):
        self.assistant = assistant
        self.file, self.name = file, name
        self.asking = asking
        self.opened = ExitStack()  # the images of /image
        self.start([])

    def start(self, messages: list[dict]) -> None:
        """Goes on from these messages, with an empty cache."""
        from sq_llava.inference.dialogues import Dialogues

        self.dialogue = Dialogues(self.assistant.model, self.assistant.processor, [messages])

    def run(self) -> None:
        with self.opened:
            while (line := _read_line()) not in (None, "/quit"):
                self.take(line)

    def take(self, line: str) -> None:
        history = list(self.dialogue.messages[0])
        try:
            if line.startswith("/"):
                self.obey(line)
            elif line:
                self.answer(line)
        # E.g. a control token in the message, or too little memory on the GPU (RuntimeError).
        except (ValueError, OSError, RuntimeError) as error:
            messages_console.print(f"[red]Error:[/red] {escape(str(error))}", soft_wrap=True)
            self.start(history)
        except KeyboardInterrupt:
            messages_console.print("Stopped. This turn was dropped.")
            # With an empty cache: the old one may hold half of a step.
            self.start(history)

    def obey(self, line: str) -> None:
        command, _, argument = line.partition(" ")
        if command == "/ask":
            self.ask()
        elif command == "/new":
            self.start([])
        elif command == "/help":
            console.print(HELP, markup=False, highlight=False)
        elif command == "/image":
            self.show(argument.strip())
        elif command == "/save":
            self.save(argument.strip())
        else:
            raise ValueError(f"There is no command {command}. /help lists the commands.")

    def show(self, image: str) -> None:
        if not image:
            raise ValueError("/image needs a file or URL: /image dog.png")
        self.file, self.name = self.opened.enter_context(_one_image(os.path.expanduser(image)))
        self.start([])
        console.print(f"Now about {self.name}.", style="dim", markup=False)

    def save(self, name: str) -> None:
        if not name:
            raise ValueError("/save needs the name of a file: /save chat.json")
        path = Path(name).expanduser()
        if path.exists():
            raise ValueError(f"{path} exists already. Give another name.")
        texts = [
            {"role": message["role"], "content": _text_of(message["content"])} for message in self.dialogue.messages[0]
        ]
        write_json(path, {"image": self.name, "messages": texts})
        console.print(f"Saved {len(texts)} messages in {path}.", style="dim", markup=False)

    def answer(self, line: str, prefix: str = "") -> None:
        from sq_llava.data.messages import place_images

        [messages] = self.dialogue.messages
        messages += place_images(None if messages else self.file, line)
        self.speak(prefix)

    def ask(self) -> None:
        """Lets the model ask, and answer its question. It has learned to ask only after an answer."""
        from sq_llava.inference.dialogues import DESCRIBE

        if not self.dialogue.messages[0]:
            self.answer(DESCRIBE, prefix="assistant: ")
        settings = dict(self.asking)
        seed = settings.pop("seed")
        self.dialogue.seed(None if seed is None else [seed])
        [question] = self.dialogue.ask_next(**settings)
        console.out(f"vusr: {question}", style="cyan", highlight=False)
        self.speak("assistant: ")

    def speak(self, prefix: str) -> None:
        """Prints the answer to the last turn: on a terminal word by word."""
        if not console.is_terminal:
            [text] = self.dialogue.answer(self.asking["max_new_tokens"])
            print(prefix + text, flush=True)  # not with rich, which would wrap lines and expand tabs
            return
        from transformers import TextStreamer

        streamer = TextStreamer(self.assistant.processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
        streamer.on_finalized_text = Printer(prefix)
        self.dialogue.answer(self.asking["max_new_tokens"], streamer)


class Printer:
    """Prints the pieces of a text, without white space at the ends of the text."""

    def __init__(self, prefix: str):
        console.out(prefix, end="")
        self.held, self.has_begun = "", False

    def __call__(self, piece: str, stream_end: bool = False) -> None:
        text = self.held + piece
        text = text if self.has_begun else text.lstrip()
        shown = text.rstrip()
        self.has_begun, self.held = self.has_begun or bool(shown), text[len(shown) :]
        console.out(shown, end="\n" if stream_end else "", highlight=False)


def _text_of(content: str | list[dict]) -> str:
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


def _read_line() -> str | None:
    try:
        return console.input("> ").strip()
    except EOFError:
        console.print()
        return None
    except KeyboardInterrupt:
        console.print()
        raise
