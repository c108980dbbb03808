"""The judge on a local server that also refuses, fails or answers slowly: what is kept, retried and paid."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from sq_llava.evaluation.judge import Judge, JudgeSettings
from sq_llava.llm_client import client
from sq_llava.llm_client.client import ChatStopped
from sq_llava.llm_client.replies import CUT_OFF, EMPTY
from tests.chat_server import KEY, Reply, chat_server, completion
from tests.processes import lines_of


pytestmark = pytest.mark.usefixtures("api_key")


def judge_of(server, folder, *others, **settings) -> Judge:
    defaults = {"model": "judge", "base_url": server.url, "retries": 3, "timeout": 5.0}
    return Judge(JudgeSettings(**{**defaults, **settings}), [each / "judge.jsonl" for each in (folder, *others)])


def ask(judge: Judge, *questions: str) -> dict:
    """The verdict on each question, whose grade is a number."""
    return judge.complete_all({each: [{"role": "user", "content": each}] for each in questions}, float, "asks")


def test_judge_is_not_asked_twice_for_the_same(tmp_path):
    with chat_server(lambda request, number: "1") as server:
        ask(judge_of(server, tmp_path), "a", "b")
        again = judge_of(server, tmp_path)
        assert {id: verdict.value for id, verdict in ask(again, "a", "b").items()} == {"a": 1.0, "b": 1.0}
        assert len(server.requests) == 2
        ask(judge_of(server, tmp_path, model="another"), "a")
        ask(judge_of(server, tmp_path, max_tokens=5), "a")
        assert len(server.requests) == 4
    assert len(lines_of(tmp_path / "judge.jsonl")) == 4


def test_grades_in_the_folder_of_another_model_are_used_and_counted(tmp_path):
    with chat_server(lambda request, number: "1") as server:
        ask(judge_of(server, tmp_path / "a"), "x", "y")
        judge = judge_of(server, tmp_path / "b", tmp_path / "a", max_requests=3, concurrency=1)
        with pytest.raises(ChatStopped, match="--judge-max-requests 3"):
            ask(judge, "x", "y", "z", "one more")
        assert [request["messages"][0]["content"] for request in server.requests[2:]] == ["z"]
    assert judge.report()["spent"].startswith("3 requests")
    assert [len(lines_of(tmp_path / name / "judge.jsonl")) for name in "ab"] == [2, 1]


def test_truncated_answer_in_the_journal_is_requested_again(tmp_path):
    with chat_server(lambda request, number: "1") as server:
        ask(judge_of(server, tmp_path, concurrency=1), "a", "b")
        file = tmp_path / "judge.jsonl"
        file.write_bytes(file.read_bytes()[:-20])
        ask(judge_of(server, tmp_path), "a", "b")
        assert [request["messages"][0]["content"] for request in server.requests] == ["a", "b", "b"]
    assert len(lines_of(file)) == 2


@pytest.mark.slow
def test_killed_judge_does_not_pay_twice(tmp_path):
    script = (
        "import sys; from pathlib import Path; from sq_llava.evaluation.judge import Judge, JudgeSettings\n"
        "judge = Judge(JudgeSettings('judge', sys.argv[1], concurrency=2), [Path(sys.argv[2]) / 'judge.jsonl'])\n"
        "judge.complete_all({str(n): [{'role': 'user', 'content': str(n)}] for n in range(40)}, float, 'asks')"
    )
    with chat_server(lambda request, number: Reply("1", seconds=0.05)) as server:
        process = subprocess.Popen([sys.executable, "-c", script, server.url, str(tmp_path)])
        while len(server.requests) < 8:
            assert process.poll() is None
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        assert len(server.requests) < 40
        ask(judge_of(server, tmp_path), *map(str, range(40)))
    assert 40 <= len(server.requests) <= 42  # the two requests in progress were lost


@pytest.mark.parametrize(
    "failure",
    [Reply(status=500, body="oops"), Reply(status=503, body="{}"), Reply(closes=True), Reply("1", seconds=1.0)],
    ids=["500", "503", "closed", "slow"],
)
def test_server_that_fails_once_is_asked_again(failure, tmp_path):
    with chat_server(lambda request, number: failure if number == 0 else "1") as server:
        assert ask(judge_of(server, tmp_path, timeout=0.5), "a")["a"].value == 1.0
    assert len(server.requests) == 2


def test_failed_request_is_listed_and_the_others_are_answered(tmp_path):
    def reply(request, number):
        said = {"b": Reply(status=500, body="oops"), "c": Reply(status=400, body='{"error": {"message": "too long"}}')}
        return said.get(request["messages"][0]["content"], "1")

    with chat_server(reply) as server:
        verdicts = ask(judge_of(server, tmp_path, retries=1), "a", "b", "c", "d")
    assert [verdicts[id].value for id in "abcd"] == [1.0, None, None, 1.0]
    assert "500" in verdicts["b"].error
    assert "too long" in verdicts["c"].error
    sent = [request["messages"][0]["content"] for request in server.requests]
    assert (sent.count("b"), sent.count("c")) == (2, 1)  # an invalid request is not retried
    assert len([line for line in lines_of(tmp_path / "judge.jsonl") if "answer" in line]) == 2


def test_answer_that_cannot_be_parsed_is_requested_again_with_a_higher_temperature(tmp_path):
    with chat_server(lambda request, number: "2" if request["temperature"] > 0.5 else "well...") as server:
        assert ask(judge_of(server, tmp_path), "a")["a"].value == 2.0
        assert [request["temperature"] for request in server.requests] == [0.0, 0.5, 1.0]
        verdict = ask(judge_of(server, tmp_path, attempts=2), "a")["a"]
        assert len(server.requests) == 3  # both attempts are kept
    assert verdict.value is None
    assert verdict.text == "well..."
    assert "no answer could be parsed in 2 attempts: could not convert string to float: 'well...'" in verdict.error


@pytest.mark.parametrize(
    ("body", "fault"),
    [(completion(None), EMPTY), (completion("  "), EMPTY), (completion("2", finish_reason="length"), CUT_OFF)],
)
def test_reply_without_a_usable_text_is_paid_and_followed_by_another_attempt(body, fault, tmp_path):
    with chat_server(lambda request, number: "1" if request.get("seed") else Reply(body=body)) as server:
        assert ask(judge_of(server, tmp_path), "a")["a"].value == 1.0
        verdict = ask(judge_of(server, tmp_path, attempts=1), "a")["a"]
    assert len(server.requests) == 2
    assert verdict.value is None and verdict.error == fault


@pytest.mark.parametrize(
    "body",
    ["<html>busy</html>", '{"choices": [{"mess', json.dumps({"choices": [], "model": "m"}), "[]"],
    ids=["html", "cut off", "no choices", "list"],
)
def test_malformed_response_is_no_answer(body, tmp_path, monkeypatch):
    monkeypatch.setattr(client, "LONGEST_BACKOFF", 0.0)
    with chat_server(lambda request, number: Reply(body=body) if number == 0 else "1") as server:
        assert ask(judge_of(server, tmp_path), "a")["a"].value == 1.0
        assert len(server.requests) == 2
        verdict = ask(judge_of(server, tmp_path, retries=0), "b")["b"]
    assert "the server's answer is not a chat completion" in verdict.error


@pytest.mark.parametrize(
    "refusal",
    [
        Reply(status=401, body=json.dumps({"error": {"message": f"Incorrect API key provided: {KEY}."}})),
        Reply(status=404, body=json.dumps({"error": {"message": "no model judge"}})),
        Reply(status=429, body=json.dumps({"error": {"message": "pay", "code": "insufficient_quota"}})),
    ],
    ids=["wrong key", "no such model", "no money"],
)
def test_server_that_refuses_us_stops_the_judge(refusal, tmp_path):
    with chat_server(lambda request, number: refusal) as server:
        with pytest.raises(ChatStopped, match=r"judge: the server refused: .*(API key|no model|pay)") as stop:
            ask(judge_of(server, tmp_path, retries=0, concurrency=1), *"abcdefgh")
        assert len(server.requests) <= 2
    assert KEY not in str(stop.value)


@pytest.mark.slow
@pytest.mark.parametrize("failure", [Reply(closes=True), Reply(status=503, body="{}")], ids=["closed", "503"])
def test_unreachable_server_stops_the_judge(failure, tmp_path):
    def reply(request, number):
        return "1" if int(request["messages"][0]["content"]) in (0, 4) else failure

    with chat_server(reply) as server:
        judge = judge_of(server, tmp_path, retries=0, concurrency=1)
        with pytest.raises(ChatStopped, match="did not answer 10 requests in a row, each sent 1 times: "):
            ask(judge, *map(str, range(40)))
        assert 15 <= len(server.requests) <= 17  # requests in progress are not cancelled
        verdicts = ask(judge_of(server, tmp_path, retries=0, concurrency=1), *map(str, range(10)))
    assert [id for id, verdict in verdicts.items() if verdict.value == 1.0] == ["0", "4"]


def test_key_is_sent_but_never_written(tmp_path, capfd):
    def reply(request, number):
        return "1" if request["messages"][0]["content"] == "a" else Reply(body=f"who is {KEY}?")

    with chat_server(reply) as server:
        judge = judge_of(server, tmp_path)
        verdicts = ask(judge, "a", "b")
    assert set(server.authorizations) == {f"Bearer {KEY}"}
    written = [file.read_text() for file in tmp_path.rglob("*") if file.is_file()]
    said = "".join([*written, str(verdicts), str(judge.report()), str(judge.settings), *capfd.readouterr()])
    assert written
    assert "who is [OPENAI_API_KEY]?" in said
    assert KEY not in said


@pytest.mark.parametrize("concurrency", [1, 8])
def test_cap_on_cost_is_never_exceeded(concurrency, tmp_path):
    # A request costs 30 * 10 + 17 * 100 = 2000 millionths, at most 34 bytes * 10 + 100 tokens * 100 = 10340. After
    # 8000, the fifth request still fits into 20000; the sixth does not.
    prices = {"max_cost": 0.02, "input_price": 10.0, "output_price": 100.0, "max_tokens": 100}
    reply = Reply(body=completion("1", 30, 17), seconds=0.02)
    with chat_server(lambda request, number: reply) as server:
        judge = judge_of(server, tmp_path, concurrency=concurrency, **prices)
        with pytest.raises(ChatStopped, match=r"--judge-max-cost 0.02: 0.01 is spent, and the next request can cost"):
            ask(judge, *"abcdefghijkl")
        assert len(server.requests) == 5
        with pytest.raises(ChatStopped, match="--judge-max-cost"):
            ask(judge_of(server, tmp_path, **prices), *"abcdefghijkl")
        assert len(server.requests) == 5
        assert len(ask(judge_of(server, tmp_path, **{**prices, "max_cost": 1.0}), *"abcdefghijkl")) == 12
    assert len(server.requests) == 12


def test_lost_answer_costs_the_maximum_and_a_refused_request_nothing(tmp_path):
    # At most 34 bytes * 10 + 100 tokens * 100 = 10340 millionths: one request fits into 0.015, two do not.
    prices = {"max_cost": 0.015, "input_price": 10.0, "output_price": 100.0, "max_tokens": 100, "concurrency": 1}
    with (
        chat_server(lambda request, number: Reply(closes=True)) as server,
        pytest.raises(ChatStopped, match=r"0\.01034 is spent"),
    ):
        ask(judge_of(server, tmp_path, retries=0, **prices), "a", "b")
    with chat_server(lambda request, number: Reply(status=500, body="oops")) as server:
        verdicts = ask(judge_of(server, tmp_path / "refused", retries=0, **prices), "a", "b")
    assert all("500" in verdict.error for verdict in verdicts.values())


def test_answer_without_a_token_count_costs_the_maximum(tmp_path):
    body = json.loads(completion("1"))
    del body["usage"]
    with chat_server(lambda request, number: Reply(body=json.dumps(body))) as server:
        ask(judge_of(server, tmp_path, max_tokens=77), "a")
    [line] = lines_of(tmp_path / "judge.jsonl")
    assert line["completion_tokens"] == 77
    assert line["prompt_tokens"] == len('[{"role": "user", "content": "a"}]')


def test_no_more_requests_at_a_time_than_allowed(tmp_path):
    with chat_server(lambda request, number: Reply("1", seconds=0.1)) as server:
        ask(judge_of(server, tmp_path, concurrency=3), *"abcdefghi")
    assert server.most_at_once == 3


def test_wrong_settings_are_refused(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="--judge-max-cost needs --judge-input-price"):
        JudgeSettings("judge", max_cost=1.0, input_price=1.0)
    for url in ("http://me:secret@host/v1", "https://host/v1?key=secret", "host/v1"):
        with pytest.raises(ValueError, match="--judge-base-url: give http") as refusal:
            JudgeSettings("judge", base_url=url)
        assert "secret" not in str(refusal.value)
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(ValueError, match="OPENAI_API_KEY is not set"):
        Judge(JudgeSettings("judge"), [tmp_path / "judge.jsonl"])
