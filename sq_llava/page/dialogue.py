"""The conversation on the page: who speaks next, and the text, piece by piece. This module does not use Gradio.

>>> for view in reply(assistant, [Turn("user", "What is it?", ("dog.png",))], Settings()):
...     print(view.turns[-1].text, view.questions)
"""

from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import dataclass

from sq_llava.inference.assistant import Assistant
from sq_llava.inference.dialogues import DESCRIBE
from sq_llava.inference.settings import AskSettings


# What the model does while it has no new words to show.
BUSY = {"assistant": "Thinking", "vusr": "Thinking of a question"}


@dataclass(frozen=True)
class Turn:
    """
    One turn of a conversation.

    Args:
        role (`str`): `user` (a person), `assistant` (the model answers) or `vusr` (the model asks).
        text (`str`): The question or answer.
        files (`tuple[str, ...]`): Paths of the pictures in this turn.
    """

    role: str
    text: str
    files: tuple[str, ...] = ()


@dataclass(frozen=True)
class View:
    """
    What a visitor sees at one moment.

    Args:
        turns (`list[Turn]`): The conversation.
        questions (`tuple[str, ...]`): Questions that the model suggests after the last turn.
        busy (`str`): One of `BUSY`, or nothing while words come.
    """

    turns: list[Turn]
    questions: tuple[str, ...] = ()
    busy: str = ""


@dataclass(frozen=True)
class Settings:
    """Values of the sliders. A `temperature` of 0 is greedy. Questions have the defaults of `sq-llava ask`."""

    max_new_tokens: int = 256
    temperature: float = 0.0
    question_temperature: float = AskSettings.temperature
    question_top_p: float = AskSettings.top_p
    num_questions: int = 3
    num_turns: int = 3


def complete(turns: list[Turn]) -> list[Turn]:
    """The conversation up to its last answer. A last question whose answer was stopped is dropped."""
    while turns and turns[-1].role != "assistant":
        turns = turns[:-1]
    return turns


def speak(assistant: Assistant, turns: list[Turn], role: str, settings: Settings) -> Generator[View, None, list[Turn]]:
    """Lets the model answer (role `assistant`) or ask (role `vusr`). Returns the conversation with the new turn."""
    yield View(turns, busy=BUSY[role])
    # A slider gives whole numbers as int, which transformers does not accept.
    sampling = {"temperature": float(settings.temperature), "top_p": 1.0, "do_sample": True}
    if role == "vusr":
        temperature, top_p = float(settings.question_temperature), float(settings.question_top_p)
        sampling |= {"temperature": temperature, "top_p": top_p, "top_k": AskSettings.top_k}
    if sampling["temperature"] == 0:
        sampling = {}
    images = [file for turn in turns for file in turn.files]
    messages = [{"role": turn.role, "content": _parts(turn)} for turn in turns]
    text, spoken = "", turns
    pieces = assistant.stream(images, messages, settings.max_new_tokens, ask=role == "vusr", **sampling)
    with closing(pieces):
        for piece in pieces:
            text += piece
            if text.strip():
                spoken = [*turns, Turn(role, text.strip())]
                yield View(spoken)
    return spoken if text.strip() else [*turns, Turn(role, "")]


def reply(assistant: Assistant, turns: list[Turn], settings: Settings) -> Iterator[View]:
    """Answers the last turn, unless it is an answer. Then lets the model suggest questions."""
    turns = yield from _answered(assistant, turns, settings)
    questions = ()
    for _ in range(settings.num_questions):
        asked = []
        for view in speak(assistant, turns, "vusr", settings):
            asked = [turn.text for turn in view.turns[len(turns) :]]
            yield View(turns, questions, BUSY["vusr"])
        questions = tuple(dict.fromkeys([*questions, *asked]))
    yield View(turns, questions)


def converse(assistant: Assistant, turns: list[Turn], settings: Settings) -> Iterator[View]:
    """Answers the last turn, unless it is an answer. Then lets the model ask itself and answer, turn after turn."""
    turns = yield from _answered(assistant, turns, settings)
    for _ in range(settings.num_turns):
        for role in ("vusr", "assistant"):
            turns = yield from speak(assistant, turns, role, settings)
    yield from reply(assistant, turns, settings)


def _answered(assistant: Assistant, turns: list[Turn], settings: Settings) -> Generator[View, None, list[Turn]]:
    if turns[-1].role == "assistant":
        return turns
    return (yield from speak(assistant, turns, "assistant", settings))


def opening(text: str, files: list[str]) -> Turn:
    """A person's turn. Without text, it asks the model to describe the picture."""
    return Turn("user", text.strip() or DESCRIBE, tuple(files))


def _parts(turn: Turn) -> list[dict]:
    return [*({"type": "image"} for _ in turn.files), {"type": "text", "text": turn.text}]
