"""What happens after clicks and uploads, without a browser."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from PIL import Image

from tests import tiny


pytestmark = pytest.mark.slow

VISITOR = SimpleNamespace(session_hash="visitor")


@pytest.fixture
def handlers() -> ModuleType:
    return import_module("sq_llava.page.handlers")  # with Gradio, which takes seconds


def click(page, text: str, photo: Path) -> Iterator[tuple]:
    return page.reply(VISITOR, {"text": text, "files": [str(photo)]}, [])


def test_of_several_fast_clicks_only_the_last_one_runs(handlers, assistant, photo):
    page, clicks = handlers.Page(assistant), []
    first = click(page, "one", photo)
    next(first)
    with ThreadPoolExecutor(2) as pool:
        for text in ("two", "three"):
            run = page.runs["visitor"]
            clicks.append(pool.submit(lambda text=text: list(click(page, text, photo))))
            assert run.stopped.wait(10)
        *_, end = first  # until here, the others wait
        second, third = (each.result() for each in clicks)
    assert end[1] == second[-1][1] == handlers.gr.skip()
    assert [turn.text for turn in third[-1][1]] == ["three", "A dog."]
    assert not page.runs


def test_trash_waits_for_the_run_that_it_ends_and_a_new_question_for_the_trash(handlers, assistant, photo):
    page = handlers.Page(assistant)
    first = click(page, "one", photo)
    next(first)
    with ThreadPoolExecutor(2) as pool:
        run = page.runs["visitor"]
        cleared = pool.submit(page.clear, VISITOR)
        assert run.stopped.wait(10)
        trash = page.runs["visitor"]
        asked = pool.submit(lambda: list(click(page, "two", photo)))
        assert trash.stopped.wait(10)
        *_, end = first
        assert cleared.result()[0] == [] and end[1] == handlers.gr.skip()
        assert [turn.text for turn in asked.result()[-1][1]] == ["two", "A dog."]
    assert not page.runs


@pytest.mark.parametrize(
    ("name", "kept"), [("a.tiff", "a.jpg"), ("a.bmp", "a.jpg"), ("a.png", "a.png"), ("a.webp", "a.webp")]
)
def test_upload_that_browsers_do_not_show_becomes_a_jpeg(handlers, tmp_path, name, kept):
    tiny.picture().save(tmp_path / name)
    [turn] = handlers._continued([], {"text": "", "files": [str(tmp_path / name)]})
    assert turn.files == (str(tmp_path / kept),)
    with Image.open(turn.files[0]) as shown:
        assert shown.format == {".jpg": "JPEG", ".png": "PNG", ".webp": "WEBP"}[Path(kept).suffix]
