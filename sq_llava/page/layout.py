"""The web page: chat about pictures, let the model ask, and see its prototypes.

    >>> create_page(load("runs/demo/model")).launch(**launch_settings())

Built with Gradio 6. All text is shown as plain text, and the fonts are those of the system. A Content-Security-Policy
keeps the browser from loading anything from other servers. Only one text is generated at a time, for all visitors.
"""

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import gradio as gr
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware

from sq_llava.inference.assistant import Assistant
from sq_llava.page.dialogue import Settings
from sq_llava.page.handlers import EXAMPLES, PHOTOS, Page
from sq_llava.page.prototype_picture import EMPTY
from sq_llava.page.prototype_picture import STYLE as PROTOTYPES_STYLE
from sq_llava.serving.connections import hosts_to_accept


INVITATION = """**Add a picture and ask about it**, or try one of these.

The model answers, and suggests questions of its own."""
# For screen readers: Gradio calls the examples a list, which may not hold buttons, and gives pictures no name.
NAMES = """() => {
  const name = () => {
    document.querySelector("#chat .examples[role=list]")?.setAttribute("role", "group");
    for (const button of document.querySelectorAll("#chat .message button:not([aria-label]):has(img)"))
      button.setAttribute("aria-label", "Enlarge the picture");
  };
  new MutationObserver(name).observe(document.body, {childList: true, subtree: true});
  name();
}"""
# Programs should use `sq-llava serve`, and the conversation itself shows what is going on.
UNSEEN = {"api_visibility": "private", "show_progress": "hidden"}
# White text on Gradio's own orange and red is hard to read.
DARK_BUTTONS = {
    f"button_{kind}_background_fill{state}{theme}": colour
    for kind, colours in {"primary": ("*primary_700", "*primary_800"), "cancel": ("#b91c1c", "#991b1b")}.items()
    for state, colour in zip(("", "_hover"), colours, strict=True)
    for theme in ("", "_dark")
}
SYSTEM_FONT = gr.themes.Font("system-ui"), gr.themes.Font("sans-serif")
# Gradio has inline scripts and styles; its workers and previews are blobs.
CONTENT_SECURITY_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' blob: data:; media-src 'self' blob: data:; font-src 'self' data:; worker-src 'self' blob:; "
    "connect-src 'self'; object-src 'none'; base-uri 'self'; form-action 'self'"
)
STYLE = """
.gradio-container {width: 100%; min-width: 0 !important; max-width: 1200px !important; margin: auto}
#chat .message img {max-height: 12rem; width: auto}
#chat button[title="Share"], #chat button[aria-label="Share"] {display: none}
#chat .placeholder {text-align: center}
#chat .examples {grid-template-columns: repeat(3, 1fr); max-width: min(40rem, 100%)}
#chat .example-image-container {width: 100%; height: 4rem; margin-bottom: 0.5rem}
#box:focus-within {border-color: var(--color-accent)}
#buttons {gap: 0.5rem}
#buttons button {white-space: nowrap; padding-inline: 0}
@media (max-width: 600px) {
  #buttons button {font-size: var(--text-md)}
  #chat .examples {grid-template-columns: 1fr; gap: 0.4rem; padding: 0 0 0.4rem}
  #chat .example {padding: 0.5rem}
  #chat .example-content {flex-direction: row; align-items: center; gap: 0.75rem}
  #chat .example-text-content {margin: 0}
  #chat .example-image-container {width: 3rem; height: 3rem; margin: 0}
}
"""


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
        "theme": gr.themes.Default(font=SYSTEM_FONT, font_mono=[gr.themes.Font("monospace")]).set(**DARK_BUTTONS),
        "css": STYLE + PROTOTYPES_STYLE,
        "footer_links": [],
        "ssr_mode": False,
        "share": False,
        # The browser checks it before the upload. A photo of 50 megapixels has about 20 MB.
        "max_file_size": "50mb",
        "app_kwargs": {"middleware": [hosts, Middleware(ContentSecurityPolicy)]},
    }


def create_page(assistant: Assistant) -> gr.Blocks:
    """The page of one model. Start it with `launch(**launch_settings())`."""
    page = Page(assistant)
    # Gradio's cache is shared by all pages of this machine, and each page deletes its files there when it ends.
    gr.set_static_paths([str(PHOTOS)])
    with gr.Blocks(
        title="SQ-LLaVA", analytics_enabled=False, fill_width=True, delete_cache=(3600, 24 * 3600)
    ) as blocks:
        turns, picture = gr.State([]), gr.State(None)
        gr.Markdown("# SQ-LLaVA\nChat about a picture, and let the model ask.")
        with gr.Row():
            with gr.Column(scale=3, min_width=300):
                chat = gr.Chatbot(
                    label="Conversation", render_markdown=False, latex_delimiters=[], allow_tags=False, height="55vh",
                    buttons=[], layout="bubble", elem_id="chat", placeholder=INVITATION,
                    examples=[{"text": text, "files": [str(photo)]} for text, photo in EXAMPLES],
                )  # fmt: skip
                box = gr.MultimodalTextbox(
                    file_types=["image"], file_count="multiple", label="Your message", show_label=False,
                    placeholder="Ask about a picture", autofocus=False, elem_id="box",
                )  # fmt: skip
                with gr.Row(elem_id="buttons"):
                    ask = gr.Button("Ask me something", variant="primary", min_width=140)
                    talk = gr.Button("Let it talk to itself", min_width=140)
                    stop = gr.Button("Stop", interactive=False, min_width=80)
                sliders = _sliders()
            if assistant.model.config.prototype_variant != "none":
                with gr.Column(scale=2, min_width=300):
                    prototypes = gr.HTML(EMPTY, elem_id="prototypes", js_on_load=None)
                    # One at a time, however many pictures are uploaded.
                    picture.change(page.look, picture, prototypes, concurrency_limit=1, **UNSEEN)

        blocks.load(js=NAMES, **UNSEEN)
        # The visitors' line is in `Page`, so Gradio's own queue lets everybody in. A visitor can send a question while
        # the model still thinks of questions to suggest.
        outputs = {"outputs": [box, turns, chat, picture, stop], "trigger_mode": "multiple", **UNSEEN}
        box.submit(page.reply, [box, turns, *sliders], **outputs)
        chat.option_select(page.choose, [turns, *sliders], **outputs)
        chat.example_select(page.try_example, [turns, *sliders], **outputs)
        ask.click(page.reply, [box, turns, *sliders], **outputs)
        talk.click(page.converse, [box, turns, *sliders], **outputs)
        stop.click(page.stop, queue=False, **UNSEEN)
        chat.clear(page.clear, None, [turns, chat, picture, stop], **UNSEEN)
        blocks.queue(default_concurrency_limit=None)
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
