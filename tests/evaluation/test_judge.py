"""The judge on a server of this machine that also refuses, fails and dawdles: what is kept, asked again and paid."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from sq_llava.evaluation.judge import Judge, JudgeSettings
from sq_llava.evaluation.metrics import bootstrap_errors
from sq_llava.llm_client.client import ChatStopped
from tests.chat_server import KEY, Reply, chat_server, completion
from tests.processes import lines_of


pytestmark = pytest.mark.usefixtures("api_key")


def settings_of(server, **overrides) -> JudgeSettings:
    return JudgeSettings(**{"model": "judge", "base_url": server.url, "retries": 3, "timeout": 5.0, **overrides})


def ask(judge: Judge, *questions: str) -> dict:
    return judge.complete_all({each: [{"role": "user", "content": each}] for each in questions}, float, "asks")


def test_judge_is_not_asked_twice_for_the_same(tmp_path):
    with chat_server(lambda request, number: "1") as server:
        ask(Judge(settings_of(server), tmp_path), "a", "b")
        again = Judge(settings_of(server), tmp_path)
        assert {id: verdict.value for id, verdict in ask(again, "a", "b").items()} == {"a": 1.0, "b": 1.0}
        assert len(server.requests) == 2
        ask(Judge(settings_of(server, model="another"), tmp_path), "a")
        ask(Judge(settings_of(server, max_tokens=5), tmp_path), "a")
        assert len(server.requests) == 4
    assert len(lines_of(tmp_path / "judge.jsonl")) == 4


def test_answer_that_a_kill_has_cut_off_is_asked_for_again(tmp_path):
    with chat_server(lambda request, number: "1") as server:
        ask(Judge(settings_of(server, concurrency=1), tmp_path), "a", "b")
        file = tmp_path / "judge.jsonl"
        file.write_bytes(file.read_bytes()[:-20])
        ask(Judge(settings_of(server), tmp_path), "a", "b")
        assert [request["messages"][0]["content"] for request in server.requests] == ["a", "b", "b"]
    assert len(lines_of(file)) == 2


@pytest.mark.slow
def test_killed_judge_does_not_pay_twice(tmp_path):
    script = (
        "import sys; from pathlib import Path; from sq_llava.evaluation.judge import Judge, JudgeSettings\n"
        "judge = Judge(JudgeSettings('judge', sys.argv[1], concurrency=2), Path(sys.argv[2]))\n"
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
        ask(Judge(settings_of(server), tmp_path), *map(str, range(40)))
    assert 40 <= len(server.requests) <= 42  # the two under way were lost


@pytest.mark.slow
def test_refused_requests_are_sent_again_after_the_seconds_of_retry_after(tmp_path):
    def reply(request, number):
        return Reply(status=429, headers={"Retry-After": "0.6"}, body="{}") if number == 0 else "1"

    with chat_server(reply) as server:
        assert ask(Judge(settings_of(server), tmp_path), "a")["a"].value == 1.0
    first, second = server.times
    assert 0.6 <= second - first < 2.0


@pytest.mark.parametrize(
    "failure",
    [Reply(status=500, body="oops"), Reply(status=503, body="{}"), Reply(closes=True), Reply("1", seconds=1.0)],
    ids=["500", "503", "closed", "slow"],
)
def test_server_that_fails_once_is_asked_again(failure, tmp_path):
    with chat_server(lambda request, number: failure if number == 0 else "1") as server:
        assert ask(Judge(settings_of(server, timeout=0.5), tmp_path), "a")["a"].value == 1.0
    assert len(server.requests) == 2


def test_request_that_fails_for_good_is_listed_and_the_others_are_answered(tmp_path):
    def reply(request, number):
        said = {"b": Reply(status=500, body="oops"), "c": Reply(status=400, body='{"error": {"message": "too long"}}')}
        return said.get(request["messages"][0]["content"], "1")

    with chat_server(reply) as server:
        verdicts = ask(Judge(settings_of(server, retries=1), tmp_path), "a", "b", "c", "d")
    assert [verdicts[id].value for id in "abcd"] == [1.0, None, None, 1.0]
    assert "500" in verdicts["b"].error
    assert "too long" in verdicts["c"].error
    sent = [request["messages"][0]["content"] for request in server.requests]
    assert (sent.count("b"), sent.count("c")) == (2, 1)  # what is wrong with a request does not pass
    assert len(lines_of(tmp_path / "judge.jsonl")) == 2


def test_answer_that_cannot_be_read_is_asked_for_again_and_warmer(tmp_path):
    with chat_server(lambda request, number: "2" if request["temperature"] > 0.5 else "well...") as server:
        assert ask(Judge(settings_of(server), tmp_path), "a")["a"].value == 2.0
        assert [request["temperature"] for request in server.requests] == [0.0, 0.5, 1.0]
        verdict = ask(Judge(settings_of(server, attempts=2), tmp_path), "a")["a"]
        assert len(server.requests) == 3  # both attempts are kept
    assert verdict.value is None
    assert verdict.text == "well..."
    assert "not readable in 2 attempts: could not convert string to float: 'well...'" in verdict.error


@pytest.mark.slow
@pytest.mark.parametrize(
    "garbage",
    [
        Reply(body="<html>busy</html>", headers={"Content-Type": "text/html"}),
        Reply(body='{"choices": [{"mess'),
        Reply(body=json.dumps({"choices": [], "model": "m"})),
        Reply(body="[]"),
        Reply(body=completion(None)),
        Reply(body=completion("  ")),
    ],
    ids=["html", "cut off", "no choices", "list", "null", "blank"],
)
def test_garbage_is_no_answer(garbage, tmp_path):
    with chat_server(lambda request, number: garbage if request["temperature"] == 0 else "1") as server:
        assert ask(Judge(settings_of(server), tmp_path), "a")["a"].value == 1.0
        assert len(server.requests) == 2
        verdict = ask(Judge(settings_of(server, attempts=1), tmp_path), "a")["a"]
    assert "the server's answer" in verdict.error


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
            ask(Judge(settings_of(server, retries=0, concurrency=1), tmp_path), *"abcdefgh")
        assert len(server.requests) <= 2
    assert KEY not in str(stop.value)


@pytest.mark.slow
@pytest.mark.parametrize("failure", [Reply(closes=True), Reply(status=503, body="{}")], ids=["closed", "503"])
def test_server_that_is_gone_stops_the_judge(failure, tmp_path):
    def reply(request, number):
        return "1" if int(request["messages"][0]["content"]) in (0, 4) else failure

    with chat_server(reply) as server:
        judge = Judge(settings_of(server, retries=0, concurrency=1), tmp_path)
        with pytest.raises(ChatStopped, match="did not answer 10 requests in a row, each sent 1 times: "):
            ask(judge, *map(str, range(40)))
        assert 15 <= len(server.requests) <= 17  # what is under way is not called back
        verdicts = ask(Judge(settings_of(server, retries=0, concurrency=1), tmp_path), *map(str, range(10)))
    assert [id for id, verdict in verdicts.items() if verdict.value == 1.0] == ["0", "4"]


def test_key_is_sent_and_written_nowhere(tmp_path, capfd):
    def reply(request, number):
        return "1" if request["messages"][0]["content"] == "a" else Reply(body=f"who is {KEY}?")

    with chat_server(reply) as server:
        judge = Judge(settings_of(server), tmp_path)
        verdicts = ask(judge, "a", "b")
    assert set(server.authorizations) == {f"Bearer {KEY}"}
    written = [file.read_text() for file in tmp_path.rglob("*") if file.is_file()]
    said = "".join([*written, str(verdicts), str(judge.report()), str(judge.settings), *capfd.readouterr()])
    assert written
    assert "who is [OPENAI_API_KEY]?" in said
    assert KEY not in said


def test_cap_on_requests_keeps_what_is_done(tmp_path):
    with chat_server(lambda request, number: "1") as server:
        with pytest.raises(ChatStopped, match=r"--judge-max-requests 5\. Raise the cap and run again"):
            ask(Judge(settings_of(server, max_requests=5), tmp_path), *"abcdefgh")
        assert len(server.requests) == 5
        with pytest.raises(ChatStopped, match="--judge-max-requests 5"):
            ask(Judge(settings_of(server, max_requests=5), tmp_path), *"abcdefgh")  # over all runs
        assert len(server.requests) == 5
        assert len(ask(Judge(settings_of(server, max_requests=8), tmp_path), *"abcdefgh")) == 8
        assert len(server.requests) == 8


@pytest.mark.parametrize("concurrency", [1, 8])
def test_cap_on_money_is_never_passed(concurrency, tmp_path):
    # An answer costs 100 * 10 + 10 * 100 = 2000 millionths, and 34 bytes * 10 + 100 tokens * 100 = 10340 at most: the
    # fifth, after 8000, still fits into 20000, the sixth does not.
    prices = {"max_cost": 0.02, "input_price": 10.0, "output_price": 100.0, "max_tokens": 100}
    with chat_server(lambda request, number: Reply("1", seconds=0.02)) as server:
        judge = Judge(settings_of(server, concurrency=concurrency, **prices), tmp_path)
        with pytest.raises(ChatStopped, match=r"--judge-max-cost 0.02: 0.01 is spent, and the next request can cost"):
            ask(judge, *"abcdefghijkl")
        assert len(server.requests) == 5
        with pytest.raises(ChatStopped, match="--judge-max-cost"):
            ask(Judge(settings_of(server, **prices), tmp_path), *"abcdefghijkl")
        assert len(server.requests) == 5
        assert len(ask(Judge(settings_of(server, **{**prices, "max_cost": 1.0}), tmp_path), *"abcdefghijkl")) == 12
    assert len(server.requests) == 12


def test_answer_that_was_lost_costs_the_most_it_can_and_a_refused_one_nothing(tmp_path):
    # 34 bytes * 10 + 100 tokens * 100 = 10340 millionths: one such fits into 0.015, two do not.
    prices = {"max_cost": 0.015, "input_price": 10.0, "output_price": 100.0, "max_tokens": 100, "concurrency": 1}
    with (
        chat_server(lambda request, number: Reply(closes=True)) as server,
        pytest.raises(ChatStopped, match=r"0\.01034 is spent"),
    ):
        ask(Judge(settings_of(server, retries=0, **prices), tmp_path), "a", "b")
    with chat_server(lambda request, number: Reply(status=500, body="oops")) as server:
        verdicts = ask(Judge(settings_of(server, retries=0, **prices), tmp_path / "refused"), "a", "b")
    assert all("500" in verdict.error for verdict in verdicts.values())


def test_answer_without_a_count_of_tokens_costs_the_most_it_can(tmp_path):
    body = json.loads(completion("1"))
    del body["usage"]
    with chat_server(lambda request, number: Reply(body=json.dumps(body))) as server:
        ask(Judge(settings_of(server, max_tokens=77), tmp_path), "a")
    [line] = lines_of(tmp_path / "judge.jsonl")
    assert line["completion_tokens"] == 77
    assert line["prompt_tokens"] == len('[{"role": "user", "content": "a"}]')


def test_no_more_requests_at_a_time_than_allowed(tmp_path):
    with chat_server(lambda request, number: Reply("1", seconds=0.1)) as server:
        ask(Judge(settings_of(server, concurrency=3), tmp_path), *"abcdefghi")
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
        Judge(JudgeSettings("judge"), tmp_path)


def test_bootstrap_finds_the_standard_error_of_a_mean():
    values = [0.0, 1.0] * 50  # analytically 0.5 / sqrt(100)
    errors = bootstrap_errors(lambda drawn: {"mean": sum(drawn) / len(drawn)}, values, 1000)
    assert errors["mean"] == pytest.approx(0.05, rel=0.1)
    assert bootstrap_errors(lambda drawn: {"mean": 0.0}, [1.0], 1000) == {}
