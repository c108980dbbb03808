"""Descriptions of plain images: described, continued, repaired, filtered, reviewed; after kills and at caps."""

import json
import os
import shutil
import signal
from collections import Counter
from pathlib import Path

import pytest

from sq_llava.data.images import CHAT_QUALITY, CHAT_SIDE, jpeg_data_url, open_image
from sq_llava.data.rows import load_rows
from sq_llava.data.sources import DataSource
from sq_llava.generation import describing
from sq_llava.generation.curate import REMARK, REWRITTEN, SAID_BEFORE, apply_rules
from sq_llava.generation.describing import DescribeSettings, Description, LocalDescriber, Prompts
from sq_llava.generation.review_sheet import hash_of_text
from sq_llava.generation.settings import PROMPTS
from sq_llava.llm_client.asking import Asked
from tests import tiny
from tests.chat_server import KEY, ChatServer, Reply, chat_server, completion
from tests.generation.commands import generate_data, made, texts_of
from tests.processes import ended, fork, lines_of, sq_llava


pytestmark = pytest.mark.usefixtures("api_key")

NAMES = ("0.png", "1.png", "2.png", "3.png", "more/4.png")
SHORT = "A brown dog runs over a field. Behind it stands a house."
LONG = "A brown dog runs over a wide green field. " + " ".join(
    f"Beside path {number} stands a tree with leaves of its own colour." for number in range(8)
)
EDITOR = ("--repair-model", "editor")


@pytest.fixture
def photos(tmp_path) -> Path:
    """Five pictures, one of them in a subfolder."""
    folder = tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    for number, name in enumerate(NAMES):
        tiny.picture(seed=number).save(folder / name)
    (folder / "notes.txt").write_text("no picture")
    return folder


@pytest.fixture
def out(tmp_path) -> Path:
    return tmp_path / "out"


class Painter:
    """
    Replies of a server: describes a picture by `says[name]`, or by a long text if `says` lacks the name; continues a
    text with "It is bright."; repairs a text by `repairs[text]`, or leaves it unchanged.
    """

    def __init__(self, photos: Path, says: dict[str, str] | None = None, repairs: dict[str, str] | None = None):
        urls = {name: jpeg_data_url(open_image(photos / name), CHAT_SIDE, CHAT_QUALITY) for name in NAMES}
        self.names = {url: name for name, url in urls.items()}
        self.says, self.repairs = says or {}, repairs or {}

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


def options(photos: Path, server: ChatServer, out: Path, *more) -> list:
    return ["curate", photos, "--model", "painter", "--base-url", server.url, "--out", out, *more]


def run(*arguments):
    """A run in which nothing fails."""
    result = generate_data(*arguments)
    assert result.exit_code == 0, result.output
    return result


def rows_of(out: Path) -> dict[str, dict]:
    return {row["id"]: row for row in lines_of(out / "data.jsonl")}


def descriptions(out: Path) -> dict[str, str]:
    return {id: texts_of(row)[1] for id, row in rows_of(out).items()}


def assert_same_as_undisturbed(out: Path, photos: Path, server: ChatServer) -> None:
    """Another folder, made in one go, must hold the same files. It is paid for again."""
    run(*options(photos, server, out.with_name("whole"), *EDITOR))
    assert made(out, "review.html") == made(out.with_name("whole"), "review.html")


def test_short_descriptions_are_continued_once_and_broken_images_reported(photos, out):
    (photos / "broken.png").write_bytes((photos / "0.png").read_bytes()[:200])
    with chat_server(Painter(photos, {"1.png": SHORT})) as server:
        assert generate_data(*options(photos, server, out)).exit_code == 1  # something failed
    (failure,) = lines_of(out / "failures.jsonl")
    assert failure["id"] == "broken.png" and "cannot be read as an image" in failure["error"]
    texts = descriptions(out)
    assert tuple(texts) == NAMES
    assert texts["1.png"] == f"{SHORT} It is bright."
    assert texts["0.png"].endswith("This is picture 0.")
    assert len(server.requests) == 6
    (going_on,) = [request for request in server.requests if len(request["messages"]) == 3]
    assert [message["role"] for message in going_on["messages"]] == ["user", "assistant", "user"]
    assert going_on["messages"][1]["content"] == SHORT
    rows = load_rows([DataSource(str(out / "data.jsonl"), str(photos))])
    assert [row["images"] for row in rows][-1] == [str(photos / "more/4.png")]
    assert {texts_of(row)[0] for row in rows} <= set(Prompts.read(PROMPTS / "curate").instructions)
    assert KEY not in "".join(path.read_text() for path in out.iterdir())


def test_texts_are_repaired_and_rewritten_or_faulty_ones_left_out(photos, out):
    says = {"0.png": f"{LONG} {LONG}", "1.png": f"{LONG} I am sorry.", "2.png": f"{LONG} Behind", "3.png": LONG}
    repairs = {f"{LONG} {LONG}": LONG, f"{LONG} Behind": "Nothing is wrong with what you have given me, dear user."}
    with chat_server(Painter(photos, says, repairs)) as server:
        run(*options(photos, server, out, *EDITOR))
    assert Counter(request["model"] for request in server.requests) == {"painter": 5, "editor": 5}
    rejected = {line["id"]: (line["step"], line["reason"]) for line in lines_of(out / "rejected.jsonl")}
    assert rejected == {
        "1.png": ("rules", "it apologises"),
        "2.png": ("rules", "its last sentence is unfinished"),
        "3.png": ("rules", SAID_BEFORE),
    }
    refused = [line["reason"] for line in lines_of(out / "rejected.jsonl") if line["step"] == "repair"]
    assert refused == [REWRITTEN]
    assert descriptions(out)["0.png"] == LONG
    assert {id: row["repaired"] for id, row in rows_of(out).items()} == {"0.png": True, "more/4.png": False}
    editor = next(request for request in server.requests if request["model"] == "editor")
    assert "image_url" not in json.dumps(editor)


def test_description_that_the_server_cut_off_is_continued_once(photos, out):
    painter = Painter(photos)

    def reply(request, number):
        name, last = painter.name(request), request["messages"][-1]["content"]
        is_cut = name == "0.png" if isinstance(last, list) else name == "1.png"
        text = SHORT if name == "1.png" and isinstance(last, list) else painter(request, number)
        return Reply(body=completion(text, finish_reason="length" if is_cut else "stop"))

    with chat_server(reply) as server:
        result = run(*options(photos, server, out))
        assert "1 the answer was cut off at the token limit" in " ".join(result.stdout.split())
        assert rows_of(out)["0.png"]["continued"] and not rows_of(out)["2.png"]["continued"]
        assert descriptions(out)["0.png"].endswith("This is picture 0. It is bright.")
        [rejected] = lines_of(out / "rejected.jsonl")
        assert (rejected["id"], rejected["step"], rejected["text"]) == ("1.png", "server", "It is bright.")
        run(*options(photos, server, out))
    assert len(server.requests) == 7


def test_descriptions_of_other_sampling_are_another_run(photos, out):
    with chat_server(Painter(photos)) as server:
        run(*options(photos, server, out))
        num_requests = len(server.requests)
        refused = generate_data(*options(photos, server, out, "--top-p", 0.5))
    assert refused.exit_code == 1 and "run with top_p" in refused.stderr
    assert len(server.requests) == num_requests > 0


def test_description_stays_as_it_is_if_its_repair_cannot_be_used(photos, out):
    painter = Painter(photos)

    def reply(request, number):
        is_repair = request["model"] == "editor" and "picture 2" in request["messages"][-1]["content"]
        return Reply(body=completion("A", finish_reason="length")) if is_repair else painter(request, number)

    with chat_server(reply) as server:
        result = run(*options(photos, server, out, *EDITOR))
    assert len(rows_of(out)) == 5 and not rows_of(out)["2.png"]["repaired"]
    assert "All runs so far: used to describe: 5 requests, 550 tokens, used to repair: 5 requests" in result.stderr
    assert "- used to repair: `5 requests, 550 tokens`" in (out / "README.md").read_text()


def test_short_text_may_be_true_of_two_images_and_a_long_one_not():
    said = {id: Description(text) for id, text in {"a": LONG, "b": SHORT, "c": SHORT, "d": LONG}.items()}
    ruled = apply_rules(said, Asked({id: each.text for id, each in said.items()}, {}, 0))
    assert list(ruled.passed) == ["a", "b", "c"] and [each.id for each in ruled.rejected] == ["d"]


@pytest.mark.parametrize(
    ("described", "repaired", "reasons"),
    [
        (LONG, f"Here is the repaired text:\n\n{LONG}", [REMARK]),
        (LONG, f"The text is unchanged. {LONG}", [REMARK]),
        (LONG, f"Sure! Of course. {LONG}", [REMARK]),
        (f"Teh {LONG}", f"The {LONG}", []),
    ],
)
def test_repairer_may_correct_the_first_word_and_not_add_a_remark(described, repaired, reasons):
    ruled = apply_rules({"a": Description(described)}, Asked({"a": repaired}, {}, 0))
    assert [each.reason for each in ruled.rejected] == reasons
    assert ruled.passed == {"a": described if reasons else repaired}


def test_description_whose_repair_is_refused_stays_as_it_was(photos, out):
    says = {"0.png": f"{LONG} Zero.", "1.png": f"{LONG} One.", "2.png": f"{LONG} Two."}
    repairs = {f"{LONG} Zero.": "I am sorry, but I cannot help with that.", f"{LONG} Two.": LONG}
    painter = Painter(photos, says, repairs)

    def reply(request: dict, number: int) -> Reply | str:
        if request["messages"][-1]["content"] == f"{LONG} One.":
            return Reply(status=400, body=json.dumps({"error": {"message": "content filter"}}))
        return painter(request, number)

    with chat_server(reply) as server:
        result = generate_data(*options(photos, server, out, *EDITOR, "--limit", 3))
    assert (
        result.exit_code == 1
        and "2 descriptions stay as they were, because their repair was refused." in result.stdout
    )
    assert descriptions(out) == says | {"2.png": LONG}
    rows = rows_of(out)
    assert [rows[id]["repair_refused"] for id in says] == [True, True, False]
    assert [rows[id]["repaired"] for id in says] == [False, False, True]
    [refused] = lines_of(out / "rejected.jsonl")
    assert (refused["id"], refused["step"], refused["reason"]) == ("0.png", "repair", REWRITTEN)
    [failure] = lines_of(out / "failures.jsonl")
    assert failure["id"] == "1.png" and "content filter" in failure["error"]


@pytest.mark.slow
def test_run_that_caps_have_stopped_resumes_without_paying_twice(photos, out):
    with chat_server(Painter(photos, {"1.png": SHORT})) as server:
        command = options(photos, server, out, *EDITOR, "--concurrency", 1)
        result = generate_data(*command, "--max-requests", 3)
        assert result.exit_code == 1 and "stopped by --max-requests 3" in result.stderr
        assert len(server.requests) == 3
        result = generate_data(*command, "--repair-max-requests", 2)
        assert result.exit_code == 1 and "stopped by --repair-max-requests 2" in result.stderr
        assert "3 are not done" in result.stderr
        assert list(descriptions(out)) == ["0.png", "1.png"]
        run(*command)
        assert len(server.requests) == 6 + 5
        assert_same_as_undisturbed(out, photos, server)


@pytest.mark.slow
@pytest.mark.parametrize("last", [2, 5, 9])
def test_run_killed_at_any_request_pays_again_only_for_that_one(photos, out, tmp_path, last):
    painter = Painter(photos, {"1.png": SHORT})
    process = None

    def reply(request: dict, number: int) -> Reply | str:
        if process is not None and len(server.requests) == last:
            process.kill()
            return Reply(closes=True)
        return painter(request, number)

    with chat_server(reply) as server:
        command = options(photos, server, out, *EDITOR, "--concurrency", 1)
        (process,) = children = fork(sq_llava, ("generate-data", *map(str, command)), tmp_path / "log")
        assert ended(children) == [-signal.SIGKILL]
        process = None
        assert len(server.requests) == last
        run(*command)
        assert len(server.requests) == 6 + 5 + 1
        assert_same_as_undisturbed(out, photos, server)


def test_image_that_the_server_fails_on_is_listed_and_tried_again(photos, out):
    painter = Painter(photos)

    def reply(request: dict, number: int) -> Reply | str:
        if painter.name(request) == "2.png" and number == 0:
            return Reply(status=400, body=json.dumps({"error": {"message": "too odd"}}))
        return painter(request, number)

    with chat_server(reply) as server:
        assert generate_data(*options(photos, server, out)).exit_code == 1
        (failure,) = lines_of(out / "failures.jsonl")
        assert failure["id"] == "2.png" and "too odd" in failure["error"]
        run(*options(photos, server, out))
    assert len(server.requests) == 5 + 1 and len(rows_of(out)) == 5


@pytest.mark.slow
def test_dry_run_asks_nothing_and_counts_what_is_left_at_most(photos, out):
    with chat_server(Painter(photos)) as server:
        command = options(photos, server, out, *EDITOR)
        result = run(*command, "--dry-run")
        assert "painter:" in result.stdout and "10 requests" in result.stdout  # two steps for each picture
        assert "editor, to repair:" in result.stdout and "5 requests" in result.stdout
        assert server.requests == [] and not out.exists()
        run(*command, "--limit", 4)
        result = run(*command, "--dry-run")
    assert "2 requests" in result.stdout and "1 request," in result.stdout


def test_reasoning_that_a_server_leaves_in_is_removed(photos, out):
    with chat_server(Painter(photos, {"1.png": f"<think>What is it? Ah.</think>\n\n{LONG}"})) as server:
        run(*options(photos, server, out, "--limit", 2))
    assert descriptions(out)["1.png"] == LONG


def test_shards_describe_each_image_once(photos, out):
    with chat_server(Painter(photos)) as server:
        for shard in ("1/2", "2/2"):
            run(*options(photos, server, out, "--shard", shard))
    assert len(server.requests) == 5
    rows = [row["id"] for path in out.glob("data-*-of-00002.jsonl") for row in lines_of(path)]
    assert tuple(sorted(rows)) == NAMES
    assert "5 rows" in (out / "README.md").read_text()


def test_other_number_of_shards_is_refused_and_another_repairer_reuses_the_descriptions(photos, out):
    with chat_server(Painter(photos)) as server:
        run(*options(photos, server, out))
        described = len(server.requests)
        result = generate_data(*options(photos, server, out, "--shard", "1/2"))
        assert result.exit_code == 1 and "num_shards" in result.stderr
        run(*options(photos, server, out, *EDITOR))
    assert {request["model"] for request in server.requests[described:]} == {"editor"}


@pytest.fixture
def model(tmp_path) -> str:
    return tiny.save_model(tmp_path / "model", system_message="")


@pytest.mark.slow
def test_local_model_describes_in_batches_as_one_by_one_and_never_twice(model, photos, tmp_path, monkeypatch):
    images = {name: photos / name for name in NAMES}
    prompts = Prompts.read(PROMPTS / "curate")
    several, alone = (
        LocalDescriber(
            str(model), DescribeSettings(short=11, max_new_tokens=12, batch_size=size), prompts, tmp_path / f"{size}"
        )
        for size in (3, 1)
    )
    described = several.describe_all(images).results
    assert alone.describe_all(images).results == described
    # The random model ends some of its answers early.
    tokenizer = describing.load(str(model)).processor.tokenizer
    for said in described.values():
        assert (said.more is not None) == (len(tokenizer(said.first, add_special_tokens=False).input_ids) <= 11)
    monkeypatch.setattr(describing, "load", lambda *arguments: pytest.fail("the model is loaded"))
    assert several.describe_all(images).results == described
    tiny.picture(seed=9).save(images["0.png"])
    assert several.kept(images["0.png"]) is None and several.kept(images["1.png"]) is not None


@pytest.mark.slow
def test_command_runs_with_a_local_model_and_reports_the_image_that_it_fails_on(model, photos, out, monkeypatch):
    odd = open_image(photos / "1.png").tobytes()
    answer_batch = describing.Assistant.answer_batch

    def fail_on_one(self, requests, *arguments):
        if any(image.tobytes() == odd for image, _ in requests):
            raise RuntimeError("out of memory")
        return answer_batch(self, requests, *arguments)

    command = ["curate", photos, "--describer", model, "--out", out, "--max-new-tokens", 4, "--batch-size", 2]
    assert "5 of 5 images are not described yet." in run(*command, "--dry-run").stdout
    assert not out.exists()
    monkeypatch.setattr(describing.Assistant, "answer_batch", fail_on_one)
    assert generate_data(*command).exit_code == 1
    assert lines_of(out / "failures.jsonl") == [{"id": "1.png", "error": "RuntimeError: out of memory"}]
    monkeypatch.undo()
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    run(*command)
    assert [line["id"] for line in lines_of(out / "descriptions.jsonl")][-1] == "1.png"
    assert len(lines_of(out / "descriptions.jsonl")) == 5
    assert len(lines_of(out / "data.jsonl")) + len(lines_of(out / "rejected.jsonl")) == 5
    assert str(model) not in json.loads((out / "run.json").read_text())["describer"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Give either --describer (a model on this machine) or --model"),
        (["--describer", "a", "--model", "b"], "Give either --describer"),
        (["--model", "b", "--images", "none"], "No such option"),
        (["--model", "b", "--prompts", "none"], "none: no such folder."),
        (["--model", "b", "--decisions", "none.json"], "none.json: no such file"),
        (["--model", "b", "--max-cost", 1], "--max-cost needs --input-price"),
        (["--model", "b", *EDITOR, "--repair-max-cost", 1], "--repair-max-cost needs --repair-input"),
    ],
)
def test_wrong_use_is_an_error_before_anything_is_asked(photos, out, arguments, message):
    result = generate_data("curate", photos, "--out", out, *arguments)
    assert result.exit_code != 0 and message in result.stderr
    assert not out.exists()


def test_file_name_that_is_not_utf8_is_refused(photos, out):
    shutil.copy(photos / "0.png", os.fsencode(photos) + b"/caf\xe9.png")
    result = generate_data("curate", photos, "--model", "painter", "--out", out)
    assert result.exit_code == 1 and "the file name is not UTF-8" in result.stderr


def test_image_that_leads_out_of_the_folder_is_refused(photos, out, tmp_path):
    tiny.picture().save(tmp_path / "outside.png")
    (photos / "link.png").symlink_to(tmp_path / "outside.png")
    result = generate_data("curate", photos, "--model", "painter", "--out", out)
    assert result.exit_code == 1 and "leads out of" in result.stderr


def test_decisions_of_a_person_are_read_back(photos, out, tmp_path):
    with chat_server(Painter(photos)) as server:
        run(*options(photos, server, out))
        texts = descriptions(out)
        decided = {"0.png": "keep", "1.png": "drop", "2.png": "keep"}
        entries = [{"id": id, "text_hash": hash_of_text(texts[id]), "decision": each} for id, each in decided.items()]
        entries[2]["text"] = "A cat, as a person wrote."
        (tmp_path / "decisions.json").write_text(json.dumps(entries))
        result = run(*options(photos, server, out, "--decisions", tmp_path / "decisions.json"))
        assert "2 of these checked by a person" in " ".join(result.stdout.split())
    assert len(server.requests) == 5
    checked = {id: row["checked"] for id, row in rows_of(out).items()}
    assert checked == {"0.png": True, "2.png": True, "3.png": False, "more/4.png": False}
    del texts["1.png"]
    assert descriptions(out) == texts | {"2.png": "A cat, as a person wrote."}
    assert [row["edited"] for row in rows_of(out).values()] == [False, True, False, False]
    (dropped,) = lines_of(out / "rejected.jsonl")
    assert (dropped["id"], dropped["step"]) == ("1.png", "person")
    sheet = (out / "review.html").read_text()
    assert sheet.count("<article") == 5 and 'data-decision="drop"' in sheet  # every text can be decided again
