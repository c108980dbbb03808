"""Instructions from captions and boxes, by a server of this machine: what is asked, kept, left out, and paid."""

import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from sq_llava.cli.main import app
from sq_llava.data.rows import load_rows
from sq_llava.data.sources import DataSource
from sq_llava.generation.llava import KINDS, draw_tasks, parse_shares, read_prompts
from sq_llava.generation.rows import Card, Shard, make_row, to_llava, write_output
from sq_llava.generation.scenes import Scene
from sq_llava.generation.settings import LlavaSettings
from sq_llava.generation.turns import fault_of, parse_turns
from tests import ROOT, tiny
from tests.chat_server import ChatServer, Reply, chat_server
from tests.processes import ended, fork, lines_of, sq_llava


PROMPTS = read_prompts()
PARTS = ("boat lies at the shore", "oar leans against it", "rope holds it", "bucket stands in it", "gull sits on it")
DETAIL = " ".join(f"One small red {part}, a little to the left." for part in PARTS)
REASONING = (
    "Question: Why is it at the shore?\nAnswer: "
    + "It is small, and the water is calm, so it stays where it is. It waits."
)
CONVERSATION = "Question: What is it?\nAnswer: A boat.\n\nQuestion: What color is it?\nAnswer: It is red."


pytestmark = pytest.mark.usefixtures("api_key")


def kind_of(request: dict) -> str:
    return next(kind for kind in KINDS if request["messages"][0]["content"] == PROMPTS.systems[kind])


def write(request: dict, number: int) -> str:
    return {"conversation": CONVERSATION, "detail": DETAIL, "reasoning": REASONING}[kind_of(request)]


def write_scenes(folder: Path, num: int) -> Path:
    boxes = [{"label": "boat", "box": [0.1, 0.2, 0.55, 0.9]}]
    path = folder / "scenes.jsonl"
    rows = [{"image": f"{n}.png", "captions": [f"Boat number {n}.", "It is red."], "boxes": boxes} for n in range(num)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run(folder: Path, server: ChatServer, *arguments, num: int = 12):
    scenes = write_scenes(folder, num)
    options = ["--model", "writer", "--base-url", server.url, "--out", folder / "out", *arguments]
    return CliRunner().invoke(app, ["generate-data", "llava", str(scenes), *map(str, options)])


def test_rows_are_read_by_training_as_they_are(tmp_path):
    with chat_server(write) as server:
        result = run(tmp_path, server, "--kinds-per-image", 3, num=4)
    assert result.exit_code == 0, result.output
    tiny.picture().save(tmp_path / "0.png")
    for name in ("data.jsonl", "llava.json"):
        rows = load_rows([DataSource(str(tmp_path / "out" / name), image_root=str(tmp_path))])
        assert len(rows) == 12
        first = next(row for row in rows if row["id"] == "0-conversation")
        assert first["images"] == [str(tmp_path / "0.png")]
        assert [part["type"] for part in first["messages"][0]["content"]] == ["image", "text"]
        assert [message["content"][-1]["text"] for message in first["messages"]] == [
            "What is it?",
            "A boat.",
            "What color is it?",
            "It is red.",
        ]


def test_files_load_with_the_datasets_library_by_their_card(tmp_path):
    import datasets

    with chat_server(write) as server:
        run(tmp_path, server, "--shard", "1/2")
        run(tmp_path, server, "--shard", "2/2")
    loaded = datasets.load_dataset(str(tmp_path / "out"), cache_dir=str(tmp_path / "cache"))
    assert loaded["train"].num_rows == 12 and set(loaded["train"]["kind"]) <= set(KINDS)


def test_model_reads_system_message_examples_and_what_is_known_of_the_image(tmp_path):
    with chat_server(write) as server:
        run(tmp_path, server)
    for request in server.requests:
        kind = kind_of(request)
        assert [message["role"] for message in request["messages"]] == ["system", *["user", "assistant"] * 2, "user"]
        last = request["messages"][-1]["content"]
        assert "- Boat number " in last and "- boat: [0.100, 0.200, 0.550, 0.900]" in last
        assert (kind == "detail") == ("Request: " in last)


@pytest.mark.parametrize("kind", KINDS)
def test_own_examples_pass_their_own_rules(kind):
    """What the model is shown must be what is asked of it."""
    for message in PROMPTS.examples[kind]:
        if message["role"] == "assistant":
            text = message["content"]
            turns = [("Describe it.", text)] if kind == "detail" else parse_turns(text)
            assert len(turns) == 1 or kind == "conversation"
            assert [fault_of(turn, kind, turns[:place]) for place, turn in enumerate(turns)] == [None] * len(turns)


def test_conversation_that_is_cut_off_keeps_its_whole_turns(tmp_path):
    with chat_server(lambda request, number: CONVERSATION + "\n\nQuestion: How many") as server:
        run(tmp_path, server, "--shares", "conversation=1", num=1)
    [row] = lines_of(tmp_path / "out" / "data.jsonl")
    [line] = lines_of(tmp_path / "out" / "rejected.jsonl")
    assert len(row["messages"]) == 4 and line["reason"] == "question or answer missing"


def test_conversation_ends_before_a_turn_that_breaks_a_rule(tmp_path):
    bad = CONVERSATION + "\nQuestion: Who owns it?\nAnswer: That cannot be determined.\nQuestion: Why?\nAnswer: So."
    with chat_server(lambda request, number: bad) as server:
        run(tmp_path, server, "--shares", "conversation=1", num=1)
    [row] = lines_of(tmp_path / "out" / "data.jsonl")
    assert len(row["messages"]) == 4
    assert [(line["id"], line["step"], line["reason"]) for line in lines_of(tmp_path / "out" / "rejected.jsonl")] == [
        ("0-conversation", "conversation", "unsure"),
        ("0-conversation", "conversation", "after a turn left out"),
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "text", "reason"),
    [
        ("conversation", "It is a boat.", "unparsable"),
        ("conversation", "Sure! Here it is.\nQuestion: What?\nAnswer: A boat.", "unparsable"),
        ("conversation", "Question: What?\nQuestion: Where?\nAnswer: Here.", "no alternation"),
        ("conversation", "Answer: A boat.\nQuestion: What?", "no alternation"),
        ("conversation", "Question: What?\nAnswer:", "question or answer missing"),
        ("conversation", "Question: What?\nAnswer: It is a boat that", "unfinished"),
        ("conversation", "Question: What?\nAnswer: The caption says a boat.", "mentions its sources"),
        ("conversation", "Question: Which bounding box?\nAnswer: The left one.", "mentions its sources"),
        ("conversation", "Question: Where?\nAnswer: At [0.1, 0.2, 0.3, 0.4].", "mentions its sources"),
        ("conversation", "Question: Who?\nAnswer: It is unclear.", "unsure"),
        ("conversation", "Question: Who?\nAnswer: We can’t tell from here.", "unsure"),
        ("conversation", "Question: Who?\nAnswer: That isn't mentioned.", "unsure"),
        ("conversation", "Question: Who?\nAnswer: As an AI language model, I see none.", "refusal"),
        ("conversation", "Question: What is <image>?\nAnswer: A boat.", "control token"),
        ("reasoning", CONVERSATION, "several questions"),
        ("reasoning", "Question: Why?\nAnswer: So.", "too short"),
        ("reasoning", REASONING.rstrip()[:-1], "unfinished"),
        ("detail", "A boat.", "too short"),
        ("detail", DETAIL + " " + DETAIL, "repeats itself"),
        ("detail", DETAIL + " The given descriptions say so.", "mentions its sources"),
    ],
)
def test_text_that_breaks_a_rule_is_left_out_with_its_reason(kind, text, reason, tmp_path):
    with chat_server(lambda request, number: text) as server:
        result = run(tmp_path, server, "--shares", f"{kind}=1", num=1)
    assert result.exit_code == 0, result.output
    assert lines_of(tmp_path / "out" / "data.jsonl") == []
    first = lines_of(tmp_path / "out" / "rejected.jsonl")[0]
    assert (first["reason"], first["step"]) == (reason, kind)
    assert f"| {kind}: {reason} | 1 |" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize(
    "text",
    [
        "**Question 1:** What is it?\n**Answer:** A boat.",
        "Question 1. What is it?\nAnswer 1. A boat.",
        "question: What is it?\n\nANSWER : A boat.\n",
        "- Question: What is it?\n- Answer: A boat.",
        "Sure! Here is one:\n\n---\nQuestion: What is it?\nAnswer: A boat.",
        "### Question: What is it?\n### Answer: A boat.",
        "Question: What is it?\n\n***\n\nAnswer: A boat.\n\n---",
        "###\nQuestion: What is it?\nAnswer: A boat.\n___\n\n- - -\n",
    ],
)
def test_usual_ways_to_write_turns_are_read(text):
    assert parse_turns(text) == [("What is it?", "A boat.")]


WORDS = st.lists(st.sampled_from(["boat", "the", "red", "isn't", "3"]), min_size=1, max_size=6).map(" ".join)


@given(turns=st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=5))
@settings(max_examples=50, deadline=None)
def test_written_turns_are_read_back(turns):
    text = "\n\n".join(f"Question: {question}\nAnswer: {answer}" for question, answer in turns)
    assert parse_turns(text) == turns


def test_rulers_between_turns_and_after_a_description_are_no_text(tmp_path):
    text = CONVERSATION.replace("\n\n", "\n\n---\n\n") + "\n\n---"
    assert parse_turns(text) == parse_turns(CONVERSATION)
    assert parse_turns("Question: Why?\nAnswer: One - two.\n\n***\n\nThree.") == [("Why?", "One - two.\n\nThree.")]
    with chat_server(lambda request, number: f"{DETAIL}\n\n---\n") as server:
        run(tmp_path, server, "--shares", "detail=1", num=1)
    [row] = lines_of(tmp_path / "out" / "data.jsonl")
    assert row["messages"][1]["content"][0]["text"] == DETAIL


@pytest.mark.parametrize(
    "answer",
    [
        "A man puts a box onto another box.",
        "The driver cannot see the bicycle behind the truck.",
        "The sky is not clear.",
        "The text on the sign says stop.",
    ],
)
def test_harmless_answers_are_kept(answer):
    assert fault_of(("What is there?", answer), "conversation") is None


def test_kinds_come_in_the_shares_and_stay_when_images_are_added():
    scenes = [Scene(str(n), f"{n}.png", ("A boat.",)) for n in range(3000)]
    tasks = list(draw_tasks(scenes, parse_shares(LlavaSettings.shares), 1, PROMPTS, seed=0))
    counts = Counter(task.kind for task in tasks)
    for kind, share in (("conversation", 58 / 158), ("detail", 23 / 158), ("reasoning", 77 / 158)):
        assert counts[kind] / 3000 == pytest.approx(share, abs=0.03)
    assert list(draw_tasks(scenes[::7], parse_shares(LlavaSettings.shares), 1, PROMPTS, seed=0)) == tasks[::7]
    assert [task.kind for task in draw_tasks(scenes, parse_shares(LlavaSettings.shares), 1, PROMPTS, seed=1)] != [
        task.kind for task in tasks
    ]
    several = list(draw_tasks(scenes[:50], parse_shares("detail=1,reasoning=1"), 3, PROMPTS, seed=0))
    assert Counter(task.kind for task in several) == {"detail": 50, "reasoning": 50}


def test_edited_copy_of_the_prompts_is_used(tmp_path):
    copy = tmp_path / "prompts"
    assert CliRunner().invoke(app, ["generate-data", "prompts", "llava", str(copy)]).exit_code == 0
    (copy / "conversation.md").write_text("Only questions about color.\n")
    with chat_server(lambda request, number: CONVERSATION) as server:
        run(tmp_path, server, "--prompts", copy, "--shares", "conversation=1", num=1)
        assert server.requests[0]["messages"][0]["content"] == "Only questions about color."
        result = run(tmp_path, server, "--shares", "conversation=1", num=1)
        assert result.exit_code == 1 and "holds answers of a run with prompts_hash" in result.stderr
    (copy / "examples.json").write_text('[{"captions": ["A boat."]}]')
    with pytest.raises(ValueError, match=r"examples.json: KeyError.*expected a list of objects"):
        read_prompts(copy)
    (copy / "detail.md").unlink()
    with pytest.raises(ValueError, match=r"detail.md: no such file. Start from a copy: sq-llava generate-data"):
        read_prompts(copy)


@pytest.mark.parametrize("command", ["llava", "captions", "curate", "self", "prompts"])
def test_help_has_examples(command):
    result = CliRunner().invoke(app, ["generate-data", command, "--help"], env={"COLUMNS": "119"})
    assert result.exit_code == 0
    assert f"sq-llava generate-data {command} " in result.output.partition("Examples:")[2]


def test_dry_run_asks_and_writes_nothing_and_needs_no_key(tmp_path, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    prices = ["--input-price", 2.5, "--output-price", 10]
    with chat_server(write) as server:
        result = run(tmp_path, server, "--dry-run", *prices)
        assert result.exit_code == 0, result.output
        assert (
            "12 requests" in result.stdout
            and "at most 12,288 answer tokens, with a cost of up to 0.15." in result.stdout
        )
        assert not server.requests and not (tmp_path / "out").exists()
        monkeypatch.setenv("OPENAI_API_KEY", "x")
        run(tmp_path, server, "--max-requests", 5)
        assert "7 requests" in run(tmp_path, server, "--dry-run").stdout


@pytest.mark.slow
def test_shards_make_what_one_run_makes(tmp_path):
    (tmp_path / "whole").mkdir()
    with chat_server(write) as server:
        run(tmp_path / "whole", server)
        for shard in ("2/3", "3/3", "1/3"):
            assert run(tmp_path, server, "--shard", shard).exit_code == 0
        assert len(server.requests) == 24
        result = run(tmp_path, server, "--shard", "1/4")
        assert result.exit_code == 1 and "num_shards" in result.stderr
    shards = [lines_of(tmp_path / "out" / f"data-{n:05}-of-00003.jsonl") for n in range(3)]
    whole = lines_of(tmp_path / "whole" / "out" / "data.jsonl")
    assert [shards[n % 3][n // 3] for n in range(12)] == whole
    card = (tmp_path / "out" / "README.md").read_text()
    assert "path: data-*-of-00003.jsonl" in card and "12 rows" in card and "3 of 3 shards" in card
    assert "12 rows" in (tmp_path / "whole" / "out" / "README.md").read_text()


@given(items=st.lists(st.integers(), max_size=20), count=st.integers(1, 6))
@settings(max_examples=50, deadline=None)
def test_each_item_is_in_one_shard(items, count):
    shards = [Shard.parse(f"{n + 1}/{count}").take(items) for n in range(count)]
    assert sorted(item for shard in shards for item in shard) == sorted(items)


@pytest.mark.parametrize("text", ["0/4", "5/4", "1", "a/b", "-1/2"])
def test_wrong_shards_are_refused(text):
    with pytest.raises(ValueError, match="give i/n"):
        Shard.parse(text)


@pytest.mark.parametrize("text", ["detail", "detail=x", "detail=-1", "poem=3", "detail=0", "detail=nan"])
def test_wrong_shares_are_refused(text):
    with pytest.raises(ValueError, match="--shares"):
        parse_shares(text)


def test_row_of_several_images_in_both_layouts():
    row = make_row("1", ["a.png", "b.png"], [("Which?", "The left."), ("Why?", "So.")], kind="k")
    assert [part["type"] for part in row["messages"][0]["content"]] == ["image", "image", "text"]
    llava = to_llava(row)
    assert llava["image"] == ["a.png", "b.png"] and llava["kind"] == "k"
    assert [turn["value"] for turn in llava["conversations"][:2]] == ["<image>\n<image>\nWhich?", "The left."]


def test_folder_that_two_processes_write_at_once_holds_whole_files(tmp_path):
    script = (
        "import pathlib, sys; from sq_llava.generation.rows import *\n"
        "row = make_row('2', ['2.png'], [('Why?', 'So.')])\n"
        "write_output(pathlib.Path(sys.argv[1]), Shard(), [row], [], {}, Card('t', 's', {}))"
    )

    def rows():
        yield make_row("1", ["1.png"], [("Why?", "So.")])
        subprocess.run([sys.executable, "-c", script, str(tmp_path)], cwd=ROOT, check=True)

    write_output(tmp_path, Shard(), rows(), [], {}, Card("t", "s", {}))
    assert [row["id"] for row in lines_of(tmp_path / "data.jsonl")] == ["1"]
    assert [row["id"] for row in json.loads((tmp_path / "llava.json").read_text())] == ["1"]
    assert not list(tmp_path.glob("*.new"))


def test_failures_and_caps_are_told_and_mended_by_the_same_command(tmp_path):
    def reply(request, number):
        if "number 3." in request["messages"][-1]["content"] and number == 0:
            return Reply(status=400, body='{"error": {"message": "filtered"}}')
        return write(request, number)

    with chat_server(reply) as server:
        result = run(tmp_path, server, "--max-requests", 8, "--concurrency", 1)
        assert result.exit_code == 1 and "1 failed" in result.stderr and "3 are open: stopped by" in result.stderr
        [failure] = lines_of(tmp_path / "out" / "failures.jsonl")
        assert failure["id"].startswith("3-") and "filtered" in failure["error"]
        assert len(lines_of(tmp_path / "out" / "data.jsonl")) == 8
        assert run(tmp_path, server).exit_code == 0
    assert len(server.requests) == 13
    assert len(lines_of(tmp_path / "out" / "data.jsonl")) == 12
    assert (tmp_path / "out" / "failures.jsonl").read_text() == ""


@pytest.mark.slow
def test_server_that_fails_in_all_ways_gives_the_same_files_in_the_end(tmp_path):
    failures = [
        Reply(status=429, headers={"Retry-After": "0.1"}, body="{}"),
        Reply(status=500, body="oops"),
        Reply("late", seconds=1.5),
        Reply(closes=True),
        Reply("cut off", cuts=True),
        Reply(body='{"choices": [{"mess'),  # an answer that was paid, and that nobody can read
    ]

    def flaky(request, number):
        place = int(request["messages"][-1]["content"].partition("number ")[2].partition(".")[0])
        return failures[place % 6] if number == 0 else write(request, number)

    (tmp_path / "whole").mkdir()
    with chat_server(write) as server:
        run(tmp_path / "whole", server)
    with chat_server(flaky) as server:
        result = run(tmp_path, server, "--timeout", 1)
        assert result.exit_code == 1 and "2 failed" in result.stderr
        assert run(tmp_path, server).exit_code == 0
        assert len(server.requests) == 24
    for name in ("data.jsonl", "llava.json", "rejected.jsonl", "failures.jsonl"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / "out" / name).read_bytes()


def start(folder: Path, server: ChatServer, *options: str) -> list[multiprocessing.Process]:
    command = ["generate-data", "llava", "../scenes.jsonl", "--model", "writer", "--base-url", server.url]
    return fork(sq_llava, (*command, "--out", "out", *options), folder / "log", (os.chdir, folder))


@pytest.mark.slow
def test_run_killed_at_random_moments_ends_as_one_that_was_not(tmp_path):
    """Of what was paid, a kill loses no more than what was under way."""
    num, concurrency, num_kills = 40, 4, 3
    options = ["--concurrency", str(concurrency)]
    write_scenes(tmp_path, num)
    draw = random.Random(7)
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    with chat_server(lambda request, number: Reply(write(request, number), seconds=0.02)) as server:
        assert ended(start(tmp_path / "whole", server, *options)) == [0]
        assert len(server.requests) == num
        server.requests.clear()
        for _ in range(num_kills):
            (process,) = children = start(tmp_path / "killed", server, *options)
            enough = len(server.requests) + draw.randint(1, 10)
            while len(server.requests) < min(enough, num) and process.is_alive():
                time.sleep(0.002)
            time.sleep(draw.random() * 0.3)
            process.kill()
            ended(children)
        assert ended(start(tmp_path / "killed", server, *options)) == [0]
        assert num <= len(server.requests) <= num + num_kills * concurrency
    names = {path.name for path in (tmp_path / "whole" / "out").iterdir()}
    assert {path.name for path in (tmp_path / "killed" / "out").iterdir()} == names
    for name in names - {"answers.jsonl"}:
        whole, killed = ((tmp_path / folder / "out" / name).read_bytes() for folder in ("whole", "killed"))
        assert killed == whole, name
    for folder in ("whole", "killed"):
        assert len({line["key"] for line in lines_of(tmp_path / folder / "out" / "answers.jsonl")}) == num
        assert len(lines_of(tmp_path / folder / "out" / "answers.jsonl")) == num


@pytest.mark.slow
def test_ctrl_c_writes_what_is_there_and_waits_for_no_busy_server(tmp_path):
    def reply(request, number):
        if "number 2." in request["messages"][-1]["content"]:
            return Reply(status=429, headers={"Retry-After": "100"}, body="{}")
        return Reply(write(request, number), seconds=0.05)

    write_scenes(tmp_path, 40)
    (tmp_path / "run").mkdir()
    with chat_server(reply) as server:
        (process,) = children = start(tmp_path / "run", server, "--concurrency", "4")
        while len(server.requests) < 8:
            assert process.is_alive()
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGINT)
        assert ended(children) == [130]
    assert "stopped by Ctrl-C" in (tmp_path / "run" / "log").read_text()
    num_rows = len(lines_of(tmp_path / "run" / "out" / "data.jsonl"))
    assert 3 <= num_rows == len(lines_of(tmp_path / "run" / "out" / "answers.jsonl")) < 40
