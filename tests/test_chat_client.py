"""A client of a server of this machine that also refuses, fails and dawdles: what is kept, asked again and paid."""

import json
import subprocess
import sys
import weakref
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sq_llava.chat_batches import NAME
from sq_llava.chat_client import (
    ChatClient,
    ChatFailure,
    ChatRequest,
    ChatSettings,
    ChatStopped,
    NotAsked,
    UnusableAnswer,
    measure,
)
from sq_llava.chat_replies import read_completion, retry_after
from sq_llava.generation.asking import ask_all, read_all
from tests.chat_server import Reply, chat_server, completion


KEY = "sk-secret-0123456789"
PIXEL = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 10_000}}


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)


def client_of(server, folder: Path, **overrides) -> ChatClient:
    values = {"model": "writer", "base_url": server.url, "retries": 2, "timeout": 5.0, **overrides}
    return ChatClient(ChatSettings(**values), folder / "answers.jsonl")


def say(text: str) -> list[dict]:
    return [{"role": "user", "content": text}]


def ask(client: ChatClient, *texts: str, batch: bool = False):
    return ask_all(client, {text: text for text in texts}, lambda text: client.complete(say(text)), "asks", batch)


def echo(request: dict, number: int) -> str:
    return f"heard {request['messages'][-1]['content']}"


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_answer_is_taken_over_from_another_server(tmp_path):
    with chat_server(echo) as server:
        assert client_of(server, tmp_path).complete(say("a")) == "heard a"
    with chat_server(echo) as other:
        assert client_of(other, tmp_path).complete(say("a")) == "heard a"
    assert (len(server.requests), len(other.requests)) == (1, 0)


def test_client_whose_server_matters_takes_no_answer_from_another(tmp_path):
    with chat_server(echo) as server, chat_server(echo) as other:
        for each in (server, other, server):
            settings = ChatSettings("writer", each.url)
            ChatClient(settings, tmp_path / "answers.jsonl", server_matters=True).complete(say("a"))
    assert (len(server.requests), len(other.requests)) == (1, 1)


def test_stream_that_is_cut_off_is_asked_for_again(tmp_path):
    with chat_server(lambda request, number: Reply("1", cuts=number == 0)) as server:
        assert client_of(server, tmp_path).complete(say("a")) == "1"
    assert len(server.requests) == 2


def test_broken_journal_is_told_by_its_line(tmp_path):
    (tmp_path / "answers.jsonl").write_text('{"key": "a", "prompt_tokens": 1, "completion_tokens": 1}\n\0\0\n')
    with pytest.raises(ValueError, match=r"answers.jsonl, line 2: cannot be read as JSON: .* Remove the line"):
        ChatClient(ChatSettings("writer"), tmp_path / "answers.jsonl")


def test_client_that_only_reads_leaves_the_line_that_another_process_is_writing(tmp_path):
    with chat_server(echo) as server:
        client_of(server, tmp_path).complete(say("a"))
    journal = tmp_path / "answers.jsonl"
    content = journal.read_bytes() + b'{"key": "b", "ans'
    journal.write_bytes(content)
    reader = ChatClient(ChatSettings("writer", server.url), journal, reads_only=True)
    assert reader.complete(say("a")) == "heard a" and journal.read_bytes() == content


def test_results_are_in_the_order_of_the_items_whatever_came_first(tmp_path):
    def reply(request, number):
        text = request["messages"][-1]["content"]
        return Reply(text, seconds=0.1 if text in "ac" else 0.0)

    with chat_server(reply) as server:
        asked = ask(client_of(server, tmp_path), *"abcd")
    assert list(asked.results.items()) == [(each, each) for each in "abcd"]


def test_failures_are_told_from_what_is_open_and_tried_again(tmp_path):
    def reply(request, number):
        failing = request["messages"][-1]["content"] == "b" and number == 0
        return Reply(status=400, body='{"error": {"message": "odd"}}') if failing else "1"

    with chat_server(reply) as server:
        asked = ask(client_of(server, tmp_path, max_requests=4, concurrency=1), *"abcdefg")
        assert (list(asked.results), list(asked.failures), asked.num_open) == (["a", "c", "d", "e"], ["b"], 2)
        assert "odd" in asked.failures["b"] and "--max-requests 4" in asked.stopped
        again = ask(client_of(server, tmp_path), *"abcdefg")
        assert list(again.results) == list("abcdefg") and not again.failures and again.stopped is None
    assert len(server.requests) == 8


@pytest.mark.parametrize("failure", [Reply(closes=True), Reply("late", seconds=1.5)], ids=["closed", "slow"])
def test_request_that_is_sent_again_is_paid_again_as_far_as_anybody_knows(failure, tmp_path):
    # 34 bytes + 100 tokens are lost, twice; a third time does not fit, though the request may be sent four times.
    with chat_server(lambda request, number: failure) as server:
        client = client_of(server, tmp_path, retries=3, max_tokens=100, max_total_tokens=300, timeout=1.0)
        with pytest.raises(ChatStopped, match="268 are used, and the next request can use 134"):
            client.complete(say("a"))
    assert len(server.requests) == 2


def test_refused_request_takes_nothing_of_the_caps(tmp_path):
    with chat_server(lambda request, number: Reply(status=503, body="{}") if number < 2 else "1") as server:
        asked = ask(client_of(server, tmp_path, max_requests=3, concurrency=3), *"abc")
        assert len(asked.results) == 3 and len(server.requests) == 9


def test_caps_are_of_all_runs_whatever_came_of_the_requests(tmp_path):
    failures = {"a": Reply(body=completion(None)), "b": Reply(closes=True), "c": Reply("late", seconds=1.5)}
    with chat_server(lambda request, number: failures.get(request["messages"][-1]["content"], "1")) as server:
        for _ in range(2):
            client = client_of(server, tmp_path, max_requests=4, retries=0, timeout=1.0, concurrency=1)
            asked = ask(client, *"abcde")
            assert "--max-requests 4" in asked.stopped and list(asked.results) == ["d"]
        # 34 bytes + 1024 tokens for each that was lost.
        assert client_of(server, tmp_path).budget.describe() == f"4 requests, {3 * 1058 + 110:,} tokens"
    assert len(server.requests) == 4


def test_batch_whose_answer_holds_no_text_counts_in_later_runs_too(tmp_path):
    with chat_server(lambda request, number: Reply(body=completion(None))) as server:
        client = client_of(server, tmp_path)
        assert "holds no text" in ask(client, "a", batch=True).failures["a"]
        told = client.budget.describe()
        assert told == "1 requests, 1,058 tokens" == client_of(server, tmp_path).budget.describe()
        # Killed before it was noted that the batch was read: it is not counted twice.
        journal = tmp_path / "answers.batches.jsonl"
        journal.write_text("".join(journal.read_text().splitlines(keepends=True)[:2]))
        assert "--max-requests 1" in ask(client_of(server, tmp_path, max_requests=1), "a", batch=True).stopped
        assert client_of(server, tmp_path).budget.describe() == told
    assert len(server.requests) == 1


def test_server_that_is_not_there_takes_nothing_of_the_caps(tmp_path):
    with chat_server(echo) as server:
        pass
    client = client_of(server, tmp_path, retries=1, max_requests=1)
    for text in "ab":
        with pytest.raises(ChatFailure, match="ConnectError"):
            client.complete(say(text))
    assert client_of(server, tmp_path).budget.num_requests == 0


@pytest.mark.parametrize("batch", [False, True])
def test_equal_requests_are_paid_once(batch, tmp_path):
    with chat_server(lambda request, number: Reply("1", seconds=0.1)) as server:
        client = client_of(server, tmp_path)
        asked = ask_all(client, dict.fromkeys("abcd", "x"), lambda text: client.complete(say(text)), "asks", batch)
        assert asked.results == dict.fromkeys("abcd", "1")
    assert len(server.requests) == len(lines_of(tmp_path / "answers.jsonl")) == 1


def test_every_line_of_a_journal_counts(tmp_path):
    line = json.dumps({"key": "a", "answer": "1", "prompt_tokens": 100, "completion_tokens": 10})
    (tmp_path / "answers.jsonl").write_text(f"{line}\n{line}\n")
    client = ChatClient(ChatSettings("writer"), tmp_path / "answers.jsonl", reads_only=True)
    assert client.budget.describe() == "2 requests, 220 tokens"


def test_second_process_is_kept_out_of_a_journal_and_a_reader_is_not(tmp_path):
    script = (
        "import sys; from pathlib import Path; from sq_llava.chat_client import ChatClient, ChatSettings\n"
        "client = ChatClient(ChatSettings('writer', sys.argv[1]), Path(sys.argv[2]) / 'answers.jsonl')\n"
        "print(client.complete([{'role': 'user', 'content': 'a'}]), flush=True)\n"
        "sys.stdin.read()"
    )
    with chat_server(echo) as server:
        command = [sys.executable, "-c", script, server.url, str(tmp_path)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as first:
            early = client_of(server, tmp_path)
            assert first.stdout.readline() == "heard a\n"
            for batch in (False, True):
                with pytest.raises(ValueError, match=r"answers.jsonl: another run writes into this folder"):
                    ask(client_of(server, tmp_path), "a", "b", batch=batch)
            with pytest.raises(ValueError, match="another run writes"):
                client_of(server, tmp_path).complete(say("b"))
            reader = ChatClient(ChatSettings("writer", server.url), tmp_path / "answers.jsonl", reads_only=True)
            assert reader.complete(say("a")) == "heard a"
        # What the other one has added since it was looked at is not asked again.
        assert len(ask(early, "a", "b").results) == 2
    assert len(server.requests) == 2 and early.budget.num_requests == 2


def test_journal_is_free_once_its_client_is_gone(tmp_path):
    with chat_server(echo) as server:
        client = client_of(server, tmp_path)
        client.complete(say("a"))
        script = (
            "import sys; from pathlib import Path; from sq_llava.chat_journal import lock; lock(Path(sys.argv[1]))"
        )
        command = [sys.executable, "-c", script, str(tmp_path / "answers.jsonl")]
        assert b"another run writes" in subprocess.run(command, capture_output=True).stderr
        del client
        assert subprocess.run(command).returncode == 0


@pytest.mark.parametrize("batch", [False, True])
def test_odd_characters_of_an_answer_are_kept(batch, tmp_path):
    text = "a\u2028b\u2029c\u0085d"

    said = {"a": text, "b": "half \ud83d of one"}
    with chat_server(lambda request, number: said[request["messages"][-1]["content"]]) as server:
        asked = ask(client_of(server, tmp_path), "a", "b", batch=batch)
        assert asked.results == {"a": text, "b": "half \ufffd of one"}
        assert ask(client_of(server, tmp_path), "a", "b").results == asked.results
    assert len(server.requests) == 2


@given(text=st.text(st.characters(exclude_categories=()), min_size=1).filter(str.strip))
@settings(max_examples=200, deadline=None)
def test_any_text_of_json_can_be_written(text):
    answer = read_completion(completion(text), (1, 1))["answer"]
    answer.encode()
    whole = json.loads(json.dumps(text))  # halves that stand together become one
    assert len(answer) == len(whole)
    for ours, theirs in zip(answer, whole):
        assert ours == theirs or (ours == "\ufffd" and "\ud800" <= theirs <= "\udfff")


@pytest.mark.parametrize("zone", ["", " -0000", " GMT", " +0000"])
def test_date_of_retry_after_is_read_whatever_its_zone_is_called(zone):
    later = datetime.now(UTC) + timedelta(seconds=60)
    assert 55 < retry_after(f"{later:%a, %d %b %Y %H:%M:%S}{zone}") <= 60


@pytest.mark.parametrize(
    ("header", "seconds"), [("soon", None), ("-3", 0.0), ("nan", 0.0), ("inf", 120.0), ("7", 7.0)]
)
def test_odd_numbers_of_retry_after_are_no_odd_waits(header, seconds):
    assert retry_after(header) == seconds


def test_date_of_retry_after_is_waited_for(tmp_path):
    later = format_datetime(datetime.now(UTC) + timedelta(seconds=2.5), usegmt=True)  # whole seconds: 1.5 or more
    refusal = Reply(status=429, headers={"Retry-After": later}, body="{}")
    with chat_server(lambda request, number: refusal if number == 0 else "1") as server:
        assert client_of(server, tmp_path).complete(say("a")) == "1"
    assert server.times[1] - server.times[0] > 1.0


def test_answer_without_text_is_a_failure_of_one_request(tmp_path):
    with chat_server(lambda request, number: Reply(body=completion(None))) as server:
        with pytest.raises(UnusableAnswer, match="holds no text"):
            client_of(server, tmp_path).complete(say("a"))
        assert issubclass(UnusableAnswer, ChatFailure)
        asked = ask(client_of(server, tmp_path), "a")
    assert "holds no text" in asked.failures["a"]


def test_several_steps_of_an_item_are_each_paid_once(tmp_path):
    def work_with(client):
        def work(text):
            first = client.complete(say(text))
            return client.complete([*say(text), {"role": "assistant", "content": first}, *say("go on")])

        return work

    with chat_server(echo) as server:
        client = client_of(server, tmp_path, max_requests=5)
        asked = ask_all(client, {each: each for each in "abcd"}, work_with(client), "asks")
        assert asked.stopped is not None
        for batch in (False, True):
            client = client_of(server, tmp_path)
            asked = ask_all(client, {each: each for each in "abcd"}, work_with(client), "asks", batch)
            assert asked.results == dict.fromkeys("abcd", "heard go on")
    assert len(server.requests) == 8


@pytest.mark.parametrize("concurrency", [1, 8])
def test_cap_on_tokens_is_never_passed(concurrency, tmp_path):
    # An answer takes 100 + 10 tokens, and is counted as 34 bytes + 100 tokens before: the fourth fits, the fifth not.
    cap = {"max_total_tokens": 500, "max_tokens": 100, "concurrency": concurrency}
    with chat_server(lambda request, number: Reply("1", seconds=0.02)) as server:
        asked = ask(client_of(server, tmp_path, **cap), *"abcdefgh")
        assert "--max-total-tokens 500: 440 are used, and the next request can use 134." in asked.stopped
        assert len(server.requests) == 4
        ask(client_of(server, tmp_path, **cap), *"abcdefgh")
    assert len(server.requests) == 4


def test_running_total_is_told(tmp_path):
    with chat_server(lambda request, number: "1") as server:
        client = client_of(server, tmp_path, input_price=100.0, output_price=1000.0)
        ask(client, *"abc")
        assert client.budget.describe() == "3 requests, 330 tokens, 0.06 spent"
        assert client_of(server, tmp_path).budget.describe() == "3 requests, 330 tokens"


def test_image_counts_as_tokens_and_not_by_its_bytes(tmp_path):
    messages = [{"role": "user", "content": [{"type": "text", "text": "What is it?"}, PIXEL, PIXEL]}]
    with chat_server(lambda request, number: "A dog.") as server:
        client = client_of(server, tmp_path, image_tokens=50, max_tokens=7)
        estimate = client.estimate([client.request(messages)])
        assert client.complete(messages) == "A dog."
    assert server.requests[0]["messages"][0]["content"][1] == PIXEL
    assert 100 < estimate.prompt_tokens < 150 and estimate.completion_tokens == 7


def test_estimate_holds_prices_and_needs_no_key(tmp_path, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    settings = ChatSettings("writer", max_tokens=100, input_price=1.0, output_price=10.0)
    client = ChatClient(settings, tmp_path / "answers.jsonl", reads_only=True)
    text = "x" * 4000
    estimate = client.estimate([client.request(say(text))] * 2)
    assert estimate.num_requests == 2 and 2000 <= estimate.prompt_tokens <= 2020
    assert estimate.cost == pytest.approx((estimate.prompt_tokens + 200 * 10) / 1e6)
    with pytest.raises(NotAsked):
        client.complete(say(text))
    assert not list(tmp_path.iterdir())


@given(texts=st.lists(st.text(max_size=30), max_size=4), num_images=st.integers(0, 3))
@settings(max_examples=50, deadline=None)
def test_bytes_of_a_prompt_do_not_depend_on_its_images(texts, num_images):
    def messages(count):
        parts = [{"type": "text", "text": text} for text in texts]
        return [{"role": "user", "content": [*parts, *[PIXEL] * count]}]

    assert measure(messages(num_images)) == (num_images, measure(messages(0))[1])


def test_wrong_settings_are_refused():
    with pytest.raises(ValueError, match="--input-price and --output-price"):
        ChatSettings("writer", input_price=1.0)
    with pytest.raises(ValueError, match="--max-cost needs"):
        ChatSettings("writer", max_cost=1.0)
    with pytest.raises(ValueError, match="--base-url: give http"):
        ChatSettings("writer", base_url="localhost:8000")


def test_batch_gives_what_single_requests_give(tmp_path):
    def reply(request, number):
        odd = request["messages"][-1]["content"] == "c"
        return Reply(status=400, body='{"error": {"message": "odd"}}') if odd else echo(request, number)

    with chat_server(reply) as server:
        server.num_looks = 2
        by_batch = ask(client_of(server, tmp_path / "batch"), *"abcd", batch=True)
        assert len(server.batches) == 1
        singly = ask(client_of(server, tmp_path / "singly"), *"abcd")
        assert by_batch.results == singly.results == {each: f"heard {each}" for each in "abd"}
        assert "odd" in by_batch.failures["c"] and list(by_batch.failures) == list(singly.failures)
        assert len(server.requests) == 8
        assert ask(client_of(server, tmp_path / "batch"), *"abd", batch=True).results == by_batch.results
    assert len(server.batches) == 1


def test_batch_whose_creation_was_not_confirmed_is_not_created_twice(tmp_path):
    with chat_server(echo) as server:
        server.num_lost = 1
        assert len(ask(client_of(server, tmp_path), *"abcd", batch=True).results) == 4
    assert len(server.batches) == 1 and len(server.requests) == 4


@pytest.mark.parametrize("batch", [True, False])
@pytest.mark.parametrize("num_lines", [1, 2])
def test_batch_that_a_kill_has_left_is_read_and_not_paid_again(num_lines, batch, tmp_path):
    """Killed after it was created, once before and once after its id was noted; whatever the next run asks by."""
    with chat_server(echo) as server:
        done = ask(client_of(server, tmp_path), *"abcd", batch=True)
        journal = tmp_path / "answers.batches.jsonl"
        journal.write_text("".join(journal.read_text().splitlines(keepends=True)[:num_lines]) + '{"event": "cre')
        (tmp_path / "answers.jsonl").write_text((tmp_path / "answers.jsonl").read_text().splitlines()[0] + "\n")
        client = client_of(server, tmp_path)
        assert ask(client, *"abcd", batch=batch).results == done.results
        assert client.budget.num_requests == 4 and client.budget.tokens == 440
    assert len(server.batches) == 1 and len(server.requests) == 4


def test_planned_batch_that_was_never_created_is_forgotten(tmp_path):
    with chat_server(echo) as server:
        key = client_of(server, tmp_path).request(say("a")).key
        (tmp_path / "answers.batches.jsonl").write_text(
            json.dumps({"event": "planned", "name": "lost", "most": {key: [50, 10]}}) + "\n"
        )
        client = client_of(server, tmp_path)
        assert ask(client, *"ab", batch=True).results == {"a": "heard a", "b": "heard b"}
    assert len(server.batches) == 1 and len(server.requests) == 2


def test_few_requests_are_held_at_a_time(tmp_path, monkeypatch):
    """With their images they would not fit into memory."""
    held, most_held = weakref.WeakSet(), 0

    class Counted(ChatRequest):
        def __init__(self, *values):
            nonlocal most_held
            super().__init__(*values)
            held.add(self)
            most_held = max(most_held, len(held))

        __hash__ = object.__hash__

    monkeypatch.setattr("sq_llava.chat_client.ChatRequest", Counted)
    monkeypatch.setattr("sq_llava.chat_batches.MAX_REQUESTS", 10)
    items = [f"{n}" for n in range(40)]
    with chat_server(echo) as server:
        asked = ask(client_of(server, tmp_path, max_requests=15), *items, batch=True)
        assert asked.num_open == 25 and len(server.batches) == 2
        client = client_of(server, tmp_path)
        missing = read_all(client, {each: each for each in items}, lambda text: client.complete(say(text)))[1]
        assert missing == items[15:]
        assert len(ask(client, *items, batch=True).results) == 40
    assert most_held < 5 and len(server.requests) == 40 and len(server.batches) == 5


def test_file_of_a_batch_that_is_cut_off_is_read_again(tmp_path):
    with chat_server(echo) as server:
        server.num_cut = 1
        asked = ask(client_of(server, tmp_path), *"abcd", batch=True)
        assert not asked.results and "nothing is paid twice" in asked.stopped
        assert len(ask(client_of(server, tmp_path), *"abcd", batch=True).results) == 4
    assert len(server.batches) == 1 and len(server.requests) == 4


def test_batches_keep_to_the_caps(tmp_path):
    # As above: a request sets 134 tokens aside, and takes 110: of 500, 3 fit at first, then 1.
    with chat_server(echo) as server:
        asked = ask(client_of(server, tmp_path, max_total_tokens=500, max_tokens=100), *"abcdefgh", batch=True)
        assert "--max-total-tokens 500" in asked.stopped and asked.num_open == 4
        assert [len(server.files[each["input_file_id"]].splitlines()) for each in server.batches.values()] == [3, 1]
        asked = ask(client_of(server, tmp_path, max_requests=6), *"abcdefgh", batch=True)
        assert "--max-requests 6" in asked.stopped
    assert len(server.requests) == 6


def test_server_without_a_batch_api_is_told(tmp_path):
    with chat_server(echo) as server:
        server.has_batches = False
        asked = ask(client_of(server, tmp_path), *"ab", batch=True)
        assert "has no Batch API" in asked.stopped and asked.num_open == 2
        assert len(ask(client_of(server, tmp_path), *"ab").results) == 2


def test_batch_names_are_kept_at_the_server(tmp_path):
    with chat_server(echo) as server:
        ask(client_of(server, tmp_path), "a", batch=True)
        [batch] = server.batches.values()
    planned = lines_of(tmp_path / "answers.batches.jsonl")[0]
    assert batch["metadata"] == {NAME: planned["name"]}
    written = "".join(path.read_text() for path in tmp_path.iterdir())
    assert KEY not in written
