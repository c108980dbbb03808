"""The chat client with a server on this machine that may also refuse, fail or be slow: journal, attempts, refusals."""

import json
import subprocess
import sys

import pytest

from sq_llava.llm_client import client as client_module
from sq_llava.llm_client.asking import ask_all
from sq_llava.llm_client.client import ChatFailure, UnusableAnswer
from sq_llava.llm_client.replies import CUT_OFF
from sq_llava.llm_client.settings import ChatSettings
from tests.chat_server import KEY, Reply, chat_server, completion
from tests.llm_client.clients import ask, client_of, echo, reader_of, refusal, say
from tests.processes import lines_of


pytestmark = pytest.mark.usefixtures("api_key")


@pytest.mark.parametrize(("server_matters", "num_requests"), [(False, (1, 0)), (True, (1, 1))])
def test_answer_of_another_server_is_reused_unless_the_server_matters(server_matters, num_requests, tmp_path):
    with chat_server(echo) as server, chat_server(echo) as other:
        for each in (server, other, server):
            client = client_of(each, tmp_path, server_matters=server_matters)
            assert client.complete(say("a")) == "heard a"
    assert (len(server.requests), len(other.requests)) == num_requests


def test_line_break_after_the_key_is_not_sent(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", f"{KEY}\r\n")
    with chat_server(echo) as server:
        assert client_of(server, tmp_path).complete(say("a")) == "heard a"


def test_request_that_cannot_be_sent_does_not_count(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "two\nlines")
    with chat_server(echo) as server:
        client = client_of(server, tmp_path, retries=0)
        with pytest.raises(ChatFailure, match="LocalProtocolError"):
            client.complete(say("a"))
    assert not server.requests and client.budget.num_requests == 0


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


def test_equal_requests_are_paid_once(tmp_path):
    with chat_server(lambda request, number: Reply("1", seconds=0.1)) as server:
        client = client_of(server, tmp_path)
        asked = ask_all(client, dict.fromkeys("abcd", "x"), lambda text: client.complete(say(text)), "asks")
        assert asked.results == dict.fromkeys("abcd", "1")
    assert len(server.requests) == len(lines_of(tmp_path / "answers.jsonl")) == 1


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


@pytest.mark.parametrize(("code", "num_requests"), [(400, 1), (503, 3), ("503", 3), ("odd", 1), (None, 1)])
def test_error_with_status_200_is_treated_by_its_own_status(code, num_requests, tmp_path, monkeypatch):
    monkeypatch.setattr(client_module, "LONGEST_BACKOFF", 0.0)
    body = json.dumps({"error": {"message": "no", "code": code}})
    with chat_server(lambda request, number: Reply(body=body)) as server:
        client = client_of(server, tmp_path)
        with pytest.raises(ChatFailure, match="no"):
            client.complete(say("a"))
    assert len(server.requests) == num_requests and client.budget.spent.num_requests == 0


def test_server_that_gives_no_usable_answer_is_not_paid_for_all(tmp_path):
    with chat_server(lambda request, number: Reply(body=completion("Half of a", finish_reason="length"))) as server:
        asked = ask(client_of(server, tmp_path, concurrency=1), *"abcdefgh")
    assert f"5 requests in a row have no usable answer: {CUT_OFF}. Raise --max-tokens." in asked.stopped
    assert len(server.requests) == 5 and len(asked.unusable) == 5 and asked.num_open == 3


def test_fault_that_the_caller_handles_ends_no_run_and_gives_the_text(tmp_path):
    with chat_server(lambda request, number: Reply(body=completion("Half of a", finish_reason="length"))) as server:
        client = client_of(server, tmp_path, attempts=2)
        for number in range(12):
            with pytest.raises(UnusableAnswer) as raised:
                next(client.answers(say(str(number)), handled=[CUT_OFF]))
            assert raised.value.text == "Half of a"
    assert len(server.requests) == 12


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
