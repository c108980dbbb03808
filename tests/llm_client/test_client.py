"""The chat client with a server on this machine that may also refuse, fail or be slow: journal, retries and caps."""

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
from sq_llava.llm_client.client import ChatClient, ChatFailure, ChatStopped, NotAsked, UnusableAnswer, measure
from sq_llava.llm_client.replies import read_completion, retry_after
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
        # 34 bytes + 1024 tokens for each lost request.
        assert client_of(server, tmp_path).budget.describe() == f"4 requests, {3 * 1058 + 110:,} tokens"
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
    assert reader_of(tmp_path).budget.describe() == "2 requests, 220 tokens"


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
    answer = read_completion(completion(text), (1, 1))["answer"]
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


def test_answer_without_text_is_a_failure_of_one_request(tmp_path):
    with chat_server(lambda request, number: Reply(body=completion(None))) as server:
        with pytest.raises(UnusableAnswer, match="has no text"):
            client_of(server, tmp_path).complete(say("a"))
        assert issubclass(UnusableAnswer, ChatFailure)
        asked = ask(client_of(server, tmp_path), "a")
    assert "has no text" in asked.failures["a"]


WRONG_BODIES = {
    "long": (completion("a" * 10_000_000), "10,000,[0-9]{3} characters, more than 1,000,000"),
    "deep": ("[" * 100_000, "not a chat completion .*nested too deeply"),
    "infinite tokens": (completion("a", prompt_tokens=float("inf")), "not a chat completion .*infinity"),
    "negative tokens": (completion("a", prompt_tokens=-(10**9)), "a negative number of tokens"),
    "null": ("null", "not a chat completion"),
    "binary": ("\0" * 100, "not a chat completion"),
    "number": (completion(7), "has no text"),
    "page": ("<html>" + "a" * 100_000, "not a chat completion"),
}


@pytest.mark.parametrize("kind", WRONG_BODIES)
def test_hostile_reply_is_a_short_failure_of_one_request_and_lowers_no_bill(tmp_path, kind):
    body, error = WRONG_BODIES[kind]
    with chat_server(lambda request, number: Reply(body=body)) as server:
        client = client_of(server, tmp_path)
        with pytest.raises(UnusableAnswer, match=error) as raised:
            client.complete(say("a"))
    assert len(str(raised.value)) < 600
    [line] = client.journal.all()
    assert "answer" not in line and line["prompt_tokens"] > 0
    assert (tmp_path / "answers.jsonl").stat().st_size < 2000


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
    # An answer uses 100 + 10 tokens and reserves 34 bytes + 100 tokens. The fourth request fits, the fifth does not.
    cap = {"max_total_tokens": 500, "max_tokens": 100, "concurrency": concurrency}
    with chat_server(lambda request, number: Reply("1", seconds=0.02)) as server:
        asked = ask(client_of(server, tmp_path, **cap), *"abcdefgh")
        assert "--max-total-tokens 500: 440 are used, and the next request can use up to 134." in asked.stopped
        assert len(server.requests) == 4
        ask(client_of(server, tmp_path, **cap), *"abcdefgh")
    assert len(server.requests) == 4


def test_budget_describes_what_was_used(tmp_path):
    with chat_server(lambda request, number: "1") as server:
        client = client_of(server, tmp_path, input_price=100.0, output_price=1000.0)
        ask(client, *"abc")
        assert client.budget.describe() == "3 requests, 330 tokens, 0.06 spent"
        assert client_of(server, tmp_path).budget.describe() == "3 requests, 330 tokens"


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
    ],
)
def test_wrong_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        ChatSettings("writer", **settings)
