"""What requests use: counted, estimated, and kept below the caps whatever a server does."""

import json
import tempfile
from pathlib import Path
from unittest.mock import patch

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sq_llava.llm_client import client as client_module
from sq_llava.llm_client.client import ChatFailure, ChatStopped, NotAsked, measure
from sq_llava.llm_client.journal import Journal
from tests.chat_server import Reply, chat_server, completion
from tests.llm_client.clients import ask, client_of, echo, reader_of, refusal, say


PIXEL = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 10_000}}


pytestmark = pytest.mark.usefixtures("api_key")


@pytest.mark.parametrize(
    "failure", [Reply(closes=True), Reply("late", seconds=1.5), Reply("1", cuts=True)], ids=["closed", "slow", "cut"]
)
def test_lost_request_counts_in_full_each_time_it_is_sent(failure, tmp_path):
    # 34 bytes + 100 tokens are lost twice. A third time does not fit, although four are allowed.
    with chat_server(lambda request, number: failure) as server:
        client = client_of(server, tmp_path, retries=3, max_tokens=100, max_total_tokens=300, timeout=1.0)
        with pytest.raises(ChatStopped, match="268 are used, and the next request can use up to 134"):
            client.complete(say("a"))
    assert len(server.requests) == 2


@pytest.mark.slow
def test_refused_request_does_not_count(tmp_path):
    with chat_server(lambda request, number: Reply(status=503, body="{}") if number < 2 else "1") as server:
        asked = ask(client_of(server, tmp_path, max_requests=3, concurrency=3), *"abc")
        assert len(asked.results) == 3 and len(server.requests) == 9


@pytest.mark.slow
def test_caps_count_all_runs_and_lost_requests(tmp_path):
    failures = {"a": Reply(body=completion(None)), "b": Reply(closes=True), "c": Reply("late", seconds=1.5)}
    with chat_server(lambda request, number: failures.get(request["messages"][-1]["content"], "1")) as server:
        for _ in range(2):
            client = client_of(server, tmp_path, max_requests=4, retries=0, timeout=1.0, concurrency=1)
            asked = ask(client, *"abcde")
            assert "--max-requests 4" in asked.stopped and list(asked.results) == ["d"]
        # 34 bytes + 1024 tokens for each lost request; the empty answer as the server counts it.
        assert str(client_of(server, tmp_path).budget.spent) == f"4 requests, {2 * 1058 + 2 * 110:,} tokens"
    assert len(server.requests) == 4


@pytest.mark.slow
def test_request_without_a_connection_does_not_count(tmp_path):
    with chat_server(echo) as server:
        pass
    client = client_of(server, tmp_path, retries=1, max_requests=1)
    for text in "ab":
        with pytest.raises(ChatFailure, match="ConnectError"):
            client.complete(say(text))
    assert client_of(server, tmp_path).budget.num_requests == 0


def test_every_line_of_a_journal_counts(tmp_path):
    line = json.dumps({"key": "a", "answer": "1", "prompt_tokens": 100, "completion_tokens": 10})
    (tmp_path / "answers.jsonl").write_text(f"{line}\n{line}\n")
    assert str(reader_of(tmp_path).budget.spent) == "2 requests, 220 tokens"


def test_reply_that_is_longer_than_the_limit_raises_what_is_reserved_later(tmp_path):
    # Each answer uses 150 + 100 tokens instead of 10 + 34. The first goes alone. Then 250 + (150 + 100) fit once.
    reply = Reply(body=completion("1", completion_tokens=150), seconds=0.05)
    caps = {"max_total_tokens": 900, "max_tokens": 10}
    with chat_server(lambda request, number: reply) as server:
        asked = ask(client_of(server, tmp_path, **caps), *"abcdefgh")
        assert "An answer had 150 tokens: the server ignores max_completion_tokens 10." in asked.stopped
        assert "Try --max-tokens-field max_tokens." in asked.stopped
        assert client_of(server, tmp_path).budget.spent.completion_tokens == 150 * len(server.requests) == 450
        ask(client_of(server, tmp_path, **caps), *"abcdefgh")
        assert len(server.requests) == 3
        # The other field may be honoured, so one request tries it.
        ask(client_of(server, tmp_path, **caps, max_tokens_field="max_tokens"), *"abcdefgh")
    assert len(server.requests) == 4 and "max_completion_tokens" not in server.requests[3]


REPLIES = st.sampled_from(
    [
        Reply("1"),
        Reply(body=completion("1", completion_tokens=90), billed=(100, 90)),
        Reply(body=completion(None, completion_tokens=100), billed=(100, 100)),
        Reply(body=completion("1", finish_reason="length", completion_tokens=100), billed=(100, 100)),
        Reply(body=completion("1", usage=None), billed=(34, 70)),
        Reply(body=completion("1", completion_tokens=None), billed=(100, 50)),
        Reply(body='{"choices": [{"mess', billed=(34, 100)),
        Reply("1", cuts=True),
        Reply(closes=True),
        refusal(400),
        refusal(403),
        Reply(status=429, headers={"Retry-After": "0"}, body="{}"),
        Reply(body=json.dumps({"error": {"message": "no"}}), billed=(0, 0)),
    ]
)


@given(replies=st.lists(REPLIES, min_size=1, max_size=8), concurrency=st.sampled_from([1, 4]))
@settings(max_examples=10, deadline=None)
@pytest.mark.slow
def test_whatever_a_server_does_the_cap_holds_and_paid_replies_are_kept(replies, concurrency):
    given_out = iter(replies * 20)
    caps = {"max_total_tokens": 1000, "max_tokens": 100, "image_tokens": 1, "concurrency": concurrency, "retries": 1}
    items = [f"{number:070}" for number in range(8)]  # a prompt has more than 100 bytes, so at most 100 tokens
    with (
        tempfile.TemporaryDirectory() as folder,
        patch.object(client_module, "LONGEST_BACKOFF", 0.0),
        chat_server(lambda request, number: next(given_out)) as server,
    ):
        for _ in range(2):
            num_sent = len(server.requests)
            before = Journal(Path(folder) / "answers.jsonl")
            client = client_of(server, Path(folder), **caps)
            asked = ask(client, *items)
            # What was paid is not asked for again.
            paid = {item for item in items if before.get(client.request(say(item)).key) is not None}
            assert paid.isdisjoint(request["messages"][0]["content"] for request in server.requests[num_sent:])
            spent = client.budget.spent
            assert sum(server.billed) <= spent.prompt_tokens + spent.completion_tokens <= 1000
            assert len(asked.results) + len(asked.failures) + len(asked.unusable) + asked.num_open == len(items)
            stored = [line for line in client.journal.all() if "refused" not in line]
            assert len(stored) == spent.num_requests


@pytest.mark.parametrize("concurrency", [1, 8])
def test_cap_on_tokens_is_never_exceeded(concurrency, tmp_path):
    # An answer uses 30 + 90 tokens and reserves 34 bytes + 100 tokens. The fourth request fits, the fifth does not.
    cap = {"max_total_tokens": 500, "max_tokens": 100, "concurrency": concurrency}
    reply = Reply(body=completion("1", 30, 90), seconds=0.02)
    with chat_server(lambda request, number: reply) as server:
        asked = ask(client_of(server, tmp_path, **cap), *"abcdefgh")
        assert "--max-total-tokens 500: 480 are used, and the next request can use up to 134." in asked.stopped
        assert len(server.requests) == 4
        ask(client_of(server, tmp_path, **cap), *"abcdefgh")
    assert len(server.requests) == 4


def test_server_that_does_not_count_gets_many_requests_at_a_time_after_the_first(tmp_path):
    reply = Reply(body=completion("1", usage=None), seconds=0.1)
    with chat_server(lambda request, number: reply) as server:
        ask(client_of(server, tmp_path, max_total_tokens=10_000, max_tokens=100, concurrency=4), *"abcdefghi")
    assert len(server.requests) == 9 and server.most_at_once == 4


def test_budget_describes_what_was_used(tmp_path):
    with chat_server(lambda request, number: "1") as server:
        client = client_of(server, tmp_path, input_price=100.0, output_price=1000.0)
        ask(client, *"abc")
        assert str(client.budget.spent) == "3 requests, 330 tokens, 0.0600 spent"
        assert str(client_of(server, tmp_path).budget.spent) == "3 requests, 330 tokens"


def test_image_counts_as_a_fixed_number_of_tokens(tmp_path):
    messages = [{"role": "user", "content": [{"type": "text", "text": "What is it?"}, PIXEL, PIXEL]}]
    with chat_server(lambda request, number: "A dog.") as server:
        client = client_of(server, tmp_path, image_tokens=50, max_tokens=7)
        estimate = client.estimate([client.request(messages)])
        assert client.complete(messages) == "A dog."
    assert server.requests[0]["messages"][0]["content"][1] == PIXEL
    assert 100 < estimate.prompt_tokens < 150 and estimate.completion_tokens == 7


def test_estimate_has_a_cost_and_needs_no_key(tmp_path, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    client = reader_of(tmp_path, max_tokens=100, input_price=1.0, output_price=10.0)
    text = "x" * 4000
    estimate = client.estimate([client.request(say(text))] * 2)
    assert estimate.num_requests == 2 and 2000 <= estimate.prompt_tokens <= 2020
    assert estimate.cost == pytest.approx((estimate.prompt_tokens + 200 * 10) / 1e6)
    with pytest.raises(NotAsked):
        client.complete(say(text))
    assert not list(tmp_path.iterdir())


@given(texts=st.lists(st.text(max_size=30), max_size=4), num_images=st.integers(0, 3))
@settings(max_examples=50, deadline=None)
def test_byte_count_of_a_prompt_does_not_depend_on_its_images(texts, num_images):
    def messages(count):
        parts = [{"type": "text", "text": text} for text in texts]
        return [{"role": "user", "content": [*parts, *[PIXEL] * count]}]

    assert measure(messages(num_images)) == (num_images, measure(messages(0))[1])
