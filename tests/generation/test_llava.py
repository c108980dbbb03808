"""Instructions from captions and boxes, with a server on this machine: requests, rows, caps, kills and shards."""

import json
import multiprocessing
import os
import random
import signal
import time
from collections import Counter
from inspect import signature
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest

from sq_llava.data.rows import load_rows
from sq_llava.data.sources import DataSource
from sq_llava.generation import captions, curate, llava, self_generation
from sq_llava.generation.llava import KINDS, Task, draw_tasks, parse_shares, read_answer, read_prompts
from sq_llava.generation.rows import Shard
from sq_llava.generation.scenes import Scene
from sq_llava.generation.settings import LlavaSettings
from tests import tiny
from tests.chat_server import ChatServer, Reply, chat_server
from tests.generation.commands import generate_data, made
from tests.processes import ended, fork, lines_of, locked_by_another_process, sq_llava


pytestmark = pytest.mark.usefixtures("api_key")

PROMPTS = read_prompts()
PARTS = ("boat lies at the shore", "oar leans against it", "rope holds it", "bucket stands in it", "gull sits on it")
DETAIL = " ".join(f"One small red {part}, a little to the left." for part in PARTS)
REASONING = (
    "Question: Why is it at the shore?\nAnswer: It is small, and the water is calm, so it stays where it is. It waits."
)
CONVERSATION = "Question: What is it?\nAnswer: A boat.\n\nQuestion: What color is it?\nAnswer: It is red."


def kind_of(request: dict) -> str:
    return next(kind for kind in KINDS if request["messages"][0]["content"] == PROMPTS.systems[kind])


def place_of(request: dict) -> int:
    """The number of the image that a request is about."""
    return int(request["messages"][-1]["content"].partition("number ")[2].partition(".")[0])


def write(request: dict, number: int) -> str:
    return {"conversation": CONVERSATION, "detail": DETAIL, "reasoning": REASONING}[kind_of(request)]


def write_scenes(folder: Path, num: int) -> Path:
    folder.mkdir(exist_ok=True)
    boxes = [{"label": "boat", "box": [0.1, 0.2, 0.55, 0.9]}]
    path = folder / "scenes.jsonl"
    rows = [{"image": f"{n}.png", "captions": [f"Boat number {n}.", "It is red."], "boxes": boxes} for n in range(num)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run(folder: Path, server: ChatServer, *arguments, num: int = 12):
    options = ["--model", "writer", "--base-url", server.url, "--out", folder / "out", *arguments]
    return generate_data("llava", write_scenes(folder, num), *options)


def test_mistyped_model_does_not_claim_the_folder(tmp_path):
    def refuse(request, number):
        if request["model"] == "writter":
            return Reply(status=404, body='{"error": {"message": "no such model"}}')
        return write(request, number)

    with chat_server(refuse) as server:
        mistyped = run(tmp_path, server, "--model", "writter", num=2)
        assert mistyped.exit_code == 1 and "no such model" in mistyped.stderr
        assert not (tmp_path / "out" / "run.json").exists()
        assert run(tmp_path, server, num=2).exit_code == 0
        refused = run(tmp_path, server, "--model", "writter", num=2)
    assert "run with model 'writer', but this run has 'writter'" in refused.stderr


@pytest.mark.parametrize("generate", [captions.generate, curate.curate, llava.generate, self_generation.generate])
def test_each_method_refuses_a_second_run_of_the_same_shard_at_once(generate, tmp_path):
    settings = SimpleNamespace(out=tmp_path, shard=Shard(1, 4), device="cpu")
    others = len(signature(generate).parameters) - 1
    with (
        locked_by_another_process(tmp_path, "shard-00001-of-00004"),
        pytest.raises(ValueError, match="shard-00001-of-00004: another run writes into this folder"),
    ):
        generate(settings, *[None] * others)


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
        assert sorted(part["type"] for part in first["messages"][0]["content"]) == ["image", "text"]
        texts = [part["text"] for message in first["messages"] for part in message["content"] if "text" in part]
        assert texts == ["What is it?", "A boat.", "What color is it?", "It is red."]


def test_image_comes_first_or_last_by_the_seed_as_in_llavas_data():
    def is_last(seed: int) -> list[bool]:
        scenes = [Scene(str(n), f"{n}.png", ("A boat.",)) for n in range(400)]
        tasks = [Task(f"{scene.id}-conversation", scene, "conversation", None) for scene in scenes]
        rows = [read_answer(task, CONVERSATION, seed)[0] for task in tasks]
        assert all(len(row["messages"][2]["content"]) == 1 for row in rows)
        return [row["messages"][0]["content"][-1] == {"type": "image"} for row in rows]

    assert 160 < sum(is_last(0)) < 240
    assert is_last(0) == is_last(0) != is_last(1)


def test_empty_caption_of_coco_is_listed_and_does_not_end_the_run(tmp_path):
    images = [{"id": n, "file_name": f"{n}.png"} for n in range(3)]
    said = [{"image_id": n, "caption": text} for n, text in ((0, "A boat."), (1, ""), (1, "A dog."), (2, "A cat."))]
    (tmp_path / "captions.json").write_text(json.dumps({"images": images, "annotations": said}))
    with chat_server(write) as server:
        options = ["--model", "writer", "--base-url", server.url, "--out", tmp_path / "out"]
        result = generate_data("llava", tmp_path / "captions.json", *options)
    assert result.exit_code == 0 and "1 row of the input cannot be used" in result.stderr
    [bad] = lines_of(tmp_path / "out" / "bad_rows.jsonl")
    assert bad["place"] == f"{tmp_path / 'captions.json'}, annotations[1]"
    assert len(lines_of(tmp_path / "out" / "data.jsonl")) == 3
    assert "1 row of the input could not be used" in (tmp_path / "out" / "README.md").read_text()


def test_tokens_and_money_of_all_runs_are_in_the_terminal_and_in_the_card(tmp_path):
    with chat_server(write) as server:
        run(tmp_path, server, "--max-requests", 5)
        result = run(tmp_path, server, "--input-price", 2.5, "--output-price", 10)
    used = "12 requests, 1,320 tokens, 0.0042 spent"
    assert f"All runs so far: {used}." in result.stderr
    assert f"- used: `{used}`" in (tmp_path / "out" / "README.md").read_text()


def test_other_request_fields_are_another_run(tmp_path):
    with chat_server(write) as server:
        same = ("--extra-body", '{"top_k": 5}')
        assert run(tmp_path, server, *same, num=1).exit_code == 0
        assert run(tmp_path, server, *same, "--max-tokens-field", "max_tokens", num=1).exit_code == 0
        refused = run(tmp_path, server, "--extra-body", '{"top_k": 6}', num=1)
    assert len(server.requests) == 1 and server.requests[0]["top_k"] == 5
    assert "run with extra_body '{\"top_k\": 5}'" in refused.stderr


def test_model_reads_system_message_examples_and_what_is_known_of_the_image(tmp_path):
    with chat_server(write) as server:
        run(tmp_path, server)
    for request in server.requests:
        kind = kind_of(request)
        assert [message["role"] for message in request["messages"]] == ["system", *["user", "assistant"] * 2, "user"]
        last = request["messages"][-1]["content"]
        assert "- Boat number " in last and "- boat: [0.100, 0.200, 0.550, 0.900]" in last
        assert (kind == "detail") == ("Request: " in last)


def test_left_out_text_is_listed_and_counted_in_the_card(tmp_path):
    with chat_server(lambda request, number: "It is a boat.") as server:
        result = run(tmp_path, server, "--shares", "conversation=1", num=1)
    assert result.exit_code == 0 and "1  conversation: unparsable" in result.stdout
    assert lines_of(tmp_path / "out" / "data.jsonl") == []
    rejected = {"id": "0-conversation", "step": "conversation", "reason": "unparsable", "text": "It is a boat."}
    assert lines_of(tmp_path / "out" / "rejected.jsonl") == [rejected]
    assert "| conversation: unparsable | 1 |" in (tmp_path / "out" / "README.md").read_text()


def test_kinds_come_in_the_shares_and_stay_when_images_are_added():
    scenes = [Scene(str(n), f"{n}.png", ("A boat.",)) for n in range(3000)]
    shares = parse_shares(LlavaSettings.shares)
    tasks = list(draw_tasks(scenes, shares, 1, PROMPTS, seed=0))
    counts = Counter(task.kind for task in tasks)
    for kind, share in (("conversation", 58 / 158), ("detail", 23 / 158), ("reasoning", 77 / 158)):
        assert counts[kind] / 3000 == pytest.approx(share, abs=0.03)
    assert list(draw_tasks(scenes[::7], shares, 1, PROMPTS, seed=0)) == tasks[::7]
    other = draw_tasks(scenes, shares, 1, PROMPTS, seed=1)
    assert [task.kind for task in other] != [task.kind for task in tasks]
    several = draw_tasks(scenes[:50], parse_shares("detail=1,reasoning=1"), 3, PROMPTS, seed=0)
    assert Counter(task.kind for task in several) == {"detail": 50, "reasoning": 50}


@pytest.mark.parametrize("text", ["detail", "detail=x", "detail=-1", "poem=3", "detail=0", "detail=nan"])
def test_wrong_shares_are_refused(text):
    with pytest.raises(ValueError, match="--shares"):
        parse_shares(text)


def test_edited_copy_of_the_prompts_is_used(tmp_path):
    copy = tmp_path / "prompts"
    assert generate_data("prompts", "llava", copy).exit_code == 0
    (copy / "conversation.md").write_text("Only questions about color.\n")
    with chat_server(lambda request, number: CONVERSATION) as server:
        run(tmp_path, server, "--prompts", copy, "--shares", "conversation=1", num=1)
        assert server.requests[0]["messages"][0]["content"] == "Only questions about color."
        result = run(tmp_path, server, "--shares", "conversation=1", num=1)
        assert result.exit_code == 1 and "contains answers of a run with prompts_hash" in result.stderr
    (copy / "examples.json").write_text('[{"captions": ["A boat."]}]')
    with pytest.raises(ValueError, match=r"examples.json: KeyError.*Expected a list of objects"):
        read_prompts(copy)
    (copy / "detail.md").unlink()
    with pytest.raises(ValueError, match=r"detail.md: the file is missing or empty. Copy .* prompts llava NEW_FOLDER"):
        read_prompts(copy)


@pytest.mark.parametrize("command", ["llava", "captions", "curate", "self", "prompts"])
def test_help_has_examples(command):
    result = generate_data(command, "--help", env={"COLUMNS": "119"})
    assert result.exit_code == 0
    assert f"sq-llava generate-data {command} " in result.output.partition("Examples:")[2]


def test_dry_run_asks_and_writes_nothing_and_needs_no_key(tmp_path, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    with chat_server(write) as server:
        result = run(tmp_path, server, "--dry-run", "--input-price", 2.5, "--output-price", 10)
        assert result.exit_code == 0, result.output
        assert "12 requests" in result.stdout
        assert "at most 12,288 answer tokens, with a cost of up to 0.15." in result.stdout
        assert not server.requests and not (tmp_path / "out").exists()
        monkeypatch.setenv("OPENAI_API_KEY", "x")
        run(tmp_path, server, "--max-requests", 5)
        assert "7 requests" in run(tmp_path, server, "--dry-run").stdout


@pytest.mark.slow
def test_shards_make_what_one_run_makes_and_load_by_their_card(tmp_path):
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
    assert "12 rows" in card and "3 of 3 shards" in card
    loaded = datasets.load_dataset(str(tmp_path / "out"), cache_dir=str(tmp_path / "cache"))
    assert loaded["train"].num_rows == 12 and set(loaded["train"]["kind"]) <= set(KINDS)
    assert "12 rows" in (tmp_path / "whole" / "out" / "README.md").read_text()


def test_failures_and_caps_are_reported_and_the_same_command_tries_again(tmp_path):
    def reply(request, number):
        if place_of(request) == 3 and number == 0:
            return Reply(status=400, body='{"error": {"message": "filtered"}}')
        return write(request, number)

    with chat_server(reply) as server:
        result = run(tmp_path, server, "--max-requests", 8, "--concurrency", 1)
        assert result.exit_code == 1 and "1 failed" in result.stderr and "3 are not done: stopped by" in result.stderr
        [failure] = lines_of(tmp_path / "out" / "failures.jsonl")
        assert failure["id"].startswith("3-") and "filtered" in failure["error"]
        assert len(lines_of(tmp_path / "out" / "data.jsonl")) == 8
        assert run(tmp_path, server).exit_code == 0
    assert len(server.requests) == 13
    assert len(lines_of(tmp_path / "out" / "data.jsonl")) == 12
    assert lines_of(tmp_path / "out" / "failures.jsonl") == []


@pytest.mark.slow
def test_server_that_fails_in_all_ways_gives_the_same_files_in_the_end(tmp_path):
    failures = [
        Reply(status=429, headers={"Retry-After": "0.1"}, body="{}"),
        Reply(status=500, body="oops"),
        Reply("late", seconds=1.5),
        Reply(closes=True),
        Reply("cut off", cuts=True),
        Reply(body='{"choices": [{"mess'),
    ]

    def flaky(request, number):
        return failures[place_of(request) % 6] if number == 0 else write(request, number)

    with chat_server(write) as server:
        run(tmp_path / "whole", server)
    with chat_server(flaky) as server:
        assert run(tmp_path, server, "--timeout", 1).exit_code == 0
        assert len(server.requests) == 24
    assert made(tmp_path / "out") == made(tmp_path / "whole" / "out")


def start(folder: Path, server: ChatServer) -> list[multiprocessing.Process]:
    """The command in a process of its own, four requests at a time."""
    folder.mkdir(exist_ok=True)
    command = ["generate-data", "llava", "../scenes.jsonl", "--model", "writer", "--base-url", server.url]
    return fork(sq_llava, (*command, "--out", "out", "--concurrency", "4"), folder / "log", (os.chdir, folder))


@pytest.mark.slow
def test_run_killed_at_random_moments_makes_the_same_files(tmp_path):
    """A kill loses at most the answers to the requests that were under way."""
    num, concurrency, num_kills = 40, 4, 3
    write_scenes(tmp_path, num)
    draw = random.Random(7)
    with chat_server(lambda request, number: Reply(write(request, number), seconds=0.02)) as server:
        assert ended(start(tmp_path / "whole", server)) == [0]
        assert len(server.requests) == num
        server.requests.clear()
        for _ in range(num_kills):
            (process,) = children = start(tmp_path / "killed", server)
            enough = len(server.requests) + draw.randint(1, 10)
            while len(server.requests) < min(enough, num) and process.is_alive():
                time.sleep(0.002)
            time.sleep(draw.random() * 0.3)
            process.kill()
            ended(children)
        assert ended(start(tmp_path / "killed", server)) == [0]
        assert num <= len(server.requests) <= num + num_kills * concurrency
    whole, killed = (
        {path.name: path.read_bytes() for path in (tmp_path / name / "out").iterdir()} for name in ("whole", "killed")
    )
    for files in (whole, killed):  # the order of the answers differs
        answers = [json.loads(line)["key"] for line in files.pop("answers.jsonl").splitlines()]
        assert len(answers) == len(set(answers)) == num
    assert killed == whole


@pytest.mark.slow
def test_ctrl_c_writes_the_finished_rows_and_waits_for_no_busy_server(tmp_path):
    def reply(request, number):
        if place_of(request) == 2:
            return Reply(status=429, headers={"Retry-After": "100"}, body="{}")
        return Reply(write(request, number), seconds=0.05)

    write_scenes(tmp_path, 40)
    with chat_server(reply) as server:
        (process,) = children = start(tmp_path / "run", server)
        while len(server.requests) < 8:
            assert process.is_alive()
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGINT)
        assert ended(children) == [130]
    assert "stopped by Ctrl-C" in (tmp_path / "run" / "log").read_text()
    num_rows = len(lines_of(tmp_path / "run" / "out" / "data.jsonl"))
    assert 3 <= num_rows == len(lines_of(tmp_path / "run" / "out" / "answers.jsonl")) < 40
