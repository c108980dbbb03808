"""The review page: texts are escaped, a person decides with keys and buttons, and decisions are read back."""

import html
from pathlib import Path

import pytest

from sq_llava.generation.review_sheet import Entry, check_decisions, hash_of_text, read_decisions, write_sheet
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


@pytest.mark.slow
@pytest.mark.skipif(not CHROMIUM.is_file(), reason=f"no browser at {CHROMIUM}")
def test_person_decides_with_keys_and_buttons_and_saves_what_is_read_back(browser, sheet, tmp_path):
    page = browser.new_page()
    requests, errors = [], []
    page.on("request", lambda request: requests.append(request.url))
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    page.goto(sheet.as_uri())
    status = page.get_by_role("status")
    assert status.inner_text() == "0 kept, 0 dropped, 3 undecided"
    page.keyboard.press("k")
    page.keyboard.press("d")
    page.locator("article").nth(2).get_by_role("button", name="Drop").click()
    assert status.inner_text() == "1 kept, 2 dropped, 0 undecided"
    page.keyboard.press("u")
    assert status.inner_text() == "1 kept, 1 dropped, 1 undecided"
    page.reload()
    assert status.inner_text() == "1 kept, 1 dropped, 1 undecided"  # the browser remembers
    with page.expect_download() as download:
        page.get_by_role("button", name="Save decisions").click()
    download.value.save_as(tmp_path / "decisions.json")
    decisions = read_decisions(tmp_path / "decisions.json")
    assert {id: decision for (id, _), decision in decisions.items()} == {"0.png": "keep", 'b"><b>.png': "drop"}
    check_decisions(decisions, TEXTS, tmp_path / "decisions.json")
    assert page.title() == "3 <texts>" and errors == []
    assert [url for url in requests if not url.startswith(("file:", "data:", "blob:"))] == []
    page.close()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not JSON"),
        ("{}", "is dict, expected the list"),
        ("[1]", "entry 0: is 1"),
        ('[{"id": "a", "text_hash": "b"}]', "entry 0: decision is None"),
        ('[{"id": "a", "text_hash": "b", "decision": "maybe"}]', "decision is 'maybe', expected keep or drop"),
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
