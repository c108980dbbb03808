"""The chat client with a server on this machine that may also refuse, fail or be slow: journal, retries and caps."""

import json
import subprocess
import sys
import tempfile
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from unittest.mock import patch

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sq_llava.llm_client import client as client_module
from sq_llava.llm_client.asking import ask_all
from sq_llava.llm_client.client import ChatClient, ChatFailure, ChatStopped, NotAsked, UnusableAnswer, measure
from sq_llava.llm_client.journal import Journal
from sq_llava.llm_client.replies import (
    BROKEN,
    CUT_OFF,
    EMPTY,
    FILTERED,
    REFUSED,
    TOO_LONG,
    read_completion,
    retry_after,
    without_thoughts,
)
from sq_llava.llm_client.settings import ChatSettings
from tests.chat_server import Reply, chat_server, completion
from tests.processes import lines_of


PIXEL = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 10_000}}


pytestmark = pytest.mark.usefixtures("api_key")


def client_of(server, folder: Path, server_matters: bool = False, **overrides) -> ChatClient:
    values = {"model": "writer", "base_url": server.url, "retries": 2, "timeout": 5.0, **overrides}
    return ChatClient(ChatSettings(**values), folder / "answers.jsonl", server_matters)


def reader_of(folder: Path, **settings) -> ChatClient:
    """A client that only reads the journal in `folder`."""
    return ChatClient(ChatSettings("writer", **settings), folder / "answers.jsonl", reads_only=True)


def say(text: str) -> list[dict]:
    return [{"role": "user", "content": text}]


def ask(client: ChatClient, *texts: str):
    return ask_all(client, {text: text for text in texts}, lambda text: client.complete(say(text)), "asks")


def echo(request: dict, number: int) -> str:
    return f"heard {request['messages'][-1]['content']}"


@pytest.mark.parametrize(("server_matters", "num_requests"), [(False, (1, 0)), (True, (1, 1))])
def test_answer_of_another_server_is_reused_unless_the_server_matters(server_matters, num_requests, tmp_path):
    with chat_server(echo) as server, chat_server(echo) as other:
        for each in (server, other, server):
            client = client_of(each, tmp_path, server_matters=server_matters)
            assert client.complete(say("a")) == "heard a"
    assert (len(server.requests), len(other.requests)) == num_requests


def test_broken_line_of_a_journal_is_an_error_with_its_number(tmp_path):
    (tmp_path / "answers.jsonl").write_text('{"key": "a", "prompt_tokens": 1, "completion_tokens": 1}\n\0\0\n')
    with pytest.raises(ValueError, match=r"answers.jsonl, line 2: cannot be read as JSON: .* Remove the line"):
        reader_of(tmp_path)


def test_reader_leaves_the_line_that_another_process_is_writing(tmp_path):
    with chat_server(echo) as server:
        client_of(server, tmp_path).complete(say("a"))
    journal = tmp_path / "answers.jsonl"
    content = journal.read_bytes() + b'{"key": "b", "ans'
    journal.write_bytes(content)
    assert reader_of(tmp_path).complete(say("a")) == "heard a" and journal.read_bytes() == content


def test_results_are_in_the_order_of_the_items(tmp_path):
    def reply(request, number):
        text = request["messages"][-1]["content"]
        return Reply(text, seconds=0.1 if text in "ac" else 0.0)

    with chat_server(reply) as server:
        asked = ask(client_of(server, tmp_path), *"abcd")
    assert list(asked.results.items()) == [(each, each) for each in "abcd"]


def test_failures_differ_from_open_items_and_are_tried_again(tmp_path):
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


def test_equal_requests_are_paid_once(tmp_path):
    with chat_server(lambda request, number: Reply("1", seconds=0.1)) as server:
        client = client_of(server, tmp_path)
        asked = ask_all(client, dict.fromkeys("abcd", "x"), lambda text: client.complete(say(text)), "asks")
        assert asked.results == dict.fromkeys("abcd", "1")
    assert len(server.requests) == len(lines_of(tmp_path / "answers.jsonl")) == 1


def test_every_line_of_a_journal_counts(tmp_path):
    line = json.dumps({"key": "a", "answer": "1", "prompt_tokens": 100, "completion_tokens": 10})
    (tmp_path / "answers.jsonl").write_text(f"{line}\n{line}\n")
    assert str(reader_of(tmp_path).budget.spent) == "2 requests, 220 tokens"


@pytest.mark.slow
def test_journal_is_locked_for_a_second_process_but_not_for_a_reader(tmp_path):
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
            assert reader_of(tmp_path).complete(say("a")) == "heard a"
        # `early` was made before the first process answered, and must not ask again.
        assert len(ask(early, "a", "b").results) == 2
    assert len(server.requests) == 2 and early.budget.num_requests == 2


def test_journal_is_unlocked_when_its_client_is_deleted(tmp_path):
    with chat_server(echo) as server:
        client = client_of(server, tmp_path)
        client.complete(say("a"))
        script = (
            "import sys; from sq_llava.output import output_lock\nwith output_lock(sys.argv[1], 'answers.jsonl'): pass"
        )
        command = [sys.executable, "-c", script, str(tmp_path)]
        assert b"another run writes" in subprocess.run(command, capture_output=True).stderr
        del client
        assert subprocess.run(command).returncode == 0
    assert [file.name for file in tmp_path.iterdir()] == ["answers.jsonl"]


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
    answer = read_completion(completion(text), "writer", (1, 1))["answer"]
    answer.encode()
    whole = json.loads(json.dumps(text))  # two adjacent halves of a surrogate pair become one character
    assert len(answer) == len(whole)
    for ours, theirs in zip(answer, whole):
        assert ours == theirs or (ours == "\ufffd" and "\ud800" <= theirs <= "\udfff")


@pytest.mark.parametrize("zone", ["", " -0000", " GMT", " +0000"])
def test_date_of_retry_after_is_read_with_any_name_of_its_zone(zone):
    later = datetime.now(UTC) + timedelta(seconds=60)
    assert 55 < retry_after(f"{later:%a, %d %b %Y %H:%M:%S}{zone}") <= 60


@pytest.mark.parametrize(
    ("header", "seconds"), [("soon", None), ("-3", 0.0), ("nan", 0.0), ("inf", 120.0), ("7", 7.0)]
)
def test_odd_numbers_of_retry_after_give_sensible_waits(header, seconds):
    assert retry_after(header) == seconds


@pytest.mark.slow
def test_date_of_retry_after_is_waited_for(tmp_path):
    later = format_datetime(datetime.now(UTC) + timedelta(seconds=2.5), usegmt=True)  # whole seconds: at least 1.5
    refusal = Reply(status=429, headers={"Retry-After": later}, body="{}")
    with chat_server(lambda request, number: refusal if number == 0 else "1") as server:
        assert client_of(server, tmp_path).complete(say("a")) == "1"
    assert server.times[1] - server.times[0] > 1.0


UNUSABLE = {
    EMPTY: completion(None),
    CUT_OFF: completion("Half of a", finish_reason="length"),
    FILTERED: completion("Half of a", finish_reason="content_filter"),
    REFUSED: completion(None, choices=[{"message": {"content": None, "refusal": "I cannot."}}]),
    BROKEN: completion(None, choices=[], error={"message": "died"}),
    TOO_LONG: completion("a" * 1_000_001),
}


@pytest.mark.parametrize("fault", UNUSABLE)
def test_unusable_reply_is_paid_as_counted_and_only_another_attempt_asks_again(fault, tmp_path):
    def reply(request, number):
        return "1" if request.get("seed") else Reply(body=UNUSABLE[fault])

    with chat_server(reply) as server:
        for _ in range(2):
            client = client_of(server, tmp_path)
            with pytest.raises(UnusableAnswer, match=fault):
                client.complete(say("a"))
            asked = ask(client_of(server, tmp_path), "a")
            assert asked.unusable["a"][0] == fault and not asked.failures and not asked.num_open
        assert len(server.requests) == 1 and str(client.budget.spent) == "1 request, 110 tokens"
        client = client_of(server, tmp_path, attempts=2)
        assert list(client.answers(say("a"))) == ["1"] and len(server.requests) == 2
    assert (tmp_path / "answers.jsonl").stat().st_size < 2000


# Good answers in bodies that other clients fail on, and the prompt and answer tokens to count. Without a count, these
# are at most 34 and 1024.
ODD_BODIES = {
    "null": (completion("fine", completion_tokens=None), (100, 1024)),
    "no usage": (completion("fine", usage=None), (34, 1024)),
    "usage of zero": (completion("fine", 0, 0), (34, 1024)),
    "infinite": (completion("fine", float("inf")), (34, 10)),
    "negative": (completion("fine", -(10**9), -1), (34, 1024)),
    "text": (completion("fine", "100", "many"), (100, 1024)),
    "total": (completion("fine", usage={"prompt_tokens": 9, "completion_tokens": 10, "total_tokens": 59}), (9, 50)),
    "parts": (completion([{"type": "thinking", "thinking": []}, {"type": "text", "text": "fine"}]), (100, 10)),
    "texts": (completion(["fi", "ne"]), (100, 10)),
    "no model": (completion("fine", model=None), (100, 10)),
    "no error": (completion("fine", error=None), (100, 10)),
    "other finish": (completion("fine", finish_reason="end_turn"), (100, 10)),
    "thoughts": (completion("<think>\nis it?</think>\nfine"), (100, 10)),
}  # fmt: skip


@pytest.mark.parametrize("form", ODD_BODIES)
def test_good_answer_in_an_odd_body_is_used_and_no_bill_is_lowered(form, tmp_path):
    body, tokens = ODD_BODIES[form]
    with chat_server(lambda request, number: Reply(body=body)) as server:
        client = client_of(server, tmp_path)
        assert client.complete(say("a")) == "fine"
    assert (client.budget.spent.prompt_tokens, client.budget.spent.completion_tokens) == tokens


def test_text_longer_than_the_limit_counts_by_its_length_if_the_server_does_not_count():
    assert read_completion(completion("a" * 4000, usage=None), "writer", (34, 100))["completion_tokens"] == 1000


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("<think>8 7?</think>\n9 6", "9 6"),
        ("8 7?</think>9 6", "9 6"),
        ("<thinking>a</thinking><Reasoning>b</Reasoning> c ", "c"),
        ("[THINK]a[/THINK]b", "b"),
        ("<|channel|>analysis<|message|>a<|end|><|start|>assistant<|channel|>final<|message|>b", "b"),
        ("<think>I wonder", ""),
        ("a <think> b", "a <think> b"),
    ],
)
def test_reasoning_is_no_part_of_an_answer(text, answer):
    assert without_thoughts(text) == answer


WRONG_BODIES = {
    "deep": ("[" * 100_000, "not a chat completion .*nested too deeply"),
    "null": ("null", "not a chat completion"),
    "binary": ("\0" * 100, "not a chat completion"),
    "page": ("<html>" + "a" * 100_000, "not a chat completion"),
    "no choices": (completion("", choices=[]), "not a chat completion"),
}


@pytest.mark.parametrize("kind", WRONG_BODIES)
def test_response_that_is_no_completion_is_a_short_failure_and_counts_in_full(tmp_path, kind):
    body, error = WRONG_BODIES[kind]
    with chat_server(lambda request, number: Reply(body=body)) as server:
        client = client_of(server, tmp_path, retries=0)
        with pytest.raises(ChatFailure, match=error) as raised:
            client.complete(say("a"))
    assert len(str(raised.value)) < 600 and not isinstance(raised.value, UnusableAnswer)
    [line] = client.journal.all()
    assert "answer" not in line and (line["prompt_tokens"], line["completion_tokens"]) == (34, 1024)
    assert (tmp_path / "answers.jsonl").stat().st_size < 2000


def refusal(status: int, message: str = "no") -> Reply:
    return Reply(status=status, body=json.dumps({"error": {"message": message}}))


@pytest.mark.parametrize("status", [400, 402, 403, 422])
def test_same_refusal_in_a_row_ends_the_run_and_one_does_not(status, tmp_path):
    def reply(request, number):
        return "1" if request["messages"][0]["content"] in "bcd" else refusal(status)

    with chat_server(reply) as server:
        asked = ask(client_of(server, tmp_path, concurrency=1), *"abcdefghijklmnopq")
        assert list(asked.results) == list("bcd") and len(asked.failures) == 11 and asked.num_open == 3
        assert f"the server refused 10 requests in a row: Error code: {status} - no." in asked.stopped
        sent = [request["messages"][0]["content"] for request in server.requests]
        # Before the first answer of a run, a few are enough. What was refused before comes last.
        again = ask(client_of(server, tmp_path, concurrency=1), *"abcdefghijklmnopq")
        assert "the server refused 5 requests in a row" in again.stopped and len(again.failures) == 14
    assert [request["messages"][0]["content"] for request in server.requests[len(sent) :]] == list("opqae")


def test_items_that_are_refused_do_not_keep_the_others_from_being_made(tmp_path):
    def reply(request, number):
        return refusal(403, "flagged") if int(request["messages"][0]["content"]) < 12 else "1"

    items = list(map(str, range(20)))
    with chat_server(reply) as server:
        for _ in range(3):
            asked = ask(client_of(server, tmp_path, concurrency=1), *items)
    assert list(asked.results) == items[12:] and len(asked.failures) == 12 and not asked.num_open
    assert str(client_of(server, tmp_path).budget.spent) == "8 requests, 880 tokens"


@pytest.mark.parametrize(
    ("code", "num_requests", "error"),
    [(400, 1, "no"), (503, 3, "no"), ("503", 3, "no"), ("odd", 1, "no"), (None, 1, "no")],
)
def test_error_with_status_200_is_treated_by_its_own_status(code, num_requests, error, tmp_path, monkeypatch):
    monkeypatch.setattr(client_module, "LONGEST_BACKOFF", 0.0)
    body = json.dumps({"error": {"message": "no", "code": code}})
    with chat_server(lambda request, number: Reply(body=body)) as server:
        client = client_of(server, tmp_path)
        with pytest.raises(ChatFailure, match=error):
            client.complete(say("a"))
    assert len(server.requests) == num_requests and client.budget.spent.num_requests == 0


def test_server_that_gives_no_usable_answer_is_not_paid_for_all(tmp_path):
    with chat_server(lambda request, number: Reply(body=UNUSABLE[CUT_OFF])) as server:
        asked = ask(client_of(server, tmp_path, concurrency=1), *"abcdefgh")
    assert f"5 requests in a row have no usable answer: {CUT_OFF}. Raise --max-tokens." in asked.stopped
    assert len(server.requests) == 5 and len(asked.unusable) == 5 and asked.num_open == 3


def test_fault_that_the_caller_handles_ends_no_run_and_gives_the_text(tmp_path):
    with chat_server(lambda request, number: Reply(body=UNUSABLE[CUT_OFF])) as server:
        client = client_of(server, tmp_path, attempts=2)
        for number in range(12):
            with pytest.raises(UnusableAnswer) as raised:
                next(client.answers(say(str(number)), handled=[CUT_OFF]))
            assert raised.value.text == "Half of a"
    assert len(server.requests) == 12


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


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"input_price": 1.0}, "--input-price and --output-price: give both"),
        ({"max_cost": 1.0}, "--max-cost needs"),
        ({"base_url": "localhost:8000"}, "--base-url: give http"),
        ({"max_tokens_field": "tokens"}, "--max-tokens-field is 'tokens': choose max_completion_tokens or max_tokens"),
        ({"extra_body": "{"}, "--extra-body {: not JSON"),
        ({"extra_body": "[1]"}, r"--extra-body \[1\]: give an object"),
        ({"extra_body": '{"max_tokens": 5}'}, "--extra-body sets max_tokens: use --max-tokens"),
        ({"extra_body": '{"n": 2}'}, "--extra-body sets n, which this command sets itself"),
        ({"extra_body": '{"seed": "a"}'}, "seed must be a whole number or null"),
    ],
)
def test_wrong_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        ChatSettings("writer", **settings)


def test_further_fields_are_sent_and_change_the_answer_that_is_kept(tmp_path):
    with chat_server(echo) as server:
        client_of(server, tmp_path).complete(say("a"))
        extra = '{"top_k": 20, "temperature": null, "chat_template_kwargs": {"enable_thinking": false}}'
        client_of(server, tmp_path, top_p=0.9, extra_body=extra).complete(say("a"))
        client_of(server, tmp_path, max_tokens_field="max_tokens").complete(say("a"))
    first, second = server.requests
    assert first == {"model": "writer", "messages": say("a"), "temperature": 0.0, "max_completion_tokens": 1024}
    added = {"top_p": 0.9, "top_k": 20, "chat_template_kwargs": {"enable_thinking": False}}
    assert second == {"model": "writer", "messages": say("a"), "max_completion_tokens": 1024, **added}


@pytest.mark.parametrize(
    ("extra", "seeds"), [(None, [None, 1, 2]), ('{"seed": 7}', [7, 8, 9]), ('{"seed": null}', [None] * 3)]
)
def test_each_attempt_has_another_seed(extra, seeds, tmp_path):
    with chat_server(echo) as server:
        assert len(list(client_of(server, tmp_path, attempts=3, extra_body=extra).answers(say("a")))) == 3
    assert [request.get("seed") for request in server.requests] == seeds
