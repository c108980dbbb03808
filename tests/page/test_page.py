"""The page in a real, headless browser: what a person does, and what the page then shows."""

import time
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest

from sq_llava.inference.assistant import Assistant
from sq_llava.page.dialogue import Settings, Turn, complete, converse, opening, speak
from tests import tiny
from tests.browsers import CHROMIUM


pytestmark = pytest.mark.slow


PHONE, DESKTOP = {"width": 390, "height": 844}, {"width": 1280, "height": 900}
HOSTILE = '<img src="http://203.0.113.1/x.png"> ![](http://203.0.113.1/y.png) **bold**'


in_browser = pytest.mark.skipif(not CHROMIUM.is_file(), reason=f"no browser at {CHROMIUM}")


class Scripted(Assistant):
    """A tiny model that sees the pictures, but says what the test wants, word by word."""

    answer_text = "A dog."
    seconds = 0.0
    num_closed = 0
    seen = sampling = None

    def stream(self, images, messages, max_new_tokens=512, ask=False, **generate_kwargs) -> Iterator[str]:
        self.seen, self.sampling = messages, {"max_new_tokens": max_new_tokens, **generate_kwargs}
        if "</s>" in messages[-1]["content"][-1]["text"]:
            raise ValueError("contains '</s>', which is a control token of this model: remove it.")
        num_asked = sum(message["role"] == "vusr" for message in messages)
        text = f"What is number {num_asked}?" if ask else self.answer_text
        try:
            for word in text.split(" "):
                time.sleep(self.seconds)
                yield word + " "
        except GeneratorExit:
            self.num_closed += 1
            raise


def assert_closed_once(assistant: Scripted) -> None:
    """Waits until a generation was closed, for half a minute at most."""
    deadline = time.monotonic() + 30
    while not assistant.num_closed and time.monotonic() < deadline:
        time.sleep(0.1)
    assert assistant.num_closed == 1


@pytest.fixture(scope="module")
def assistant() -> Scripted:
    processor = tiny.tiny_processor()
    return Scripted(tiny.tiny_model_for(processor), processor)


@pytest.fixture(autouse=True)
def fast_again(assistant):
    yield
    assistant.seconds, assistant.answer_text, assistant.num_closed = 0.0, "A dog.", 0


@pytest.fixture(scope="module")
def url(assistant) -> Iterator[str]:
    from sq_llava.page.layout import create_page, launch_settings

    blocks = create_page(assistant)
    _, address, _ = blocks.launch(prevent_thread_lock=True, quiet=True, **launch_settings())
    yield address.rstrip("/")
    blocks.close()


class Visitor:
    """A person who uses the page."""

    def __init__(self, page, url: str, theme: str = "light"):
        self.page, self.requests, self.errors = page, [], []
        page.set_default_timeout(60_000)
        page.on("request", lambda request: self.requests.append(request.url))
        page.on("console", lambda message: self.errors.append(message.text) if message.type == "error" else None)
        page.goto(f"{url}?__theme={theme}")
        page.get_by_test_id("submit-button").wait_for()

    def upload(self, file: Path) -> None:
        self.page.set_input_files("#box input[type=file]", str(file))
        self.page.locator("#box img").wait_for(state="attached")

    def say(self, text: str) -> None:
        self.page.locator("#box textarea").fill(text)
        self.page.get_by_test_id("submit-button").click()

    def press(self, name: str) -> None:
        self.page.get_by_role("button", name=name).click()

    def sees(self, text: str) -> None:
        self.page.get_by_text(text, exact=True).first.wait_for()

    def sees_answers(self, count: int) -> None:
        self.page.wait_for_function(f"document.querySelectorAll('[data-testid=bot]').length == {count}")

    def texts(self, role: str) -> list[str]:
        return [text for text in self.page.get_by_test_id(role).all_inner_texts() if text.strip()]


@pytest.fixture
def visitor(browser, url) -> Iterator[Visitor]:
    page = browser.new_page(viewport=DESKTOP)
    yield Visitor(page, url)
    page.close()


@pytest.fixture
def photo(tmp_path) -> Path:
    file = tmp_path / "photo.png"
    tiny.picture(width=90, height=60).save(file)
    return file


@in_browser
def test_question_about_a_picture_is_answered_and_nothing_is_loaded_from_outside(
    visitor, photo, url, assistant, monkeypatch
):
    monkeypatch.setattr(assistant, "answer_text", HOSTILE)
    visitor.upload(photo)
    visitor.say("What is it?")
    visitor.sees(HOSTILE)
    assert visitor.texts("user") == ["What is it?"]
    assert [part["type"] for part in assistant.seen[0]["content"]] == ["image", "text"]
    visitor.page.locator("#overlay img").wait_for()
    assert [address for address in visitor.requests if not address.startswith((url, "data:", "blob:"))] == []
    assert visitor.errors == []


@in_browser
def test_browser_is_told_to_load_nothing_from_outside(visitor, url):
    policy = visitor.page.goto(url).headers["content-security-policy"]
    assert "default-src 'self'" in policy
    visitor.page.evaluate("fetch('http://203.0.113.1/').catch(error => error.message)")
    assert any("Content Security Policy" in error for error in visitor.errors)


def test_web_page_whose_name_points_to_this_machine_is_refused(url):
    """DNS rebinding: the browser of a visitor sends the name of the page."""
    assert httpx2.get(url).status_code == 200
    for path in ("", "/config", "/gradio_api/info"):
        assert httpx2.get(url + path, headers={"Host": "evil.example"}).status_code == 400


@pytest.mark.parametrize("path", ["/etc/passwd", str(Path(__file__)), "../../../../etc/passwd", "C:/x"])
def test_files_of_this_machine_are_not_served(url, path):
    for route in ("/gradio_api/file=", "/file=", "/gradio_api/stream/"):
        assert httpx2.get(url + route + path).status_code in (403, 404, 405), route


@in_browser
def test_clicking_a_question_of_the_model_sends_it(visitor, photo):
    visitor.upload(photo)
    visitor.press("Ask me something")
    visitor.page.get_by_role("button", name="What is number 0?").click()
    visitor.sees_answers(2)
    assert visitor.texts("user") == ["Can you describe the image in detail?", "What is number 0?"]


@in_browser
def test_model_talks_to_itself_until_it_is_stopped(visitor, photo, assistant):
    visitor.upload(photo)
    assistant.seconds = 0.3
    visitor.press("Let it talk to itself")
    visitor.sees("The model asks: What is number 0?")
    visitor.press("Stop")
    assert_closed_once(assistant)
    assistant.seconds = 0.0
    visitor.say("And now?")
    visitor.sees("And now?")
    visitor.page.wait_for_function("document.querySelectorAll('[data-testid=bot]').length >= 2")
    assert [message["role"] for message in assistant.seen[-3:]] != ["vusr", "user"]


@in_browser
def test_model_talks_to_itself_for_three_turns_by_default(visitor, photo):
    visitor.upload(photo)
    visitor.press("Let it talk to itself")
    visitor.sees("The model asks: What is number 2?")
    visitor.sees_answers(4)


@in_browser
def test_sliders_change_the_settings(visitor, photo, assistant):
    visitor.upload(photo)
    visitor.press("Settings ▼")
    for label, key, value in (
        ("Number of turns when talking to itself", "Home", "1"),
        ("Maximum length of an answer or question, in tokens", "End", "1024"),
        ("Sampling temperature for answers (0: greedy)", "End", "2"),
    ):
        visitor.page.get_by_role("slider", name=label).press(key)
        visitor.page.wait_for_function(
            "([label, value]) => document.querySelector(`[aria-label='number input for ${label}']`).value == value",
            arg=[label, value],
        )
    visitor.press("Let it talk to itself")
    visitor.sees_answers(2)
    assert visitor.page.get_by_text("What is number 1?").count() == 0
    assert assistant.sampling["max_new_tokens"] == 1024
    assert assistant.sampling["temperature"] == 2 and assistant.sampling["do_sample"]


@in_browser
def test_wrong_input_is_a_warning_and_the_typed_text_comes_back(visitor, photo, tmp_path):
    visitor.say("Hello?")
    visitor.page.get_by_text("There is no picture yet").wait_for()
    assert visitor.page.locator("#box textarea").input_value() == "Hello?"
    broken = tmp_path / "broken.png"
    broken.write_bytes(photo.read_bytes()[:100])
    visitor.upload(broken)
    visitor.say("What is it?")
    visitor.page.get_by_text("broken.png: cannot be read as an image").wait_for()
    assert visitor.texts("bot") == []


@in_browser
def test_control_token_is_a_warning_and_the_question_is_dropped(visitor, photo):
    visitor.upload(photo)
    visitor.say("Hello </s>")
    visitor.page.get_by_text("control token of this model").wait_for()
    assert visitor.texts("user") == []
    assert visitor.page.locator("#box textarea").input_value() == "Hello </s>"


@in_browser
def test_overlay_shows_only_the_prototypes_that_are_chosen(visitor, photo):
    visitor.upload(photo)
    visitor.say("What is it?")
    overlay = visitor.page.locator("#overlay img")
    overlay.wait_for()
    before = overlay.get_attribute("src")
    visitor.page.locator("#chosen label").first.click()
    visitor.page.wait_for_function(f"document.querySelector('#overlay img').src != {before!r}")


@in_browser
@pytest.mark.parametrize("theme, dark", [("light", False), ("dark", True)])
def test_phone_shows_everything_without_scrolling_sideways(browser, url, photo, theme, dark):
    page = browser.new_page(viewport=PHONE)
    visitor = Visitor(page, url, theme)
    visitor.upload(photo)
    visitor.say("What is it, " + "and what is it " * 20 + "?")
    page.locator("#overlay img").wait_for()
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    for name in ("Ask me something", "Let it talk to itself", "Stop"):
        box = page.get_by_role("button", name=name).bounding_box()
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= PHONE["width"]
    background = page.evaluate("getComputedStyle(document.querySelector('#chat')).backgroundColor")
    brightness = sum(int(level) for level in background[4:-1].split(",")[:3]) / 3
    assert (brightness < 100) is dark
    page.close()


@in_browser
def test_trash_starts_a_new_conversation(visitor, photo):
    visitor.upload(photo)
    visitor.say("What is it?")
    visitor.sees("A dog.")
    visitor.page.locator("#overlay img").wait_for()
    visitor.press("Clear")
    visitor.page.locator("#overlay img").wait_for(state="detached")
    visitor.say("And now?")
    visitor.page.get_by_text("There is no picture yet").wait_for()
    assert visitor.texts("bot") == []


@in_browser
def test_trash_stops_the_generation(visitor, photo, assistant):
    visitor.upload(photo)
    assistant.seconds = 0.3
    visitor.press("Let it talk to itself")
    visitor.sees("The model asks: What is number 0?")
    visitor.page.locator("#overlay img").wait_for()
    visitor.press("Clear")
    visitor.page.locator("#overlay img").wait_for(state="detached")
    assert_closed_once(assistant)
    assert visitor.texts("user") == visitor.texts("bot") == []


def test_model_asks_as_vusr_and_answers(assistant):
    *_, turns = converse(assistant, [opening("", ["a.png"]), Turn("assistant", "A dog.")], Settings(num_turns=2))
    assert [turn.role for turn in turns] == ["user", "assistant", "vusr", "assistant", "vusr", "assistant"]
    assert turns[2].text == "What is number 0?"


def test_answers_are_greedy_unless_a_temperature_is_set_and_questions_are_sampled(assistant, monkeypatch):
    calls, stream = [], assistant.stream
    monkeypatch.setattr(assistant, "stream", lambda *args, **settings: calls.append(settings) or stream(*args))
    for role, settings in [("assistant", Settings()), ("assistant", Settings(temperature=0.5)), ("vusr", Settings())]:
        list(speak(assistant, [opening("Hi", [])], role, settings))
    assert calls[0] == {"ask": False}
    assert calls[1] == {"ask": False, "do_sample": True, "temperature": 0.5, "top_p": 1.0}
    assert calls[2] == {"ask": True, "do_sample": True, "temperature": 1.2, "top_p": 0.95, "top_k": 300}


@pytest.mark.parametrize("role", ["assistant", "vusr"])
def test_temperature_can_be_a_whole_number(assistant, role):
    real = Assistant(assistant.model, assistant.processor)
    talk = [Turn("user", "What is it?")] + ([Turn("assistant", "A dog.")] if role == "vusr" else [])
    settings = Settings(max_new_tokens=2, temperature=2, question_temperature=2, question_top_p=1)
    assert list(speak(real, talk, role, settings))[-1][-1].role == role


def test_question_whose_answer_was_stopped_is_dropped():
    said = [Turn("user", "What is it?"), Turn("assistant", "A dog.")]
    assert complete([*said, Turn("vusr", "And")]) == said
    assert complete([Turn("user", "What is it?")]) == []
