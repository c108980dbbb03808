"""What the page does when a visitor clicks: it runs the model, and shows what it says. No layout here.

Each visitor has one run at a time. `Stop`, the trash and a new question end the run of the same visitor. None of them
uses Gradio's `cancels`, which would show the word "Error" over the conversation.
"""

import html
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib.resources import files
from pathlib import Path
from threading import Event, Lock

import gradio as gr

from image_processing_sq_llava import open_header, open_stream
from sq_llava.data.images import MAX_SENT_SIDE, open_image, open_sent_image
from sq_llava.inference.assistant import Assistant
from sq_llava.output import written_whole
from sq_llava.page.dialogue import BUSY, Settings, Turn, View, complete, converse, opening, reply
from sq_llava.page.line import Line, LineIsFull, Waiting
from sq_llava.page.prototype_picture import EMPTY, prototype_picture
from sq_llava.serving.images import FORMATS


PHOTOS = files("sq_llava.page") / "photos"
EXAMPLES = (
    ("what color is the shape?", PHOTOS / "shape.png"),
    ("What is the cat looking at?", PHOTOS / "cat.jpg"),
    ("What is on the table?", PHOTOS / "coffee.jpg"),
)
# What every browser shows, by Pillow's names. MPO: a JPEG of a phone, with another picture behind it.
BROWSER_FORMATS = (*FORMATS, "MPO")
# Seconds after which a visitor is told how long it takes.
PATIENCE = 3
# Seconds that a new run waits until the last one of the same visitor has ended. It takes a tenth of a second.
SECONDS_TO_END = 5


@dataclass
class Run:
    """
    Work for one visitor. `stopped` ends it; `over` is set when it changes the page no more. `is_replaced` says that
    something else of the same visitor, such as a new question, decides what the page shows then.
    """

    is_replaced: bool = False
    stopped: Event = field(default_factory=Event)
    over: Event = field(default_factory=Event)


class Page:
    """The handlers. They yield values for the `outputs` of `create_page`: box, conversation, chat, picture, Stop."""

    def __init__(self, assistant: Assistant):
        self.assistant, self.line = assistant, Line()
        self.runs: dict[str, Run] = {}
        self.lock = Lock()  # for `runs`

    def reply(self, request: gr.Request, box: dict, turns: list[Turn], *settings) -> Iterator[tuple]:
        """Answers what is typed, or describes a new picture. Then the model suggests questions."""
        yield from self._run(request, box, turns, reply, Settings(*settings))

    def converse(self, request: gr.Request, box: dict, turns: list[Turn], *settings) -> Iterator[tuple]:
        """Lets the model ask itself and answer."""
        yield from self._run(request, box, turns, converse, Settings(*settings))

    def choose(self, request: gr.Request, event: gr.SelectData, turns: list[Turn], *settings) -> Iterator[tuple]:
        """Answers one of the model's own questions that was clicked. The box stays as it is."""
        question = {"text": event.value, "files": []}
        for _, *values in self._run(request, question, turns, reply, Settings(*settings)):
            yield gr.skip(), *values

    def try_example(self, request: gr.Request, event: gr.SelectData, turns: list[Turn], *settings) -> Iterator[tuple]:
        """Answers the question of an example. The browser says only which one: a path of its own is not read."""
        text, photo = EXAMPLES[event.index]
        example = {"text": text, "files": [str(photo)]}
        for _, *values in self._run(request, example, turns, reply, Settings(*settings)):
            yield gr.skip(), *values

    async def stop(self, request: gr.Request) -> None:
        """Ends the run of a visitor. It keeps the words that are there."""
        if run := self.runs.get(request.session_hash):
            run.stopped.set()

    def clear(self, request: gr.Request) -> tuple:
        """Ends the run of a visitor, and empties the conversation."""
        with self._only_run(request.session_hash):
            return *shown(View([])), stop_button(is_running=False)

    def look(self, picture: str | None) -> str:
        """The prototype picture."""
        return EMPTY if picture is None else prototype_picture(self.assistant, open_image(picture))

    def _run(self, request: gr.Request, box: dict, turns: list[Turn], work, settings: Settings) -> Iterator[tuple]:
        """Shows each step of `work`. Wrong input is a warning; then the box gets back what was typed."""
        with self._only_run(request.session_hash) as run:
            yield from self._shown_steps(run, box, turns, work, settings)

    @contextmanager
    def _only_run(self, visitor: str) -> Iterator[Run]:
        """Takes the place of the visitor's last run, and waits until that is over. Of two clicks, the later counts."""
        run = Run()
        with self.lock:
            last, self.runs[visitor] = self.runs.get(visitor), run
            if last:
                last.is_replaced = True
                last.stopped.set()
        try:
            if last:
                last.over.wait(SECONDS_TO_END)
            yield run
        finally:
            run.over.set()
            with self.lock:
                if self.runs.get(visitor) is run:
                    del self.runs[visitor]

    def _shown_steps(self, run: Run, box: dict, turns: list[Turn], work, settings: Settings) -> Iterator[tuple]:
        """The steps as values for the `outputs`, and at the end the ones that stay."""
        view, note, box_at_end = View(turns, busy=BUSY["assistant"]), "", gr.skip()
        try:
            view = replace(view, turns=_continued(turns, box))
            if not any(turn.files for turn in view.turns):
                raise ValueError("There is no picture yet. Add one to the message, or choose an example.")
            yield {"text": "", "files": []}, *shown(view, words_of(view)), stop_button(is_running=True)
            box_at_end = box
            for step in self.line.follow(work(self.assistant, view.turns, settings), run.stopped):
                waiting = None
                if isinstance(step, View):
                    view = step
                elif view.busy:
                    waiting = step
                else:
                    continue
                yield gr.skip(), *shown(view, words_of(view, waiting)), stop_button(is_running=True)
            box_at_end = gr.skip()
            if view.turns[-1].role == "user":
                note = "Stopped before the first word."
        except (ValueError, LineIsFull) as error:
            message = str(error)
            for file in box["files"]:
                message = message.replace(file, Path(file).name)
            title = "The model is busy" if isinstance(error, LineIsFull) else "Something is wrong with the input"
            gr.Warning(html.escape(message), title=title)
            if view.turns and view.turns[-1].role == "assistant":
                box_at_end = gr.skip()
            view = replace(view, turns=complete(view.turns))
        last = box_at_end, *shown(view, note), stop_button(is_running=False)
        # Gradio sends the last values once more at the end, perhaps after the first ones of what replaces this run.
        yield tuple(gr.skip() for _ in last) if run.is_replaced else last


def shown(view: View, note: str = "") -> tuple:
    """Values for conversation, chat and picture. The questions become buttons under the last message."""
    messages = []
    for turn in view.turns:
        text = html.escape(turn.text, quote=False)
        files = [{"path": file, "alt_text": "the picture"} for file in turn.files]
        text = f"The model asks: {text}" if turn.role == "vusr" else text
        messages.append({"role": "assistant" if turn.role == "assistant" else "user", "content": [*files, text]})
    if note:
        messages.append({"role": "assistant", "content": note})
    if messages and view.questions:
        messages[-1]["options"] = [{"value": question} for question in view.questions]
    pictures = [file for turn in view.turns for file in turn.files]
    return view.turns, messages, pictures[-1] if pictures else None


def words_of(view: View, waiting: Waiting | None = None) -> str:
    """What the model is busy with, who comes first, and for how long a visitor has waited, once that is long."""
    if not view.busy:
        return ""
    ahead, seconds = waiting or (0, 0)
    words = f"{view.busy}…"
    if ahead:
        words = f"Waiting: {ahead} {'request comes' if ahead == 1 else 'requests come'} first."
    return f"{words} {seconds} s" if seconds >= PATIENCE else words


def stop_button(is_running: bool) -> gr.Button:
    """An update of the button Stop, which is quiet while nothing runs."""
    return gr.Button(interactive=is_running, variant="stop" if is_running else "secondary")


def _continued(turns: list[Turn], box: dict) -> list[Turn]:
    """The conversation with what was typed. A question whose answer was stopped is asked again, or gives its files."""
    answered = complete(turns)
    unanswered = turns[len(answered) :][:1]
    if not box["text"].strip() and not box["files"] and turns:
        return [*answered, *(turn for turn in unanswered if turn.role == "user")]
    kept = [file for turn in unanswered for file in turn.files]
    return [*answered, opening(box["text"], [*kept, *map(_for_browsers, box["files"])])]


def _for_browsers(file: str) -> str:
    """Checks an uploaded picture. A very large one, and one that browsers do not show, is replaced by a JPEG."""
    image = open_sent_image(file)
    with open_stream(file) as stream, open_header(stream) as sent:
        is_shown = sent.format in BROWSER_FORMATS
    if is_shown and max(image.size) < MAX_SENT_SIDE:
        return file
    copy = Path(file).with_suffix(".jpg")
    with written_whole(copy) as new:
        image.save(new, "JPEG", quality=95)
    return str(copy)
