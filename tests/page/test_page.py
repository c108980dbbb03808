"""The page in a real, headless browser: what a person does, and what the page then shows."""

import re
import time
from collections.abc import Iterator
from pathlib import Path
from threading import Event

import httpx2
import pytest
from axe_playwright_python.sync_playwright import Axe
from PIL import Image

from sq_llava.inference.assistant import Assistant
from sq_llava.page.dialogue import Settings, Turn, View, complete, converse, opening, reply, speak
from sq_llava.page.line import Line, LineIsFull, Waiting
from tests.browsers import CHROMIUM
from tests.page.conftest import Scripted


pytestmark = pytest.mark.slow


PHONE, DESKTOP = {"width": 390, "height": 844}, {"width": 1280, "height": 900}
HOSTILE = '<img src="http://203.0.113.1/x.png"> ![](http://203.0.113.1/y.png) **bold**'


in_browser = pytest.mark.skipif(not CHROMIUM.is_file(), reason=f"no browser at {CHROMIUM}")


def assert_closed_once(assistant: Scripted) -> None:
    """Waits until a generation was closed, for half a minute at most."""
    deadline = time.monotonic() + 30
    while not assistant.num_closed and time.monotonic() < deadline:
        time.sleep(0.1)
    assert assistant.num_closed == 1


def assert_accessible(page) -> None:
    """No serious violation of the rules of axe."""
    violations = Axe().run(page).response["violations"]
    assert [violation["id"] for violation in violations if violation["impact"] in ("serious", "critical")] == []


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

    def sees_nothing_run(self, num_answers: int) -> None:
        """Waits until there are so many answers and Stop is quiet."""
        self.page.wait_for_function(
            "count => document.querySelectorAll('[data-testid=bot]').length == count && "
            "[...document.querySelectorAll('button')].some(button => button.innerText == 'Stop' && button.disabled)",
            arg=num_answers,
        )

    def sees_no_error(self) -> None:
        """Gradio shows the word over a component whose listener failed or was cancelled."""
        assert self.page.get_by_text("Error", exact=True).count() == 0

    def texts(self, role: str) -> list[str]:
        return [text for text in self.page.get_by_test_id(role).all_inner_texts() if text.strip()]


@pytest.fixture
def visitor(browser, url) -> Iterator[Visitor]:
    page = browser.new_page(viewport=DESKTOP)
    yield Visitor(page, url)
    page.close()


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
    visitor.page.locator(".prototypes image").wait_for()
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


def test_page_on_all_addresses_starts_with_a_name_of_its_own(assistant):
    """Gradio asks for the page at localhost when it starts."""
    from sq_llava.page.layout import create_page, launch_settings

    blocks = create_page(assistant)
    settings = launch_settings("0.0.0.0", ["demo.example.org"])
    _, address, _ = blocks.launch(prevent_thread_lock=True, quiet=True, **settings)
    try:
        for host, status in {"demo.example.org": 200, "evil.example": 400}.items():
            assert httpx2.get(address, headers={"Host": host}).status_code == status
    finally:
        blocks.close()


def test_one_prototype_picture_is_made_at_a_time(assistant):
    from sq_llava.page.layout import create_page

    [look] = [function for function in create_page(assistant).fns.values() if function.name == "look"]
    assert look.concurrency_limit == 1


@pytest.mark.parametrize("path", ["/etc/passwd", str(Path(__file__)), "../../../../etc/passwd", "C:/x"])
def test_files_of_this_machine_are_not_served(url, path):
    for route in ("/gradio_api/file=", "/file=", "/gradio_api/stream/"):
        assert httpx2.get(url + route + path).status_code in (403, 404, 405), route


@in_browser
def test_clicking_a_question_of_the_model_sends_it(visitor, photo):
    visitor.upload(photo)
    visitor.press("Ask me something")
    visitor.page.get_by_role("button", name="What is number 0?").click()
    visitor.sees_nothing_run(num_answers=2)
    assert visitor.texts("user") == ["Can you describe the image in detail?", "What is number 0?"]


@in_browser
def test_work_is_visible_at_once_and_stop_shows_no_error(visitor, assistant, monkeypatch):
    """One page: stopped before the first word, asked again, stopped in the middle, asked again."""
    monkeypatch.setattr("sq_llava.page.handlers.PATIENCE", 1)
    assistant.seconds_before_first_word = 5
    layout = visitor.page.locator("#chat").bounding_box()
    assert visitor.page.get_by_role("button", name="Stop").is_disabled()
    visitor.press("What is the cat looking at?")
    visitor.sees("Thinking…")
    visitor.page.get_by_text(re.compile(r"^Thinking… [12] s$")).wait_for()
    assistant.seconds_before_first_word, clicked = 0, time.monotonic()
    visitor.press("Stop")
    visitor.sees("Stopped before the first word.")
    assert time.monotonic() - clicked < 3
    visitor.sees_no_error()

    assistant.seconds, assistant.answer_text = 0.2, "A very long dog " * 10
    visitor.press("Ask me something")
    visitor.page.get_by_text("A very long").wait_for()
    visitor.press("Stop")
    visitor.sees_nothing_run(num_answers=1)
    visitor.sees_no_error()
    assert 2 < len(visitor.texts("bot")[0].split()) < 40
    assert visitor.texts("user") == ["What is the cat looking at?"]

    assistant.seconds = 0.1
    visitor.press("Ask me something")
    visitor.page.get_by_text("Thinking of a question…").wait_for()
    assistant.answer_text = "A cat."
    visitor.say("And now?")
    visitor.sees("A cat.")
    visitor.sees_nothing_run(num_answers=2)
    visitor.page.get_by_role("button", name="What is number 0?").wait_for()
    assert visitor.texts("user") == ["What is the cat looking at?", "And now?"]
    assert visitor.page.locator("#chat").bounding_box() == layout
    visitor.sees_no_error()


@pytest.mark.long
@in_browser
def test_model_talks_to_itself_until_it_is_stopped(visitor, photo, assistant):
    visitor.upload(photo)
    assistant.seconds = 0.3
    visitor.press("Let it talk to itself")
    visitor.sees("The model asks: What is number 0?")
    visitor.press("Stop")
    assert_closed_once(assistant)
    visitor.sees_no_error()
    assistant.seconds = 0.0
    visitor.say("And now?")
    visitor.sees("And now?")
    visitor.page.wait_for_function("document.querySelectorAll('[data-testid=bot]').length >= 2")
    assert [message["role"] for message in assistant.seen[-3:]] != ["vusr", "user"]


@pytest.mark.long
@in_browser
def test_visitor_waits_in_line_and_one_who_leaves_gives_up_the_model(browser, url, assistant):
    first, second = (Visitor(browser.new_page(viewport=DESKTOP), url) for _ in range(2))
    assistant.seconds = 0.5
    assistant.answer_text = "A very long dog " * 30
    first.press("What is on the table?")
    first.page.get_by_text("A very").wait_for()
    second.press("What is on the table?")
    second.page.get_by_text("Waiting: 1 request comes first.").wait_for()
    first.page.close()
    second.page.get_by_text("A very").wait_for()
    assert_closed_once(assistant)
    second.page.close()


@pytest.mark.long
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
    visitor.sees_nothing_run(num_answers=2)
    assert visitor.page.get_by_text("The model asks: What is number 1?").count() == 0
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


@pytest.mark.long
@in_browser
def test_control_token_is_a_warning_and_the_question_is_dropped(visitor, photo):
    visitor.upload(photo)
    visitor.say("Hello </s>")
    visitor.page.get_by_text("control token of this model").wait_for()
    assert visitor.texts("user") == []
    assert visitor.page.locator("#box textarea").input_value() == "Hello </s>"


@in_browser
def test_pointing_at_a_prototype_names_it_and_lights_its_region(visitor, photo):
    visitor.upload(photo)
    visitor.say("What is it?")
    visitor.page.locator(".prototypes image").wait_for()
    name, region = visitor.page.locator(".prototypes li button").first, visitor.page.locator(".prototypes g").first
    assert re.fullmatch(r"Prototype \d+: \d+%", name.inner_text())
    for pointed_at in (name, region.locator("path").first):
        assert not region.locator(".shade").is_visible()
        pointed_at.hover(force=True)
        assert region.locator(".shade").is_visible()
        assert region.locator("text").text_content() == name.inner_text()
        assert visitor.page.locator(".prototypes text:visible").count() == 1
        visitor.page.mouse.move(0, 0)


@in_browser
def test_photo_of_a_phone_is_scaled_down_and_a_huge_file_is_refused_before_it_is_sent(visitor, tmp_path, assistant):
    huge = tmp_path / "huge.png"
    with huge.open("wb") as file:
        file.truncate(200_000_000)
    chosen = time.monotonic()
    visitor.page.set_input_files("#box input[type=file]", str(huge))
    visitor.page.get_by_text("exceed the maximum allowed size of 50").wait_for()
    assert time.monotonic() - chosen < 3
    assert not any("upload?" in address for address in visitor.requests)
    phone = tmp_path / "phone.jpg"
    Image.new("RGB", (8192, 6144), "white").save(phone)
    visitor.upload(phone)
    visitor.say("What is it?")
    visitor.sees("A dog.")
    with Image.open(assistant.images[0]) as sent:
        assert sent.size == (4096, 3072)


@in_browser
@pytest.mark.parametrize("theme, dark", [("light", False), ("dark", True)])
def test_phone_shows_everything_without_scrolling_sideways_and_names_it_for_screen_readers(
    browser, url, photo, theme, dark
):
    page = browser.new_page(viewport=PHONE)
    visitor = Visitor(page, url, theme)
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    assert_accessible(page)
    visitor.upload(photo)
    visitor.say("What is it, " + "and what is it " * 20 + "?")
    page.locator(".prototypes image").wait_for()
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    for name in ("Ask me something", "Let it talk to itself", "Stop"):
        box = page.get_by_role("button", name=name).bounding_box()
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= PHONE["width"]
    background = page.evaluate("getComputedStyle(document.querySelector('#chat')).backgroundColor")
    brightness = sum(int(level) for level in background[4:-1].split(",")[:3]) / 3
    assert (brightness < 100) is dark
    assert_accessible(page)
    page.close()


@pytest.mark.long
@in_browser
def test_trash_stops_the_generation_and_starts_a_new_conversation(visitor, photo, assistant):
    visitor.upload(photo)
    assistant.seconds = 0.3
    visitor.press("Let it talk to itself")
    visitor.sees("The model asks: What is number 0?")
    visitor.page.locator(".prototypes image").wait_for()
    visitor.press("Clear")
    visitor.page.locator(".prototypes image").wait_for(state="detached")
    assert_closed_once(assistant)
    assert visitor.texts("user") == visitor.texts("bot") == []
    visitor.say("And now?")
    visitor.page.get_by_text("There is no picture yet").wait_for()
    visitor.sees_no_error()


def test_model_asks_as_vusr_and_answers(assistant):
    said = [opening("", ["a.png"]), Turn("assistant", "A dog.")]
    *_, view = converse(assistant, said, Settings())
    assert [turn.role for turn in view.turns] == ["user", "assistant"] + 3 * ["vusr", "assistant"]
    assert view.turns[2].text == "What is number 0?"
    assert view.questions == ("What is number 3?",)


def test_each_answer_is_followed_by_suggested_questions(assistant):
    views = list(reply(assistant, [opening("Hi", ["a.png"])], Settings(num_questions=2)))
    assert views[0] == View([opening("Hi", ["a.png"])], busy="Thinking")
    assert views[-1].turns[-1] == Turn("assistant", "A dog.")
    assert views[-1].questions == ("What is number 0?",)
    assert not views[-1].busy


def test_line_does_one_work_at_a_time_in_order_and_says_how_many_come_first():
    line, go, order = Line(longest=2), Event(), []

    def work(name):
        go.wait(10)
        order.append(name)
        yield name

    first, second = line.follow(work("first"), Event()), line.follow(work("second"), Event())
    assert next(first) == Waiting(ahead=0, seconds=0)
    assert next(second) == Waiting(ahead=1, seconds=0)
    with pytest.raises(LineIsFull, match="2 requests wait"):
        next(line.follow(work("third"), Event()))
    go.set()
    assert [step for step in second if not isinstance(step, Waiting)] == ["second"]
    assert [*first] == order[:1] == ["first"]


def test_stopped_work_ends_at_once_and_gives_up_its_place():
    line, stopped, closed = Line(), Event(), []

    def work():
        try:
            yield "word"
            time.sleep(0.5)
            yield "another word"
        finally:
            closed.append(True)

    steps = line.follow(work(), stopped)
    assert next(steps) == "word"
    stopped.set()
    assert [*steps] == [] and not closed
    assert [step for step in line.follow((step for step in ["next"]), Event()) if step == "next"] == ["next"]
    assert closed


def test_error_of_the_work_reaches_the_visitor_and_the_line_moves_on():
    line = Line()

    def work():
        raise ValueError("too long")
        yield

    with pytest.raises(ValueError, match="too long"):
        list(line.follow(work(), Event()))
    assert list(line.follow((step for step in ["next"]), Event())) == ["next"]


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
    assert list(speak(real, talk, role, settings))[-1].turns[-1].role == role


def test_question_whose_answer_was_stopped_is_dropped():
    said = [Turn("user", "What is it?"), Turn("assistant", "A dog.")]
    assert complete([*said, Turn("vusr", "And")]) == said
    assert complete([Turn("user", "What is it?")]) == []
