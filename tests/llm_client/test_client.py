"""A client of a server of this machine that also refuses, fails and dawdles: what is kept, asked again and paid."""

import json
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sq_llava.llm_client.asking import ask_all
from sq_llava.llm_client.client import (
    ChatClient,
    ChatFailure,
    ChatSettings,
    ChatStopped,
    NotAsked,
    UnusableAnswer,
    measure,
)
from sq_llava.llm_client.replies import read_completion, retry_after
from tests.chat_server import Reply, chat_server, completion
from tests.processes import lines_of


PIXEL = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 10_000}}


pytestmark = pytest.mark.usefixtures("api_key")


def client_of(server, folder: Path, **overrides) -> ChatClient:
    values = {"model": "writer", "base_url": server.url, "retries": 2, "timeout": 5.0, **overrides}
    return ChatClient(ChatSettings(**values), folder / "answers.jsonl")


def say(text: str) -> list[dict]:
    return [{"role": "user", "content": text}]


def ask(client: ChatClient, *texts: str):
    return ask_all(client, {text: text for text in texts}, lambda text: client.complete(say(text)), "asks")


def echo(request: dict, number: int) -> str:
    return f"heard {request['messages'][-1]['content']}"


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
        with pytest.raises(ChatStopped, match="268 are used, and the next request can use up to 134"):
            client.complete(say("a"))
    assert len(server.requests) == 2


@pytest.mark.slow
def test_refused_request_takes_nothing_of_the_caps(tmp_path):
    with chat_server(lambda request, number: Reply(status=503, body="{}") if number < 2 else "1") as server:
        asked = ask(client_of(server, tmp_path, max_requests=3, concurrency=3), *"abc")
        assert len(asked.results) == 3 and len(server.requests) == 9


@pytest.mark.slow
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


@pytest.mark.slow
def test_server_that_is_not_there_takes_nothing_of_the_caps(tmp_path):
    with chat_server(echo) as server:
        pass
    client = client_of(server, tmp_path, retries=1, max_requests=1)
    for text in "ab":
        with pytest.raises(ChatFailure, match="ConnectError"):
            client.complete(say(text))
    assert client_of(server, tmp_path).budget.num_requests == 0


def test_equal_requests_are_paid_once(tmp_path):
    with chat_server(lambda request, number: Reply("1", seconds=0.1)) as server:
        client = client_of(server, tmp_path)
        asked = ask_all(client, dict.fromkeys("abcd", "x"), lambda text: client.complete(say(text)), "asks")
        assert asked.results == dict.fromkeys("abcd", "1")
    assert len(server.requests) == len(lines_of(tmp_path / "answers.jsonl")) == 1


def test_every_line_of_a_journal_counts(tmp_path):
    line = json.dumps({"key": "a", "answer": "1", "prompt_tokens": 100, "completion_tokens": 10})
    (tmp_path / "answers.jsonl").write_text(f"{line}\n{line}\n")
    client = ChatClient(ChatSettings("writer"), tmp_path / "answers.jsonl", reads_only=True)
    assert client.budget.describe() == "2 requests, 220 tokens"


@pytest.mark.slow
def test_second_process_is_kept_out_of_a_journal_and_a_reader_is_not(tmp_path):
    script = (
        "import sys; from pathlib import Path; from sq_llava.llm_client.client import ChatClient, ChatSettings\n"
        "client = ChatClient(ChatSettings('writer', sys.argv[1]), Path(sys.argv[2]) / 'answers.jsonl')\n"
        "print(client.complete([{'role': 'user', 'content': 'a'}]), flush=True)\n"
        "sys.stdin.read()"
    )
    with chat_server(echo) as server:
        command = [sys.executable, "-c", script, server.url, str(tmp_path)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as first:
            early = client_of(server, tmp_path)
            assert first.stdout.readline() == "heard a\n"
            with pytest.raises(ValueError, match=r"answers.jsonl: another run writes into this folder"):
                ask(client_of(server, tmp_path), "a", "b")
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
            "import sys; from pathlib import Path; from sq_llava.llm_client.journal import lock; "
            "lock(Path(sys.argv[1]))"
        )
        command = [sys.executable, "-c", script, str(tmp_path / "answers.jsonl")]
        assert b"another run writes" in subprocess.run(command, capture_output=True).stderr
        del client
        assert subprocess.run(command).returncode == 0


def test_odd_characters_of_an_answer_are_kept(tmp_path):
    text = "a\u2028b\u2029c\u0085d"

    said = {"a": text, "b": "half \ud83d of one"}
    with chat_server(lambda request, number: said[request["messages"][-1]["content"]]) as server:
        asked = ask(client_of(server, tmp_path), "a", "b")
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


@pytest.mark.slow
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
        for _ in range(2):
            client = client_of(server, tmp_path)
            asked = ask_all(client, {each: each for each in "abcd"}, work_with(client), "asks")
            assert asked.results == dict.fromkeys("abcd", "heard go on")
    assert len(server.requests) == 8


@pytest.mark.parametrize("concurrency", [1, 8])
def test_cap_on_tokens_is_never_passed(concurrency, tmp_path):
    # An answer takes 100 + 10 tokens, and is counted as 34 bytes + 100 tokens before: the fourth fits, the fifth not.
    cap = {"max_total_tokens": 500, "max_tokens": 100, "concurrency": concurrency}
    with chat_server(lambda request, number: Reply("1", seconds=0.02)) as server:
        asked = ask(client_of(server, tmp_path, **cap), *"abcdefgh")
        assert "--max-total-tokens 500: 440 are used, and the next request can use up to 134." in asked.stopped
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
