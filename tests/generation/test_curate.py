"""Descriptions of images: who describes, continues and repairs; the rules; the review sheet; kills and caps."""

import html
import json
import os
import shutil
import signal
from collections import Counter
from pathlib import Path

import pytest
from typer.testing import CliRunner

from sq_llava.cli.main import app
from sq_llava.data.images import CHAT_QUALITY, CHAT_SIDE, jpeg_data_url, open_image
from sq_llava.data.rows import load_rows
from sq_llava.data.sources import DataSource
from sq_llava.generation import describing
from sq_llava.generation.curate import apply_rules
from sq_llava.generation.describing import DescribeSettings, Description, LocalDescriber, Prompts
from sq_llava.generation.review_sheet import Entry, check_decisions, hash_of_text, read_decisions, write_sheet
from sq_llava.generation.settings import PROMPTS
from sq_llava.generation.text_rules import first_fault, share_of_new_words
from tests import tiny
from tests.browsers import CHROMIUM
from tests.chat_server import KEY, ChatServer, Reply, chat_server
from tests.processes import ended, fork, lines_of, sq_llava


LONG = "A brown dog runs over a wide green field. " + " ".join(
    f"Beside path {number} stands a tree with leaves of its own colour." for number in range(8)
)
SOUND = "A brown dog runs over a field. Behind it stands a house."


@pytest.mark.parametrize(
    ("reason", "text"),
    [
        ("it is empty", " \n"),
        ("it refuses", "As an AI language model, I have no eyes."),
        ("it refuses", "I can’t see the picture, but it may be a dog."),
        ("it refuses", "No image was provided."),
        ("it apologises", "A dog. Sorry for the short answer."),
        ("it apologises", "I apologize. It is a dog."),
        ("it holds markup, an address or the marks of a prompt", "A dog <image> runs."),
        ("it holds markup, an address or the marks of a prompt", "A dog.\nUSER: What else?"),
        ("it holds markup, an address or the marks of a prompt", "See https://example.org for more."),
        ("it is hardly language", "A dog \ufffd\ufffd runs."),
        ("it is hardly language", "1 2 3 4 5 6 7 8 9 dog."),
        ("it is hardly language", "A " + "o" * 41 + " runs."),
        ("it is hardly language", "A dоg runs."),  # a Cyrillic o
        ("a phrase is repeated in a row", "A dog on the grass on the grass on the grass."),
        ("a phrase is repeated in a row", "A very very very small dog."),
        ("a sentence stands there twice", "A dog runs fast. It rains. a dog runs fast!"),
        ("its last sentence is unfinished", "A dog runs. Behind it"),
        ("it ends in a question", "A dog runs. Do you want to know more?"),
    ],
)
def test_text_is_left_out_for_the_reason_that_it_has(reason, text):
    assert first_fault(text) == reason


@pytest.mark.parametrize(
    "text",
    [
        LONG,
        SOUND,
        'A sign says "no entry."',
        "Two dogs, two cats, and two horses (all of them small).",
        "It rains. It rains.",  # too short a sentence to be called a repeat
        "It was built in 1999, with 12 floors and 3 lifts!",
        "Собака бежит по траве.",
        "The door is red, which I cannot help but notice.",
    ],
)
def test_sound_text_passes(text):
    assert first_fault(text) is None


def test_words_that_a_repair_brought_in_are_counted():
    assert share_of_new_words("A dog runs.", "a DOG runs over a field") == 0
    assert share_of_new_words("The text is right.", "A dog runs.") == 1
    assert share_of_new_words("", "A dog.") == 0


@pytest.fixture
def photos(tmp_path) -> Path:
    """Five pictures, one of them in a folder below, and a broken one."""
    folder = tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    for number, name in enumerate(("0.png", "1.png", "2.png", "3.png", "more/4.png")):
        tiny.picture(seed=number).save(folder / name)
    (folder / "broken.png").write_bytes((folder / "0.png").read_bytes()[:200])
    (folder / "notes.txt").write_text("no picture")
    return folder


class Painter:
    """
    What a server says: of each picture the text that `says` has by the picture's name, else a long one; when told to
    go on, "It is bright."; of a text to be repaired the text itself, or what `repairs` has for it.
    """

    def __init__(self, photos: Path, says: dict[str, str] | None = None, repairs: dict[str, str] | None = None):
        files = [file for file in photos.rglob("*.png") if file.name != "broken.png"]
        self.names = {self.url(file): file.name for file in files}
        self.says, self.repairs = says or {}, repairs or {}

    def url(self, file: Path) -> str:
        return jpeg_data_url(open_image(file), CHAT_SIDE, CHAT_QUALITY)

    def name(self, request: dict) -> str | None:
        content = request["messages"][0]["content"]
        return self.names[content[0]["image_url"]["url"]] if isinstance(content, list) else None

    def __call__(self, request: dict, number: int) -> Reply | str:
        name, last = self.name(request), request["messages"][-1]["content"]
        if name is None:
            return self.repairs.get(last, last)
        if isinstance(last, str):
            return "It is bright."
        return self.says.get(name, f"{LONG} This is picture {name.removesuffix('.png')}.")


def run(*arguments) -> "CliRunner.Result":
    return CliRunner().invoke(app, ["generate-data", "curate", *map(str, arguments)])


def with_server(server: ChatServer, photos: Path, out: Path, *more) -> list:
    return [photos, "--model", "painter", "--base-url", server.url, "--out", out, *more]


pytestmark = pytest.mark.usefixtures("api_key")


def texts_of(out: Path) -> dict[str, str]:
    return {row["id"]: row["messages"][1]["content"][0]["text"] for row in lines_of(out / "data.jsonl")}


def contents(out: Path) -> dict[str, bytes]:
    """All that a run makes of its answers, whose own order is that in which they came; the card has the command."""
    names = ("data.jsonl", "llava.json", "rejected.jsonl", "failures.jsonl", "review.html")
    return {name: (out / name).read_bytes() for name in names}


def test_short_descriptions_are_continued_once_and_broken_images_reported(photos, tmp_path):
    with chat_server(Painter(photos, {"1.png": SOUND})) as server:
        result = run(*with_server(server, photos, tmp_path / "out"))
    assert result.exit_code == 1  # something failed
    (failure,) = lines_of(tmp_path / "out" / "failures.jsonl")
    assert failure["id"] == "broken.png" and "cannot be read as an image" in failure["error"]
    texts = texts_of(tmp_path / "out")
    assert list(texts) == ["0.png", "1.png", "2.png", "3.png", "more/4.png"]
    assert texts["1.png"] == f"{SOUND} It is bright."
    assert texts["0.png"].endswith("This is picture 0.")
    assert len(server.requests) == 6
    (going_on,) = [request for request in server.requests if len(request["messages"]) == 3]
    assert [message["role"] for message in going_on["messages"]] == ["user", "assistant", "user"]
    assert going_on["messages"][1]["content"] == SOUND
    rows = load_rows([DataSource(str(tmp_path / "out" / "data.jsonl"), str(photos))])
    assert [row["images"] for row in rows][-1] == [str(photos / "more/4.png")]
    asked = {row["messages"][0]["content"][1]["text"] for row in rows}
    assert asked <= set(Prompts.read(PROMPTS / "curate").instructions)
    assert KEY not in "".join(path.read_text() for path in (tmp_path / "out").iterdir())


def test_texts_are_repaired_and_rewritten_or_faulty_ones_left_out(photos, tmp_path):
    (photos / "broken.png").unlink()
    says = {"0.png": f"{LONG} {LONG}", "1.png": f"{LONG} I am sorry.", "2.png": f"{LONG} Behind", "3.png": LONG}
    repairs = {f"{LONG} {LONG}": LONG, f"{LONG} Behind": "Nothing is wrong with what you have given me, dear user."}
    with chat_server(Painter(photos, says, repairs)) as server:
        result = run(*with_server(server, photos, tmp_path / "out", "--repair-model", "editor"))
    assert result.exit_code == 0, result.output
    assert Counter(request["model"] for request in server.requests) == {"painter": 5, "editor": 5}
    rejected = {line["id"]: (line["step"], line["reason"]) for line in lines_of(tmp_path / "out" / "rejected.jsonl")}
    assert rejected == {
        "1.png": ("rules", "it apologises"),
        "2.png": ("repair", "it is not the text that was to be repaired"),
        "3.png": ("rules", "an earlier image of the shard has the same text"),
    }
    rows = {row["id"]: row for row in lines_of(tmp_path / "out" / "data.jsonl")}
    assert texts_of(tmp_path / "out")["0.png"] == LONG
    assert {id: row["repaired"] for id, row in rows.items()} == {"0.png": True, "more/4.png": False}
    editor = next(request for request in server.requests if request["model"] == "editor")
    assert "image_url" not in json.dumps(editor)


def test_short_text_may_be_true_of_two_images_and_a_long_one_not():
    said = {id: Description(text) for id, text in {"a": LONG, "b": SOUND, "c": SOUND, "d": LONG}.items()}
    passed, rejected = apply_rules(said, {id: each.text for id, each in said.items()})
    assert list(passed) == ["a", "b", "c"] and [each.id for each in rejected] == ["d"]


@pytest.mark.parametrize("remark", ["Here is the repaired text:\n\n", "The text is unchanged. ", "Sure! Of course. "])
def test_remark_of_a_repairer_is_no_description(remark):
    passed, rejected = apply_rules({"a": Description(LONG)}, {"a": f"{remark}{LONG}"})
    assert not passed and rejected[0].reason == "it begins with words that are not in the text that was to be repaired"


def test_first_word_may_be_mended():
    said = {"a": Description(f"Teh {LONG}")}
    assert apply_rules(said, {"a": f"The {LONG}"})[1] == []


@pytest.mark.slow
def test_caps_end_a_run_that_goes_on_without_paying_twice(photos, tmp_path):
    (photos / "broken.png").unlink()
    with chat_server(Painter(photos, {"1.png": SOUND})) as server:
        options = with_server(server, photos, tmp_path / "out", "--repair-model", "editor", "--concurrency", 1)
        result = run(*options, "--max-requests", 3)
        assert result.exit_code == 1 and "stopped by --max-requests 3" in result.stderr
        assert len(server.requests) == 3
        result = run(*options, "--repair-max-requests", 2)
        assert result.exit_code == 1 and "stopped by --repair-max-requests 2" in result.stderr
        assert "3 are open" in result.stderr
        assert list(texts_of(tmp_path / "out")) == ["0.png", "1.png"]
        assert run(*options).exit_code == 0
        num_paid = len(server.requests)
        assert run(*with_server(server, photos, tmp_path / "whole", "--repair-model", "editor")).exit_code == 0
    assert num_paid == 6 + 5 and len(server.requests) == 2 * num_paid
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("last", [2, 5, 9])
def test_run_killed_at_any_request_pays_for_that_one_alone_again(photos, tmp_path, last):
    (photos / "broken.png").unlink()
    painter = Painter(photos, {"1.png": SOUND})
    process = None

    def reply(request: dict, number: int) -> Reply | str:
        if process is not None and len(server.requests) == last:
            process.kill()
            return Reply(closes=True)
        return painter(request, number)

    with chat_server(reply) as server:
        options = with_server(server, photos, tmp_path / "out", "--repair-model", "editor", "--concurrency", 1)
        (process,) = children = fork(sq_llava, ("generate-data", "curate", *map(str, options)), tmp_path / "log")
        assert ended(children) == [-signal.SIGKILL]
        process = None
        assert len(server.requests) == last
        assert run(*options).exit_code == 0
        num_paid = len(server.requests)
        assert run(*with_server(server, photos, tmp_path / "whole", "--repair-model", "editor")).exit_code == 0
    assert num_paid == 6 + 5 + 1
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_image_that_the_server_fails_on_is_listed_and_tried_again(photos, tmp_path):
    (photos / "broken.png").unlink()
    painter = Painter(photos)
    refuses = True

    def reply(request: dict, number: int) -> Reply | str:
        if refuses and painter.name(request) == "2.png":
            return Reply(status=400, body=json.dumps({"error": {"message": "too odd"}}))
        return painter(request, number)

    with chat_server(reply) as server:
        result = run(*with_server(server, photos, tmp_path / "out"))
        assert result.exit_code == 1
        (failure,) = lines_of(tmp_path / "out" / "failures.jsonl")
        assert failure["id"] == "2.png" and "too odd" in failure["error"]
        refuses = False
        assert run(*with_server(server, photos, tmp_path / "out")).exit_code == 0
    assert len(server.requests) == 5 + 1
    assert len(texts_of(tmp_path / "out")) == 5


@pytest.mark.slow
def test_dry_run_asks_nothing_and_counts_what_is_left_at_most(photos, tmp_path):
    (photos / "broken.png").unlink()
    with chat_server(Painter(photos)) as server:
        options = with_server(server, photos, tmp_path / "out", "--repair-model", "editor")
        result = run(*options, "--dry-run")
        assert result.exit_code == 0, result.output
        # Each picture in two steps; each text.
        assert "painter:" in result.stdout and "10 requests" in result.stdout
        assert "editor, to repair:" in result.stdout and "5 requests" in result.stdout
        assert server.requests == [] and not (tmp_path / "out").exists()
        assert run(*options, "--limit", 4).exit_code == 0
        result = run(*options, "--dry-run")
    assert "2 requests" in result.stdout and "1 requests" in result.stdout


def test_thoughts_that_a_server_leaves_in_are_taken_out(photos, tmp_path):
    (photos / "broken.png").unlink()
    with chat_server(Painter(photos, {"1.png": f"<think>What is it? Ah.</think>\n\n{LONG}"})) as server:
        assert run(*with_server(server, photos, tmp_path / "out", "--limit", 2)).exit_code == 0
    assert texts_of(tmp_path / "out")["1.png"] == LONG


def test_shards_describe_each_image_once(photos, tmp_path):
    (photos / "broken.png").unlink()
    with chat_server(Painter(photos)) as server:
        for shard in ("1/2", "2/2"):
            assert run(*with_server(server, photos, tmp_path / "out", "--shard", shard)).exit_code == 0
    assert len(server.requests) == 5
    rows = [row["id"] for path in (tmp_path / "out").glob("data-*-of-00002.jsonl") for row in lines_of(path)]
    assert sorted(rows) == ["0.png", "1.png", "2.png", "3.png", "more/4.png"]
    assert "5 rows" in (tmp_path / "out" / "README.md").read_text()


def test_other_number_of_shards_is_refused_and_another_repairer_takes_the_descriptions_over(photos, tmp_path):
    (photos / "broken.png").unlink()
    with chat_server(Painter(photos)) as server:
        assert run(*with_server(server, photos, tmp_path / "out")).exit_code == 0
        described = len(server.requests)
        result = run(*with_server(server, photos, tmp_path / "out", "--shard", "1/2"))
        assert result.exit_code == 1 and "num_shards" in result.stderr
        assert run(*with_server(server, photos, tmp_path / "out", "--repair-model", "editor")).exit_code == 0
    assert {request["model"] for request in server.requests[described:]} == {"editor"}


@pytest.fixture
def model(tmp_path) -> str:
    return tiny.save_model(tmp_path / "model", system_message="")


@pytest.mark.slow
def test_own_model_describes_in_batches_as_one_by_one_and_never_twice(model, photos, tmp_path, monkeypatch):
    (photos / "broken.png").unlink()
    images = {file.name: file for file in sorted(photos.rglob("*.png"))}
    prompts = Prompts.read(PROMPTS / "curate")
    several, alone = (
        LocalDescriber(
            str(model), DescribeSettings(short=11, max_new_tokens=12, batch_size=size), prompts, tmp_path / f"{size}"
        )
        for size in (3, 1)
    )
    described = several.describe_all(images).results
    assert alone.describe_all(images).results == described
    # Of these random models some end their answers early.
    tokenizer = describing.load(str(model)).processor.tokenizer
    for said in described.values():
        assert (said.more is not None) == (len(tokenizer(said.first, add_special_tokens=False).input_ids) <= 11)
    monkeypatch.setattr(describing, "load", lambda *arguments: pytest.fail("the model is loaded"))
    assert several.describe_all(images).results == described
    tiny.picture(seed=9).save(images["0.png"])
    assert several.kept(images["0.png"]) is None and several.kept(images["1.png"]) is not None


@pytest.mark.slow
def test_image_that_the_model_fails_on_takes_no_other_with_it(model, photos, tmp_path, monkeypatch):
    (photos / "broken.png").unlink()
    odd = open_image(photos / "1.png").tobytes()
    answer_batch = describing.Assistant.answer_batch

    def fail_on_one(self, requests, *arguments):
        if any(image.tobytes() == odd for image, _ in requests):
            raise RuntimeError("out of memory")
        return answer_batch(self, requests, *arguments)

    monkeypatch.setattr(describing.Assistant, "answer_batch", fail_on_one)
    options = [photos, "--describer", model, "--out", tmp_path / "out", "--max-new-tokens", 4]
    assert run(*options).exit_code == 1
    (failure,) = lines_of(tmp_path / "out" / "failures.jsonl")
    assert failure == {"id": "1.png", "error": "RuntimeError: out of memory"}
    monkeypatch.undo()
    assert run(*options).exit_code == 0
    assert [line["id"] for line in lines_of(tmp_path / "out" / "descriptions.jsonl")][-1] == "1.png"


@pytest.mark.slow
def test_command_runs_with_an_own_model(model, photos, tmp_path):
    (photos / "broken.png").unlink()
    options = [photos, "--describer", model, "--out", tmp_path / "out", "--max-new-tokens", 4, "--batch-size", 2]
    result = run(*options, "--dry-run")
    assert result.exit_code == 0 and not (tmp_path / "out").exists()
    result = run(*options)
    assert result.exit_code == 0, result.output
    assert len(lines_of(tmp_path / "out" / "descriptions.jsonl")) == 5
    assert len(lines_of(tmp_path / "out" / "data.jsonl")) + len(lines_of(tmp_path / "out" / "rejected.jsonl")) == 5
    assert str(model) not in json.loads((tmp_path / "out" / "run.json").read_text())["describer"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Give either --describer (a model on this machine) or --model"),
        (["--describer", "a", "--model", "b"], "Give either --describer"),
        (["--model", "b", "--images", "none"], "No such option"),
        (["--model", "b", "--prompts", "none"], "none: no such folder."),
        (["--model", "b", "--decisions", "none.json"], "none.json: no such file"),
        (["--model", "b", "--max-cost", 1], "--max-cost needs --input-price"),
        (["--model", "b", "--repair-model", "c", "--repair-max-cost", 1], "--repair-max-cost needs --repair-input"),
    ],
)
def test_wrong_use_is_an_error_before_anything_is_asked(photos, tmp_path, arguments, message):
    result = run(photos, "--out", tmp_path / "out", *arguments)
    assert result.exit_code != 0 and message in result.stderr
    assert not (tmp_path / "out").exists()


def test_name_that_is_no_utf8_is_refused_before_anything_is_asked(photos, tmp_path):
    shutil.copy(photos / "0.png", os.fsencode(photos) + b"/caf\xe9.png")
    result = run(photos, "--model", "m", "--base-url", "http://127.0.0.1:1/v1", "--out", tmp_path / "out")
    assert result.exit_code == 1 and "the name is no UTF-8" in result.stderr


def test_image_that_leads_out_of_the_folder_is_refused(photos, tmp_path):
    tiny.picture().save(tmp_path / "outside.png")
    (photos / "link.png").symlink_to(tmp_path / "outside.png")
    result = run(photos, "--out", tmp_path / "out", "--model", "painter")
    assert result.exit_code == 1 and "leads out of" in result.stderr


def test_decisions_of_a_person_are_read_back(photos, tmp_path):
    (photos / "broken.png").unlink()
    out = tmp_path / "out"
    with chat_server(Painter(photos)) as server:
        options = with_server(server, photos, out)
        assert run(*options).exit_code == 0
        texts = texts_of(out)
        decisions = tmp_path / "decisions.json"
        decided = {"0.png": "keep", "1.png": "drop"}
        entries = [{"id": id, "text_hash": hash_of_text(texts[id]), "decision": each} for id, each in decided.items()]
        decisions.write_text(json.dumps(entries))
        result = run(*options, "--decisions", decisions)
        assert result.exit_code == 0, result.output
        assert "1 of these checked by a person" in " ".join(result.stdout.split())
    assert len(server.requests) == 5
    rows = {row["id"]: row["checked"] for row in lines_of(out / "data.jsonl")}
    assert rows == {"0.png": True, "2.png": False, "3.png": False, "more/4.png": False}
    (dropped,) = lines_of(out / "rejected.jsonl")
    assert (dropped["id"], dropped["step"]) == ("1.png", "person")
    sheet = (out / "review.html").read_text()
    assert sheet.count("<article") == 5 and 'data-decision="drop"' in sheet  # all are there to be decided again


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not JSON"),
        ("{}", "is dict: expected the list"),
        ("[1]", "entry 0: is 1"),
        ('[{"id": "a", "text_hash": "b"}]', "entry 0: decision is None"),
        ('[{"id": "a", "text_hash": "b", "decision": "maybe"}]', "decision is 'maybe': expected keep or drop"),
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
    with pytest.raises(ValueError, match="'b' is no row of this sheet"):
        check_decisions([("b", hash_of_text("A dog."))], {"a": "A dog."}, path)


HOSTILE = '<img src="http://203.0.113.1/x.png" onerror="document.title=1"><script>document.title=2</script> & TITLE'


def entries() -> list[Entry]:
    texts = [SOUND, HOSTILE, LONG]
    ids = ["0.png", 'b"><b>.png', "2.png"]
    return [Entry(id, tiny.picture(seed), text) for seed, (id, text) in enumerate(zip(ids, texts))]


def test_sheet_escapes_ids_and_texts(tmp_path):
    write_sheet(tmp_path / "review.html", entries(), "3 <texts>")
    page = (tmp_path / "review.html").read_text()
    assert html.escape(HOSTILE) in page and "<script>document" not in page
    assert 'data-id="b&quot;&gt;&lt;b&gt;.png"' in page
    assert "<title>3 &lt;texts&gt;</title>" in page
    assert page.count("<article") == 3 and "ENTRIES" not in page and "SCRIPT_HASH" not in page


@pytest.mark.slow
@pytest.mark.skipif(not CHROMIUM.is_file(), reason=f"no browser at {CHROMIUM}")
def test_person_decides_with_keys_and_buttons_and_saves_what_is_read_back(browser, tmp_path):
    write_sheet(tmp_path / "review.html", entries(), "3 descriptions to check")
    page = browser.new_page()
    requests, errors = [], []
    page.on("request", lambda request: requests.append(request.url))
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    page.goto((tmp_path / "review.html").as_uri())
    assert page.get_by_role("status").inner_text() == "0 kept, 0 dropped, 3 undecided"
    page.keyboard.press("k")
    page.keyboard.press("d")
    page.locator("article").nth(2).get_by_role("button", name="Drop").click()
    assert page.get_by_role("status").inner_text() == "1 kept, 2 dropped, 0 undecided"
    page.keyboard.press("u")
    assert page.get_by_role("status").inner_text() == "1 kept, 1 dropped, 1 undecided"
    page.reload()  # what was decided is still there
    assert page.get_by_role("status").inner_text() == "1 kept, 1 dropped, 1 undecided"
    with page.expect_download() as download:
        page.get_by_role("button", name="Save decisions").click()
    download.value.save_as(tmp_path / "decisions.json")
    decisions = read_decisions(tmp_path / "decisions.json")
    assert {id: decision for (id, _), decision in decisions.items()} == {"0.png": "keep", 'b"><b>.png': "drop"}
    check_decisions(decisions, {entry.id: entry.text for entry in entries()}, tmp_path / "decisions.json")
    assert page.title() == "3 descriptions to check" and errors == []
    assert [url for url in requests if not url.startswith(("file:", "data:", "blob:"))] == []
    page.close()
