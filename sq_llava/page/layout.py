"""The web page: chat about pictures, let the model ask, and see its prototypes.

    >>> create_page(load("runs/demo/model")).launch(**launch_settings())

Built with Gradio 6. All text is shown as plain text, and the fonts are those of the system. A Content-Security-Policy
keeps the browser from loading anything from other servers. Only one text is generated at a time, for all visitors.
"""

import html
import os
from collections.abc import Iterator, Sequence
from dataclasses import fields
from importlib.resources import files
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

from sq_llava.data.images import open_image
from sq_llava.inference.assistant import Assistant
from sq_llava.inference.prototypes import PrototypeMap, colour_of_rank, look, paint
from sq_llava.page.dialogue import Settings, Turn, complete, converse, opening, speak
from sq_llava.serving.connections import hosts_to_accept


# Gradio reads these when it is imported.
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "0")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import gradio as gr
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware


PHOTOS = files("sq_llava.page") / "photos"
EXAMPLES = {
    "shape.png": "what color is the shape?",
    "cat.jpg": "What is the cat looking at?",
    "coffee.jpg": "What is on the table?",
    "rocket.jpg": "What is happening here?",
}
NUM_CHOICES = 8
# Maximum number of clicks, of all visitors, that wait for the model.
MAX_WAITING = 32
# Maximum width and height of the prototype picture, in pixels.
LARGEST_SIDE = 768
SYSTEM_FONT = gr.themes.Font("system-ui"), gr.themes.Font("sans-serif")
# Gradio has inline scripts and styles; its workers and previews are blobs.
CONTENT_SECURITY_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' blob: data:; media-src 'self' blob: data:; font-src 'self' data:; worker-src 'self' blob:; "
    "connect-src 'self'; object-src 'none'; base-uri 'self'; form-action 'self'"
)
STYLE = """
.gradio-container {max-width: 1200px !important; margin: auto}
#chat .message img {max-height: 12rem; width: auto}
#chat button[title="Share"], #chat button[aria-label="Share"] {display: none}
#examples .gallery {display: grid; grid-template-columns: 1fr 1fr}
#examples .container {display: flex; flex-direction: column-reverse; align-items: center; gap: 0.3rem; min-width: 0}
#examples p {font-size: var(--text-sm); margin: 0; width: 100%; text-align: center; white-space: normal}
#examples img {height: 4rem; width: auto}
#chosen label {border-left: 1rem solid}
"""
STYLE += "".join(
    f"#chosen label:nth-of-type({rank + 1}) {{border-left-color: rgb{colour_of_rank(rank)}}}\n"
    for rank in range(NUM_CHOICES)
)


class ContentSecurityPolicy:
    """Middleware that adds the header to every response."""

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send):
        async def send_with_policy(message):
            if message["type"] == "http.response.start":
                header = (b"content-security-policy", CONTENT_SECURITY_POLICY.encode())
                message = {**message, "headers": [*message["headers"], header]}
            await send(message)

        await self.app(scope, receive, send_with_policy)


def launch_settings(host: str = "127.0.0.1", allowed_hosts: Sequence[str] | None = None) -> dict[str, Any]:
    """
    Settings of Gradio's `launch` for the page.

    Args:
        host, allowed_hosts: Address to listen on, and names that visitors may use; see `hosts_to_accept`.

    Raises:
        ValueError: if one of `allowed_hosts` is not a name.
    """
    hosts = Middleware(TrustedHostMiddleware, allowed_hosts=hosts_to_accept(host, allowed_hosts), www_redirect=False)
    return {
        "server_name": host,
        "theme": gr.themes.Default(font=SYSTEM_FONT, font_mono=[gr.themes.Font("monospace")]),
        "css": STYLE,
        "footer_links": ["settings"],
        "ssr_mode": False,
        "share": False,
        "max_file_size": "20mb",
        "app_kwargs": {"middleware": [hosts, Middleware(ContentSecurityPolicy)]},
    }


class Page:
    """
    The handlers of clicks. They yield values for the `outputs` of [`create_page`]: input box, conversation, chat,
    picture.
    """

    def __init__(self, assistant: Assistant):
        self.assistant = assistant

    def reply(self, box: dict, turns: list[Turn], *settings) -> Iterator[tuple]:
        """Answers the typed message."""
        yield from self._guarded(box, turns, self._answer(box, turns, Settings(*settings)))

    def choose(self, event: gr.SelectData, turns: list[Turn], *settings) -> Iterator[tuple]:
        """Answers one of the model's own questions that was clicked. The input box stays as it is."""
        question = {"text": event.value, "files": []}
        for _, *values in self._guarded(question, turns, self._answer(question, turns, Settings(*settings))):
            yield gr.skip(), *values

    def ask(self, box: dict, turns: list[Turn], *settings) -> Iterator[tuple]:
        """Lets the model ask. Its questions appear as buttons under its last answer."""
        yield from self._guarded(box, turns, self._suggest(box, turns, Settings(*settings)))

    def converse(self, box: dict, turns: list[Turn], *settings) -> Iterator[tuple]:
        """Lets the model ask itself and answer."""
        yield from self._guarded(box, turns, self._converse(box, turns, Settings(*settings)))

    def _answer(self, box: dict, turns: list[Turn], settings: Settings) -> Iterator[tuple]:
        turns = [*complete(turns), opening(box["text"], box["files"])]
        _check_pictures(turns)
        yield shown(turns)
        for turns in speak(self.assistant, turns, "assistant", settings):  # noqa: B020
            yield shown(turns)

    def _suggest(self, box: dict, turns: list[Turn], settings: Settings) -> Iterator[tuple]:
        questions = []
        for values in self._begin(box, turns, settings):
            turns = values[0]
            yield values
        for _ in range(settings.num_questions):
            before = questions
            for asked in speak(self.assistant, turns, "vusr", settings):
                questions = list(dict.fromkeys([*before, asked[-1].text]))
                yield shown(turns, questions)

    def _converse(self, box: dict, turns: list[Turn], settings: Settings) -> Iterator[tuple]:
        for values in self._begin(box, turns, settings):
            turns = values[0]
            yield values
        for turns in converse(self.assistant, turns, settings):  # noqa: B020
            yield shown(turns)

    def _begin(self, box: dict, turns: list[Turn], settings: Settings) -> Iterator[tuple]:
        """Answers the input box first if it has text or pictures. Otherwise, the conversation stays as it is."""
        turns = complete(turns)
        if box["text"].strip() or box["files"] or not turns:
            yield from self._answer(box, turns, settings)
        else:
            yield shown(turns)

    def _guarded(self, box: dict, turns: list[Turn], steps: Iterator[tuple]) -> Iterator[tuple]:
        """Shows wrong input as a warning, and restores the input box and the conversation."""
        emptied = False
        try:
            for values in steps:
                # The box is emptied only once, so that text typed in the meantime stays.
                yield (gr.skip() if emptied else {"text": "", "files": []}, *values)
                emptied = True
        except ValueError as error:
            message = str(error)
            for file in box["files"]:
                message = message.replace(file, Path(file).name)
            gr.Warning(html.escape(message), title="Something is wrong with the input")
            yield (box if emptied else gr.skip(), *shown(complete(turns)))

    def look(self, picture: str | None) -> tuple:
        """Values for the prototype panel: the prototype map, the coloured picture, the choice of prototypes."""
        if picture is None:
            return None, gr.Image(None, visible=False), gr.CheckboxGroup([], visible=False)
        seen = look(self.assistant, open_image(picture))
        choices = [(f"{prototype}: {share:.0%}", prototype) for prototype, share in seen.shares.items()]
        overlay = gr.Image(self.paint(picture, seen, []), visible=True)
        return seen, overlay, gr.CheckboxGroup(choices[:NUM_CHOICES], value=[], visible=True)

    def paint(self, picture: str, seen: PrototypeMap, chosen: list[int]) -> Image.Image:
        image = ImageOps.contain(open_image(picture), (LARGEST_SIDE, LARGEST_SIDE))
        return paint(image, seen, chosen or None)


def shown(turns: list[Turn], questions: list[str] = ()) -> tuple:
    """Values for conversation, chat and picture. `questions` become buttons under the last message."""
    messages = []
    for turn in turns:
        text = html.escape(turn.text, quote=False)
        files = [{"path": file} for file in turn.files]
        text = f"The model asks: {text}" if turn.role == "vusr" else text
        role = "assistant" if turn.role == "assistant" else "user"
        messages.append({"role": role, "content": [*files, text]})
    if messages and questions:
        messages[-1]["options"] = [{"value": question} for question in questions]
    pictures = [file for turn in turns for file in turn.files]
    return turns, messages, pictures[-1] if pictures else None


def _check_pictures(turns: list[Turn]) -> None:
    files = [file for turn in turns for file in turn.files]
    if not files:
        raise ValueError("There is no picture yet. Add one to the message, or choose an example.")
    for file in files:
        open_image(file)


def create_page(assistant: Assistant) -> gr.Blocks:
    """The page of one model. Start it with `launch(**launch_settings())`."""
    page = Page(assistant)
    with gr.Blocks(title="SQ-LLaVA", analytics_enabled=False, delete_cache=(3600, 24 * 3600)) as blocks:
        turns, picture = gr.State([]), gr.State(None)
        gr.Markdown("# SQ-LLaVA\nDrop a picture, chat about it, and let the model ask.")
        with gr.Row():
            with gr.Column(scale=3, min_width=300):
                chat = gr.Chatbot(
                    label="Conversation", render_markdown=False, latex_delimiters=[], allow_tags=False, height="55vh",
                    buttons=[], layout="bubble", elem_id="chat",
                )  # fmt: skip
                box = gr.MultimodalTextbox(
                    file_types=["image"], file_count="multiple", show_label=False, placeholder="Ask about a picture",
                    autofocus=False, elem_id="box",
                )  # fmt: skip
                with gr.Row():
                    ask = gr.Button("Ask me something", variant="primary", min_width=120)
                    talk = gr.Button("Let it talk to itself", min_width=120)
                    stop = gr.Button("Stop", variant="stop", min_width=80)
                sliders = _sliders()
            with gr.Column(scale=2, min_width=300):
                examples = [[{"text": text, "files": [str(PHOTOS / name)]}] for name, text in EXAMPLES.items()]
                gr.Examples(examples, box, elem_id="examples")
                has_prototypes = assistant.model.config.prototype_variant != "none"
                panel, looking = _prototype_panel(page, picture) if has_prototypes else ([], [])

        outputs = [box, turns, chat, picture]
        # One generation at a time, for all visitors. Programs should use `sq-llava serve`.
        shared = {
            "outputs": outputs, "concurrency_id": "model", "concurrency_limit": 1, "show_progress": "minimal",
            "api_visibility": "private",
        }  # fmt: skip
        running = [
            box.submit(page.reply, [box, turns, *sliders], **shared),
            chat.option_select(page.choose, [turns, *sliders], **shared),
            ask.click(page.ask, [box, turns, *sliders], **shared),
            talk.click(page.converse, [box, turns, *sliders], **shared),
        ]
        blocks.queue(max_size=MAX_WAITING)
        stop.click(None, cancels=running)
        # Two listeners, in this order: Gradio applies `cancels` after the function of the same listener, so it would
        # also cancel the next question. The second listener skips the queue, so that it is done before the next
        # question is read. Without the queue, a change of `picture` triggers nothing: the panel is emptied here.
        chat.clear(None, cancels=[*running, *looking])
        chat.clear(
            lambda: shown([]) + (page.look(None) if panel else ()), None, [*outputs[1:], *panel], queue=False,
            api_visibility="private",
        )  # fmt: skip
    return blocks


def _sliders() -> list[gr.Slider]:
    """One slider for each field of `Settings`, in the same order."""
    ranges = {
        "max_new_tokens": (1, 1024, 1, "Maximum length of an answer or question, in tokens"),
        "temperature": (0, 2, 0.1, "Sampling temperature for answers (0: greedy)"),
        "question_temperature": (0.1, 2, 0.1, "Sampling temperature for questions"),
        "question_top_p": (0.05, 1, 0.05, "Top-p sampling for questions"),
        "num_questions": (1, 8, 1, "Number of suggested questions"),
        "num_turns": (1, 10, 1, "Number of turns when talking to itself"),
    }
    with gr.Accordion("Settings", open=False):
        return [
            gr.Slider(low, high, value=setting.default, step=step, label=label, precision=0 if step == 1 else None)
            for setting in fields(Settings)
            for low, high, step, label in [ranges[setting.name]]
        ]


def _prototype_panel(page: Page, picture: gr.State) -> tuple[list[gr.components.Component], list]:
    """The components that `Page.look` fills, and the event that calls it."""
    seen = gr.State(None)
    overlay = gr.Image(
        label="What the prototypes see", interactive=False, format="png", buttons=["download", "fullscreen"],
        visible=False, elem_id="overlay",
    )  # fmt: skip
    chosen = gr.CheckboxGroup(
        [], label="Show only these prototypes", info="Number, and share of the picture. Choose none to show all.",
        visible=False, elem_id="chosen",
    )  # fmt: skip
    panel = [seen, overlay, chosen]
    looking = picture.change(page.look, picture, panel, show_progress="hidden", api_visibility="private")
    chosen.input(page.paint, [picture, seen, chosen], overlay, show_progress="hidden", api_visibility="private")
    return panel, [looking]
