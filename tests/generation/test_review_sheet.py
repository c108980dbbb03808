"""The review page: texts are escaped, a person decides with keys and buttons, and decisions are read back."""

import html
from pathlib import Path

import pytest

from sq_llava.generation.review_sheet import (
    Decision,
    Entry,
    check_decisions,
    hash_of_text,
    read_decisions,
    write_sheet,
)
from tests import tiny
from tests.browsers import CHROMIUM


HOSTILE = '<img src="http://203.0.113.1/x.png" onerror="document.title=1"><script>document.title=2</script> & TITLE'
TEXTS = {"0.png": "A brown dog runs over a field.", 'b"><b>.png': HOSTILE, "2.png": "A long text. " * 40}


@pytest.fixture
def sheet(tmp_path) -> Path:
    path = tmp_path / "review.html"
    entries = [Entry(id, tiny.picture(seed), text) for seed, (id, text) in enumerate(TEXTS.items())]
    write_sheet(path, entries, "3 <texts>")
    return path


def test_page_escapes_ids_and_texts(sheet):
    page = sheet.read_text()
    assert html.escape(HOSTILE) in page and "<script>document" not in page
    assert 'data-id="b&quot;&gt;&lt;b&gt;.png"' in page
    assert "<title>3 &lt;texts&gt;</title>" in page
    assert page.count("<article") == 3 and "ENTRIES" not in page and "SCRIPT_HASH" not in page


class Reviewer:
    """A person who checks the texts of a page in a browser."""

    def __init__(self, browser, sheet: Path, viewport: dict[str, int] | None = None):
        self.requests, self.errors = [], []
        self.page = browser.new_page(viewport=viewport or {"width": 1000, "height": 700})
        self.page.set_default_timeout(10_000)
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("console", lambda message: self.errors.append(message.text) if message.type == "error" else None)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.goto(sheet.as_uri())

    def press(self, *keys: str) -> None:
        for key in keys:
            self.page.keyboard.press(key)

    def click(self, row: int, name: str) -> None:
        self.page.locator("article").nth(row).get_by_role("button", name=name).click()

    def filter(self, name: str) -> None:
        self.page.get_by_role("group").get_by_role("button", name=name).click()

    @property
    def counts(self) -> str:
        return self.page.get_by_role("status").inner_text()

    @property
    def decisions(self) -> list[str]:
        """The decision about each row."""
        return self.page.evaluate("[...document.querySelectorAll('article')].map(a => a.dataset.decision ?? '')")

    @property
    def current(self) -> int:
        """The row with the frame. Waits until the page has stopped scrolling."""
        self.page.wait_for_timeout(150)
        return self.page.evaluate("[...document.querySelectorAll('article')].findIndex(a => a.ariaCurrent)")

    @property
    def visible(self) -> list[int]:
        return [n for n, row in enumerate(self.page.locator("article").all()) if row.is_visible()]

    def save(self, file: Path) -> dict:
        with self.page.expect_download() as download:
            self.page.get_by_role("button", name="Save decisions").click()
        download.value.save_as(file)
        return read_decisions(file)


@pytest.fixture
def review(browser):
    """Opens a page. At the end, it must have no errors and must have loaded nothing."""
    reviewers = []

    def start(sheet: Path, **settings) -> Reviewer:
        reviewers.append(Reviewer(browser, sheet, **settings))
        return reviewers[-1]

    yield start
    for reviewer in reviewers:
        assert reviewer.errors == []
        assert [url for url in reviewer.requests if not url.startswith(("file:", "data:", "blob:"))] == []
        reviewer.page.close()


in_browser = pytest.mark.skipif(not CHROMIUM.is_file(), reason=f"no browser at {CHROMIUM}")


@pytest.fixture
def long_sheet(tmp_path) -> Path:
    """A page of 12 rows, of which two or three fit into the window."""
    texts = {f"{number}.png": f"Text {number}. " + "A dog runs. " * (20 * (number % 3)) for number in range(12)}
    entries = [Entry(id, tiny.picture(seed), text) for seed, (id, text) in enumerate(texts.items())]
    path = tmp_path / "long" / "review.html"
    path.parent.mkdir()
    write_sheet(path, entries, "12 descriptions to check")
    return path


@pytest.mark.slow
@in_browser
def test_person_decides_with_keys_and_buttons_and_saves_what_is_read_back(review, sheet, tmp_path):
    person = review(sheet)
    assert person.counts == "0 kept, 0 dropped, 3 undecided"
    person.press("k", "D")  # with the shift key or caps lock, too
    person.click(2, "Drop")
    assert person.counts == "1 kept, 2 dropped, 0 undecided"
    person.press("u")
    person.page.reload()
    assert person.counts == "1 kept, 1 dropped, 1 undecided"  # the browser remembers
    decisions = person.save(tmp_path / "decisions.json")
    assert {id: each.word for (id, _), each in decisions.items()} == {"0.png": "keep", 'b"><b>.png': "drop"}
    check_decisions(decisions, TEXTS, tmp_path / "decisions.json")
    assert person.page.title() == "3 <texts>"


@pytest.mark.slow
@in_browser
def test_keys_decide_about_the_row_that_the_person_sees(review, long_sheet):
    person = review(long_sheet)
    person.press("k", "k", "k")
    assert person.decisions[:4] == ["keep", "keep", "keep", ""] and person.current == 3
    person.page.reload()
    assert person.current == 3
    assert person.page.locator("article").nth(3).evaluate("a => a.getBoundingClientRect().bottom <= innerHeight")
    person.press("d")
    assert person.decisions[:5] == ["keep", "keep", "keep", "drop", ""]
    person.page.mouse.move(500, 400)
    person.page.mouse.wheel(0, 900)
    seen = person.current
    assert seen > 5
    box = person.page.locator("article").nth(seen).bounding_box()
    assert box["y"] >= 100 and box["y"] + box["height"] <= 700  # all of it is in the window, below the header
    person.press("d")
    assert person.decisions[seen] == "drop" and person.decisions.count("drop") == 2
    person.page.mouse.wheel(0, -5000)
    assert person.current == 0
    person.page.locator("article").nth(1).locator("p").click()
    person.press("d")
    assert person.decisions[1] == "drop"


@pytest.mark.slow
@in_browser
def test_each_undo_takes_back_one_decision_also_after_a_reload(review, long_sheet):
    person = review(long_sheet)
    person.press("k", "d", "k", "ArrowUp", "ArrowUp", "k")
    assert person.decisions[:4] == ["keep", "keep", "keep", ""]
    person.press("U")
    assert person.decisions[:4] == ["keep", "drop", "keep", ""] and person.current == 1
    person.page.reload()
    person.press("u")
    assert person.decisions[:4] == ["keep", "drop", "", ""] and person.current == 2
    person.press("u", "u")
    person.page.get_by_role("button", name="Undo").click()
    assert person.decisions == [""] * 12 and person.current == 0


@pytest.mark.slow
@in_browser
def test_filter_shows_rows_of_one_kind_and_n_goes_to_the_next_undecided(review, long_sheet):
    person = review(long_sheet)
    person.press("k", "ArrowDown", "d", "ArrowUp", "ArrowUp", "n")
    assert person.current == 3
    person.filter("Dropped")
    assert person.visible == [2] and person.current == 2
    person.press("k")  # leaves the filter
    assert person.visible == [] and person.page.get_by_text("No row is like that.").is_visible()
    person.filter("Undecided")
    assert person.visible == [1, 3, 4, 5, 6, 7, 8, 9, 10, 11]
    person.page.get_by_role("button", name="Next undecided").click()
    person.press("d")
    assert person.visible[0] in (1, 3) and len(person.visible) == 9
    person.press("u", "u")  # the second one is about a row that the filter hides
    assert person.decisions == ["keep", "", "drop", *[""] * 9] and len(person.visible) == 12 and person.current == 2


@pytest.mark.slow
@in_browser
def test_edited_text_is_kept_remembered_saved_and_can_be_undone(review, sheet, tmp_path):
    person = review(sheet)
    box = person.page.get_by_role("textbox", name="Text")
    person.press("E")
    box.fill("A dog. <b>Bold & dark.</b>")
    person.press("Escape")
    assert box.count() == 0 and person.decisions == ["", "", ""]
    person.press("e")
    box.fill(" ")
    person.press("Control+Enter")
    assert person.page.get_by_role("alert").inner_text() == "A text cannot be empty. Drop the row instead."
    box.fill("A dog,\nand <i> a cat.")
    person.press("k")  # is typed
    person.page.get_by_role("button", name="Save text").click()
    assert person.counts == "1 kept, 0 dropped, 2 undecided, 1 edited"
    person.page.reload()
    assert person.page.locator("article p").first.inner_text() == "A dog,\nand <i> a cat.k"
    person.press("e")
    box.fill("A dog and a cat.")
    person.press("Control+Enter")
    decisions = person.save(tmp_path / "decisions.json")
    [(key, decision)] = decisions.items()
    assert key == ("0.png", hash_of_text(TEXTS["0.png"])) and decision == Decision("keep", "A dog and a cat.")
    check_decisions(decisions, TEXTS, tmp_path / "decisions.json")
    again = tmp_path / "again.html"
    write_sheet(again, [Entry("0.png", tiny.picture(), TEXTS["0.png"], decision)], "again")
    later = review(again)
    assert later.counts == "1 kept, 0 dropped, 0 undecided, 1 edited"
    assert later.page.locator("article p").inner_text() == "A dog and a cat."
    assert later.save(tmp_path / "later.json") == decisions
    person.press("u", "u")
    assert person.decisions == ["", "", ""] and person.page.locator("article p").first.inner_text() == TEXTS["0.png"]


@pytest.mark.slow
@in_browser
def test_image_is_enlarged_by_key_and_click(review, sheet):
    person = review(sheet)
    dialog = person.page.get_by_role("dialog")
    for open_dialog, close_dialog in (
        (lambda: person.press("Z"), lambda: person.press("z")),
        (lambda: person.page.locator("article img").nth(1).click(), lambda: person.press("Escape")),
        (lambda: person.page.locator("article img").first.click(), dialog.click),
    ):
        open_dialog()
        assert dialog.locator("img").bounding_box()["height"] > 600
        person.press("k")  # does nothing: the row cannot be seen
        close_dialog()
        assert dialog.count() == 0 and person.decisions == ["", "", ""]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not JSON"),
        ("{}", "is dict, expected the list"),
        ("[1]", "entry 0: is 1"),
        ('[{"id": "a", "text_hash": "b"}]', "entry 0: decision is None"),
        ('[{"id": "a", "text_hash": "b", "decision": "maybe"}]', "decision is 'maybe', expected keep or drop"),
        ('[{"id": "a", "text_hash": "b", "decision": "keep", "text": " "}]', "entry 0: text is ' ', expected a text"),
        ('[{"id": "a", "text_hash": "b", "decision": "keep", "text": 3}]', "text is 3"),
        ('[{"id": "a", "text_hash": "b", "decision": "keep", "text": "A <image>."}]', "markup.* Edit 'a' again"),
        ('[{"id": "a", "text_hash": "b", "decision": "keep", "text": "\\ud83d"}]', "expected a text"),
    ],
)
def test_wrong_decisions_are_refused(tmp_path, content, message):
    file = tmp_path / "decisions.json"
    file.write_text(content)
    with pytest.raises(ValueError, match=message):
        read_decisions(file)


def test_decision_about_another_text_or_row_is_refused():
    path = Path("decisions.json")
    check_decisions([("a", hash_of_text("A dog."))], {"a": "A dog."}, path)
    with pytest.raises(ValueError, match="the text of 'a' has changed"):
        check_decisions([("a", hash_of_text("A cat."))], {"a": "A dog."}, path)
    with pytest.raises(ValueError, match="'b' is not on the review page"):
        check_decisions([("b", hash_of_text("A dog."))], {"a": "A dog."}, path)
